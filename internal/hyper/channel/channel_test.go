package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

func pair(t *testing.T, handlers map[Kind]Handler) *Host {
	t.Helper()
	a, b := net.Pipe()
	host, err := NewHost(a)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error)
	go func() { served <- Serve(ctx, b, handlers) }()
	t.Cleanup(func() {
		cancel()
		host.Close()
		<-served
	})
	return host
}

func echo(string) (func(net.Conn), error) {
	return func(c net.Conn) {
		_, _ = io.Copy(c, c)
		c.Close()
	}, nil
}

// TestOpenEnded: when the channel ends while a stream is opened, the error says why it did.
func TestOpenEnded(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(guest net.Conn, host *Host)
		want string
	}{
		"QEMU ends": {func(guest net.Conn, _ *Host) { guest.Close() }, "the channel has ended: EOF"},
		"no frames": {func(guest net.Conn, _ *Host) { _, _ = guest.Write([]byte("no frame of yamux")) }, "what is no frame"},
		"the host":  {func(_ net.Conn, host *Host) { host.Close() }, "the channel has ended: "},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			host, err := NewHost(ours)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			go func() {
				// The stream has been asked for: its answer is awaited.
				_, _ = theirs.Read(make([]byte, headerSize))
				go func() { _, _ = io.Copy(io.Discard, theirs) }()
				tt.end(theirs, host)
			}()
			_, err = host.Open(t.Context(), Task, "")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestOpen(t *testing.T) {
	host := pair(t, map[Kind]Handler{
		Task: echo,
		Pipe: func(argument string) (func(net.Conn), error) {
			if argument == "" {
				return nil, errors.New("which?")
			}
			return func(c net.Conn) {
				fmt.Fprint(c, argument)
				c.Close()
			}, nil
		},
	})
	for name, tt := range map[string]struct {
		kind     Kind
		argument string
		refused  string
		want     string
	}{
		"an argument":     {Pipe, "some/fifo", "", "some/fifo"},
		"a refusal":       {Pipe, "", "which?", ""},
		"an unknown kind": {Dial, "80", `no streams of kind 'D'`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := host.Open(t.Context(), tt.kind, tt.argument)
			var refused *RefusedError
			if errors.As(err, &refused) {
				if refused.Reason != tt.refused {
					t.Errorf("refused: %q, want %q", refused.Reason, tt.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got, err := io.ReadAll(c)
			if err != nil || string(got) != tt.want || tt.refused != "" {
				t.Errorf("got %q, %v; want %q, refusal %q", got, err, tt.want, tt.refused)
			}
		})
	}
	t.Run("much data at once", func(t *testing.T) {
		data := make([]byte, 4<<20)
		_, _ = rand.Read(data)
		errs := make(chan error)
		for range 8 {
			go func() { errs <- roundTrip(t.Context(), host, data) }()
		}
		for range 8 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
	})
}

func roundTrip(ctx context.Context, host *Host, data []byte) error {
	c, err := host.Open(ctx, Task, "")
	if err != nil {
		return err
	}
	defer c.Close()
	go func() { _, _ = c.Write(data) }()
	got := make([]byte, len(data))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, data) {
		return errors.New("other bytes came back")
	}
	return nil
}

// What a guest may do wrong, and that the host does not wait for it.
func TestHostileGuest(t *testing.T) {
	for name, guest := range map[string]func(net.Conn){
		"garbage":                            func(c net.Conn) { _, _ = io.Copy(c, rand.Reader) },
		"hangs up":                           func(c net.Conn) { c.Close() },
		"opens a stream":                     func(c net.Conn) { opens(c) },
		"pings":                              func(c net.Conn) { send(c, frame(2, 1, 0, 7)) },
		"an empty frame that opens a stream": func(c net.Conn) { send(c, frame(1, 1, 2, 0)) },
		"more than a window":                 func(c net.Conn) { send(c, frame(0, 0, 1, windowSize+1)) },
		"no such type":                       func(c net.Conn) { send(c, frame(4, 0, 1, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			host, err := NewHost(a)
			if err != nil {
				t.Fatal(err)
			}
			defer host.Close()
			go guest(b)
			defer b.Close()
			select {
			case <-host.Done():
			case <-time.After(time.Minute):
				t.Error("the session goes on")
			}
			if _, err := host.Open(t.Context(), Task, ""); err == nil {
				t.Error("opened a stream")
			}
		})
	}
	t.Run("never answers", func(t *testing.T) {
		a, b := net.Pipe()
		host, err := NewHost(a)
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		go func() { _, _ = io.Copy(io.Discard, b) }()
		defer b.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := host.Open(ctx, Task, ""); err == nil {
			t.Error("opened a stream")
		}
	})
}

// opens is a guest that follows yamux, but not the rule that the host opens streams.
func opens(c net.Conn) {
	session, err := yamux.Server(c, config())
	if err != nil {
		return
	}
	if stream, err := session.OpenStream(); err == nil {
		_, _ = stream.Write([]byte("hello"))
	}
	<-session.CloseChan()
}

// frame is a header of yamux.
func frame(kind byte, flags uint16, stream, length uint32) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, stream), length)
}

// send sends, and takes what comes.
func send(c net.Conn, b []byte) {
	go func() { _, _ = io.Copy(io.Discard, c) }()
	_, _ = c.Write(b)
}

// Frames that are cut anywhere are the same frames.
func TestGuardSeesFramesInPieces(t *testing.T) {
	good := slices.Concat(frame(2, 2, 0, 1), frame(0, 0, 1, 3), []byte{0, 2, 0}, frame(1, 4, 1, 9))
	bad := frame(2, 1, 0, 7)
	for size := 1; size <= len(good); size++ {
		g := &guard{}
		for piece := range slices.Chunk(good, size) {
			if err := g.look(piece); err != nil {
				t.Fatalf("in pieces of %d: %v", size, err)
			}
		}
		var err error
		for piece := range slices.Chunk(bad, size) {
			err = errors.Join(err, g.look(piece))
		}
		if err == nil {
			t.Errorf("in pieces of %d: it takes a ping", size)
		}
	}
}

// FuzzHost is a guest that answers the opening of a stream with anything.
func FuzzHost(f *testing.F) {
	f.Add(slices.Concat(frame(0, 2, 1, 3), []byte{0, 0, 0}, frame(0, 0, 1, 2), []byte("hi")))
	f.Add(slices.Concat(frame(0, 2, 1, 7), []byte{1, 0, 4}, []byte("busy"), frame(1, 8, 1, 0)))
	f.Add(slices.Concat(frame(1, 2, 1, 1<<31), frame(1, 2, 1, 1<<31), frame(3, 0, 0, 2)))
	f.Add(frame(2, 1, 0, 7))
	f.Add(frame(0, 0, 9, windowSize))
	f.Fuzz(func(t *testing.T, answer []byte) {
		a, b := net.Pipe()
		host, err := NewHost(a)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			send(b, answer)
			b.Close()
		}()
		if stream, err := host.Open(t.Context(), Task, ""); err == nil {
			got, _ := io.ReadAll(stream)
			if len(got) > len(answer) {
				t.Errorf("%d bytes of %d", len(got), len(answer))
			}
			stream.Close()
		}
		host.Close()
		b.Close()
	})
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{'T', 0, 1, 'x'})
	f.Fuzz(func(t *testing.T, data []byte) {
		head, text, err := readFrame(bytes.NewReader(data))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := writeFrame(&out, head, text); err != nil || !bytes.HasPrefix(data, out.Bytes()) {
			t.Errorf("%q became %q", data, out.Bytes())
		}
	})
}
