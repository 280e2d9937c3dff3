package portal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const acme, globex = 101, 102

// specs are two Networks with one CIDR; each one's Block of one node is the other one's of the other node.
func specs() map[int32][2]Spec {
	lo, hi := netip.MustParsePrefix("10.0.0.16/28"), netip.MustParsePrefix("10.0.1.16/28")
	n1, n2 := netip.MustParseAddr("172.31.0.1"), netip.MustParseAddr("172.31.0.2")
	spec := func(id int32, here, there netip.Prefix, other netip.Addr) Spec {
		return Spec{
			ID: id, CIDR: networkCIDR, Blocks: []netip.Prefix{here}, Remote: []RemoteBlock{{there, other}},
			ServiceCIDRs: []netip.Prefix{serviceCIDR},
			Egress:       Egress{Internet: true, APIServer: true, APIServers: []netip.AddrPort{apiServer}},
		}
	}
	return map[int32][2]Spec{
		acme:   {spec(acme, lo, hi, n2), spec(acme, hi, lo, n1)},
		globex: {spec(globex, hi, lo, n2), spec(globex, lo, hi, n1)},
	}
}

// tenants is the lab with both Networks on both nodes and a pod of each.
type tenants struct {
	*lab
	a1, a2, b1, b2 *pod // letter: Network, digit: node
}

func newTenants(t *testing.T) *tenants {
	t.Helper()
	w := &tenants{lab: newLab(t)}
	for _, s := range specs() {
		for i, n := range w.nodes {
			n.ensure(s[i])
		}
	}
	w.a1 = w.nodes[0].pod(acme, "a1", "10.0.0.17")
	w.a2 = w.nodes[1].pod(acme, "a2", "10.0.1.17")
	w.b1 = w.nodes[0].pod(globex, "b1", "10.0.1.17")
	w.b2 = w.nodes[1].pod(globex, "b2", "10.0.0.17")
	return w
}

func TestEqualAddresses(t *testing.T) {
	w := newTenants(t)
	a3 := w.nodes[0].pod(acme, "a3", "10.0.0.18")
	mtu := w.a1.res.MTU
	if mtu != 1450 {
		t.Fatalf("MTU %d, want that of the underlay less 50", mtu)
	}
	for name, tc := range map[string]struct {
		from *pod
		to   *pod
	}{
		"acme on one node":           {w.a1, a3},
		"acme across":                {w.a1, w.a2},
		"acme back":                  {w.a2, w.a1},
		"globex across":              {w.b1, w.b2},
		"globex back":                {w.b2, w.b1},
		"acme across, another of it": {w.a2, a3},
	} {
		t.Run(name, func(t *testing.T) {
			want := tc.to.name + " " + tc.from.ip
			if got, err := tc.from.tcp(tc.to.ip+":80", patience); got != want {
				t.Errorf("tcp: %q, %v; want %q", got, err, want)
			}
			// The answer is longer than the question: more than one packet in every case but the first.
			for _, size := range []int{1, mtu - 28 - len(want) - 1, mtu - 28, 2 * mtu, 20000} {
				if got, err := tc.from.udp(tc.to.ip+":80", size, patience); got != want {
					t.Errorf("udp with %d bytes: %q, %v; want %q", size, got, err, want)
				}
			}
			for _, size := range []int{0, mtu - 28 - 1, mtu - 28} {
				if err := tc.from.ping(tc.to.ip, size, patience); err != nil {
					t.Errorf("ping with %d bytes: %v", size, err)
				}
			}
			if err := tc.from.ping(tc.to.ip, mtu-28+1, despair); !errors.Is(err, unix.EMSGSIZE) {
				t.Errorf("ping with one byte too many: %v, want EMSGSIZE", err)
			}
			s, err := tc.from.dial(tc.to.ip+":80", patience)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.echo(strings.Repeat("x", 1<<20)); err != nil {
				t.Errorf("a megabyte there and back: %v", err)
			}
		})
	}
}

func TestProbes(t *testing.T) {
	w := newTenants(t)
	for name, tc := range map[string]struct {
		node *node
		to   *pod
	}{
		"acme on node 1": {w.nodes[0], w.a1}, "globex on node 1": {w.nodes[0], w.b1},
		"acme on node 2": {w.nodes[1], w.a2}, "globex on node 2": {w.nodes[1], w.b2},
	} {
		t.Run(name, func(t *testing.T) {
			want := tc.to.name + " 169.254.77.1"
			if got, err := tc.node.tcp(tc.to.ip+":80", patience); got != want {
				t.Errorf("tcp: %q, %v; want %q", got, err, want)
			}
			if got, err := tc.node.udp(tc.to.ip+":80", 4000, patience); got != want {
				t.Errorf("udp: %q, %v; want %q", got, err, want)
			}
			if err := tc.node.ping(tc.to.ip, 100, patience); err != nil {
				t.Errorf("ping: %v", err)
			}
		})
	}
}

