package portal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// HostIfName is the name of an attachment's link inside its portal.
func HostIfName(containerID, ifName string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifName))
	return podLinkPrefix + hex.EncodeToString(sum[:5])
}

// Attach connects a pod to the portal. It may be repeated, also after a crash in its middle.
// It returns ErrNoPortal if this Manager has not ensured the portal.
func (m *Manager) Attach(ctx context.Context, id int32, a Attachment) (Result, error) {
	p := m.portal(id)
	p.mu.RLock()
	defer p.mu.RUnlock()
	if !p.ready {
		return Result{}, fmt.Errorf("attach to portal %d: %w", id, ErrNoPortal)
	}
	if !slices.ContainsFunc(p.blocks, func(b netip.Prefix) bool { return b.Contains(a.Address) }) {
		return Result{}, fmt.Errorf("attach to portal %d: %v is in none of the blocks %v that this node holds; ensure the portal with its block first", id, a.Address, p.blocks)
	}
	if err := ctx.Err(); err != nil {
		return Result{}, err
	}
	res, err := p.attach(a)
	if err != nil {
		return Result{}, fmt.Errorf("attach %s to portal %d: %w", a.Address, id, err)
	}
	return res, nil
}

// podNetns opens the pod's namespace and a socket in it.
func podNetns(path string) (netns.NsHandle, *netlink.Handle, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return ns, nil, fmt.Errorf("open the pod's network namespace %s: %w", path, err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return ns, nil, fmt.Errorf("enter the pod's network namespace %s: %w", path, err)
	}
	return ns, h, nil
}

func (p *portal) attach(a Attachment) (Result, error) {
	ns, pod, err := podNetns(a.Netns)
	if err != nil {
		return Result{}, err
	}
	defer ns.Close()
	defer pod.Close()

	res := Result{HostIfName: HostIfName(a.ContainerID, a.IfName), PodMAC: macOf(a.Address), Gateway: podGateway, MTU: p.mtu}
	// Both ends are born where they belong, the portal's end up.
	veth := &netlink.Veth{
		LinkAttrs: netlink.NewLinkAttrs(), PeerName: a.IfName, PeerNamespace: netlink.NsFd(ns),
		PeerHardwareAddr: res.PodMAC, PeerTxQLen: -1,
	}
	veth.Name, veth.MTU, veth.HardwareAddr, veth.Flags = res.HostIfName, res.MTU, podGatewayMAC, net.FlagUp
	err = p.link.LinkAdd(veth)
	if errors.Is(err, unix.EEXIST) {
		// An earlier call got here, or part of the way.
		if p.check(pod, a) == nil {
			return res, nil
		}
		if old, lookup := p.link.LinkByName(res.HostIfName); lookup == nil {
			if err := ignoreGone(p.link.LinkDel(old)); err != nil {
				return Result{}, fmt.Errorf("delete link %s: %w", res.HostIfName, err)
			}
			err = p.link.LinkAdd(veth)
		}
		if errors.Is(err, unix.EEXIST) {
			return Result{}, fmt.Errorf("the pod has an interface %s that is not ours: %w", a.IfName, err)
		}
	}
	if err != nil {
		return Result{}, fmt.Errorf("create link %s: %w", res.HostIfName, err)
	}
	if err := p.configure(pod, a, veth.Index); err != nil {
		// Half a link would be in the way of whoever comes next.
		return Result{}, errors.Join(err, ignoreGone(p.link.LinkDel(veth)))
	}
	return res, nil
}

// configure sets addresses and routes on both ends of a new link.
func (p *portal) configure(pod *netlink.Handle, a Attachment, index int) error {
	eth, err := pod.LinkByName(a.IfName)
	if err != nil {
		return fmt.Errorf("find %s in the pod: %w", a.IfName, err)
	}
	if err := pod.AddrAdd(eth, &netlink.Addr{IPNet: host(a.Address)}); err != nil {
		return fmt.Errorf("set address of %s: %w", a.IfName, err)
	}
	if err := pod.LinkSetUp(eth); err != nil {
		return fmt.Errorf("set %s up: %w", a.IfName, err)
	}
	if err := pod.NeighSet(neighbour(eth.Attrs().Index, podGateway)); err != nil {
		return fmt.Errorf("set the gateway's neighbour entry: %w", err)
	}
	def := via(eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), podGateway)
	if err := pod.RouteReplace(&def); err != nil {
		return fmt.Errorf("set default route: %w", err)
	}

	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}}
	if err := p.link.AddrAdd(link, &netlink.Addr{IPNet: host(podGateway)}); err != nil {
		return fmt.Errorf("set the gateway's address: %w", err)
	}
	if err := p.link.NeighSet(neighbour(index, a.Address)); err != nil {
		return fmt.Errorf("set the pod's neighbour entry: %w", err)
	}
	// Last, as from here on the pod can be reached and may send.
	if err := p.link.RouteReplace(&netlink.Route{LinkIndex: index, Dst: host(a.Address), Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("set route to the pod: %w", err)
	}
	return nil
}

func neighbour(index int, a netip.Addr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: index, Family: netlink.FAMILY_V4, State: unix.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: macOf(a)}
}

// Detach removes what Attach made; the connections of the address stay, see EndConnections. Anything missing is
// success: link, pod's namespace, portal.
func (m *Manager) Detach(ctx context.Context, id int32, a Attachment) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.portal(id).detach(a); err != nil {
		return fmt.Errorf("detach %v from portal %d: %w", a.Address, id, err)
	}
	return nil
}

