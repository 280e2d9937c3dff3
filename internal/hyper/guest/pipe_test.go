//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/fifo"
	"google.golang.org/protobuf/types/known/emptypb"

	"h8s.io/hypernetes/internal/hyper/channel"
)

// patience with a busy machine, where a deadline is not what is tested.
const patience = 5 * time.Minute

// connect makes a channel with the given handlers on its guest's end.
func connect(t *testing.T, handlers map[channel.Kind]channel.Handler) *channel.Host {
	t.Helper()
	ours, theirs := net.Pipe()
	var done sync.WaitGroup
	done.Go(func() {
		// It ends with the test's end.
		_ = channel.Serve(t.Context(), theirs, handlers)
	})
	host, err := channel.NewHost(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		host.Close()
		done.Wait()
	})
	return host
}

func openStream(t *testing.T, host *channel.Host, kind channel.Kind, argument string) net.Conn {
	t.Helper()
	stream, err := host.Open(t.Context(), kind, argument)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return stream
}

func randomBytes(n int) []byte {
	data := make([]byte, n)
	random := rand.NewChaCha8([32]byte{byte(n)})
	// It never fails.
	_, _ = random.Read(data)
	return data
}

// awaitGone waits until a file is no more.
func awaitGone(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is still there", path)
		}
	}
}

func TestPipeRead(t *testing.T) {
	for name, size := range map[string]int{"nothing": 0, "a little": 10, "much": 100 << 20} {
		t.Run(name, func(t *testing.T) {
			p := newPipes(t.TempDir())
			host := connect(t, map[channel.Kind]channel.Handler{channel.Pipe: p.handle})
			stream := openStream(t, host, channel.Pipe, "c/stdout:r")
			path := filepath.Join(p.dir, "c/stdout")
			data := randomBytes(size)
			go func() {
				// As fast as it can: nothing may be lost of a writer that is gone at once.
				if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
					_, _ = f.Write(data)
					f.Close()
				}
			}()
			got, err := io.ReadAll(stream)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, data) {
				t.Errorf("%d bytes came, and not the %d that were sent", len(got), len(data))
			}
			awaitGone(t, path)
		})
	}
}

// TestPipeReadGivenUp: the container does not block when the host stops to read.
func TestPipeReadGivenUp(t *testing.T) {
	p := newPipes(t.TempDir())
	host := connect(t, map[channel.Kind]channel.Handler{channel.Pipe: p.handle})
	stream := openStream(t, host, channel.Pipe, "stdout:r")
	path := filepath.Join(p.dir, "stdout")
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	stream.Close()
	if _, err := f.Write(make([]byte, 4<<20)); err != nil {
		t.Errorf("write what nobody reads: %v", err)
	}
	f.Close()
	awaitGone(t, path)
}

func TestPipeWrite(t *testing.T) {
	for name, size := range map[string]int{"nothing": 0, "a little": 10, "much": 100 << 20} {
		t.Run(name, func(t *testing.T) {
			p := newPipes(t.TempDir())
			host := connect(t, map[channel.Kind]channel.Handler{channel.Pipe: p.handle})
			stream := openStream(t, host, channel.Pipe, "stdin:w")
			path := filepath.Join(p.dir, "stdin")
			data := randomBytes(size)
			go func() {
				_, _ = stream.Write(data)
				stream.Close()
			}()
			got, err := os.ReadFile(path) // to the end
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, data) {
				t.Errorf("%d bytes came, and not the %d that were sent", len(got), len(data))
			}
			awaitGone(t, path)
		})
	}
}

// TestPipeWriteUnread: the host learns that the reader is gone.
func TestPipeWriteUnread(t *testing.T) {
	p := newPipes(t.TempDir())
	host := connect(t, map[channel.Kind]channel.Handler{channel.Pipe: p.handle})
	stream := openStream(t, host, channel.Pipe, "stdin:w")
	path := filepath.Join(p.dir, "stdin")
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := stream.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v, want the end", err)
	}
	awaitGone(t, path)
}

// fakeTasks is containerd's Task service as far as it opens and closes the input of a process.
type fakeTasks struct {
	taskapi.TTRPCTaskService
	path    string
	stdin   io.Closer
	closeIO chan struct{}
}