func TestIsolation(t *testing.T) {
	w := newTenants(t)
	n1, n2 := w.nodes[0], w.nodes[1]
	def := n1.defaultPod("10.244.0.2")
	n1.greet("0.0.0.0", 10250)
	n2.greet("0.0.0.0", 10250)
	n1.greet("0.0.0.0", 6443)
	lo, err := n1.h.LinkByName("lo")
	n1.must(err)
	n1.addr(lo, "192.0.2.1/32")
	// kube-proxy, in as far as it matters: a load balancer's address, and a Service address.
	if _, err := run(n1.ns, "nft", `table ip proxy {
		chain prerouting { type nat hook prerouting priority dstnat;
			ip daddr 198.51.100.1 tcp dport 80 dnat to 10.244.0.2:80
			ip daddr 198.51.100.2 tcp dport 80 dnat to 172.31.0.1:10250
			ip daddr 198.51.100.3 tcp dport 80 dnat to 10.0.0.17:80
			ip daddr 198.51.100.4 tcp dport 80 dnat to 172.31.0.254:80
			ip daddr 10.96.5.5 tcp dport 80 dnat to 10.244.0.2:80
		}
	}`); err != nil {
		t.Fatal(err)
	}

	for name, tc := range map[string]struct {
		from *place
		to   string
		want string // empty: no answer
	}{
		"control: default pod reaches the load balancer":    {w.world, "172.31.0.1:10250", "node1 172.31.0.254"},
		"control: kubelet is up":                            {def, "172.31.0.1:10250", "node1 10.244.0.2"},
		"control: the default pod is up":                    {n1.place, "10.244.0.2:80", "default-pod 10.244.255.1"},
		"control: the default pod reaches by load balancer": {def, "198.51.100.2:80", "node1 10.244.0.2"},
		"tenant to internet":                                {w.a1.place, "203.0.113.1:80", "world 172.31.0.1"},
		"tenant to internet, node 2":                        {w.b2.place, "203.0.113.1:80", "world 172.31.0.2"},
		"tenant to API server":                              {w.a1.place, "172.31.0.1:6443", "node1 10.0.0.17"},
		"tenant to API server from another node":            {w.a2.place, "172.31.0.1:6443", "node1 172.31.0.2"},
		"control: the nodes' router is up":                  {n1.place, "172.31.0.254:80", "world 172.31.0.1"},
		"tenant to the nodes' router":                       {w.a1.place, "172.31.0.254:80", ""},
		"tenant to the nodes' router, node 2":               {w.b2.place, "172.31.0.254:80", ""},
		"tenant to the nodes' router by load balancer":      {w.a1.place, "198.51.100.4:80", ""},
		"tenant to its node's kubelet":                      {w.a1.place, "172.31.0.1:10250", ""},
		"tenant to the other node's kubelet":                {w.a1.place, "172.31.0.2:10250", ""},
		"tenant to another address of the node":             {w.a1.place, "192.0.2.1:10250", ""},
		"tenant to the node by the uplink":                  {w.a1.place, "169.254.77.1:10250", ""},
		"tenant to the portal":                              {w.a1.place, "169.254.1.1:10250", ""},
		"tenant to the portal's uplink":                     {w.a1.place, "169.254.77.2:10250", ""},
		"tenant to metadata":                                {w.a1.place, "169.254.169.254:80", ""},
		"tenant to default pod":                             {w.a1.place, "10.244.0.2:80", ""},
		"tenant to a Service of the default network":        {w.a1.place, "10.96.5.5:80", ""},
		"tenant to default pod by load balancer":            {w.a1.place, "198.51.100.1:80", ""},
		"tenant to kubelet by load balancer":                {w.a1.place, "198.51.100.2:80", ""},
		"tenant to tenant by load balancer":                 {w.b1.place, "198.51.100.3:80", ""},
		"tenant to an address of its network without a pod": {w.a1.place, "10.0.7.7:80", ""},
		"tenant to an address of its block without a pod":   {w.a1.place, "10.0.0.30:80", ""},
		"default pod to tenant":                             {def, "10.0.0.17:80", ""},
		"default pod to tenant of the other network":        {def, "10.0.1.17:80", ""},
		"default pod to tenant by load balancer":            {def, "198.51.100.3:80", ""},
		"the world to tenant":                               {w.world, "10.0.0.17:80", ""},
		"the other node's host to tenant":                   {n2.place, "10.0.0.18:80", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.from == w.world && tc.want == "" {
				br, err := w.world.h.LinkByName("br0")
				w.world.must(err)
				w.world.route(br, "10.0.0.0/24", "172.31.0.1")
			}
			limit := patience
			if tc.want == "" {
				limit = despair
			}
			got, err := tc.from.tcp(tc.to, limit)
			if got != tc.want {
				t.Errorf("tcp %s: %q, %v; want %q", tc.to, got, err, tc.want)
			}
			if tc.want != "" || strings.Contains(name, "load balancer") {
				return
			}
			if got, _ := tc.from.udp(tc.to, 10, despair); got != "" {
				t.Errorf("udp %s: %q, want nothing", tc.to, got)
			}
			if addr, _, _ := strings.Cut(tc.to, ":"); addr != "169.254.1.1" {
				if err := tc.from.ping(addr, 10, despair); err == nil {
					t.Errorf("ping %s: an answer", addr)
				}
			}
		})
	}

	t.Run("tenant pings its gateway", func(t *testing.T) {
		if err := w.a1.ping("169.254.1.1", 10, patience); err != nil {
			t.Error(err)
		}
	})
	t.Run("tenant on another tenant's neighbour", func(t *testing.T) {
		// b1 is 10.0.1.17 on this node; acme's 10.0.1.17 is on the other one and that is what a1 hears.
		if got, err := w.a1.tcp("10.0.1.17:80", patience); got != "a2 10.0.0.17" {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("egress closed", func(t *testing.T) {
		s := specs()[acme][0]
		s.Egress = Egress{}
		n1.ensure(s)
		for _, to := range []string{"203.0.113.1:80", "172.31.0.1:6443"} {
			if got, err := w.a1.tcp(to, despair); err == nil {
				t.Errorf("%s: %q", to, got)
			}
		}
		if got, err := w.a1.tcp("10.0.1.17:80", patience); err != nil {
			t.Errorf("%q, %v", got, err)
		}
		s.Egress = Egress{APIServer: true, APIServers: []netip.AddrPort{apiServer}}
		n1.ensure(s)
		if got, err := w.a1.tcp("203.0.113.1:80", despair); err == nil {
			t.Errorf("internet: %q", got)
		}
		if got, err := w.a1.tcp("172.31.0.1:6443", patience); err != nil {
			t.Errorf("API server: %q, %v", got, err)
		}
	})
	t.Run("API server of no tenant", func(t *testing.T) {
		g := w.guard()
		g.APIServers = nil
		n1.must(n1.m.EnsureGuard(t.Context(), g))
		if got, err := w.a1.tcp("172.31.0.1:6443", despair); err == nil {
			t.Errorf("%q", got)
		}
	})
}

func TestForgeries(t *testing.T) {
	w := newTenants(t)
	n1, n2 := w.nodes[0], w.nodes[1]
	def := n1.defaultPod("10.244.0.2")
	a3 := n1.pod(acme, "a3", "10.0.0.18")
	box := w.a1.inbox("0.0.0.0:5000")
	to := netip.MustParseAddrPort("10.0.0.17:5000")
	genuine := udpPacket(netip.MustParseAddrPort("10.0.0.18:7"), to, []byte("genuine"))
	src := netip.MustParseAddrPort

	// A packet of acme's remote pod, wrapped for the overlay.
	inner := append(append(append([]byte{}, macOf(n1.ip)...), macOf(n2.ip)...), 8, 0)
	inner = append(inner, udpPacket(src("10.0.1.17:7"), to, []byte("overlay"))...)
	vxlan := make([]byte, 8)
	vxlan[0] = 8
	binary.BigEndian.PutUint32(vxlan[4:], acme<<8)
	vxlan = append(vxlan, inner...)
	at := src("172.31.0.1:4789")

	t.Run("control: a node speaks the overlay", func(t *testing.T) {
		n2.sendRaw(udpPacket(src("172.31.0.2:9999"), at, vxlan))
		if got := w.a1.next(box); got != "overlay" {
			t.Fatalf("got %q", got)
		}
	})
	for name, forge := range map[string]func(){
		"another pod's address":            func() { a3.sendRaw(udpPacket(src("10.0.0.19:7"), to, []byte("forged"))) },
		"the receiver's own address":       func() { a3.sendRaw(udpPacket(src("10.0.0.17:7"), to, []byte("forged"))) },
		"a remote pod's address":           func() { a3.sendRaw(udpPacket(src("10.0.1.17:7"), to, []byte("forged"))) },
		"the node's address":               func() { a3.sendRaw(udpPacket(src("169.254.77.1:7"), to, []byte("forged"))) },
		"the internet's address":           func() { a3.sendRaw(udpPacket(src("203.0.113.1:7"), to, []byte("forged"))) },
		"the gateway's address":            func() { a3.sendRaw(udpPacket(src("169.254.1.1:7"), to, []byte("forged"))) },
		"default pod as the node":          func() { def.sendRaw(udpPacket(src("169.254.77.1:7"), to, []byte("forged"))) },
		"default pod as a pod":             func() { def.sendRaw(udpPacket(src("10.0.0.18:7"), to, []byte("forged"))) },
		"overlay by default pod":           func() { def.sendRaw(udpPacket(src("10.244.0.2:9999"), at, vxlan)) },
		"overlay by default pod as a node": func() { def.sendRaw(udpPacket(src("172.31.0.2:9999"), at, vxlan)) },
		"overlay by the world":             func() { w.world.sendRaw(udpPacket(src("172.31.0.254:9999"), at, vxlan)) },
		"overlay by a tenant":              func() { w.b1.sendRaw(udpPacket(src("10.0.1.17:9999"), at, vxlan)) },
		"overlay by a tenant as a node":    func() { w.b1.sendRaw(udpPacket(src("172.31.0.2:9999"), at, vxlan)) },
		"overlay by another node's tenant": func() { w.b2.sendRaw(udpPacket(src("10.0.0.17:9999"), at, vxlan)) },
		"overlay of a node, stranger inside": func() {
			forged := slices.Clone(vxlan)
			copy(forged[22:], udpPacket(src("10.0.9.9:7"), to, []byte("forged!")))
			n2.sendRaw(udpPacket(src("172.31.0.2:9999"), at, forged))
		},
	} {
		t.Run(name, func(t *testing.T) {
			forge()
			// Both come by the same queues, so the genuine one would be second.
			a3.sendRaw(genuine)
			if got := w.a1.next(box); got != "genuine" {
				t.Errorf("the pod got the packet %q", got)
			}
		})
	}
	t.Run("default pod's overlay through the other node", func(t *testing.T) {
		// Forwarded by node 1 to node 2: dropped at node 1, whoever it claims to be.
		box := w.a2.inbox("0.0.0.0:5000")
		there := netip.MustParseAddrPort("10.0.1.17:5000")
		forged := append(append(append([]byte{}, vxlan[:8]...), append(append(macOf(n2.ip), macOf(n1.ip)...), 8, 0)...), udpPacket(src("10.0.0.17:7"), there, []byte("forged"))...)
		def.sendRaw(udpPacket(src("172.31.0.1:9999"), src("172.31.0.2:4789"), forged))
		w.a1.sendRaw(udpPacket(src("10.0.0.17:7"), there, []byte("genuine")))
		if got := w.a2.next(box); got != "genuine" {
			t.Errorf("the pod got %q", got)
		}
	})
}

func TestEnsureRepairs(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	spec := specs()[acme][0]
	spec.Services = []Service{{Name: "shop/web:http", ClusterIP: netip.MustParseAddr("10.96.1.1"), Protocol: "TCP", Port: 80, Endpoints: endpoints("10.0.1.17:80")}}
	n1.ensure(spec)
	p := n1.m.portal(acme)

	works := func(t *testing.T) {
		t.Helper()
		for what, do := range map[string]func() (string, error){
			"across":   func() (string, error) { return w.a1.tcp("10.0.1.17:80", patience) },
			"service":  func() (string, error) { return w.a1.tcp("10.96.1.1:80", patience) },
			"probe":    func() (string, error) { return n1.tcp("10.0.0.17:80", patience) },
			"internet": func() (string, error) { return w.a1.tcp("203.0.113.1:80", patience) },
		} {
			if got, err := do(); err != nil {
				t.Errorf("%s: %q, %v", what, got, err)
			}
		}
	}
	works(t)
	generation := func() uint32 {
		g, err := p.nf.generation()
		n1.must(err)
		return g
	}
	state := func() string {
		var b strings.Builder
		// Addresses and routes of IPv4: what the kernel does with IPv6's addresses of its own takes
		// a second. Of the neighbours those that stay.
		for _, args := range [][]string{{"-d", "link"}, {"-4", "addr"}, {"-4", "route", "show", "table", "all"}, {"-4", "neigh", "show", "nud", "permanent"}} {
			for _, ns := range []*place{n1.place, {ns: p.ns}} {
				out, err := run(ns.ns, "ip", args...)
				n1.must(err)
				b.WriteString(out)
			}
		}
		return b.String()
	}
	t.Run("nothing to do", func(t *testing.T) {
		before, rules := state(), generation()
		n1.ensure(spec)
		if diff := cmp.Diff(before, state()); diff != "" {
			t.Error(diff)
		}
		if generation() != rules {
			t.Error("rules were written again")
		}
	})

	delLink := func(h *netlink.Handle, name string) func() error {
		return func() error {
			l, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			return h.LinkDel(l)
		}
	}
	ip := func(ns *place, args ...string) func() error {
		return func() error { _, err := run(ns.ns, "ip", args...); return err }
	}
	inside := &place{t: t, name: "portal", ns: p.ns}
	for name, damage := range map[string]func() error{
		"uplink deleted on the node":    delLink(n1.h, "h8su101"),
		"uplink deleted in the portal":  delLink(p.link, "uplink"),
		"overlay deleted":               delLink(p.link, "vx"),
		"uplink down":                   ip(n1.place, "link", "set", "h8su101", "down"),
		"overlay down":                  ip(inside, "link", "set", "vx", "down"),
		"overlay's MTU changed":         ip(inside, "link", "set", "vx", "mtu", "900"),
		"routes flushed":                ip(inside, "route", "flush", "dev", "vx"),
		"default route deleted":         ip(inside, "route", "del", "default"),
		"stale route added":             ip(inside, "route", "add", "10.0.1.17/32", "via", "172.31.0.9", "dev", "vx", "onlink"),
		"neighbour deleted":             ip(inside, "neigh", "del", "172.31.0.2", "dev", "vx"),
		"node's route deleted":          ip(n1.place, "route", "del", "10.0.0.16/28"),
		"node's stale route added":      ip(n1.place, "route", "add", "203.0.113.0/24", "dev", "h8su101"),
		"node's uplink address deleted": ip(n1.place, "addr", "flush", "dev", "h8su101"),
		"name server's address deleted": ip(inside, "addr", "del", "10.96.0.10/32", "dev", "lo"),
		"forwarding entry deleted": func() error {
			_, err := run(p.ns, "bridge", "fdb", "del", macOf(w.nodes[1].ip).String(), "dev", "vx", "dst", "172.31.0.2")
			return err
		},
		"rules deleted": func() error { _, err := run(p.ns, "nft", "delete", "table", "inet", "h8s"); return err },
		"a rule added": func() error {
			_, err := run(p.ns, "nft", "insert", "rule", "inet", "h8s", "forward", "drop")
			return err
		},
		"another table's set of the same name": func() error {
			_, err := run(p.ns, "nft", "delete table inet h8s; table inet h8s { set hairpin { type ipv4_addr; }\n}")
			return err
		},
		"forwarding off": func() error { return inNetns(p.ns, func() error { return setSysctl("ipv4/ip_forward", "0") }) },
		"name taken away": func() error {
			return unbindNetns(filepath.Join(n1.dir, "h8s-101"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n1.must(damage())
			n1.ensure(spec)
			works(t)
			if diff := cmp.Diff([]string{w.a1.res.HostIfName}, must(n1.m.Attachments(acme))); diff != "" {
				t.Error(diff)
			}
			if !isNetns(filepath.Join(n1.dir, "h8s-101")) {
				t.Error("the namespace has no name")
			}
			// And the next one finds nothing to do.
			rules := generation()
			n1.ensure(spec)
			if generation() != rules {
				t.Error("rules were written again")
			}
		})
	}
	t.Run("guard deleted", func(t *testing.T) {
		if _, err := run(n1.ns, "nft", "delete", "table", "inet", "h8s"); err != nil {
			t.Fatal(err)
		}
		n1.must(n1.m.EnsureGuard(t.Context(), w.guard()))
		works(t)
		if !strings.Contains(nft(t, n1.ns, "list", "table", "inet", "h8s"), "from-portal") {
			t.Error("no guard")
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestRemoteBlocksComeAndGo(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	spec := specs()[acme][0]
	remote := spec.Remote
	spec.Remote = nil
	n1.ensure(spec)
	if got, err := w.a1.tcp("10.0.1.17:80", despair); err == nil {
		t.Errorf("a block that is gone answers %q", got)
	}
	p := n1.m.portal(acme)
	for _, args := range [][]string{{"ip", "route", "show", "dev", "vx"}, {"ip", "neigh", "show", "dev", "vx", "nud", "permanent"}, {"bridge", "fdb", "show", "dev", "vx"}} {
		if out := must(run(p.ns, args[0], args[1:]...)); strings.Contains(out, "172.31.0.2") {
			t.Errorf("%q left: %s", args, out)
		}
	}
	spec.Remote = remote
	n1.ensure(spec)
	if _, err := w.a1.tcp("10.0.1.17:80", patience); err != nil {
		t.Error(err)
	}
	// A Block of our own goes: the node has no way there.
	w.nodes[0].must(n1.m.Detach(t.Context(), acme, w.a1.a))
	spec.Blocks = nil
	n1.ensure(spec)
	if out := must(run(n1.ns, "ip", "route", "show", "dev", "h8su101")); strings.TrimSpace(out) != "" {
		t.Errorf("routes left: %s", out)
	}
	if _, err := n1.m.Attach(t.Context(), acme, w.a1.a); err == nil {
		t.Error("attached outside of any block")
	}
}

func TestRestartKeepsConnections(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	spec := specs()[acme][0]
	spec.Services = []Service{{ClusterIP: netip.MustParseAddr("10.96.1.1"), Protocol: "tcp", Port: 80, Endpoints: endpoints("10.0.1.17:80")}}
	n1.ensure(spec)
	open := map[string]*session{}
	for name, dial := range map[string]func() (*session, error){
		"across":   func() (*session, error) { return w.a1.dial("10.0.1.17:80", patience) },
		"service":  func() (*session, error) { return w.a1.dial("10.96.1.1:80", patience) },
		"internet": func() (*session, error) { return w.a1.dial("203.0.113.1:80", patience) },
		"probe":    func() (*session, error) { return n1.dial("10.0.0.17:80", patience) },
	} {
		s, err := dial()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		defer s.Close()
		open[name] = s
	}
	alive := func(when string) {
		t.Helper()
		for name, s := range open {
			if err := s.echo(when); err != nil {
				t.Errorf("%s, %s: %v", when, name, err)
			}
		}
	}
	alive("before")
	n1.restart()
	alive("after the manager went")
	if _, err := n1.m.Attach(t.Context(), acme, w.a1.a); !errors.Is(err, ErrNoPortal) {
		t.Errorf("attach before ensure: %v", err)
	}
	if err := n1.m.Ensure(t.Context(), spec); !errors.Is(err, ErrNoGuard) {
		t.Errorf("ensure before guard: %v", err)
	}
	n1.must(n1.m.EnsureGuard(t.Context(), w.guard()))
	n1.ensure(spec)
	alive("after the new manager's first ensure")
	if err := n1.m.Check(t.Context(), acme, w.a1.a); err != nil {
		t.Error(err)
	}
	// Established connections outlive their Service, as with kube-proxy.
	spec.Services = nil
	n1.ensure(spec)
	alive("after the service went")
	for what, got := range map[string][]int32{"list": must(n1.m.List())} {
		if diff := cmp.Diff([]int32{acme, globex}, got); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
}

func TestAttach(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	ctx := t.Context()
	t.Run("result", func(t *testing.T) {
		want := Result{HostIfName: HostIfName(w.a1.a.ContainerID, "eth0"), PodMAC: macOf(w.a1.a.Address), Gateway: podGateway, MTU: 1450}
		if diff := cmp.Diff(want, w.a1.res, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if len(want.HostIfName) != 11 {
			t.Error(want.HostIfName)
		}
	})
	t.Run("again keeps connections", func(t *testing.T) {
		s, err := w.a1.dial("10.0.1.17:80", patience)
		n1.must(err)
		defer s.Close()
		res, err := n1.m.Attach(ctx, acme, w.a1.a)
		n1.must(err)
		if diff := cmp.Diff(w.a1.res, res, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if err := s.echo("still here"); err != nil {
			t.Error(err)
		}
	})
	t.Run("after a crash half way", func(t *testing.T) {
		for what, damage := range map[string][]string{
			"no address in the pod": {"addr", "flush", "dev", "eth0"},
			"link down in the pod":  {"link", "set", "eth0", "down"},
			"no route in the pod":   {"route", "flush", "dev", "eth0"},
		} {
			if _, err := run(w.a1.ns, "ip", damage...); err != nil {
				t.Fatal(err)
			}
			if err := n1.m.Check(ctx, acme, w.a1.a); err == nil {
				t.Errorf("%s: check is content", what)
			}
			if _, err := n1.m.Attach(ctx, acme, w.a1.a); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if err := n1.m.Check(ctx, acme, w.a1.a); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if got, err := w.a1.tcp("10.0.1.17:80", patience); err != nil {
				t.Errorf("%s: %q, %v", what, got, err)
			}
		}
	})
	t.Run("again with another namespace", func(t *testing.T) {
		a := w.a1.a
		other := newPlace(t, "other")
		a.Netns = other.path()
		if _, err := n1.m.Attach(ctx, acme, a); err != nil {
			t.Fatal(err)
		}
		if got, err := other.tcp("10.0.1.17:80", patience); err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if _, err := w.a1.h.LinkByName("eth0"); err == nil {
			t.Error("the first namespace kept its interface")
		}
		if _, err := n1.m.Attach(ctx, acme, w.a1.a); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("an interface that is somebody else's", func(t *testing.T) {
		other := newPlace(t, "other")
		wire(n1.place, "tmp0", other, "eth0")
		_, err := n1.m.Attach(ctx, acme, Attachment{ContainerID: "x", IfName: "eth0", Netns: other.path(), Address: netip.MustParseAddr("10.0.0.20")})
		if err == nil || !strings.Contains(err.Error(), "not ours") {
			t.Error(err)
		}
	})
	t.Run("errors", func(t *testing.T) {
		for name, tc := range map[string]struct {
			id int32
			a  Attachment
		}{
			"no portal":         {999, w.a1.a},
			"not in a block":    {acme, Attachment{"y", "eth0", w.a1.path(), netip.MustParseAddr("10.0.0.40")}},
			"no such namespace": {acme, Attachment{"y", "eth0", "/nonexistent", netip.MustParseAddr("10.0.0.21")}},
			"name too long":     {acme, Attachment{"y", "ethernet-interface-0", w.a1.path(), netip.MustParseAddr("10.0.0.21")}},
		} {
			if _, err := n1.m.Attach(ctx, tc.id, tc.a); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		if diff := cmp.Diff([]string{w.a1.res.HostIfName}, must(n1.m.Attachments(acme))); diff != "" {
			t.Errorf("links left by failed attachments: %s", diff)
		}
	})
	t.Run("detach", func(t *testing.T) {
		s, err := w.a1.dial("203.0.113.1:80", patience)
		n1.must(err)
		defer s.Close()
		p := n1.m.portal(acme)
		flows := func(h *netlink.Handle) (n int) {
			for _, f := range must(h.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)) {
				if ip := net.ParseIP("10.0.0.17"); f.Forward.SrcIP.Equal(ip) || f.Reverse.SrcIP.Equal(ip) {
					n++
				}
			}
			return n
		}
		if flows(n1.h) == 0 || flows(p.link) == 0 {
			t.Error("control: no connections are tracked")
		}
		n1.must(n1.m.EndConnections(ctx, acme, w.a1.a.Address))
		if err := s.echo("hello"); err != nil {
			t.Errorf("the connections of a pod that is still there: %v", err)
		}
		for range 3 {
			n1.must(n1.m.Detach(ctx, acme, w.a1.a))
			n1.must(n1.m.EndConnections(ctx, acme, w.a1.a.Address))
		}
		if a, b := flows(n1.h), flows(p.link); a+b != 0 {
			t.Errorf("connections left: %d on the node, %d in the portal", a, b)
		}
		if _, err := w.a1.h.LinkByName("eth0"); err == nil {
			t.Error("the pod has its link still")
		}
		// The address goes to another pod; a late DEL of the first one must not touch it.
		next := n1.pod(acme, "next", "10.0.0.17")
		s2, err := next.dial("10.0.1.17:80", patience)
		n1.must(err)
		defer s2.Close()
		n1.must(n1.m.Detach(ctx, acme, w.a1.a))
		n1.must(n1.m.EndConnections(ctx, acme, w.a1.a.Address))
		if flows(p.link) == 0 {
			t.Error("the late detach ended the next pod's connections")
		}
		if err := s2.echo("hello"); err != nil {
			t.Error(err)
		}
		gone := w.a1.a
		gone.Netns = "/nonexistent"
		n1.must(n1.m.Detach(ctx, acme, gone))
		n1.must(n1.m.Detach(ctx, 4000, gone))
		n1.must(n1.m.EndConnections(ctx, 4000, gone.Address))
	})
}

func TestManyPodsAtOnce(t *testing.T) {
	lab := newLab(t)
	n1 := lab.nodes[0]
	spec := Spec{ID: 7, CIDR: networkCIDR, Blocks: prefixes("10.0.0.0/24")}
	n1.ensure(spec)
	errs := make(chan error)
	for i := range 110 {
		p := newPlace(t, "pod")
		go func() {
			a := Attachment{ContainerID: fmt.Sprint(i), IfName: "eth0", Netns: p.path(), Address: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}
			_, err := n1.m.Attach(context.Background(), 7, a)
			if err == nil {
				err = n1.m.Check(context.Background(), 7, a)
			}
			errs <- err
		}()
	}
	for range 110 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	n1.ensure(spec)
	if n := len(must(n1.m.Attachments(7))); n != 110 {
		t.Errorf("%d attachments", n)
	}
}

func TestRemove(t *testing.T) {
	w := newTenants(t)
	n1 := w.nodes[0]
	pc, l, err := n1.m.Listen(acme)
	n1.must(err)
	pc.Close()
	l.Close()
	for range 2 {
		n1.must(n1.m.Remove(t.Context(), acme))
	}
	if got, err := n1.tcp("10.0.1.17:80", patience); got != "b1 169.254.77.1" {
		t.Errorf("the other network suffers: %q, %v", got, err)
	}
	if _, err := w.a1.h.LinkByName("eth0"); err == nil {
		t.Error("the pod has its link still")
	}
	n1.must(n1.m.Detach(t.Context(), acme, w.a1.a))
	// And back, at once, with the same VNI.
	n1.ensure(specs()[acme][0])
	if _, err := n1.m.Attach(t.Context(), acme, w.a1.a); err != nil {
		t.Fatal(err)
	}
	if got, err := w.a1.tcp("10.0.1.17:80", patience); err != nil {
		t.Errorf("%q, %v", got, err)
	}
	t.Run("by a manager that did not make it", func(t *testing.T) {
		n1.restart()
		n1.must(n1.m.Remove(t.Context(), acme))
		n1.must(n1.m.Remove(t.Context(), globex))
		if diff := cmp.Diff([]string(nil), n1.leftovers()); diff != "" {
			t.Error(diff)
		}
		if ids := must(n1.m.List()); len(ids) != 0 {
			t.Error(ids)
		}
	})
	t.Run("remains of a crash", func(t *testing.T) {
		n1.must(os.WriteFile(filepath.Join(n1.dir, "h8s-55"), nil, 0o444))
		wire(n1.place, "h8su56", newPlace(t, "x"), "uplink")
		if diff := cmp.Diff([]int32{55, 56}, must(n1.m.List())); diff != "" {
			t.Error(diff)
		}
		for _, id := range must(n1.m.List()) {
			n1.must(n1.m.Remove(t.Context(), id))
		}
		if diff := cmp.Diff([]string(nil), n1.leftovers()); diff != "" {
			t.Error(diff)
		}
	})
}

func TestListen(t *testing.T) {
	w := newTenants(t)
	for _, tc := range []struct {
		pod  *pod
		text string
	}{{w.a1, "acme's"}, {w.b1, "globex's"}} {
		pc, l, err := tc.pod.node.m.Listen(tc.pod.id)
		tc.pod.must(err)
		t.Cleanup(func() { pc.Close(); l.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				pc.WriteTo([]byte(tc.text+"\n"), from)
			}
		}()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, tc.text)
				c.Close()
			}
		}()
		if got, err := tc.pod.udp("10.96.0.10:53", 0, patience); got != tc.text {
			t.Errorf("udp: %q, %v; want %q", got, err, tc.text)
		}
		if got, err := tc.pod.tcp("10.96.0.10:53", patience); got != tc.text {
			t.Errorf("tcp: %q, %v; want %q", got, err, tc.text)
		}
		if _, err := tc.pod.tcp("10.96.0.10:54", patience); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("another port: %v, want refused", err)
		}
	}
	if _, err := w.nodes[0].tcp("10.96.0.10:53", despair); err == nil {
		t.Error("the node has the name server's address")
	}
}

func TestSpecIsRefused(t *testing.T) {
	lab := newLab(t)
	good := specs()[acme][0]
	for name, change := range map[string]func(*Spec){
		"id 0":                  func(s *Spec) { s.ID = 0 },
		"id beyond VXLAN":       func(s *Spec) { s.ID = 1 << 24 },
		"no CIDR":               func(s *Spec) { s.CIDR = netip.Prefix{} },
		"CIDR not canonical":    func(s *Spec) { s.CIDR = netip.MustParsePrefix("10.0.0.1/16") },
		"CIDR IPv6":             func(s *Spec) { s.CIDR = netip.MustParsePrefix("fd00::/64") },
		"block outside":         func(s *Spec) { s.Blocks = prefixes("10.1.0.0/28") },
		"block larger":          func(s *Spec) { s.Blocks = prefixes("10.0.0.0/8") },
		"remote outside":        func(s *Spec) { s.Remote = []RemoteBlock{{netip.MustParsePrefix("0.0.0.0/0"), lab.nodes[1].ip}} },
		"remote on this node":   func(s *Spec) { s.Remote = []RemoteBlock{{netip.MustParsePrefix("10.0.3.0/28"), lab.nodes[0].ip}} },
		"remote without a node": func(s *Spec) { s.Remote = []RemoteBlock{{CIDR: netip.MustParsePrefix("10.0.3.0/28")}} },
	} {
		t.Run(name, func(t *testing.T) {
			s := good
			change(&s)
			if err := lab.nodes[0].m.Ensure(t.Context(), s); err == nil {
				t.Error("no error")
			}
			if ids := must(lab.nodes[0].m.List()); len(ids) != 0 {
				t.Errorf("left behind: %v", ids)
			}
		})
	}
}
