package portal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// initech's Network has nothing in common with acme's, and umbrella's lies within it. Where Networks do not have one
// CIDR, a node that has pods of both has a route from each to the other.
const initech, umbrella = 103, 104

// neighbours are Networks of different CIDRs on two nodes, with a pod on each.
type neighbours struct {
	*lab
	pods map[int32][2]*pod
	// own is a Service of each Network that leads to both its pods, and away one that leads to everybody else's.
	own, away map[int32]netip.Addr
}

func newNeighbours(t *testing.T) *neighbours {
	t.Helper()
	w := &neighbours{lab: newLab(t), pods: map[int32][2]*pod{}, own: map[int32]netip.Addr{}, away: map[int32]netip.Addr{}}
	networks := map[int32]struct {
		cidr   string
		blocks [2]string
	}{
		acme:     {"10.0.0.0/16", [2]string{"10.0.0.16/28", "10.0.1.16/28"}},
		initech:  {"10.9.0.0/16", [2]string{"10.9.0.16/28", "10.9.1.16/28"}},
		umbrella: {"10.0.200.0/24", [2]string{"10.0.200.16/28", "10.0.200.32/28"}},
	}
	address := func(id int32, node int) netip.Addr {
		return netip.MustParsePrefix(networks[id].blocks[node]).Addr().Next()
	}
	for id, n := range networks {
		w.own[id], w.away[id] = netip.AddrFrom4([4]byte{10, 96, 1, byte(id)}), netip.AddrFrom4([4]byte{10, 96, 2, byte(id)})
		var here, elsewhere []netip.AddrPort
		for other := range networks {
			for node := range w.nodes {
				if at := netip.AddrPortFrom(address(other, node), 80); other == id {
					here = append(here, at)
				} else {
					elsewhere = append(elsewhere, at)
				}
			}
		}
		var services []Service
		for _, protocol := range []string{"tcp", "udp"} {
			services = append(services,
				Service{ClusterIP: w.own[id], Protocol: protocol, Port: 80, Endpoints: here},
				Service{ClusterIP: w.away[id], Protocol: protocol, Port: 80, Endpoints: elsewhere})
		}
		var pods [2]*pod
		for i, node := range w.nodes {
			block, far := netip.MustParsePrefix(n.blocks[i]), netip.MustParsePrefix(n.blocks[1-i])
			node.ensure(Spec{
				ID: id, CIDR: netip.MustParsePrefix(n.cidr), Blocks: []netip.Prefix{block}, Remote: []RemoteBlock{{far, w.nodes[1-i].ip}},
				Services: services, ServiceCIDRs: []netip.Prefix{serviceCIDR}, Egress: Egress{Internet: true, APIServer: true, APIServers: []netip.AddrPort{apiServer}},
			})
			pods[i] = node.pod(id, fmt.Sprintf("%d-%d", id, i+1), block.Addr().Next().String())
			// The worst of underlays: it carries tenants' addresses.
			eth, err := w.nodes[1-i].h.LinkByName("eth0")
			node.must(err)
			w.nodes[1-i].route(eth, block.String(), node.ip.String())
		}
		w.pods[id] = pods
	}
	return w
}

// probes are packets of every protocol that Services and conntrack know, valid to the last byte.
func probes(from, to netip.Addr, mark string) [][]byte {
	payload := []byte(mark)
	tcp := make([]byte, 20, 20+len(payload))
	binary.BigEndian.PutUint16(tcp[0:], 40000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	tcp[12], tcp[13], tcp[14] = 5<<4, 2, 0xff // SYN
	tcp = append(tcp, payload...)
	pseudo := slices.Concat(from.AsSlice(), to.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(tcp))}, tcp)
	binary.BigEndian.PutUint16(tcp[16:], checksum(pseudo))
	icmp := append([]byte{8, 0, 0, 0, 0x68, 0x38, 0, 1}, payload...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(icmp))
	return [][]byte{
		udpPacket(netip.AddrPortFrom(from, 40000), netip.AddrPortFrom(to, 80), payload),
		ipPacket(unix.IPPROTO_TCP, from, to, tcp),
		ipPacket(unix.IPPROTO_ICMP, from, to, icmp),
	}
}

// watch is what comes to a pod, and what comes to its portal from the node.
type watch struct {
	victim      *pod
	pod, uplink *tap
}

func (w *neighbours) watch(victim *pod) *watch {
	portal := &place{t: w.t, name: "portal of " + victim.name, ns: victim.node.m.portal(victim.id).ns}
	return &watch{victim, victim.tap("eth0"), portal.tap(uplinkName)}
}

