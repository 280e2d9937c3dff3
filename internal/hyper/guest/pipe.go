//go:build linux

package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// readerTimeout is how long a FIFO that the host writes may stay without a reader.
const readerTimeout = 2 * time.Minute

// pipes carries ends of the FIFOs below dir to the host.
type pipes struct {
	dir string

	mu     sync.Mutex
	inputs map[string]chan struct{} // by path, those that the host writes; closed when it does no more
}

func newPipes(dir string) *pipes { return &pipes{dir: dir, inputs: map[string]chan struct{}{}} }

// written returns a channel that is closed when all that the host writes into the FIFO is
// in it, or nobody reads it; nil if the host does not write this one.
func (p *pipes) written(path string) <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.inputs[path]
}

func (p *pipes) begin(path string) (end func()) {
	done := make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inputs[path] = done
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.inputs[path] == done {
			delete(p.inputs, path)
		}
		close(done)
	}
}

// handle is the channel.Handler of channel.Pipe. When it returns, the FIFO is there and,
// if the host reads it, open: nothing that is written from now on is lost.
func (p *pipes) handle(argument string) (func(net.Conn), error) {
	path, end, ok := cutLast(argument, ":")
	if !ok || !filepath.IsLocal(path) || path == "." {
		return nil, badRequest("pipe %q: it is a path below the pipes' directory and :r or :w", argument)
	}
	path = filepath.Join(p.dir, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("pipe %s: %w", argument, err)
	}
	switch end {
	case "r":
		fifo, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		return func(stream net.Conn) { readPipe(stream, fifo, path) }, nil
	case "w":
		end := p.begin(path)
		return func(stream net.Conn) {
			defer end()
			writePipe(stream, path)
		}, nil
	}
	return nil, badRequest("pipe %q: the host's end is r or w", argument)
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// readPipe carries what is written into the FIFO to the host, until its last writer
// has closed it, and removes it. If the host closes the stream before, the rest is thrown
// away: a container must not block because nobody reads its log.
func readPipe(stream net.Conn, fifo *os.File, path string) {
	defer os.Remove(path)
	defer stream.Close()
	defer fifo.Close()
	go func() {
		// The host sends nothing but its end.
		_, _ = io.Copy(io.Discard, stream)
		_ = stream.SetWriteDeadline(time.Unix(1, 0))
	}()
	if err := waitForWriter(fifo); err != nil {
		return
	}
	buffer := make([]byte, 32<<10)
	if _, err := io.CopyBuffer(stream, onlyReader{fifo}, buffer); err == nil {
		return
	}
	_, _ = io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{fifo}, buffer)
}

// onlyReader and onlyWriter hide methods that would make copies of another size.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// waitForWriter waits until there is something to read, or a writer came and went. A
// read before would see an end that is none yet.
func waitForWriter(fifo *os.File) error {
	raw, err := fifo.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0
	})
}

// writePipe carries what the host sends into the FIFO, and removes it. The host's end of
// the stream is the FIFO's, after all data; a reader that leaves ends the stream.
func writePipe(stream net.Conn, path string) {
	defer os.Remove(path)
	defer stream.Close()
	fifo, err := openWriter(path, readerTimeout)
	if err != nil {
		return
	}
	defer fifo.Close()
	_, _ = io.CopyBuffer(onlyWriter{fifo}, onlyReader{stream}, make([]byte, 32<<10))
}

// openWriter opens a FIFO for writing as soon as it has a reader.
func openWriter(path string, timeout time.Duration) (*os.File, error) {
	giveUp := time.AfterFunc(timeout, func() {
		// A reader that comes and goes lets the blocked opening return.
		if f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			f.Close()
		}
	})
	defer giveUp.Stop()
	return os.OpenFile(path, os.O_WRONLY, 0)
}
