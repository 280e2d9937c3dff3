package portal

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// patience bounds what must happen, despair what must not.
	patience = 30 * time.Second
	despair  = 400 * time.Millisecond
)

var (
	clusterDNS   = netip.MustParseAddr("10.96.0.10")
	serviceCIDR  = netip.MustParsePrefix("10.96.0.0/16")
	podCIDR      = netip.MustParsePrefix("10.244.0.0/16")
	underlayCIDR = netip.MustParsePrefix("172.31.0.0/24")
	networkCIDR  = netip.MustParsePrefix("10.0.0.0/16")
	internet     = netip.MustParseAddr("203.0.113.1")
	apiServer    = netip.MustParseAddrPort("172.31.0.1:6443") // on node 1
)

// place is a network namespace in which tests act.
type place struct {
	t    testing.TB
	name string
	ns   netns.NsHandle
	h    *netlink.Handle
}

func newPlace(t testing.TB, name string) *place {
	t.Helper()
	ns, err := newNetns()
	if err != nil {
		t.Fatal(err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	p := &place{t: t, name: name, ns: ns, h: h}
	t.Cleanup(func() { h.Close(); p.ns.Close() })
	lo, err := h.LinkByName("lo")
	p.must(err)
	p.must(h.LinkSetUp(lo))
	return p
}

func (p *place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

func (p *place) do(fn func() error) error { return inNetns(p.ns, fn) }

// path is how others open the namespace.
func (p *place) path() string { return fmt.Sprintf("/proc/self/fd/%d", int(p.ns)) }

// wire joins two places by a veth pair.
func wire(a *place, aName string, b *place, bName string) (netlink.Link, netlink.Link) {
	a.t.Helper()
	v := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: bName, PeerNamespace: netlink.NsFd(b.ns), PeerTxQLen: -1}
	v.Name = aName
	a.must(a.h.LinkAdd(v))
	al, err := a.h.LinkByName(aName)
	a.must(err)
	bl, err := b.h.LinkByName(bName)
	b.must(err)
	a.must(a.h.LinkSetUp(al))
	b.must(b.h.LinkSetUp(bl))
	return al, bl
}

func (p *place) addr(l netlink.Link, cidr string) {
	p.t.Helper()
	a, err := netlink.ParseAddr(cidr)
	p.must(err)
	p.must(p.h.AddrAdd(l, a))
}

func (p *place) route(l netlink.Link, dst, gw string) {
	p.t.Helper()
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(netip.MustParsePrefix(dst)), Flags: int(netlink.FLAG_ONLINK)}
	if gw != "" {
		r.Gw = net.ParseIP(gw)
	} else {
		r.Flags, r.Scope = 0, netlink.SCOPE_LINK
	}
	p.must(p.h.RouteAdd(r))
}

// greet serves TCP and UDP on addr:port. A client hears "<name> <client's address>" and then its own bytes.
func (p *place) greet(addr string, port int) {
	p.t.Helper()
	at := net.JoinHostPort(addr, fmt.Sprint(port))
	p.must(p.do(func() error {
		l, err := net.Listen("tcp4", at)
		if err != nil {
			return err
		}
		p.t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
					fmt.Fprintf(c, "%s %s\n", p.name, host)
					io.Copy(c, c)
				}()
			}
		}()
		pc, err := net.ListenPacket("udp4", at)
		if err != nil {
			return err
		}
		p.t.Cleanup(func() { pc.Close() })
		go func() {
			buf := make([]byte, 65536)
			for {
				n, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				host, _, _ := net.SplitHostPort(from.String())
				pc.WriteTo(append([]byte(p.name+" "+host+"\n"), buf[:n]...), from)
			}
		}()
		return nil
	}))
}

// session is an open TCP connection to a greeter.
type session struct {
	net.Conn
	r        *bufio.Reader
	greeting string
}

func (p *place) dial(to string, limit time.Duration) (*session, error) {
	var s *session
	err := p.do(func() error {
		c, err := net.DialTimeout("tcp4", to, limit)
		if err != nil {
			return err
		}
		s = &session{Conn: c, r: bufio.NewReader(c)}
		c.SetDeadline(time.Now().Add(limit))
		s.greeting, err = s.r.ReadString('\n')
		s.greeting = strings.TrimSpace(s.greeting)
		if err != nil {
			c.Close()
		}
		return err
	})
	return s, err
}

