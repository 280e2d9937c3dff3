package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// connectTo returns a guest that serves streams as it is told.
func connectTo(t *testing.T, serve map[channel.Kind]func(net.Conn)) *guest {
	t.Helper()
	ours, theirs := net.Pipe()
	host, err := channel.NewHost(ours)
	must(t, err)
	handlers := map[channel.Kind]channel.Handler{}
	for _, kind := range []channel.Kind{channel.Task, channel.Control} {
		handlers[kind] = func(string) (func(net.Conn), error) {
			return func(c net.Conn) {
				if f := serve[kind]; f != nil {
					f(c)
				}
			}, nil
		}
	}
	go func() { _ = channel.Serve(context.Background(), theirs, handlers) }()
	t.Cleanup(func() { _ = host.Close() })
	g, err := newGuest(t.Context(), host)
	must(t, err)
	t.Cleanup(g.close)
	return g
}

// says is a guest that hears one request and then says one thing after the other.
func says(texts ...string) func(net.Conn) {
	return func(c net.Conn) {
		defer c.Close()
		_, _ = c.Read(make([]byte, 64<<10))
		for _, text := range texts {
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
		_, _ = io.Copy(io.Discard, c)
	}
}

// hangsUp is a guest that hears one request and has no answer. Of one that does not wait for
// the request, the error depends on who is first.
func hangsUp(c net.Conn) {
	_, _ = c.Read(make([]byte, 64<<10))
	c.Close()
}

// timeFor is little only where it must run out.
func timeFor(want string) time.Duration {
	if want == "deadline exceeded" {
		return time.Second
	}
	return testTimeout
}

// endlessly is a guest that says something and then the same thing for ever.
func endlessly(first, again string) func(net.Conn) {
	return func(c net.Conn) {
		says(first)(&oneWay{c})
		for {
			if _, err := io.WriteString(c, again); err != nil {
				return
			}
		}
	}
}

// oneWay is a connection whose other side has said all.
type oneWay struct{ net.Conn }

func (o *oneWay) Close() error { return nil }
func (o *oneWay) Read(b []byte) (int, error) {
	if len(b) == 64<<10 {
		return o.Conn.Read(b)
	}
	return 0, io.EOF
}

// TestHostileControl: what a guest answers to HTTP is bounded in size and time.
func TestHostileControl(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
	for name, tt := range map[string]struct {
		guest func(net.Conn)
		want  string // of the error, or of the file
	}{
		"an endless file":         {endlessly(ok, "400\r\n"+strings.Repeat("x", 1024)+"\r\n"), "file"},
		"endless headers":         {endlessly("HTTP/1.1 200 OK\r\n", "X: "+strings.Repeat("x", 1000)+"\r\n"), "headers exceeded"},
		"endless interim answers": {endlessly("", "HTTP/1.1 103 Early Hints\r\nX: "+strings.Repeat("x", 1000)+"\r\n\r\n"), "headers exceeded"},
		"a redirection":           {says("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n"), "with 307"},
		"an endless refusal":      {endlessly("HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", "400\r\n"+strings.Repeat("x", 1024)+"\r\n"), "with 500: xxx"},
		"garbage":                 {says(strings.Repeat("\x00\xff", 1000) + "\r\n"), "malformed"},
		"nothing":                 {says(), "deadline exceeded"},
		"no end":                  {says(ok), "deadline exceeded"},
		"hanging up":              {hangsUp, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := connectTo(t, map[channel.Kind]func(net.Conn){channel.Control: tt.guest})
			ctx, cancel := context.WithTimeout(t.Context(), timeFor(tt.want))
			defer cancel()
			file, err := g.readFile(ctx, "/x")
			switch {
			case tt.want == "file":
				if err != nil || len(file) != guestapi.MaxFile {
					t.Errorf("%d bytes, %v", len(file), err)
				}
			case err == nil || !strings.Contains(err.Error(), tt.want):
				t.Errorf("%d bytes, %v, want %q", len(file), err, tt.want)
			case len(err.Error()) > maxMessage+200:
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		})
	}
}

// answer is a ttrpc message.
func answer(stream uint32, length int, r *ttrpc.Response) string {
	payload, _ := proto.Marshal(r)
	if length == 0 {
		length = len(payload)
	}
	header := binary.BigEndian.AppendUint32(nil, uint32(length))
	return string(append(append(binary.BigEndian.AppendUint32(header, stream), 2, 0), payload...))
}

func refusalOf(size int) *ttrpc.Response {
	return &ttrpc.Response{Status: &status.Status{Code: 2, Message: strings.Repeat("\xc3\xa4", size/2)}}
}

// TestHostileTasks: what a guest answers to the Task service's questions is as well.
func TestHostileTasks(t *testing.T) {
	// ttrpc's client says either why a connection has ended or only that it has.
	const ended = "closed|bytes: 4194304 are allowed|gives 2 answers to 1 question"
	for name, tt := range map[string]struct {
		guest func(net.Conn)
		want  string // a regular expression
	}{
		"a huge message":     {says(answer(1, math.MaxInt32, refusalOf(0))), ended},
		"a large refusal":    {says(answer(1, 0, refusalOf(3<<20))), "ääää"},
		"another's answer":   {says(answer(3, 0, refusalOf(0)), answer(1, 0, refusalOf(0))), ended},
		"garbage":            {says(strings.Repeat("\x00\xff", 4000)), ended},
		"nothing":            {says(), "deadline exceeded"},
		"hanging up":         {hangsUp, ended},
		"an endless message": {endlessly(answer(1, 4<<20+1, refusalOf(0)), "x"), ended},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := connectTo(t, map[channel.Kind]func(net.Conn){channel.Task: tt.guest})
			ctx, cancel := context.WithTimeout(t.Context(), timeFor(tt.want))
			defer cancel()
			_, err := g.tasks.Kill(ctx, &task.KillRequest{ID: "x"})
			if err == nil || !regexp.MustCompile(tt.want).MatchString(err.Error()) || len(err.Error()) > maxMessage+200 {
				t.Errorf("%.200v, want %q", err, tt.want)
			}
		})
	}
	t.Run("answers to nothing", func(t *testing.T) {
		g := connectTo(t, map[channel.Kind]func(net.Conn){channel.Task: endlessly("", answer(1, 0, refusalOf(0)))})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		// The first may be answered; the connection ends for the second.
		_, _ = g.tasks.Kill(ctx, &task.KillRequest{ID: "x"})
		if err := g.ttrpc.UserOnCloseWait(ctx); err != nil {
			t.Errorf("the connection goes on: %v", err)
		}
	})
	t.Run("reading nothing", func(t *testing.T) {
		g := connectTo(t, map[channel.Kind]func(net.Conn){channel.Task: func(net.Conn) {}})
		ended := make(chan error)
		go func() {
			// More than a window: the deadline of a call does not hold for its writing.
			large := &task.ExecProcessRequest{Spec: &anypb.Any{Value: make([]byte, 1<<20)}}
			_, err := g.tasks.Exec(context.Background(), large)
			ended <- err
		}()
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a guest that reads nothing has agreed")
			}
		case <-time.After(time.Minute):
			t.Error("the call does not end")
		}
	})
}

