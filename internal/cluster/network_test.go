package cluster

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestLinkNames(t *testing.T) {
	names := map[string]string{}
	for _, cluster := range []string{"default", "a", strings.Repeat("a", 20), strings.Repeat("a", 19) + "b", "aaaaaaaaaaa", "aaaaaaaaaaaa"} {
		for _, name := range []string{bridgeName(cluster), vethName(cluster, "n1"), vethName(cluster, "n50")} {
			if len(name) > 15 {
				t.Errorf("%s has %d bytes", name, len(name))
			}
			if other, ok := names[name]; ok {
				t.Errorf("%s is of both %s and %s", name, cluster, other)
			}
			names[name] = cluster
		}
	}
	if got := bridgeName("default"); got != "h8s-default" {
		t.Errorf("bridge of cluster default = %s", got)
	}
}

// inScratchNamespace runs f in a network namespace that ends with it.
func inScratchNamespace(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("unshare: %v", err)
			return
		}
		f(t)
	}()
	<-done
}

func TestBridgeAndNode(t *testing.T) {
	c := testConfig(t, 2)
	inScratchNamespace(t, func(t *testing.T) {
		var bridge netlink.Link
		for range 2 { // a supervisor that starts again finds its bridge
			var err error
			if bridge, err = ensureBridge(c); err != nil {
				t.Error(err)
				return
			}
		}
		// A stand-in for node init: a process in a network namespace of its own.
		sleep := exec.Command("sleep", "1000")
		sleep.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
		if err := sleep.Start(); err != nil {
			t.Error(err)
			return
		}
		defer func() {
			_ = sleep.Process.Kill()
			_ = sleep.Wait()
		}()
		for range 2 { // a node that boots again is plugged in again
			if err := plugNode(c, c.Nodes[0], bridge, sleep.Process.Pid); err != nil {
				t.Error(err)
				return
			}
		}
		checkNodeCard(t, c, sleep.Process.Pid)
		links, err := clusterLinks()
		if err != nil || len(links[c.Name]) != 2 {
			t.Errorf("links of the cluster = %v, %v, want a bridge and a veth", links[c.Name], err)
		}
		for range 2 { // removing nothing is no error
			if err := removeLinks(c.Name, c.Nodes); err != nil {
				t.Error(err)
			}
		}
		if links, err := clusterLinks(); err != nil || len(links) != 0 {
			t.Errorf("left over: %v, %v", links, err)
		}
	})
}

func checkNodeCard(t *testing.T, c *Config, pid int) {
	t.Helper()
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		t.Error(err)
		return
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Error(err)
		return
	}
	defer handle.Close()
	link, err := handle.LinkByName(nodeLink)
	if err != nil {
		t.Error(err)
		return
	}
	if got, want := link.Attrs().HardwareAddr.String(), hardwareAddr(c.Nodes[0].Address).String(); got != want {
		t.Errorf("address of the node's card = %s, want %s", got, want)
	}
}

func TestMasqueradeRulesAreAccepted(t *testing.T) {
	c := testConfig(t, 1)
	inScratchNamespace(t, func(t *testing.T) {
		for range 2 { // a node init that starts again replaces them
			nft := exec.Command("nft", "-f", "-")
			nft.Stdin = strings.NewReader(masqueradeRules(c.Nodes[0]))
			if out, err := nft.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		}
	})
}

func TestDropsForwarded(t *testing.T) {
	tests := map[string]struct {
		rules string
		want  bool
	}{
		"nothing":          {"", false},
		"accepts":          {"type filter hook forward priority filter; policy accept;", false},
		"drops":            {"type filter hook forward priority filter; policy drop;", true},
		"drops only input": {"type filter hook input priority filter; policy drop;", false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := dropsForwarded(test.rules); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}

// listenBoth listens on a port that is free for both protocols: a connection of somebody
// else's may have its number.
func listenBoth(t *testing.T) (net.PacketConn, net.Listener) {
	t.Helper()
	for {
		packets, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listener, err := net.Listen("tcp", packets.LocalAddr().String())
		if err == nil {
			return packets, listener
		}
		packets.Close()
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// resolver is an upstream name server on loopback.
func resolver(t *testing.T, answer string) string {
	t.Helper()
	packets, listener := listenBoth(t)
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		reply := new(dns.Msg)
		reply.SetReply(query)
		rr, err := dns.NewRR(query.Question[0].Name + " 5 IN A " + answer)
		if err != nil {
			t.Error(err)
		}
		reply.Answer = append(reply.Answer, rr)
		_ = w.WriteMsg(reply)
	})
	for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
		go func() { _ = s.ActivateAndServe() }()
	}
	t.Cleanup(func() { packets.Close(); listener.Close() })
	return packets.LocalAddr().String()
}

func TestForwarder(t *testing.T) {
	// A port where nobody listens: it was free a moment ago.
	closed, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead := closed.LocalAddr().String()
	closed.Close()
	tests := map[string]struct {
		resolvers []string
		want      int
	}{
		"the first answers":  {[]string{resolver(t, "192.0.2.7")}, dns.RcodeSuccess},
		"the second answers": {[]string{dead, resolver(t, "192.0.2.7")}, dns.RcodeSuccess},
		"nobody answers":     {[]string{dead}, dns.RcodeServerFailure},
	}
	for name, test := range tests {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(name+" "+network, func(t *testing.T) {
				f := &forwarder{resolvers: test.resolvers, log: slog.New(slog.DiscardHandler)}
				query := new(dns.Msg)
				query.SetQuestion("www.example.", dns.TypeA)
				w := &recorder{network: network}
				f.ServeDNS(w, query)
				if w.answer == nil || w.answer.Rcode != test.want || w.answer.Id != query.Id {
					t.Fatalf("answer = %v, want rcode %d", w.answer, test.want)
				}
				if test.want == dns.RcodeSuccess && w.answer.Answer[0].(*dns.A).A.String() != "192.0.2.7" {
					t.Errorf("answer = %v", w.answer)
				}
			})
		}
	}
}

// recorder is a dns.ResponseWriter that keeps the answer.
type recorder struct {
	dns.ResponseWriter
	network string
	answer  *dns.Msg
}

func (r *recorder) WriteMsg(m *dns.Msg) error { r.answer = m; return nil }
func (r *recorder) Close() error              { return nil }

func (r *recorder) LocalAddr() net.Addr {
	if r.network == "tcp" {
		return &net.TCPAddr{}
	}
	return &net.UDPAddr{}
}

func TestForwarderServes(t *testing.T) {
	f := &forwarder{resolvers: []string{resolver(t, "192.0.2.9")}, log: slog.New(slog.DiscardHandler)}
	packets, listener := listenBoth(t)
	address := netip.MustParseAddrPort(listener.Addr().String())
	packets.Close()
	listener.Close()
	ctx := testContext(t)
	served := make(chan error, 1)
	go func() { served <- f.serve(ctx, address) }()
	for _, network := range []string{"udp", "tcp"} {
		err := poll(ctx, 1e6, func() error {
			query := new(dns.Msg)
			query.SetQuestion("www.example.", dns.TypeA)
			answer, _, err := (&dns.Client{Net: network}).Exchange(query, address.String())
			if err == nil && len(answer.Answer) != 1 {
				err = errors.New(answer.String())
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", network, err)
		}
	}
	select {
	case err := <-served:
		t.Errorf("serving ended: %v", err)
	default:
	}
}
