// Package qmp speaks the QEMU Machine Protocol, with which a QEMU process is
// commanded: https://www.qemu.org/docs/master/interop/qmp-spec.html
//
// QEMU is not trusted, as its guest may have taken it over: what it can make the
// client keep is one message of a limited size and one answer for each command that
// is under way.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxMessage is the longest message in bytes that is read. QEMU's longest ones that
// we ask for, lists of block nodes, have some kilobytes for each disk.
const maxMessage = 1 << 20

// writeTimeout is how long QEMU may leave a command unread. Commands fit into the
// socket's buffer, so that it is only reached by a QEMU that reads none at all.
const writeTimeout = 10 * time.Second

// Error is how QEMU refuses a command.
type Error struct {
	Class string `json:"class"` // such as GenericError, CommandNotFound, DeviceNotFound
	Desc  string `json:"desc"`
}

// Error implements error.
func (e *Error) Error() string {
	if e.Class == "GenericError" {
		return e.Desc
	}
	return e.Class + ": " + e.Desc
}

// Event is what QEMU reports without being asked.
type Event struct {
	Name string          // such as SHUTDOWN
	Data json.RawMessage // absent, or an object
}

// Decode stores the event's data in v, as far as it fits.
func (e Event) Decode(v any) {
	if e.Data != nil {
		_ = json.Unmarshal(e.Data, v)
	}
}

// Client commands one QEMU. Its methods may be called at the same time.
type Client struct {
	conn    net.Conn
	handler func(Event)
	done    chan struct{}

	writing sync.Mutex // held while a command is written

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan<- message
	err     error // why the client ended, once done is closed
}

type message struct {
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *Error          `json:"error"`
	Event  string          `json:"event"`
	Data   json.RawMessage `json:"data"`
	QMP    json.RawMessage `json:"QMP"`
}

// New takes over conn and negotiates with the QEMU at its other end. The handler is
// called with one event after the other, and with none after Done is closed; the
// answers to commands wait for it, so it may not block, nor call Execute. When New
// fails it has closed conn.
func New(ctx context.Context, conn net.Conn, handler func(Event)) (*Client, error) {
	c := &Client{
		conn:    conn,
		handler: handler,
		done:    make(chan struct{}),
		pending: map[uint64]chan<- message{},
	}
	lines := newScanner(conn)
	if err := c.greet(ctx, lines); err != nil {
		conn.Close()
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	go c.read(lines)
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func newScanner(r io.Reader) *bufio.Scanner {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 4<<10), maxMessage)
	return lines
}

func (c *Client) greet(ctx context.Context, lines *bufio.Scanner) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var greeting message
	if !lines.Scan() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return endOf(lines)
	}
	if err := json.Unmarshal(lines.Bytes(), &greeting); err != nil {
		return fmt.Errorf("its greeting: %w", err)
	}
	if greeting.QMP == nil {
		return errors.New("its first message is no greeting")
	}
	if !stop() {
		return context.Cause(ctx)
	}
	return nil
}

// endOf says why nothing more can be read.
func endOf(lines *bufio.Scanner) error {
	if err := lines.Err(); err != nil {
		return err
	}
	return io.EOF
}

func (c *Client) read(lines *bufio.Scanner) {
	err := func() error {
		for lines.Scan() {
			var m message
			if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
				return fmt.Errorf("what it sends is no JSON: %w", err)
			}
			c.dispatch(m)
		}
		return endOf(lines)
	}()
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = fmt.Errorf("QEMU's monitor ended: %w", err)
	close(c.done)
}

func (c *Client) dispatch(m message) {
	if m.Event != "" {
		c.handler(Event{m.Event, m.Data})
		return
	}
	if m.ID == nil {
		return
	}
	c.mu.Lock()
	answer := c.pending[*m.ID]
	delete(c.pending, *m.ID)
	c.mu.Unlock()
	if answer != nil {
		answer <- m // it has room for the only answer it ever gets
	}
}

// Execute runs a command and waits for its answer, which it stores in result unless
// that is nil. arguments become a JSON object, or none when nil. A refusal of QEMU
// is a *Error. When ctx ends first, the command may or may not be carried out.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	return c.ExecuteWithFile(ctx, command, arguments, nil, result)
}

// ExecuteWithFile is Execute for a command that takes a copy of a file, such as add-fd.
// The connection must be a Unix socket.
func (c *Client) ExecuteWithFile(ctx context.Context, command string, arguments any, f *os.File, result any) error {
	answer, err := c.execute(ctx, command, arguments, f)
	if err == nil && result != nil {
		err = json.Unmarshal(answer, result)
	}
	if err != nil {
		return fmt.Errorf("QEMU: %s: %w", command, err)
	}
	return nil
}

// SendFile gives QEMU a copy of a file, which commands such as migrate then know by
// this name. The connection must be a Unix socket.
func (c *Client) SendFile(ctx context.Context, name string, f *os.File) error {
	return c.ExecuteWithFile(ctx, "getfd", map[string]any{"fdname": name}, f, nil)
}

func (c *Client) execute(ctx context.Context, command string, arguments any, file *os.File) (json.RawMessage, error) {
	answer := make(chan message, 1)
	c.mu.Lock()
	c.last++
	id := c.last
	c.pending[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return nil, err
	}
	if err := c.write(append(line, '\n'), file); err != nil {
		return nil, err
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return nil, m.Error
		}
		return m.Return, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-c.done:
		return nil, c.Err()
	}
}

// write writes a whole line. When it cannot, half a line may be out and nothing more
// can be said: the client ends.
func (c *Client) write(line []byte, file *os.File) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	switch conn, ok := c.conn.(*net.UnixConn); {
	case err != nil:
	case file == nil:
		_, err = c.conn.Write(line)
	case !ok:
		return errors.New("files can only be sent over a Unix socket")
	default:
		_, _, err = conn.WriteMsgUnix(line, unix.UnixRights(int(file.Fd())), nil)
		runtime.KeepAlive(file)
	}
	if err != nil {
		c.conn.Close()
	}
	return err
}

// Done is closed when the connection has ended and the last event was handled.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is why the connection ended, or nil while it has not.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection, and commands under way; Done follows.
func (c *Client) Close() error { return c.conn.Close() }