func TestCheckMetrics(t *testing.T) {
	good, err := proto.Marshal(&stats.Metrics{Memory: &stats.MemoryStat{Usage: 42}})
	must(t, err)
	for name, tt := range map[string]struct {
		in   *anypb.Any
		ok   bool
		size int
	}{
		"good":           {&anypb.Any{TypeUrl: metricsType, Value: good}, true, len(good)},
		"unknown fields": {&anypb.Any{TypeUrl: metricsType, Value: append(bytes.Clone(good), 0xfa, 0x3f, 1, 'x')}, true, len(good)},
		"garbage":        {&anypb.Any{TypeUrl: metricsType, Value: []byte{0xff, 0xff}}, false, 0},
		"another type":   {&anypb.Any{TypeUrl: "google.protobuf.Any", Value: good}, false, 0},
		"none":           {nil, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := checkMetrics(tt.in)
			if (err == nil) != tt.ok || len(got.GetValue()) != tt.size {
				t.Errorf("%d bytes, %v", len(got.GetValue()), err)
			}
		})
	}
}

// TestOOMIsToldOnce: and before the end of the container, however often the guest says it.
func TestOOMIsToldOnce(t *testing.T) {
	var published []string
	p := &pod{publish: func(topic string, _ any) { published = append(published, topic) }, containers: map[string]*container{}}
	p.containers["a"] = &container{id: "a", pod: p}
	for _, id := range []string{"a", "a", "of another pod", ""} {
		p.handle(guestapi.Event{OOM: id})
	}
	if strings.Join(published, " ") != "/tasks/oom" {
		t.Errorf("published: %v", published)
	}
}