func (p *portal) detach(a Attachment) error {
	release, found, err := p.forReading()
	if err != nil || !found {
		return err // the links died with the portal
	}
	defer release()
	link, err := p.link.LinkByName(HostIfName(a.ContainerID, a.IfName))
	if err == nil {
		err = ignoreGone(p.link.LinkDel(link))
	}
	if err != nil && !isLinkNotFound(err) {
		return fmt.Errorf("delete link: %w", err)
	}
	return nil
}

// EndConnections makes the portal and the node forget the connections of an address that was detached, so that the
// next pod to get it inherits none. An address that a pod has is left alone. It takes some 10 ms of the kernel's
// time for each 100 000 connections that the machine may have, whether it has them or not.
func (m *Manager) EndConnections(ctx context.Context, id int32, addr netip.Addr) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := m.endConnections(m.portal(id), addr); err != nil {
		return fmt.Errorf("portal %d: %w", id, err)
	}
	return nil
}

func (m *Manager) endConnections(p *portal, addr netip.Addr) error {
	release, found, err := p.forReading()
	if err != nil {
		return err
	}
	if !found {
		return nil // Remove has ended the node's connections
	}
	defer release()
	if _, taken, err := p.podLink(addr); err != nil || taken || !addr.Is4() {
		return err
	}
	if err := flushAddr(p.nf, p.link, addr); err != nil {
		return err
	}
	return flushAddr(m.nf, m.link, addr)
}

// podLink returns the index of the link to which addr is routed, if there is a pod with that address.
func (p *portal) podLink(addr netip.Addr) (index int, found bool, err error) {
	routes, err := p.link.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: host(addr)}, netlink.RT_FILTER_DST)
	if err != nil {
		return 0, false, fmt.Errorf("look up route to %v: %w", addr, err)
	}
	for _, r := range routes {
		if r.Type == unix.RTN_UNICAST && len(r.Gw) == 0 {
			return r.LinkIndex, true, nil
		}
	}
	return 0, false, nil
}

// Check tells what is wrong with an attachment, nil if nothing is.
func (m *Manager) Check(ctx context.Context, id int32, a Attachment) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p := m.portal(id)
	release, found, err := p.forReading()
	if err != nil {
		return fmt.Errorf("check portal %d: %w", id, err)
	}
	if !found {
		return fmt.Errorf("check portal %d: %w", id, ErrNoPortal)
	}
	defer release()
	ns, pod, err := podNetns(a.Netns)
	if err != nil {
		return fmt.Errorf("check portal %d: %w", id, err)
	}
	defer ns.Close()
	defer pod.Close()
	if err := p.check(pod, a); err != nil {
		return fmt.Errorf("check %v in portal %d: %w", a.Address, id, err)
	}
	return nil
}

func (p *portal) check(pod *netlink.Handle, a Attachment) error {
	name := HostIfName(a.ContainerID, a.IfName)
	link, err := p.link.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	eth, err := pod.LinkByName(a.IfName)
	if err != nil {
		return fmt.Errorf("the pod's %s: %w", a.IfName, err)
	}
	l, e := link.Attrs(), eth.Attrs()
	if l.ParentIndex != e.Index || e.ParentIndex != l.Index {
		return fmt.Errorf("the pod's %s is not the other end of %s", a.IfName, name)
	}
	if l.Flags&net.FlagUp == 0 || e.Flags&net.FlagUp == 0 {
		return fmt.Errorf("%s or the pod's %s is down", name, a.IfName)
	}
	if !bytes.Equal(e.HardwareAddr, macOf(a.Address)) || !bytes.Equal(l.HardwareAddr, podGatewayMAC) {
		return fmt.Errorf("%s or the pod's %s has another hardware address", name, a.IfName)
	}
	for _, end := range []struct {
		h    *netlink.Handle
		link netlink.Link
		want netip.Addr
	}{{p.link, link, podGateway}, {pod, eth, a.Address}} {
		addrs, err := end.h.AddrList(end.link, netlink.FAMILY_V4)
		if err != nil {
			return fmt.Errorf("list addresses: %w", err)
		}
		if !slices.ContainsFunc(addrs, func(x netlink.Addr) bool { return prefixOf(x.IPNet) == netip.PrefixFrom(end.want, 32) }) {
			return fmt.Errorf("%s lacks the address %v", end.link.Attrs().Name, end.want)
		}
	}
	defaults, err := pod.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: e.Index}, netlink.RT_FILTER_OIF)
	if err != nil {
		return fmt.Errorf("list the pod's routes: %w", err)
	}
	if !slices.ContainsFunc(defaults, func(r netlink.Route) bool { return prefixOf(r.Dst).Bits() == 0 && r.Gw.Equal(podGateway.AsSlice()) }) {
		return fmt.Errorf("the pod lacks the default route by %v", podGateway)
	}
	if index, found, err := p.podLink(a.Address); err != nil {
		return err
	} else if !found || index != l.Index {
		return fmt.Errorf("%v is not routed to %s", a.Address, name)
	}
	return nil
}

// Attachments returns the names of the pod links that exist in the portal, none if there is no portal; compare
// with HostIfName.
func (m *Manager) Attachments(id int32) ([]string, error) {
	p := m.portal(id)
	release, found, err := p.forReading()
	if err != nil || !found {
		return nil, err
	}
	defer release()
	links, err := p.link.LinkList()
	if err != nil {
		return nil, fmt.Errorf("portal %d: list links: %w", id, err)
	}
	var names []string
	for _, l := range links {
		if l.Type() == "veth" && strings.HasPrefix(l.Attrs().Name, podLinkPrefix) {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}
