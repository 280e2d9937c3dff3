package shim

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"

	"h8s.io/hypernetes/internal/hyper/channel"
)

func newTaskClient(conn net.Conn) *ttrpc.Client {
	return ttrpc.NewClient(&answers{Conn: conn}, ttrpc.WithUnaryClientInterceptor(shortRefusals))
}

// answers is a ttrpc connection to a guest that gets no more answers than it has asked
// questions, none larger than ttrpc takes, and every question off within callTimeout.
// Otherwise it ends. ttrpc writes a line to the node's log for each answer that nobody
// waits for, and waits for ever for a guest that reads nothing.
type answers struct {
	net.Conn

	mu       sync.Mutex
	out, in  messages
	asked    int
	answered int
}

// Write implements net.Conn.
func (a *answers) Write(b []byte) (int, error) {
	a.mu.Lock()
	asked, err := a.out.count(b)
	a.asked += asked
	a.mu.Unlock()
	if err == nil {
		err = a.SetWriteDeadline(time.Now().Add(callTimeout))
	}
	n := 0
	if err == nil {
		n, err = a.Conn.Write(b)
	}
	if err != nil {
		_ = a.Close() // half a message may be out
	}
	return n, err
}

// Read implements net.Conn.
func (a *answers) Read(b []byte) (int, error) {
	n, err := a.Conn.Read(b)
	a.mu.Lock()
	defer a.mu.Unlock()
	answered, wrong := a.in.count(b[:n])
	if a.answered += answered; wrong == nil && a.answered > a.asked {
		wrong = fmt.Errorf("the guest gives %d answers to %d questions", a.answered, a.asked)
	}
	if wrong != nil {
		return 0, wrong
	}
	return n, err
}

// messages counts ttrpc's messages as they pass by:
// https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md
type messages struct {
	frames channel.Frames
	header [10]byte
}

const largestMessage = 4 << 20

// count returns how many messages begin with what completes a header in b.
func (m *messages) count(b []byte) (n int, err error) {
	err = m.frames.Scan(b, m.header[:], func() (payload uint32, err error) {
		n++
		if payload = binary.BigEndian.Uint32(m.header[:4]); payload > largestMessage {
			err = fmt.Errorf("a message of %d bytes: %d are allowed", payload, largestMessage)
		}
		return payload, err
	})
	return n, err
}

// shortRefusals cuts what the guest says when it refuses: it goes into events and logs.
func shortRefusals(ctx context.Context, request *ttrpc.Request, response *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	err := invoke(ctx, request, response)
	if s := response.GetStatus(); s != nil {
		s.Message, s.Details = bounded(s.Message), nil
	}
	return err
}

// bounded is the beginning of what a guest says.
func bounded(text string) string {
	return strings.ToValidUTF8(text[:min(len(text), maxMessage)], "")
}