// friend is the other pod of the Network.
func (w *neighbours) friend(p *pod) *pod {
	pods := w.pods[p.id]
	if pods[0] == p {
		return pods[1]
	}
	return pods[0]
}

// stillGenuine says what leaked, once what may come has come after it: packets of the victim's friend on the other
// node, and one of its own node.
func (w *neighbours) stillGenuine(t *testing.T, at *watch, packets func(from, to netip.Addr) [][]byte) {
	t.Helper()
	victim, friend := at.victim, w.friend(at.victim)
	for _, packet := range packets(friend.a.Address, victim.a.Address) {
		friend.sendRaw(packet)
		arrives(t, victim.name, at.pod, "genuine", packet[9])
	}
	victim.node.sendRaw(udpPacket(netip.AddrPortFrom(nodeUplinkAddr, 7), netip.AddrPortFrom(victim.a.Address, 80), []byte("genuine")))
	arrives(t, victim.name+"'s portal", at.uplink, "genuine", unix.IPPROTO_UDP)
}

// TestDisjointNetworks sends from every pod to every pod of every other Network, and listens on the links of the
// victims and their portals: not even one packet without an answer gets there.
func TestDisjointNetworks(t *testing.T) {
	w := newNeighbours(t)
	attack := func(t *testing.T, label string, targets func(from, to *pod) []netip.Addr) {
		t.Helper()
		for victims, pods := range w.pods {
			for _, victim := range pods {
				at := w.watch(victim)
				for id, attackers := range w.pods {
					for _, from := range attackers {
						if id == victims {
							continue
						}
						for _, to := range targets(from, victim) {
							for _, packet := range probes(from.a.Address, to, "LEAK from "+from.name+" "+label+";") {
								from.sendRaw(packet)
							}
						}
					}
				}
				w.stillGenuine(t, at, func(from, to netip.Addr) [][]byte { return probes(from, to, "genuine") })
			}
		}
	}
	addresses := func(from, to *pod) []netip.Addr { return []netip.Addr{to.a.Address, w.own[to.id], w.away[from.id]} }

	t.Run("control: Services", func(t *testing.T) {
		for id, pods := range w.pods {
			for _, p := range pods {
				if got, err := p.tcp(w.own[id].String()+":80", patience); !strings.HasPrefix(got, fmt.Sprint(id)) {
					t.Errorf("%s: %q, %v", p.name, got, err)
				}
			}
		}
	})
	t.Run("addresses and Services", func(t *testing.T) { attack(t, "as it is", addresses) })
	t.Run("answers", func(t *testing.T) {
		// The stacks' own packets, on one node; as above, none gets as far as to be answered.
		for id, attackers := range w.pods {
			for other, victims := range w.pods {
				if id == other {
					continue
				}
				from, to := attackers[0], victims[0]
				if got, err := from.tcp(to.ip+":80", despair); err == nil {
					t.Errorf("tcp from %s to %s: %q", from.name, to.name, got)
				}
				if got, err := from.udp(to.ip+":80", 10, despair); err == nil {
					t.Errorf("udp from %s to %s: %q", from.name, to.name, got)
				}
				if err := from.ping(to.ip, 10, despair); err == nil {
					t.Errorf("ping from %s to %s: an answer", from.name, to.name)
				}
			}
		}
	})
	// Whoever has broken out of the sandbox routes as she likes.
	for name, gateway := range map[string]netip.Addr{
		"by the portal's uplink": portalUplinkAddr, "by the node's uplink": nodeUplinkAddr, "by node 1": w.nodes[0].ip, "by node 2": w.nodes[1].ip,
	} {
		t.Run("routes "+name, func(t *testing.T) {
			for _, attackers := range w.pods {
				for _, from := range attackers {
					for _, cmd := range []string{
						// One neighbour answers for all: the portal.
						fmt.Sprintf("neigh replace %s lladdr %s dev eth0", gateway, podGatewayMAC),
						fmt.Sprintf("route replace 10.0.0.0/8 via %s dev eth0 onlink", gateway),
					} {
						_, err := run(from.ns, "ip", strings.Fields(cmd)...)
						from.must(err)
					}
				}
			}
			attack(t, name, addresses)
		})
	}
	t.Run("routes on the link", func(t *testing.T) {
		for _, attackers := range w.pods {
			for _, from := range attackers {
				ip := func(command string) {
					_, err := run(from.ns, "ip", strings.Fields(command)...)
					from.must(err)
				}
				ip("route replace 10.0.0.0/8 dev eth0 scope link")
				for id, victims := range w.pods {
					for _, service := range []netip.Addr{w.own[id], w.away[id]} {
						ip(fmt.Sprintf("neigh replace %s lladdr %s dev eth0", service, podGatewayMAC))
					}
					for _, to := range victims {
						ip(fmt.Sprintf("neigh replace %s lladdr %s dev eth0", to.ip, podGatewayMAC))
					}
				}
			}
		}
		attack(t, "on the link", addresses)
		// And to the victims by their own hardware addresses.
		attack(t, "to its hardware address", func(from, to *pod) []netip.Addr {
			for _, packet := range probes(from.a.Address, to.a.Address, "LEAK from "+from.name+" by frame;") {
				from.sendFrame(macOf(to.a.Address), unix.ETH_P_IP, packet)
			}
			return nil
		})
	})
	t.Run("without the guard", func(t *testing.T) {
		// A portal lets in nobody but its node, whatever the node lets pass.
		for _, n := range w.nodes {
			nft(t, n.ns, "delete", "table", "inet", "h8s")
		}
		for victims, pods := range w.pods {
			for _, victim := range pods {
				at := w.watch(victim)
				passed := 0
				for id, attackers := range w.pods {
					if id == victims {
						continue
					}
					for _, from := range attackers {
						for _, packet := range probes(from.a.Address, victim.a.Address, "LEAK") {
							from.sendFrame(podGatewayMAC, unix.ETH_P_IP, packet)
						}
					}
				}
				friend := w.friend(victim)
				friend.sendFrame(podGatewayMAC, unix.ETH_P_IP, probes(friend.a.Address, victim.a.Address, "genuine")[0])
				arrives(t, victim.name, at.pod, "genuine", unix.IPPROTO_UDP)
				victim.node.sendRaw(udpPacket(netip.AddrPortFrom(nodeUplinkAddr, 7), netip.AddrPortFrom(victim.a.Address, 80), []byte("genuine")))
				victim.must(at.uplink.until(func(frame []byte) bool {
					if bytes.Contains(frame, []byte("LEAK")) {
						passed++
					}
					return bytes.Contains(frame, []byte("genuine"))
				}))
				if victims != umbrella && passed == 0 { // umbrella's addresses end in acme's portal
					t.Errorf("control: without a guard nothing came to the portal of %s", victim.name)
				}
			}
		}
	})
}