// TestOOMBeforeExit: the guest's Wait answers before its events are read.
func TestOOMBeforeExit(t *testing.T) {
	exit, err := proto.Marshal(&task.WaitResponse{ExitStatus: 137})
	must(t, err)
	g := connectTo(t, map[channel.Kind]func(net.Conn){
		channel.Task: says(answer(1, 0, &ttrpc.Response{Payload: exit})),
		channel.Control: func(c net.Conn) {
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Query().Get("follow") != "false" {
					t.Errorf("asked for %s", r.URL)
				}
				_, _ = io.WriteString(w, `{"oom": "a"}`+"\n")
			})}
			_ = server.Serve(&oneConn{conn: c})
		},
	})
	var published []string
	p := &pod{guest: g, ctx: t.Context(), containers: map[string]*container{}}
	p.publish = func(topic string, _ any) { published = append(published, topic) }
	c := &container{id: "a", pod: p}
	c.init = newProcess(c, "", stdio{})
	p.containers["a"] = c
	c.await(c.init)
	if strings.Join(published, " ") != "/tasks/oom /tasks/exit" {
		t.Errorf("published: %v", published)
	}
}

type oneConn struct {
	conn net.Conn
}

func (l *oneConn) Accept() (net.Conn, error) {
	if l.conn == nil {
		return nil, errors.New("no more")
	}
	c := l.conn
	l.conn = nil
	return c, nil
}
func (*oneConn) Close() error   { return nil }
func (*oneConn) Addr() net.Addr { return &net.UnixAddr{} }

func FuzzEvents(f *testing.F) {
	f.Add([]byte(`{"oom": "a"}` + "\n" + `{"oom": "b"}` + "\n"))
	f.Add([]byte("{\n"))
	f.Add([]byte(strings.Repeat("x", maxMessage+1)))
	f.Add([]byte(`{"oom": 7}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var events, size int
		if err := readEvents(bytes.NewReader(text), func(e guestapi.Event) {
			events++
			size = max(size, len(e.OOM))
		}); err == nil {
			t.Error("it ended without an end")
		}
		if events > bytes.Count(text, []byte("\n"))+1 || size > maxMessage {
			t.Errorf("%d events, one of %d bytes, of %q", events, size, text)
		}
	})
}

// FuzzTasks is a guest that answers a question of the Task service with anything.
func FuzzTasks(f *testing.F) {
	metrics, _ := proto.Marshal(&stats.Metrics{Memory: &stats.MemoryStat{Usage: 42}})
	payload, _ := proto.Marshal(&task.StatsResponse{Stats: &anypb.Any{TypeUrl: metricsType, Value: metrics}})
	f.Add([]byte(answer(1, 0, &ttrpc.Response{Payload: payload})))
	f.Add([]byte(answer(1, 0, refusalOf(100))))
	f.Add([]byte(answer(3, 0, refusalOf(0))))
	f.Add([]byte(answer(1, 5<<20, refusalOf(0))))
	f.Fuzz(func(t *testing.T, text []byte) {
		ours, theirs := net.Pipe()
		client := newTaskClient(ours)
		defer client.Close()
		go func() {
			says(string(text))(&oneWay{theirs})
			theirs.Close()
		}()
		response, err := task.NewTTRPCTaskClient(client).Stats(t.Context(), &task.StatsRequest{ID: "x"})
		if err != nil {
			if len(err.Error()) > maxMessage+200 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if checked, err := checkMetrics(response.GetStats()); err == nil && len(checked.Value) > len(text) {
			t.Errorf("metrics of %d bytes", len(checked.Value))
		}
	})
}
