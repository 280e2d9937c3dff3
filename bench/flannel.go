package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The peer across nodes: one VXLAN device per node, laid out as flannel's vxlan
// backend does it. Its own UDP port and number, a /24 of pod addresses per node, a
// route to each other node's /24 by way of that node's VXLAN device, and permanent
// neighbour and forwarding entries, so that nothing is looked up. The pods behind it
// are attached as the ptp plugin does.

const (
	flannelLink = "flannel.1"
	flannelVNI  = 1
	flannelPort = 8472
	// flannelHost is the node's end of a pod's veth.
	flannelHost = "bench-ptp"
	// vxlanOverhead is what the headers take from the underlay's MTU.
	vxlanOverhead = 50
)

// flannel is the layout on all nodes, with one pod on each.
type flannel struct {
	nodes []node
	// pods are the places of the pods, by node.
	pods []place
	// namespaces of the pods; a pod is gone when its file is closed.
	namespaces []*os.File
}

// flannelSubnet is the range of the i-th node; its first address is the VXLAN
// device's. It is a part of the cluster's pod CIDR that no node has: kube-proxy
// masquerades what comes from elsewhere.
func flannelSubnet(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(200 + i), 0}), 24)
}

// flannelMAC is the hardware address of the i-th node's VXLAN device.
func flannelMAC(i int) net.HardwareAddr {
	return net.HardwareAddr{0x0e, 0xbe, 0x0c, 0, 0, byte(i)}
}

// layFlannel makes the layout. The caller removes it, also after an error.
func layFlannel(nodes []node) (*flannel, error) {
	f := &flannel{nodes: nodes}
	for i, n := range nodes {
		if err := inNetns(n.netns, func() error { return f.layNode(i) }); err != nil {
			return f, fmt.Errorf("lay out VXLAN on node %s: %w", n.name, err)
		}
	}
	return f, nil
}

func (f *flannel) layNode(i int) error {
	if err := f.removeLinks(); err != nil {
		return err
	}
	underlay, err := linkWith(f.nodes[i].address)
	if err != nil {
		return err
	}
	mtu := underlay.Attrs().MTU - vxlanOverhead
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = flannelLink, mtu, flannelMAC(i)
	if err := netlink.LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: flannelVNI, Port: flannelPort, VtepDevIndex: underlay.Attrs().Index,
		SrcAddr: f.nodes[i].address.AsSlice(), Learning: false,
	}); err != nil {
		return fmt.Errorf("make %s: %w", flannelLink, err)
	}
	vxlan, err := netlink.LinkByName(flannelLink)
	if err != nil {
		return fmt.Errorf("find %s: %w", flannelLink, err)
	}
	if err := netlink.AddrAdd(vxlan, &netlink.Addr{IPNet: host(flannelSubnet(i).Addr())}); err != nil {
		return fmt.Errorf("give %s its address: %w", flannelLink, err)
	}
	if err := netlink.LinkSetUp(vxlan); err != nil {
		return fmt.Errorf("set %s up: %w", flannelLink, err)
	}
	for j, other := range f.nodes {
		if j == i {
			continue
		}
		if err := routeTo(vxlan, j, other); err != nil {
			return fmt.Errorf("add the way to node %s: %w", other.name, err)
		}
	}
	return f.addPod(i, mtu)
}

// routeTo is what flannel adds for each lease of another node.
func routeTo(vxlan netlink.Link, j int, other node) error {
	index, gateway := vxlan.Attrs().Index, flannelSubnet(j).Addr().AsSlice()
	return errors.Join(
		netlink.NeighSet(&netlink.Neigh{
			LinkIndex: index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST,
			IP: gateway, HardwareAddr: flannelMAC(j),
		}),
		netlink.NeighSet(&netlink.Neigh{
			LinkIndex: index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
			IP: other.address.AsSlice(), HardwareAddr: flannelMAC(j),
		}),
		netlink.RouteReplace(&netlink.Route{
			LinkIndex: index, Scope: netlink.SCOPE_UNIVERSE, Dst: ipNet(flannelSubnet(j)), Gw: gateway,
			Flags: int(netlink.FLAG_ONLINK),
		}),
	)
}

// addPod attaches a pod to the i-th node, whose namespace the calling thread is in.
func (f *flannel) addPod(i, mtu int) error {
	gateway := flannelSubnet(i).Addr().Next()
	addr := gateway.Next()
	ns, err := newNetns()
	if err != nil {
		return err
	}
	f.namespaces = append(f.namespaces, ns)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = flannelHost, mtu
	if err := netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: attrs, PeerName: "eth0", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns.Fd()),
	}); err != nil {
		return fmt.Errorf("make a pod's veth: %w", err)
	}
	link, err := netlink.LinkByName(flannelHost)
	if err != nil {
		return fmt.Errorf("find %s: %w", flannelHost, err)
	}
	err = errors.Join(
		netlink.AddrAdd(link, &netlink.Addr{IPNet: host(gateway)}),
		netlink.LinkSetUp(link),
		netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: host(addr)}),
	)
	if err != nil {
		return fmt.Errorf("set up %s: %w", flannelHost, err)
	}
	p := place{netns: netnsPath(ns), addr: addr}
	f.pods = append(f.pods, p)
	return inNetns(p.netns, func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		index := eth0.Attrs().Index
		err = errors.Join(netlink.AddrAdd(eth0, &netlink.Addr{IPNet: host(addr)}), netlink.LinkSetUp(eth0))
		for _, route := range []netlink.Route{
			{LinkIndex: index, Scope: netlink.SCOPE_LINK, Dst: host(gateway)},
			{LinkIndex: index, Gw: gateway.AsSlice()},
		} {
			err = errors.Join(err, netlink.RouteReplace(&route))
		}
		if err != nil {
			return fmt.Errorf("set up eth0: %w", err)
		}
		return nil
	})
}

// remove takes the layout away.
func (f *flannel) remove() error {
	var errs []error
	for _, n := range f.nodes {
		errs = append(errs, inNetns(n.netns, f.removeLinks))
	}
	for _, ns := range f.namespaces {
		errs = append(errs, ns.Close())
	}
	return errors.Join(errs...)
}

func (f *flannel) removeLinks() error {
	for _, name := range []string{flannelLink, flannelHost} {
		if err := removeLink(name); err != nil {
			return err
		}
	}
	return nil
}

// removeLink removes a link of the calling thread's namespace, if it is there.
func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// linkWith is the link that has an address.
func linkWith(a netip.Addr) (netlink.Link, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, addr := range addrs {
		if addr.IP.Equal(a.AsSlice()) {
			return netlink.LinkByIndex(addr.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no link has the address %s", a)
}

func host(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