// echo says whether the session still works.
func (s *session) echo(text string) error {
	s.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(s, text+"\n"); err != nil {
		return err
	}
	got, err := s.r.ReadString('\n')
	if err == nil && got != text+"\n" {
		err = fmt.Errorf("got %q, want %q", got, text)
	}
	return err
}

// tcp returns the greeting of to, or "" and why there was none.
func (p *place) tcp(to string, limit time.Duration) (string, error) {
	s, err := p.dial(to, limit)
	if err != nil {
		return "", err
	}
	defer s.Close()
	return s.greeting, nil
}

// udp sends size bytes and returns the greeting in the answer.
func (p *place) udp(to string, size int, limit time.Duration) (string, error) {
	var greeting string
	err := p.do(func() error {
		c, err := net.Dial("udp4", to)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Write(make([]byte, size)); err != nil {
			return err
		}
		buf := make([]byte, 65536)
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		head, tail, _ := strings.Cut(string(buf[:n]), "\n")
		if len(tail) != size {
			return fmt.Errorf("%d bytes came back of %d", len(tail), size)
		}
		greeting = head
		return nil
	})
	return greeting, err
}

// ping sends one ICMP echo request that may not be fragmented.
func (p *place) ping(to string, size int, limit time.Duration) error {
	return p.do(func() error {
		c, err := net.Dial("ip4:icmp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(*net.IPConn).SyscallConn()
		if err != nil {
			return err
		}
		raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		})
		if err != nil {
			return err
		}
		msg := make([]byte, 8+size)
		msg[0] = 8
		binary.BigEndian.PutUint16(msg[4:], 0x6838)
		binary.BigEndian.PutUint16(msg[2:], checksum(msg))
		c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Write(msg); err != nil {
			return err
		}
		buf := make([]byte, 65536)
		for {
			n, _, err := c.(*net.IPConn).ReadFromIP(buf) // without the header, unlike Read
			if err != nil {
				return err
			}
			if n == len(msg) && buf[0] == 0 && binary.BigEndian.Uint16(buf[4:]) == 0x6838 {
				return nil
			}
		}
	})
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// udpPacket is an IPv4 packet with whatever source one likes.
func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b[0:], src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	return ipPacket(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), append(b, payload...))
}

// ipPacket is an IPv4 packet of any protocol.
func ipPacket(proto byte, src, dst netip.Addr, payload []byte) []byte {
	b := make([]byte, 20, 20+len(payload))
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, payload...)
}

// sendRaw sends a whole IP packet.
func (p *place) sendRaw(packet []byte) {
	p.t.Helper()
	p.must(p.do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, &unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
	}))
}

// inbox receives datagrams on addr.
func (p *place) inbox(addr string) net.PacketConn {
	p.t.Helper()
	var pc net.PacketConn
	p.must(p.do(func() (err error) {
		pc, err = net.ListenPacket("udp4", addr)
		return err
	}))
	p.t.Cleanup(func() { pc.Close() })
	return pc
}

func (p *place) next(pc net.PacketConn) string {
	p.t.Helper()
	buf := make([]byte, 2048)
	pc.SetReadDeadline(time.Now().Add(patience))
	n, _, err := pc.ReadFrom(buf)
	p.must(err)
	return string(buf[:n])
}

// node is a place with a Manager.
type node struct {
	*place
	ip  netip.Addr
	dir string
	m   *Manager
	lab *lab
}

// lab is an underlay with two nodes, the internet beyond it, and a pod of the default network on each node.
type lab struct {
	t       testing.TB
	world   *place
	nodes   [2]*node
	ordinal int
}

func newLab(t testing.TB) *lab {
	t.Helper()
	lab := &lab{t: t, world: newPlace(t, "world")}
	br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	br.Name = "br0"
	lab.world.must(lab.world.h.LinkAdd(br))
	lab.world.must(lab.world.h.LinkSetUp(br))
	lab.world.addr(br, "172.31.0.254/24")
	lo, err := lab.world.h.LinkByName("lo")
	lab.world.must(err)
	lab.world.addr(lo, internet.String()+"/32")
	lab.world.greet(internet.String(), 80)
	lab.world.greet("172.31.0.254", 80)
	for i := range lab.nodes {
		n := &node{place: newPlace(t, fmt.Sprintf("node%d", i+1)), ip: netip.AddrFrom4([4]byte{172, 31, 0, byte(i + 1)}), dir: t.TempDir(), lab: lab}
		port, eth := wire(lab.world, fmt.Sprintf("port%d", i+1), n.place, "eth0")
		lab.world.must(lab.world.h.LinkSetMaster(port, br))
		n.addr(eth, n.ip.String()+"/24")
		n.route(eth, "0.0.0.0/0", "172.31.0.254")
		// As a node is, with the strict reverse path filter that some distributions set.
		n.must(n.do(func() error {
			return errors.Join(setSysctl("ipv4/ip_forward", "1"), setSysctl("ipv4/conf/all/rp_filter", "1"))
		}))
		n.restart()
		n.must(n.m.EnsureGuard(t.Context(), lab.guard()))
		lab.nodes[i] = n
	}
	t.Cleanup(func() {
		for _, n := range lab.nodes {
			ids, err := n.m.List()
			if err != nil {
				t.Error(err)
			}
			for _, id := range ids {
				if err := n.m.Remove(context.Background(), id); err != nil {
					t.Error(err)
				}
			}
			n.m.Close()
		}
	})
	return lab
}

