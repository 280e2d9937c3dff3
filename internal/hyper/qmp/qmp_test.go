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
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}`

// socketPair returns the two ends of a stream.
func socketPair(t testing.TB) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// command is what the client says.
type command struct {
	Execute   string
	Arguments map[string]any
	ID        uint64
}

// connect returns a client of a QEMU that greets, and to whose other commands answer
// returns lines.
func connect(t testing.TB, handler func(Event), answer func(command) []string) *Client {
	t.Helper()
	ours, theirs := socketPair(t)
	go func() {
		fmt.Fprint(theirs, greeting+"\r\n")
		lines := bufio.NewScanner(theirs)
		for lines.Scan() {
			var c command
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Errorf("%s: %v", lines.Bytes(), err)
			}
			reply := []string{fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID)}
			if c.Execute != "qmp_capabilities" {
				reply = answer(c)
			}
			for _, line := range reply {
				if _, err := fmt.Fprint(theirs, line+"\r\n"); err != nil {
					return
				}
			}
			if reply == nil {
				theirs.Close()
			}
		}
	}()
	c, err := New(deadline(t), ours, handler)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		<-c.Done()
	})
	return c
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func noEvents(Event) {}

func TestExecute(t *testing.T) {
	for name, test := range map[string]struct {
		answer  []string // with %d for the command's ID
		want    string   // the result's name
		err     string   // part of the error, or empty
		refused *Error
	}{
		"result": {answer: []string{`{"return": {"name": "a"}, "id": %d}`}, want: "a"},
		"refusal": {
			answer:  []string{`{"error": {"class": "DeviceNotFound", "desc": "no device"}, "id": %d}`},
			err:     "DeviceNotFound: no device",
			refused: &Error{"DeviceNotFound", "no device"},
		},
		"event first": {
			answer: []string{`{"event": "RESUME"}`, `{"return": {"name": "a"}, "id": %d}`}, want: "a",
		},
		"answers to nothing": {
			answer: []string{`{"return": {}}`, `{"return": {}, "id": 99}`, `{}`, `{"return": {"name": "a"}, "id": %d}`},
			want:   "a",
		},
		"two answers": {
			answer: []string{`{"return": {"name": "a"}, "id": %d}`, `{"return": {"name": "b"}, "id": %[1]d}`}, want: "a",
		},
		"other type":   {answer: []string{`{"return": [], "id": %d}`}, err: "cannot unmarshal"},
		"no JSON":      {answer: []string{`}`}, err: "no JSON"},
		"long message": {answer: []string{`{"x": "` + strings.Repeat("a", maxMessage) + `"}`}, err: bufio.ErrTooLong.Error()},
		"end":          {err: io.EOF.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			c := connect(t, noEvents, func(c command) (lines []string) {
				for _, line := range test.answer {
					if strings.Contains(line, "%") {
						line = fmt.Sprintf(line, c.ID)
					}
					lines = append(lines, line)
				}
				return lines
			})
			var result struct{ Name string }
			err := c.Execute(deadline(t), "query-name", map[string]any{"a": 1}, &result)
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			var refused *Error
			if errors.As(err, &refused); test.refused != nil && (refused == nil || *refused != *test.refused) {
				t.Errorf("refusal %v, want %v", refused, test.refused)
			}
			if result.Name != test.want {
				t.Errorf("result %q, want %q", result.Name, test.want)
			}
		})
	}
}

// Answers in another order find who asked.
func TestExecuteAtTheSameTime(t *testing.T) {
	const many = 20
	var held []string
	c := connect(t, noEvents, func(c command) []string {
		held = append(held, fmt.Sprintf(`{"return": %v, "id": %d}`, c.Arguments["n"], c.ID))
		if len(held) < many {
			return []string{}
		}
		for i := range many / 2 {
			held[i], held[many-1-i] = held[many-1-i], held[i]
		}
		return held
	})
	var all sync.WaitGroup
	for n := range many {
		all.Go(func() {
			got := -1
			if err := c.Execute(deadline(t), "echo", map[string]any{"n": n}, &got); err != nil || got != n {
				t.Errorf("%d, %v, want %d", got, err, n)
			}
		})
	}
	all.Wait()
}

func TestExecuteIsCutOff(t *testing.T) {
	c := connect(t, noEvents, func(c command) []string {
		if c.Execute == "hang" {
			return []string{}
		}
		return []string{fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID)}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "hang", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want %v", err, context.DeadlineExceeded)
	}
	if n := len(c.pending); n != 0 {
		t.Errorf("%d commands are still under way", n)
	}
	if err := c.Execute(deadline(t), "next", nil, nil); err != nil {
		t.Errorf("the next command: %v", err)
	}
	c.Close()
	<-c.Done()
	if err := c.Execute(deadline(t), "late", nil, nil); err == nil {
		t.Error("a client that has ended executes a command")
	}
	if c.Err() == nil {
		t.Error("a client that has ended has no reason for it")
	}
}

// Events come in their order, and all of them before the answer that follows them.
func TestEvents(t *testing.T) {
	const many = 1000
	var got []string
	c := connect(t, func(e Event) {
		var data struct{ N int }
		e.Decode(&data)
		got = append(got, fmt.Sprint(e.Name, data.N))
	}, func(c command) (lines []string) {
		for n := range many {
			lines = append(lines, fmt.Sprintf(`{"event": "E", "data": {"n": %d}, "timestamp": {}}`, n))
		}
		return append(lines, fmt.Sprintf(`{"return": {}, "id": %d}`, c.ID))
	})
	if err := c.Execute(deadline(t), "events", nil, nil); err != nil {
		t.Fatal(err)
	}
	if len(got) != many {
		t.Fatalf("%d events, want %d", len(got), many)
	}
	for n, e := range got {
		if want := fmt.Sprint("E", n); e != want {
			t.Fatalf("event %s, want %s", e, want)
		}
	}
}

func TestSendFile(t *testing.T) {
	ours, theirs := socketPair(t)
	received := make(chan string, 1)
	go func() {
		defer close(received)
		fmt.Fprint(theirs, greeting+"\r\n")
		for id := 1; ; id++ {
			line, rights := make([]byte, 1<<10), make([]byte, 64)
			_, n, _, _, err := theirs.ReadMsgUnix(line, rights)
			if err != nil {
				return
			}
			if messages, err := unix.ParseSocketControlMessage(rights[:n]); err == nil && len(messages) == 1 {
				if fds, err := unix.ParseUnixRights(&messages[0]); err == nil && len(fds) == 1 {
					f := os.NewFile(uintptr(fds[0]), "received")
					content, _ := io.ReadAll(f)
					f.Close()
					received <- string(content)
				}
			}
			fmt.Fprintf(theirs, `{"return": {}, "id": %d}`+"\r\n", id)
		}
	}()
	c, err := New(deadline(t), ours, noEvents)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fmt.Fprint(w, "content")
	w.Close()
	if err := c.SendFile(deadline(t), "state", r); err != nil {
		t.Fatal(err)
	}
	if got := <-received; got != "content" {
		t.Errorf("QEMU received %q", got)
	}
}

func TestNewFails(t *testing.T) {
	for name, test := range map[string]struct{ says, want string }{
		"silence":    {"", context.DeadlineExceeded.Error()},
		"no JSON":    {"hello\n", "greeting"},
		"no QMP":     {`{"event": "RESUME"}` + "\n", "no greeting"},
		"no line":    {strings.Repeat(" ", 2*maxMessage), bufio.ErrTooLong.Error()},
		"no answers": {greeting + "\n", context.DeadlineExceeded.Error()},
		"refusal":    {greeting + "\n" + `{"error": {"class": "GenericError", "desc": "no"}, "id": 1}` + "\n", "no"},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := socketPair(t)
			go func() {
				commands := bufio.NewScanner(theirs)
				for line := range strings.Lines(test.says) {
					_, _ = io.WriteString(theirs, line)
					commands.Scan()
				}
			}()
			ctx := deadline(t)
			if test.want == context.DeadlineExceeded.Error() {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
			}
			_, err := New(ctx, ours, noEvents)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if _, err := ours.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is not closed: %v", err)
			}
		})
	}
}

// FuzzClient reads what a QEMU might say that its guest has taken over.
func FuzzClient(f *testing.F) {
	f.Add([]byte(greeting + "\n" + `{"return": {}, "id": 1}` + "\n" + `{"return": {}, "id": 2}` + "\n"))
	f.Add([]byte(greeting + "\n" + `{"event": "SHUTDOWN", "data": {"reason": 1}}` + "\n"))
	f.Add([]byte(`{"QMP": null}`))
	f.Fuzz(func(t *testing.T, says []byte) {
		ours, theirs := net.Pipe()
		go func() {
			go func() { _, _ = io.Copy(io.Discard, theirs) }()
			_, _ = theirs.Write(says)
			theirs.Close()
		}()
		c, err := New(deadline(t), ours, func(e Event) {
			var data struct{ Reason string }
			e.Decode(&data)
		})
		if err != nil {
			return
		}
		defer c.Close()
		var result map[string]any
		_ = c.Execute(deadline(t), "query-status", nil, &result)
		c.Close()
		<-c.Done()
	})
}