func (f *fakeTasks) Exec(ctx context.Context, _ *taskapi.ExecProcessRequest) (_ *emptypb.Empty, err error) {
	f.stdin, err = fifo.OpenFifo(ctx, f.path, syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
	return &emptypb.Empty{}, err
}

func (f *fakeTasks) CloseIO(context.Context, *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	defer close(f.closeIO)
	return &emptypb.Empty{}, f.stdin.Close()
}

// TestInputEnds: a process reads its input to the end, also when the host has sent it, and
// closed it, before containerd's service opens the FIFO to read.
func TestInputEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		size  int
		early bool
	}{
		"nothing, closed early":                    {0, true},
		"nothing, closed late":                     {0, false},
		"a little, closed early":                   {10, true},
		"a little, closed late":                    {10, false},
		"more than a FIFO holds, and closed early": {200 << 10, true},
		"more than a FIFO holds, and closed late":  {200 << 10, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPipes(t.TempDir())
			path := filepath.Join(p.dir, "stdin")
			inner := &fakeTasks{path: path, closeIO: make(chan struct{})}
			service := &tasks{TTRPCTaskService: inner, pipes: p}
			host := connect(t, map[channel.Kind]channel.Handler{channel.Pipe: p.handle})
			stream := openStream(t, host, channel.Pipe, "stdin:w")
			if _, err := service.Exec(t.Context(), &taskapi.ExecProcessRequest{Stdin: path}); err != nil {
				t.Fatal(err)
			}
			got := make(chan []byte, 1)
			read := func() {
				// As containerd's service does: it waits for a writer.
				have, _ := os.ReadFile(path)
				got <- have
			}
			if !tt.early {
				go read()
			}
			data := randomBytes(tt.size)
			if _, err := stream.Write(data); err != nil { // less than a window
				t.Fatal(err)
			}
			stream.Close()
			if _, err := service.CloseIO(t.Context(), &taskapi.CloseIORequest{Stdin: true}); err != nil {
				t.Error(err)
			}
			if tt.early {
				go read()
			}
			select {
			case have := <-got:
				if !bytes.Equal(have, data) {
					t.Errorf("%d bytes came, and not the %d that were sent", len(have), len(data))
				}
			case <-time.After(patience):
				t.Fatal("the input has no end")
			}
			select {
			case <-inner.closeIO:
			case <-time.After(patience):
				t.Error("containerd's own writer stays")
			}
			awaitGone(t, path)
		})
	}
}

// TestOpenWriterGivesUp: no thread waits forever for a reader.
func TestOpenWriterGivesUp(t *testing.T) {
	p := newPipes(t.TempDir())
	if _, err := p.handle("stdin:w"); err != nil {
		t.Fatal(err)
	}
	if f, err := openWriter(filepath.Join(p.dir, "stdin"), time.Millisecond); err == nil {
		f.Close()
	}
}

func TestPipeRefused(t *testing.T) {
	p := newPipes(t.TempDir())
	for _, argument := range []string{"", "stdout", "stdout:x", "../stdout:r", "/stdout:r", ":r", ".:r", "a/../../b:w"} {
		if _, err := p.handle(argument); !errors.As(err, new(badRequestError)) {
			t.Errorf("%q: %v", argument, err)
		}
	}
}

func TestDial(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			listener, err := net.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			var done sync.WaitGroup
			done.Go(func() {
				for {
					c, err := listener.Accept()
					if err != nil {
						return
					}
					// All of it comes before any goes back.
					data, _ := io.ReadAll(c)
					_, _ = c.Write(data)
					c.Close()
				}
			})
			_, port, err := net.SplitHostPort(listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			host := connect(t, map[channel.Kind]channel.Handler{channel.Dial: dialLoopback})
			stream := openStream(t, host, channel.Dial, port)
			data := randomBytes(3 << 20)
			if _, err := stream.Write(data); err != nil {
				t.Fatal(err)
			}
			stream.Close() // our direction's end
			got, err := io.ReadAll(stream)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes came back of %d (%v)", len(got), len(data), err)
			}
			listener.Close()
			done.Wait()
			if _, err := host.Open(t.Context(), channel.Dial, port); !errors.As(err, new(*channel.RefusedError)) {
				t.Errorf("a port where nobody listens any more: %v", err)
			}
		})
	}
	for _, argument := range []string{"", "0", "-1", "65536", "http", "127.0.0.1:80"} {
		if _, err := dialLoopback(argument); !errors.As(err, new(badRequestError)) {
			t.Errorf("%q: %v", argument, err)
		}
	}
}
