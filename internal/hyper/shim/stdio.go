package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// drainTimeout is how long the last output of a process that has ended may take.
const drainTimeout = 10 * time.Second

// stdio are the FIFOs of a process on the node, which containerd made, or empty for those
// that it does not have.
type stdio struct {
	stdin, stdout, stderr string
	terminal              bool
}

// streams carry a process's input and output between the FIFOs of the node and those of
// the guest.
type streams struct {
	outputs sync.WaitGroup

	mu      sync.Mutex
	keep    io.Closer // a writer of the FIFO of standard input, until closeInput
	input   []io.Closer
	closers []io.Closer
	closed  bool
}

// opener opens a stream to the guest; channel.Host does.
type opener interface {
	Open(ctx context.Context, kind channel.Kind, argument string) (net.Conn, error)
}

// openStreams opens a process's streams: the guest's FIFOs are below guestapi.PipeDir, at
// dir, and there when it returns. It returns those FIFOs' paths in the guest, too.
func openStreams(ctx context.Context, guest opener, node stdio, dir string) (_ *streams, inside stdio, err error) {
	s := &streams{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	inside.terminal = node.terminal
	for _, out := range []struct {
		name, fifo string
		path       *string
	}{{"stdout", node.stdout, &inside.stdout}, {"stderr", node.stderr, &inside.stderr}} {
		if out.fifo == "" || (node.terminal && out.name == "stderr") {
			continue
		}
		pipe := path.Join(dir, out.name)
		if err := s.openOutput(ctx, guest, out.fifo, pipe); err != nil {
			return nil, inside, fmt.Errorf("%s: %w", out.name, err)
		}
		*out.path = path.Join(guestapi.PipeDir, pipe)
	}
	if node.stdin != "" {
		pipe := path.Join(dir, "stdin")
		if err := s.openInput(ctx, guest, node.stdin, pipe); err != nil {
			return nil, inside, fmt.Errorf("stdin: %w", err)
		}
		inside.stdin = path.Join(guestapi.PipeDir, pipe)
	}
	return s, inside, nil
}

func (s *streams) openOutput(ctx context.Context, guest opener, fifo, pipe string) error {
	// For reading as well: containerd may go and come again, and find the FIFO as it was.
	node, err := os.OpenFile(fifo, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	s.add(node)
	stream, err := guest.Open(ctx, channel.Pipe, pipe+":r")
	if err != nil {
		return err
	}
	s.add(stream)
	s.outputs.Go(func() {
		_, _ = io.Copy(node, onlyReader{stream})
		// containerd waits for this end; the guest, for the stream's.
		_ = node.Close()
		_ = stream.Close()
	})
	return nil
}

func (s *streams) openInput(ctx context.Context, guest opener, fifo, pipe string) error {
	node, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	s.add(node)
	// With a writer of our own, the input has no end before closeInput: containerd may go
	// and come again.
	keep, err := os.OpenFile(fifo, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	s.add(keep)
	s.keep = keep
	stream, err := guest.Open(ctx, channel.Pipe, pipe+":w")
	if err != nil {
		return err
	}
	s.add(stream)
	s.input = []io.Closer{stream, node}
	go func() {
		_, _ = io.Copy(onlyWriter{stream}, onlyReader{node})
		_ = stream.Close()
		_ = node.Close() // a writer that is left learns that nobody reads
	}()
	go func() {
		// The guest says nothing but its end: nobody reads there any more. The copy must not wait
		// for that with what it has, nor containerd for the copy.
		_, _ = stream.Read(make([]byte, 1))
		_ = stream.Close()
		_ = node.Close()
	}()
	return nil
}

// onlyReader and onlyWriter hide methods by which io.Copy would use splice, which the
// node's FIFOs do not always take.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

func (s *streams) add(c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return
	}
	s.closers = append(s.closers, c)
}

// closeInput ends the input once its other writers have closed it.
func (s *streams) closeInput() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keep != nil {
		_ = s.keep.Close()
		s.keep = nil
	}
}

// dropInput lets who writes the input of a process that has ended know that nobody reads
// it, once all output is out: until then a child may. The guest does not tell it:
// containerd's service there keeps a reader until the process is deleted, which containerd
// does when its own writer has ended.
func (s *streams) dropInput() {
	s.outputs.Wait()
	for _, c := range s.input {
		_ = c.Close()
	}
}

// drain waits until all output has been passed on, but not for long.
func (s *streams) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, drainTimeout, errors.New("the output has not come to its end"))
	defer cancel()
	done := make(chan struct{})
	go func() {
		s.outputs.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close ends all streams.
func (s *streams) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, c := range s.closers {
		_ = c.Close()
	}
	s.closers = nil
}
