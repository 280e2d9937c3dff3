// Package probe is what the cluster tests play attackers and clients with. Its
// program (./main) runs inside pods, and in network namespaces of the cluster's
// nodes: a batch of dials or DNS queries at once, raw packets, a capture.
//
//	probe dial            stdin: []Target           stdout: []Outcome
//	probe dns             stdin: []Query            stdout: []Answer
//	probe send            stdin: []Packet           sends them in order
//	probe capture IF MARK END                       stdout: "ready", then one line per packet on IF that
//	                                                contains MARK, until one contains END
//	probe serve ADDRESS:PORT                        answers HTTP with "served", or with the client's
//	                                                address at /clientip, and UDP with "served", until
//	                                                it is killed
package probe

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

// Run is the program; see the package's documentation.
func Run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	verb := ""
	if len(args) > 0 {
		verb, args = args[0], args[1:]
	}
	switch {
	case verb == "dial" && len(args) == 0:
		return batch(in, out, func(t Target) Outcome { return t.dial(ctx) })
	case verb == "dns" && len(args) == 0:
		return batch(in, out, func(q Query) Answer { return q.ask(ctx) })
	case verb == "send" && len(args) == 0:
		var packets []Packet
		if err := json.NewDecoder(in).Decode(&packets); err != nil {
			return fmt.Errorf("read packets: %w", err)
		}
		return send(packets)
	case verb == "capture" && len(args) == 3:
		return capture(ctx, out, args[0], args[1], args[2])
	case verb == "serve" && len(args) == 1:
		datagrams, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp4", args[0])
		if err != nil {
			return err
		}
		defer datagrams.Close()
		go answer(datagrams)
		srv := &http.Server{Addr: args[0], ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				answer := "served"
				if r.URL.Path == "/clientip" {
					answer, _, _ = net.SplitHostPort(r.RemoteAddr)
				}
				fmt.Fprint(w, answer)
			})}
		context.AfterFunc(ctx, func() { srv.Close() })
		return srv.ListenAndServe()
	}
	return fmt.Errorf("usage: probe dial|dns|send, probe capture INTERFACE MARK END, probe serve ADDRESS:PORT")
}

// answer answers until the socket is closed.
func answer(c net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		if _, err := c.WriteTo([]byte("served"), from); err != nil {
			return
		}
	}
}

// batch does everything at once: what is unreachable costs one timeout, not one each.
func batch[In, Out any](r io.Reader, w io.Writer, do func(In) Out) error {
	var in []In
	if err := json.NewDecoder(r).Decode(&in); err != nil {
		return fmt.Errorf("read input: %w", err)
	}
	out := make([]Out, len(in))
	slots := make(chan struct{}, 64)
	done := make(chan struct{})
	for i := range in {
		go func() {
			slots <- struct{}{}
			out[i] = do(in[i])
			<-slots
			done <- struct{}{}
		}()
	}
	for range in {
		<-done
	}
	return json.NewEncoder(w).Encode(out)
}