func (l *lab) guard() Guard {
	return Guard{
		NodeIPs:        []netip.Addr{netip.MustParseAddr("172.31.0.1"), netip.MustParseAddr("172.31.0.2")},
		Infrastructure: []netip.Prefix{podCIDR, serviceCIDR, underlayCIDR},
		APIServers:     []netip.AddrPort{apiServer},
	}
}

// restart replaces the node's Manager as a restart of the agent does.
func (n *node) restart() {
	n.t.Helper()
	if n.m != nil {
		n.must(n.m.Close())
	}
	n.must(n.do(func() (err error) {
		log := slog.New(slog.NewTextHandler(n.t.Output(), nil))
		n.m, err = NewManager(NodeConfig{NodeIP: n.ip, ClusterDNS: clusterDNS, NetnsDir: n.dir}, log)
		return err
	}))
}

// pod is a place with an attachment.
type pod struct {
	*place
	node *node
	id   int32
	a    Attachment
	ip   string
	res  Result
}

// pod makes a pod and attaches it; it greets on port 80.
func (n *node) pod(id int32, name, address string) *pod {
	n.t.Helper()
	p := &pod{place: newPlace(n.t, name), node: n, id: id, ip: address}
	n.lab.ordinal++
	p.a = Attachment{ContainerID: fmt.Sprintf("%s-%d", name, n.lab.ordinal), IfName: "eth0", Netns: p.path(), Address: netip.MustParseAddr(address)}
	var err error
	p.res, err = n.m.Attach(n.t.Context(), id, p.a)
	n.must(err)
	p.greet("0.0.0.0", 80)
	return p
}

// defaultPod is a pod of the default network, with a route of its own as ptp makes it.
func (n *node) defaultPod(address string) *place {
	n.t.Helper()
	p := newPlace(n.t, "default-pod")
	outer, inner := wire(n.place, "def0", p, "eth0")
	n.addr(outer, "10.244.255.1/32")
	n.route(outer, address+"/32", "")
	p.addr(inner, address+"/32")
	p.route(inner, "10.244.255.1/32", "")
	p.route(inner, "0.0.0.0/0", "10.244.255.1")
	p.greet("0.0.0.0", 80)
	return p
}

func (n *node) ensure(s Spec) {
	n.t.Helper()
	n.must(n.m.Ensure(n.t.Context(), s))
}

// nft returns the portal's ruleset, or the node's.
func nft(t testing.TB, ns netns.NsHandle, args ...string) string {
	t.Helper()
	out, err := run(ns, "nft", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func prefixes(in ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range in {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func endpoints(in ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range in {
		out = append(out, netip.MustParseAddrPort(s))
	}
	return out
}

// leftovers lists what a portal leaves on a node.
func (n *node) leftovers() []string {
	n.t.Helper()
	var out []string
	files, err := os.ReadDir(n.dir)
	n.must(err)
	for _, f := range files {
		out = append(out, filepath.Join(n.dir, f.Name()))
	}
	links, err := n.h.LinkList()
	n.must(err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, uplinkPrefix) {
			out = append(out, l.Attrs().Name)
		}
	}
	routes, err := n.h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, 0)
	n.must(err)
	for _, r := range routes {
		if r.Dst != nil && networkCIDR.Overlaps(prefixOf(r.Dst)) && r.Dst.IP.String() != "0.0.0.0" {
			out = append(out, r.String())
		}
	}
	return out
}

func TestMain(m *testing.M) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "the tests of package portal need root: they make network namespaces")
		os.Exit(1)
	}
	os.Exit(m.Run())
}