// TestOtherProtocols sends what neither Services nor firewalls are usually asked about.
func TestOtherProtocols(t *testing.T) {
	w := newNeighbours(t)
	n1, n2 := w.nodes[0], w.nodes[1]
	def := n1.defaultPod("10.244.0.2")
	from, friend, friendAfar := w.pods[acme][0], n1.pod(acme, "friend", "10.0.0.18"), w.pods[acme][1]
	var victims []*pod
	for _, id := range []int32{initech, umbrella} {
		victims = append(victims, w.pods[id][0], w.pods[id][1])
	}
	protocols := map[string]byte{"IPIP": 4, "GRE": 47, "ESP": 50, "SCTP": 132, "IGMP": 2, "6in4": 41, "OSPF": 89, "reserved": 255}

	for name, proto := range protocols {
		t.Run(name, func(t *testing.T) {
			packet := func(from, to netip.Addr, text string) []byte {
				return ipPacket(proto, from, to, protocolPayload(proto, text))
			}
			nodes := map[*node]*tap{n1: n1.listen(proto), n2: n2.listen(proto)}
			var watched []*watch
			for _, v := range victims {
				watched = append(watched, w.watch(v))
			}
			near, far := friend.tap("eth0"), friendAfar.tap("eth0")
			targets := []netip.Addr{
				n1.ip, n2.ip, nodeUplinkAddr, portalUplinkAddr, podGateway, w.own[initech], w.away[acme], clusterDNS, netip.MustParseAddr("10.244.0.2"),
				netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("224.0.0.5"), netip.MustParseAddr("255.255.255.255"), netip.MustParseAddr("10.0.255.255"),
			}
			for _, v := range victims {
				targets = append(targets, v.a.Address)
			}
			for _, to := range targets {
				from.sendFrame(podGatewayMAC, unix.ETH_P_IP, packet(from.a.Address, to, "LEAK"))
			}
			// Within the Network it is nobody else's business; and the default network does reach its node.
			for _, to := range []*pod{friend, friendAfar} {
				from.sendRaw(packet(from.a.Address, to.a.Address, "genuine"))
			}
			arrives(t, "friend", near, "genuine", proto)
			arrives(t, "friend on the other node", far, "genuine", proto)
			for _, at := range watched {
				w.stillGenuine(t, at, func(from, to netip.Addr) [][]byte { return [][]byte{packet(from, to, "genuine")} })
			}
			def.sendRaw(packet(netip.MustParseAddr("10.244.0.2"), n1.ip, "genuine"))
			arrives(t, "node 1", nodes[n1], "genuine", proto)
			n1.sendRaw(packet(n1.ip, n2.ip, "genuine"))
			arrives(t, "node 2", nodes[n2], "genuine", proto)
		})
	}
}

