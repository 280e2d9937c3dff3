package shim

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/channel"
)

// TestInputUnread: containerd's write of what nobody reads any more ends with an error,
// however much of it is on its way. It waits for that before it ends an exec.
func TestInputUnread(t *testing.T) {
	for name, tt := range map[string]struct {
		read int64 // by the process, before it ends
		size int   // of what containerd writes
	}{
		"one byte after the end": {0, 1},
		"little was read":        {1, 4 << 20},
		"much was read":          {1 << 20, 4 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			host, err := channel.NewHost(ours)
			must(t, err)
			t.Cleanup(func() { _ = host.Close() })
			opened, ended := make(chan struct{}), make(chan struct{})
			go func() {
				_ = channel.Serve(context.Background(), theirs, map[channel.Kind]channel.Handler{
					channel.Pipe: func(string) (func(net.Conn), error) {
						return func(stream net.Conn) {
							<-opened // who opens the FIFO later finds no reader
							_, _ = io.CopyN(io.Discard, stream, tt.read)
							_ = stream.Close()
							close(ended)
						}, nil
					},
				})
			}()
			fifo := filepath.Join(t.TempDir(), "stdin")
			must(t, unix.Mkfifo(fifo, 0o600))
			streams, _, err := openStreams(t.Context(), host, stdio{stdin: fifo}, "c")
			must(t, err)
			t.Cleanup(streams.close)
			in, err := os.OpenFile(fifo, os.O_WRONLY|unix.O_NONBLOCK, 0)
			close(opened)
			must(t, err)
			defer in.Close()
			must(t, in.SetDeadline(time.Now().Add(testTimeout)))
			if tt.read == 0 {
				<-ended
			}
			// What fits into the FIFO is taken until the end is known.
			for err == nil {
				_, err = in.Write(make([]byte, tt.size))
			}
			if !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write: %v, want %v", err, syscall.EPIPE)
			}
		})
	}
}
