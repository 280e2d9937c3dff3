package portal

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestServices(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	a3 := n1.pod(acme, "a3", "10.0.0.18")
	a3.greet("0.0.0.0", 8080)
	vip := netip.MustParseAddr("10.96.1.1")
	spec := func(services ...Service) Spec {
		s := specs()[acme][0]
		s.Services = services
		return s
	}
	// heard asks n times, and returns who answered.
	heard := func(ask func() (string, error), n int) map[string]int {
		t.Helper()
		out := map[string]int{}
		for range n {
			got, err := ask()
			if err != nil {
				t.Errorf("no answer: %v", err)
				return out
			}
			out[got]++
		}
		return out
	}
	tcp := func() (string, error) { return w.a1.tcp("10.96.1.1:8000", patience) }
	udp := func() (string, error) { return w.a1.udp("10.96.1.1:8000", 3000, patience) }
	service := func(protocol string, eps ...string) Service {
		return Service{Name: "shop/web:http", ClusterIP: vip, Protocol: protocol, Port: 8000, Endpoints: endpoints(eps...)}
	}

	t.Run("endpoints on both nodes, ports of their own", func(t *testing.T) {
		n1.ensure(spec(service("TCP", "10.0.0.18:8080", "10.0.1.17:80"), service("UDP", "10.0.0.18:8080", "10.0.1.17:80")))
		for name, ask := range map[string]func() (string, error){"tcp": tcp, "udp": udp} {
			got := heard(ask, 40)
			if got["a3 10.0.0.17"] == 0 || got["a2 10.0.0.17"] == 0 || len(got) != 2 {
				t.Errorf("%s: %v, want both and no other", name, got)
			}
		}
	})
	t.Run("other ports are refused", func(t *testing.T) {
		for _, to := range []string{"10.96.1.1:8001", "10.96.9.9:8000"} {
			if _, err := w.a1.tcp(to, patience); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("tcp %s: %v, want refused", to, err)
			}
			if _, err := w.a1.udp(to, 1, patience); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("udp %s: %v, want refused", to, err)
			}
		}
	})
	t.Run("of another network do not exist", func(t *testing.T) {
		if _, err := w.b1.tcp("10.96.1.1:8000", patience); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%v, want refused", err)
		}
	})
	t.Run("hairpin", func(t *testing.T) {
		n1.ensure(spec(service("tcp", "10.0.0.17:80"), service("udp", "10.0.0.17:80")))
		for name, ask := range map[string]func() (string, error){"tcp": tcp, "udp": udp} {
			if got, err := ask(); got != "a1 169.254.1.1" {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
	})
	t.Run("no endpoints are refused", func(t *testing.T) {
		outside := service("tcp")
		outside.ClusterIP = netip.MustParseAddr("10.97.0.1") // not in the known Service ranges
		n1.ensure(spec(service("tcp"), service("udp"), outside))
		for _, to := range []string{"10.96.1.1:8000", "10.97.0.1:8000"} {
			if _, err := w.a1.tcp(to, patience); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("tcp: %v, want refused", err)
			}
		}
		if _, err := udp(); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("udp: %v, want refused", err)
		}
	})
	t.Run("endpoint changes", func(t *testing.T) {
		n1.ensure(spec(service("tcp", "10.0.0.18:80")))
		s, err := w.a1.dial("10.96.1.1:8000", patience)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		n1.ensure(spec(service("tcp", "10.0.1.17:80")))
		if got := heard(tcp, 10); got["a2 10.0.0.17"] != 10 {
			t.Errorf("new connections go to %v", got)
		}
		if err := s.echo("still there"); err != nil {
			t.Errorf("the old connection broke: %v", err)
		}
	})
	t.Run("a UDP flow follows its endpoint", func(t *testing.T) {
		for name, restart := range map[string]bool{"same manager": false, "new manager": true} {
			n1.ensure(spec(service("udp", "10.0.0.18:80")))
			var c net.Conn
			w.a1.must(w.a1.do(func() (err error) {
				c, err = net.Dial("udp4", "10.96.1.1:8000")
				return err
			}))
			defer c.Close()
			ask := func() string {
				c.SetDeadline(time.Now().Add(patience))
				c.Write(nil)
				buf := make([]byte, 100)
				n, err := c.Read(buf)
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				return string(buf[:n])
			}
			if got := ask(); got != "a3 10.0.0.17\n" {
				t.Errorf("%s: before: %q", name, got)
			}
			if restart {
				n1.restart()
				n1.must(n1.m.EnsureGuard(t.Context(), w.guard()))
			}
			n1.ensure(spec(service("udp", "10.0.1.17:80")))
			if got := ask(); got != "a2 10.0.0.17\n" {
				t.Errorf("%s: after: %q", name, got)
			}
		}
	})
	t.Run("affinity", func(t *testing.T) {
		sticky := service("tcp", "10.0.0.18:80", "10.0.1.17:80", "10.0.0.17:80")
		sticky.AffinityTimeout = time.Hour
		n1.ensure(spec(sticky))
		first, err := tcp()
		if err != nil {
			t.Fatal(err)
		}
		same := func(when string) {
			t.Helper()
			if got := heard(tcp, 20); got[first] != 20 {
				t.Errorf("%s: %v, want %q only", when, got, first)
			}
		}
		same("at once")
		// Another Service comes: memory stays.
		n1.ensure(spec(sticky, service("udp", "10.0.0.18:80")))
		same("after a change")
		n1.restart()
		n1.must(n1.m.EnsureGuard(t.Context(), w.guard()))
		n1.ensure(spec(sticky))
		same("after a restart")
		// Its endpoint goes: somebody else takes over, and stays.
		names := map[string]string{"a1 169.254.1.1": "10.0.0.17:80", "a2 10.0.0.17": "10.0.1.17:80", "a3 10.0.0.17": "10.0.0.18:80"}
		gone := netip.MustParseAddrPort(names[first])
		sticky.Endpoints = slices.DeleteFunc(sticky.Endpoints, func(a netip.AddrPort) bool { return a == gone })
		n1.ensure(spec(sticky))
		old := first
		if first, err = tcp(); err != nil || first == old {
			t.Errorf("after its endpoint went: %q, %v", first, err)
		}
		same("with the next one")
	})
	t.Run("to the API server", func(t *testing.T) {
		n1.greet("0.0.0.0", 6443)
		n1.ensure(spec(Service{ClusterIP: netip.MustParseAddr("10.96.0.1"), Protocol: "tcp", Port: 443, Endpoints: []netip.AddrPort{apiServer}}))
		if got, err := w.a1.tcp("10.96.0.1:443", patience); got != "node1 10.0.0.17" {
			t.Errorf("%q, %v", got, err)
		}
	})
}