// TestIPv6 speaks to a portal in a family that it does not have.
func TestIPv6(t *testing.T) {
	w := newNeighbours(t)
	n1 := w.nodes[0]
	from, friend, victim := w.pods[acme][0], n1.pod(acme, "friend", "10.0.0.18"), w.pods[initech][0]
	portal := &place{t: t, name: "portal", ns: n1.m.portal(acme).ns}
	// Each of these sees all that comes to it; the first one must.
	left := portal.tap(from.res.HostIfName)
	others := map[string]*tap{
		"the sender":         from.tap("eth0"),
		"its neighbour":      friend.tap("eth0"),
		"another's pod":      victim.tap("eth0"),
		"the node's uplink":  n1.tap(uplinkPrefix + fmt.Sprint(acme)),
		"another's uplink":   n1.tap(uplinkPrefix + fmt.Sprint(initech)),
		"the other node":     w.nodes[1].tap("eth0"),
		"the world":          w.world.tap("br0"),
		"the portal's other": portal.tap(friend.res.HostIfName),
	}
	src := netip.MustParseAddr("fe80::6838:1")
	for _, mac := range []net.HardwareAddr{
		podGatewayMAC, macOf(victim.a.Address), macOf(friend.a.Address), nodeUplinkMAC,
		{0x33, 0x33, 0, 0, 0, 1},
		{0x33, 0x33, 0, 0, 0, 2},
		{0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
	} {
		for _, to := range []string{"ff02::1", "ff02::2", "ff05::1:3", "fe80::858:a9ff:fefe:101", "fd00::1", "2001:db8::1", "::ffff:10.9.0.17", "::1"} {
			dst := netip.MustParseAddr(to)
			from.sendFrame(mac, unix.ETH_P_IPV6, ipv6Packet(unix.IPPROTO_ICMPV6, src, dst, echoRequest6(src, dst, "LEAK")))
			from.sendFrame(mac, unix.ETH_P_IPV6, ipv6Packet(47, src, dst, []byte("LEAK, GRE")))
			// Who is there? An answer would tell.
			solicit := slices.Concat([]byte{135, 0, 0, 0, 0, 0, 0, 0}, dst.AsSlice(), []byte{1, 1, 2, 0, 0, 0, 0, 1}, []byte("LEAK"))
			from.sendFrame(mac, unix.ETH_P_IPV6, ipv6Packet(unix.IPPROTO_ICMPV6, src, dst, checksum6(src, dst, solicit)))
		}
	}
	from.sendFrame(podGatewayMAC, unix.ETH_P_IPV6, ipv6Packet(47, src, src, []byte("last")))
	sent := 0
	w.world.must(left.until(func(frame []byte) bool {
		if bytes.Contains(frame, []byte("LEAK")) {
			sent++
		}
		return bytes.Contains(frame, []byte("last"))
	}))
	if want := 7 * 8 * 3; sent != want {
		t.Errorf("%d frames left the pod, want %d", sent, want)
	}
	// Something genuine goes everywhere, so that what came before it was seen before it.
	genuine := func(p *place, src, dst netip.Addr) {
		p.sendRaw(udpPacket(netip.AddrPortFrom(src, 7), netip.AddrPortFrom(dst, 80), []byte("genuine")))
	}
	genuine(friend.place, friend.a.Address, from.a.Address)
	genuine(from.place, from.a.Address, friend.a.Address)
	genuine(w.pods[initech][1].place, w.pods[initech][1].a.Address, victim.a.Address)
	genuine(from.place, from.a.Address, internet)
	genuine(victim.place, victim.a.Address, internet)
	genuine(n1.place, n1.ip, w.nodes[1].ip)
	genuine(friend.place, friend.a.Address, internet)
	for name, tap := range others {
		w.world.must(tap.until(func(frame []byte) bool {
			if binary.BigEndian.Uint16(frame[12:]) == unix.ETH_P_IPV6 && (bytes.Contains(frame, []byte("LEAK")) || name == "the sender") {
				t.Errorf("%s got %x", name, frame)
			}
			return bytes.Contains(frame, []byte("genuine"))
		}))
	}
}

// arrives reads until text comes in a packet of the protocol, and complains of everything that leaked before.
func arrives(t *testing.T, where string, tap *tap, text string, proto byte) {
	t.Helper()
	err := tap.until(func(packet []byte) bool {
		if i := bytes.Index(packet, []byte("LEAK")); i >= 0 {
			t.Errorf("%s got a packet: %x %s", where, packet[:i], packet[i:])
		}
		return bytes.Contains(packet, []byte(text)) && packet[tap.header+9] == proto
	})
	if err != nil {
		t.Fatalf("control: %s does not get its own packet of protocol %d: %v", where, proto, err)
	}
}

// protocolPayload is text behind the header that makes a packet of the protocol one that conntrack takes for valid.
func protocolPayload(proto byte, text string) []byte {
	switch proto {
	case 132: // SCTP: ports, then a chunk INIT (RFC 9260)
		chunk := append([]byte{1, 0, 0, byte(20 + len(text)), 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1}, text...)
		packet := append([]byte{0, 9, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0}, chunk...)
		binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))
		return packet
	case 47: // GRE, version 0, some IPv4 within
		return append([]byte{0, 0, 8, 0}, text...)
	case 4:
		return ipPacket(unix.IPPROTO_UDP, netip.MustParseAddr("10.0.0.17"), netip.MustParseAddr("10.9.0.17"), append(make([]byte, 8), text...))
	}
	return append(make([]byte, 8), text...)
}

