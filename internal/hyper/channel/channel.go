// Package channel carries everything that a virtual machine's host side and its
// guest say to each other over one byte stream: a virtio-serial port, or a vsock
// where the host has it.
//
// The stream is cut into many by yamux. Only the host opens streams: each begins
// with what it is for, and the guest answers before the first byte of payload. The
// guest is not trusted. What it can make the host keep is bounded by a window for
// each stream that the host opened. A guest that opens a stream, or pings, ends the
// session, as does one that answers no ping.
package channel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// Kind says what a stream is for.
type Kind byte

const (
	// Task streams speak ttrpc, containerd's Task service.
	Task Kind = 'T'
	// Control streams speak HTTP, the service of package guestapi.
	Control Kind = 'C'
	// Pipe streams carry one end of a FIFO of the guest, which the argument names.
	Pipe Kind = 'P'
	// Dial streams carry a TCP connection to a port of the guest's loopback, which
	// the argument gives in decimal.
	Dial Kind = 'D'
)

const (
	maxArgument = 1 << 10
	windowSize  = 256 << 10 // yamux's minimum
	pingEvery   = 5 * time.Second
	// openTimeout also bounds how long a ping may take. A guest without a request of CPU gets
	// next to none while other pods of its node want all: it is late, and does not hang.
	openTimeout = 40 * time.Second
)

func config() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 64
	c.MaxStreamWindowSize = windowSize
	c.KeepAliveInterval = pingEvery
	c.ConnectionWriteTimeout = openTimeout
	c.StreamOpenTimeout = openTimeout
	c.LogOutput = io.Discard
	return c
}

// Host is the host's end.
type Host struct {
	session *yamux.Session
	guard   *guard
}

// NewHost takes over rw, which Close closes. The guest has opened its end: from here on
// it must answer.
func NewHost(rw io.ReadWriteCloser) (*Host, error) {
	g := &guard{ReadWriteCloser: rw}
	session, err := yamux.Client(g, config())
	if err != nil {
		return nil, fmt.Errorf("channel to the guest: %w", err)
	}
	return &Host{session, g}, nil
}

// Open opens a stream. It returns the guest's refusal as a *RefusedError. The
// deadline of ctx holds for the opening alone.
func (h *Host) Open(ctx context.Context, kind Kind, argument string) (net.Conn, error) {
	if len(argument) > maxArgument {
		return nil, fmt.Errorf("open a stream to the guest: argument of %d bytes", len(argument))
	}
	stream, err := h.session.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open a stream to the guest: %w", h.explain(err))
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(openTimeout)
	}
	err = func() error {
		if err := stream.SetDeadline(deadline); err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		if err := writeFrame(stream, byte(kind), argument); err != nil {
			return err
		}
		status, message, err := readFrame(stream)
		if err != nil {
			return err
		}
		if status != 0 {
			return &RefusedError{message}
		}
		if !stop() {
			return context.Cause(ctx)
		}
		return stream.SetDeadline(time.Time{})
	}()
	if err != nil {
		stream.Close()
		return nil, fmt.Errorf("open a stream to the guest: %w", h.explain(err))
	}
	return stream, nil
}

// errUnanswered is why a session ends to whose end nobody has said anything.
var errUnanswered = errors.New("no ping was answered in time, or the host has closed the channel")

// explain adds to the error of a stream why the session has ended, if it has: the stream
// itself says no more than EOF.
func (h *Host) explain(err error) error {
	if !h.session.IsClosed() {
		return err
	}
	_ = h.session.Close() // it waits for what the last read has found
	why := errUnanswered
	if end := h.guard.end.Load(); end != nil {
		why = *end
	}
	return fmt.Errorf("%w: the channel has ended: %w", err, why)
}

// Done is closed when nothing can be said to the guest any more.
func (h *Host) Done() <-chan struct{} { return h.session.CloseChan() }

// Close ends all streams.
func (h *Host) Close() error { return h.session.Close() }

// RefusedError is why the guest does not serve a stream.
type RefusedError struct{ Reason string }

// Error implements error.
func (e *RefusedError) Error() string { return "the guest refuses: " + e.Reason }

// Handler opens what a stream is for; its error is the host's to read. The function
// that it returns then serves the stream, and closes it.
type Handler func(argument string) (serve func(net.Conn), err error)

// Serve is the guest's end. It returns when rw ends, or with ctx.
func Serve(ctx context.Context, rw io.ReadWriteCloser, handlers map[Kind]Handler) error {
	c := config()
	c.EnableKeepAlive = false // a machine that is paused must not give up its host
	session, err := yamux.Server(rw, c)
	if err != nil {
		return fmt.Errorf("channel to the host: %w", err)
	}
	defer session.Close()
	defer context.AfterFunc(ctx, func() { session.Close() })()
	for {
		stream, err := session.AcceptStream()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("channel to the host: %w", err)
		}
		go serveStream(stream, handlers)
	}
}

func serveStream(stream net.Conn, handlers map[Kind]Handler) {
	serve, err := func() (func(net.Conn), error) {
		kind, argument, err := readFrame(stream)
		if err != nil {
			return nil, err
		}
		handler := handlers[Kind(kind)]
		if handler == nil {
			return nil, fmt.Errorf("no streams of kind %q", kind)
		}
		return handler(argument)
	}()
	if err != nil {
		message := err.Error()
		_ = writeFrame(stream, 1, message[:min(len(message), maxArgument)])
		stream.Close()
		return
	}
	if err := writeFrame(stream, 0, ""); err != nil {
		stream.Close()
		return
	}
	serve(stream)
}

// A frame is a byte, and a text with its length in two bytes, big endian.
func writeFrame(w io.Writer, head byte, text string) error {
	frame := binary.BigEndian.AppendUint16([]byte{head}, uint16(len(text)))
	_, err := w.Write(append(frame, text...))
	return err
}

func readFrame(r io.Reader) (head byte, text string, err error) {
	var fixed [3]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return 0, "", err
	}
	n := binary.BigEndian.Uint16(fixed[1:])
	if n > maxArgument {
		return 0, "", fmt.Errorf("a text of %d bytes: %d are allowed", n, maxArgument)
	}
	body := make([]byte, n)
	_, err = io.ReadFull(r, body)
	return fixed[0], string(body), err
}
