package portal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var (
	podGateway       = netip.MustParseAddr("169.254.1.1")  // on every pod's link inside the portal
	nodeUplinkAddr   = netip.MustParseAddr("169.254.77.1") // the node's end of every uplink
	portalUplinkAddr = netip.MustParseAddr("169.254.77.2") // the portal's end

	// Link-layer addresses follow from addresses, so that neighbours need no asking.
	podGatewayMAC   = macOf(podGateway)
	nodeUplinkMAC   = macOf(nodeUplinkAddr)
	portalUplinkMAC = macOf(portalUplinkAddr)
)

// vxlanOverhead is what the overlay adds to a packet: outer IPv4, UDP, VXLAN and inner Ethernet headers.
const vxlanOverhead = 20 + 8 + 8 + 14

// macOf is the hardware address of whoever has the IPv4 address a.
func macOf(a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{0x0a, 0x58, b[0], b[1], b[2], b[3]}
}

func host(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf is the inverse of ipNet; nil is the default route.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

func isLinkNotFound(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}

// ignoreGone makes success of deleting what is not there.
func ignoreGone(err error) error {
	if isLinkNotFound(err) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

func (s Spec) validate(cfg NodeConfig) error {
	if s.ID < 1 || s.ID >= 1<<24 {
		return fmt.Errorf("id %d is no VXLAN network identifier: it must be 1 to %d", s.ID, 1<<24-1)
	}
	within := func(what string, p netip.Prefix) error {
		if !p.IsValid() || !p.Addr().Is4() || p != p.Masked() {
			return fmt.Errorf("%s %v is no canonical IPv4 prefix", what, p)
		}
		if p.Bits() < s.CIDR.Bits() || !s.CIDR.Contains(p.Addr()) {
			return fmt.Errorf("%s %v is outside of the network's %v", what, p, s.CIDR)
		}
		return nil
	}
	if err := within("CIDR", s.CIDR); err != nil {
		return err
	}
	for _, b := range s.Blocks {
		if err := within("block", b); err != nil {
			return err
		}
	}
	for _, r := range s.Remote {
		if err := within("remote block", r.CIDR); err != nil {
			return err
		}
		if !r.NodeIP.Is4() || r.NodeIP == cfg.NodeIP {
			return fmt.Errorf("remote block %v: %v is not another node's IPv4 address", r.CIDR, r.NodeIP)
		}
	}
	return nil
}

// Ensure makes the portal what spec says: creates what misses, removes what is stale, and changes nothing that is
// right already. It returns ErrNoGuard before EnsureGuard has succeeded. Pods stay connected throughout.
func (m *Manager) Ensure(ctx context.Context, spec Spec) error {
	if err := m.ensure(ctx, spec); err != nil {
		return fmt.Errorf("portal %d: %w", spec.ID, err)
	}
	return nil
}

func (m *Manager) ensure(ctx context.Context, spec Spec) error {
	if err := spec.validate(m.cfg); err != nil {
		return err
	}
	m.guard.Lock()
	guarded := m.guard.ensured
	m.guard.Unlock()
	if !guarded {
		return ErrNoGuard
	}
	underlay, err := m.underlay()
	if err != nil {
		return err
	}
	p := m.portal(spec.ID)
	p.changing.Lock()
	defer p.changing.Unlock()

	if err := m.ensureNetns(p); err != nil {
		return err
	}
	// Only this function and Remove change the namespace, and p.changing keeps them apart.
	if err := inNetns(p.ns, portalSysctls); err != nil {
		return err
	}
	// Rules come before links: there is never a way without a guard.
	r := portalRules(spec, m.cfg.ClusterDNS)
	changed, err := m.apply(ctx, p.ns, p.nf, &p.rules, r)
	if err != nil {
		return err
	}
	mtu := underlay.Attrs().MTU - vxlanOverhead
	steps := []struct {
		name string
		do   func() error
	}{
		{"loopback", func() error { return p.ensureLoopback(m.cfg.ClusterDNS) }},
		{"uplink", func() error { return m.ensureUplink(p, mtu) }},
		{"overlay", func() error { return m.ensureOverlay(p, mtu) }},
		{"routes", func() error { return p.ensureRoutes(spec) }},
		{"node routes", func() error { return m.ensureNodeRoutes(p, spec.Blocks) }},
		{"connections", func() error {
			if !changed {
				return nil
			}
			return p.flushStaleUDP(spec.Services)
		}},
	}
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready, p.mtu, p.blocks = true, mtu, slices.Clone(spec.Blocks)
	return nil
}

// ensureNetns makes the portal's namespace and gives it its name; if somebody took the name away, the namespace with
// its pods gets it back.
func (m *Manager) ensureNetns(p *portal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	found, err := p.open()
	if err != nil {
		return err
	}
	if !found {
		ns, err := newNetns()
		if err != nil {
			return err
		}
		if err := p.use(ns); err != nil {
			return err
		}
	}
	if sameNetns(p.path, p.ns) {
		return nil
	}
	return bindNetns(p.ns, p.path)
}

// portalSysctls runs in the portal, before its links exist: links inherit.
func portalSysctls() error {
	if err := setSysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	for _, scope := range []string{"all", "default"} {
		for _, s := range [][2]string{
			{"ipv4/conf/%s/rp_filter", "0"}, // the antispoof chain is exact, and knows pods
			{"ipv4/conf/%s/send_redirects", "0"},
			{"ipv4/conf/%s/accept_redirects", "0"},
			{"ipv4/conf/%s/accept_source_route", "0"},
			{"ipv4/conf/%s/arp_ignore", "1"}, // a pod is answered for its gateway only
			{"ipv4/conf/%s/arp_announce", "2"},
			{"ipv6/conf/%s/disable_ipv6", "1"},
		} {
			if err := setSysctl(fmt.Sprintf(s[0], scope), s[1]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *portal) ensureLoopback(clusterDNS netip.Addr) error {
	lo, err := p.link.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := ensureUp(p.link, lo, 0); err != nil {
		return err
	}
	return ensureAddr(p.link, lo, clusterDNS, netlink.SCOPE_UNIVERSE)
}

// ensureUplink makes the veth pair between node and portal.
func (m *Manager) ensureUplink(p *portal, mtu int) error {
	name := uplinkPrefix + strconv.Itoa(int(p.id))
	outer, err := m.link.LinkByName(name)
	if err != nil && !isLinkNotFound(err) {
		return err
	}
	inner, err := p.link.LinkByName(uplinkName)
	if err != nil && !isLinkNotFound(err) {
		return err
	}
	paired := outer != nil && inner != nil &&
		outer.Attrs().ParentIndex == inner.Attrs().Index && inner.Attrs().ParentIndex == outer.Attrs().Index &&
		bytes.Equal(outer.Attrs().HardwareAddr, nodeUplinkMAC) && bytes.Equal(inner.Attrs().HardwareAddr, portalUplinkMAC)
	if !paired {
		if outer != nil {
			if err := ignoreGone(m.link.LinkDel(outer)); err != nil {
				return fmt.Errorf("delete link %s: %w", name, err)
			}
		}
		if inner != nil {
			if err := ignoreGone(p.link.LinkDel(inner)); err != nil {
				return fmt.Errorf("delete link %s: %w", uplinkName, err)
			}
		}
		veth := &netlink.Veth{
			LinkAttrs: netlink.NewLinkAttrs(), PeerName: uplinkName, PeerNamespace: netlink.NsFd(p.ns),
			PeerHardwareAddr: portalUplinkMAC, PeerTxQLen: -1,
		}
		veth.Name, veth.MTU, veth.HardwareAddr = name, mtu, nodeUplinkMAC
		if err := m.link.LinkAdd(veth); err != nil {
			return fmt.Errorf("create link %s: %w", name, err)
		}
		if outer, err = m.link.LinkByName(name); err != nil {
			return err
		}
		if inner, err = p.link.LinkByName(uplinkName); err != nil {
			return err
		}
	}
	if err := inNetns(m.ns, func() error {
		for _, s := range [][2]string{
			{"ipv6/conf/%s/disable_ipv6", "1"},
			{"ipv4/conf/%s/rp_filter", "0"}, // the guard is exact
			{"ipv4/conf/%s/accept_redirects", "0"},
			{"ipv4/conf/%s/send_redirects", "0"},
			{"ipv4/conf/%s/forwarding", "1"},
		} {
			if err := setSysctl(fmt.Sprintf(s[0], name), s[1]); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for _, end := range []struct {
		h         *netlink.Handle
		l         netlink.Link
		addr      netip.Addr
		scope     netlink.Scope
		neighbour netip.Addr
	}{
		// Link scope keeps the node from speaking to others by this address.
		{m.link, outer, nodeUplinkAddr, netlink.SCOPE_LINK, portalUplinkAddr},
		{p.link, inner, portalUplinkAddr, netlink.SCOPE_UNIVERSE, nodeUplinkAddr},
	} {
		if err := ensureUp(end.h, end.l, mtu); err != nil {
			return err
		}
		if err := ensureAddr(end.h, end.l, end.addr, end.scope); err != nil {
			return err
		}
		if err := ensureNeighbours(end.h, end.l, netlink.FAMILY_V4, []netip.Addr{end.neighbour}); err != nil {
			return err
		}
	}
	return nil
}

// ensureOverlay makes the VXLAN device. It is created from the node's namespace, where its UDP socket stays.
func (m *Manager) ensureOverlay(p *portal, mtu int) error {
	mac := macOf(m.cfg.NodeIP)
	vx, err := p.link.LinkByName(overlayName)
	if err != nil && !isLinkNotFound(err) {
		return err
	}
	if vx != nil {
		have, ok := vx.(*netlink.Vxlan)
		if !ok || have.VxlanId != int(p.id) || have.Port != m.cfg.VXLANPort || have.Learning || have.Proxy ||
			!have.SrcAddr.Equal(m.cfg.NodeIP.AsSlice()) || !bytes.Equal(have.HardwareAddr, mac) {
			if err := ignoreGone(p.link.LinkDel(vx)); err != nil {
				return fmt.Errorf("delete link %s: %w", overlayName, err)
			}
			vx = nil
		}
	}
	if vx == nil {
		link := &netlink.Vxlan{LinkAttrs: netlink.NewLinkAttrs(), VxlanId: int(p.id), Port: m.cfg.VXLANPort, SrcAddr: m.cfg.NodeIP.AsSlice()}
		link.Name, link.MTU, link.HardwareAddr, link.Namespace = overlayName, mtu, mac, netlink.NsFd(p.ns)
		if err := m.link.LinkAdd(link); err != nil {
			if errors.Is(err, unix.EEXIST) {
				err = fmt.Errorf("%w: VXLAN network identifier %d is in use on this node by something else; find it with `ip -d link show type vxlan` in every namespace", err, p.id)
			}
			return fmt.Errorf("create link %s: %w", overlayName, err)
		}
		if vx, err = p.link.LinkByName(overlayName); err != nil {
			return err
		}
	}
	return ensureUp(p.link, vx, mtu)
}

// ensureRoutes sets the portal's routes but those to pods, and the overlay's neighbours.
func (p *portal) ensureRoutes(spec Spec) error {
	uplink, err := p.link.LinkByName(uplinkName)
	if err != nil {
		return err
	}
	vx, err := p.link.LinkByName(overlayName)
	if err != nil {
		return err
	}
	nodes := map[netip.Addr]bool{}
	remote := make([]netlink.Route, 0, len(spec.Remote))
	for _, r := range spec.Remote {
		nodes[r.NodeIP] = true
		remote = append(remote, via(vx, r.CIDR, r.NodeIP))
	}
	// Neighbours come before the routes that use them.
	if err := ensureNeighbours(p.link, vx, netlink.FAMILY_V4, sortedKeys(nodes)); err != nil {
		return err
	}
	if err := ensureNeighbours(p.link, vx, unix.AF_BRIDGE, sortedKeys(nodes)); err != nil {
		return err
	}
	have, err := p.link.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{}, 0)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	on := func(match func(netlink.Route) bool) []netlink.Route {
		return slices.DeleteFunc(slices.Clone(have), func(r netlink.Route) bool { return !match(r) })
	}
	// What has no pod and no node must not leave by the default route.
	hole := netlink.Route{Dst: ipNet(spec.CIDR), Type: unix.RTN_BLACKHOLE}
	if err := ensureRouteSet(p.link, on(func(r netlink.Route) bool { return r.Type == unix.RTN_BLACKHOLE }), []netlink.Route{hole}); err != nil {
		return err
	}
	if err := ensureRouteSet(p.link, on(func(r netlink.Route) bool { return r.LinkIndex == vx.Attrs().Index }), remote); err != nil {
		return err
	}
	def := via(uplink, netip.PrefixFrom(netip.IPv4Unspecified(), 0), nodeUplinkAddr)
	return ensureRouteSet(p.link, on(func(r netlink.Route) bool { return r.LinkIndex == uplink.Attrs().Index }), []netlink.Route{def})
}

func via(l netlink.Link, dst netip.Prefix, gw netip.Addr) netlink.Route {
	return netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(dst), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Type: unix.RTN_UNICAST}
}

// nodeRoutes lists the node's routes into a portal.
func (m *Manager) nodeRoutes(uplink netlink.Link) ([]netlink.Route, error) {
	routes, err := m.link.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: uplink.Attrs().Index}, netlink.RT_FILTER_OIF)
	if err != nil {
		return nil, fmt.Errorf("list the node's routes: %w", err)
	}
	return routes, nil
}

// ensureNodeRoutes sets the node's routes to the Blocks it holds, and ends the connections of those it holds no more.
func (m *Manager) ensureNodeRoutes(p *portal, blocks []netip.Prefix) error {
	uplink, err := m.link.LinkByName(uplinkPrefix + strconv.Itoa(int(p.id)))
	if err != nil {
		return err
	}
	have, err := m.nodeRoutes(uplink)
	if err != nil {
		return err
	}
	var want []netlink.Route
	for _, b := range blocks {
		r := via(uplink, b, portalUplinkAddr)
		r.Src = nodeUplinkAddr.AsSlice()
		want = append(want, r)
	}
	if err := ensureRouteSet(m.link, have, want); err != nil {
		return err
	}
	for _, r := range have {
		if b := prefixOf(r.Dst); !slices.Contains(blocks, b) {
			if err := errors.Join(flushPrefix(p.link, b), flushPrefix(m.link, b)); err != nil {
				return err
			}
		}
	}
	return nil
}

// ensureRouteSet turns the routes have into want; it adds and replaces before it deletes.
func ensureRouteSet(h *netlink.Handle, have, want []netlink.Route) error {
	wanted := map[netip.Prefix]bool{}
	existing := map[netip.Prefix]netlink.Route{}
	for _, r := range have {
		existing[prefixOf(r.Dst)] = r
	}
	for _, w := range want {
		dst := prefixOf(w.Dst)
		wanted[dst] = true
		if r, ok := existing[dst]; ok && r.LinkIndex == w.LinkIndex && r.Gw.Equal(w.Gw) && r.Src.Equal(w.Src) && r.Type == w.Type && r.Flags&int(netlink.FLAG_ONLINK) == w.Flags {
			continue
		}
		if err := h.RouteReplace(&w); err != nil {
			return fmt.Errorf("set route %v: %w", dst, err)
		}
	}
	for dst, r := range existing {
		if !wanted[dst] {
			if err := ignoreGone(h.RouteDel(&r)); err != nil {
				return fmt.Errorf("delete route %v: %w", dst, err)
			}
		}
	}
	return nil
}

// ensureNeighbours makes the link's permanent neighbour (or, for AF_BRIDGE, forwarding) entries those of addrs.
func ensureNeighbours(h *netlink.Handle, l netlink.Link, family int, addrs []netip.Addr) error {
	have, err := h.NeighList(l.Attrs().Index, family)
	if err != nil {
		return fmt.Errorf("list neighbours of %s: %w", l.Attrs().Name, err)
	}
	known := map[netip.Addr]bool{}
	for _, n := range have {
		a, _ := netip.AddrFromSlice(n.IP)
		a = a.Unmap()
		if slices.Contains(addrs, a) {
			known[a] = n.State&unix.NUD_PERMANENT != 0 && bytes.Equal(n.HardwareAddr, macOf(a))
			continue
		}
		if n.State&(unix.NUD_PERMANENT|unix.NUD_REACHABLE|unix.NUD_STALE) == 0 {
			continue // the kernel's own, multicast for one
		}
		n.Family, n.LinkIndex = family, l.Attrs().Index
		if err := ignoreGone(h.NeighDel(&n)); err != nil {
			return fmt.Errorf("delete neighbour %v of %s: %w", a, l.Attrs().Name, err)
		}
	}
	for _, a := range addrs {
		if known[a] {
			continue
		}
		n := &netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: macOf(a)}
		if family == unix.AF_BRIDGE {
			n.Flags = unix.NTF_SELF
		}
		if err := h.NeighSet(n); err != nil {
			return fmt.Errorf("set neighbour %v of %s: %w", a, l.Attrs().Name, err)
		}
	}
	return nil
}

// ensureUp sets a link up, with the MTU unless that is 0.
func ensureUp(h *netlink.Handle, l netlink.Link, mtu int) error {
	if mtu != 0 && l.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set MTU %d of %s: %w", mtu, l.Attrs().Name, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// ensureAddr makes addr/32 the link's only IPv4 address, loopback's own aside.
func ensureAddr(h *netlink.Handle, l netlink.Link, addr netip.Addr, scope netlink.Scope) error {
	have, err := h.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
	}
	found := false
	for _, a := range have {
		switch p := prefixOf(a.IPNet); {
		case p == netip.PrefixFrom(addr, 32):
			found = true
		case p.Addr().IsLoopback():
		default:
			if err := ignoreGone(h.AddrDel(l, &a)); err != nil {
				return fmt.Errorf("delete address %v of %s: %w", p, l.Attrs().Name, err)
			}
		}
	}
	if found {
		return nil
	}
	if err := h.AddrReplace(l, &netlink.Addr{IPNet: host(addr), Scope: int(scope)}); err != nil {
		return fmt.Errorf("set address %v of %s: %w", addr, l.Attrs().Name, err)
	}
	return nil
}