// tap is what comes to a link, or to a raw socket.
type tap struct {
	packets chan []byte
	// header is how long what stands before the IP header is.
	header int
}

// tap hears all frames that arrive on a link of the place, whatever becomes of them.
func (p *place) tap(link string) *tap {
	p.t.Helper()
	return p.receive(unix.AF_PACKET, 0, func(fd int) error {
		l, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: l.Index, Protocol: htons(unix.ETH_P_ALL)})
	})
}

// listen hears IPv4 packets of a protocol that are delivered to the place.
func (p *place) listen(proto byte) *tap {
	p.t.Helper()
	return p.receive(unix.AF_INET, int(proto), func(int) error { return nil })
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (p *place) receive(family, proto int, bind func(fd int) error) *tap {
	p.t.Helper()
	var fd int
	p.must(p.do(func() (err error) {
		if fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(20 * time.Millisecond))
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait), bind(fd))
	}))
	t, stop, done := &tap{packets: make(chan []byte, 1<<14)}, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, from, err := unix.Recvfrom(fd, buf, 0)
			link, ok := from.(*unix.SockaddrLinklayer)
			if outgoing := ok && link.Pkttype == unix.PACKET_OUTGOING; err == nil && !outgoing {
				t.packets <- bytes.Clone(buf[:n])
			}
		}
	}()
	p.t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	if family == unix.AF_PACKET {
		t.header = 14
	}
	return t
}

// until reads packets up to the last one that is of interest.
func (t *tap) until(last func(packet []byte) bool) error {
	deadline := time.After(patience)
	for {
		select {
		case packet := <-t.packets:
			if last(packet) {
				return nil
			}
		case <-deadline:
			return errors.New("no such packet came")
		}
	}
}

// sendFrame sends an Ethernet frame by eth0.
func (p *place) sendFrame(to net.HardwareAddr, ethertype uint16, payload []byte) {
	p.t.Helper()
	p.must(p.do(func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := slices.Concat(to, l.HardwareAddr, binary.BigEndian.AppendUint16(nil, ethertype), payload)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Protocol: htons(ethertype), Halen: 6, Addr: [8]byte(append(slices.Clone(to), 0, 0))})
	}))
}

func ipv6Packet(next byte, src, dst netip.Addr, payload []byte) []byte {
	head := []byte{0x60, 0, 0, 0, 0, byte(len(payload)), next, 255}
	return slices.Concat(head, src.AsSlice(), dst.AsSlice(), payload)
}

func echoRequest6(src, dst netip.Addr, text string) []byte {
	return checksum6(src, dst, append([]byte{128, 0, 0, 0, 0x68, 0x38, 0, 1}, text...))
}

// checksum6 fills in the checksum of an ICMPv6 message.
func checksum6(src, dst netip.Addr, message []byte) []byte {
	pseudo := slices.Concat(src.AsSlice(), dst.AsSlice(), []byte{0, 0, 0, byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6}, message)
	binary.BigEndian.PutUint16(message[2:], checksum(pseudo))
	return message
}
