// Package tap joins a virtual machine to a pod's network namespace: everything that
// arrives at the pod's interface goes to a tap, whose other end is the machine's
// network card, and everything that the machine sends leaves by that interface.
//
// The namespace's own network stack never sees a packet of the pod's: the kernel
// redirects at the interface's ingress, before the stack. So the interface keeps the
// addresses that CNI gave it, which is where CNI and the kubelet look for them, and
// still only the guest answers for them.
package tap

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

const (
	// podInterface is the name that the CRI gives to a pod's interface.
	podInterface = "eth0"
	// tapName is the tap's name in the pod's namespace.
	tapName = "h8s-tap"
)

// Tap is a pod's interface as a virtual machine gets it.
type Tap struct {
	// File is the tap (with virtio-net headers). The tap, and with it all redirection to
	// it, ends with the last process that holds the file open.
	File *os.File
	// Link is what the guest has to configure on its network card.
	Link guestapi.Link
}

// Close closes the file; a virtual machine that holds it keeps its network.
func (t *Tap) Close() error { return t.File.Close() }

// Open makes the tap in the network namespace at path, in which CNI has set up eth0.
// What an earlier Open left there is replaced.
func Open(path string) (*Tap, error) {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open the pod's network namespace %s: %w", path, err)
	}
	defer ns.Close()
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink in the pod's network namespace %s: %w", path, err)
	}
	defer nl.Close()
	t, err := open(nl, ns)
	if err != nil {
		return nil, fmt.Errorf("connect the virtual machine to the pod's network namespace %s: %w", path, err)
	}
	return t, nil
}

func open(nl *netlink.Handle, ns netns.NsHandle) (_ *Tap, err error) {
	eth, err := nl.LinkByName(podInterface)
	if err != nil {
		return nil, fmt.Errorf("find %s, which the network plugin makes: %w", podInterface, err)
	}
	link, err := describe(nl, eth)
	if err != nil {
		return nil, err
	}
	if err := removeRedirect(nl, eth); err != nil {
		return nil, err
	}
	file, err := create(ns)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
		}
	}()
	tap, err := nl.LinkByName(tapName)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", tapName, err)
	}
	if err := nl.LinkSetMTU(tap, link.MTU); err != nil {
		return nil, fmt.Errorf("set the MTU of %s: %w", tapName, err)
	}
	if err := nl.LinkSetUp(tap); err != nil {
		return nil, fmt.Errorf("set %s up: %w", tapName, err)
	}
	// The direction out of the guest first, so that the tap is whole when the first
	// packet reaches it.
	if err := redirect(nl, tap, eth); err != nil {
		return nil, err
	}
	if err := redirect(nl, eth, tap); err != nil {
		return nil, err
	}
	return &Tap{File: file, Link: link}, nil
}

// Remove undoes Open where the process that held the tap was killed. It is
// idempotent, and a namespace that is gone is no error.
func Remove(path string) error {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the pod's network namespace %s: %w", path, err)
	}
	defer ns.Close()
	// A file that was a namespace's mount point remains for a moment after an unmount.
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(ns), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		return err
	}
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink in the pod's network namespace %s: %w", path, err)
	}
	defer nl.Close()
	eth, err := nl.LinkByName(podInterface)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s in %s: %w", podInterface, path, err)
	}
	return removeRedirect(nl, eth)
}

// create makes the tap in another network namespace: the kernel puts it where the
// calling thread is.
func create(ns netns.NsHandle) (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		file, err := func() (*os.File, error) {
			if err := netns.Set(ns); err != nil {
				return nil, fmt.Errorf("enter the pod's network namespace: %w", err)
			}
			// Not by package os, whose poller does not know taps.
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("open /dev/net/tun (is the module tun loaded?): %w", err)
			}
			request, err := unix.NewIfreq(tapName)
			if err != nil {
				unix.Close(fd)
				return nil, err
			}
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
				unix.Close(fd)
				return nil, fmt.Errorf("make %s: %w", tapName, err)
			}
			return os.NewFile(uintptr(fd), tapName), nil
		}()
		done <- result{file, err}
	}()
	r := <-done
	return r.file, r.err
}

// redirect sends everything that arrives at from out of to. With u32, whose empty key
// matches all: matchall and flower are modules of their own, which not every kernel has.
func redirect(nl *netlink.Handle, from, to netlink.Link) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}}
	if err := nl.QdiscAdd(qdisc); err != nil {
		return fmt.Errorf("add an ingress qdisc to %s: %w", from.Attrs().Name, err)
	}
	filter := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index,
			Parent:    qdisc.Handle,
			Priority:  1,
			Protocol:  unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := nl.FilterAdd(filter); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

func removeRedirect(nl *netlink.Handle, link netlink.Link) error {
	qdiscs, err := nl.QdiscList(link)
	if err != nil {
		return fmt.Errorf("list the qdiscs of %s: %w", link.Attrs().Name, err)
	}
	for _, qdisc := range qdiscs {
		if qdisc.Attrs().Parent != netlink.HANDLE_INGRESS {
			continue
		}
		if err := nl.QdiscDel(qdisc); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("remove the ingress qdisc of %s: %w", link.Attrs().Name, err)
		}
	}
	return nil
}

// describe reads what the guest's card needs in order to stand in for a link. Routes
// that the kernel made for an address are among them: a network plugin may have
// replaced such a route, and then it must not come back in the guest.
func describe(nl *netlink.Handle, link netlink.Link) (guestapi.Link, error) {
	attrs := link.Attrs()
	d := guestapi.Link{Name: attrs.Name, HardwareAddr: attrs.HardwareAddr.String(), MTU: attrs.MTU}

	addresses, err := nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return d, fmt.Errorf("list the addresses of %s: %w", attrs.Name, err)
	}
	for _, a := range addresses {
		if prefix, ok := toPrefix(a.IPNet); ok && !isLinkLocal6(prefix) {
			d.Addresses = append(d.Addresses, prefix)
		}
	}

	routes, err := nl.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: attrs.Index, Table: unix.RT_TABLE_MAIN},
		netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return d, fmt.Errorf("list the routes of %s: %w", attrs.Name, err)
	}
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST {
			continue
		}
		route, ok := toRoute(r)
		if ok && !isLinkLocal6(route.Destination) {
			d.Routes = append(d.Routes, route)
		}
	}
	// A gateway has to be reachable when its route is added.
	slices.SortStableFunc(d.Routes, func(a, b guestapi.Route) int {
		return cmp.Compare(boolToInt(a.Gateway.IsValid()), boolToInt(b.Gateway.IsValid()))
	})

	neighbours, err := nl.NeighList(attrs.Index, netlink.FAMILY_ALL)
	if err != nil {
		return d, fmt.Errorf("list the neighbours of %s: %w", attrs.Name, err)
	}
	for _, n := range neighbours {
		address, ok := netip.AddrFromSlice(n.IP)
		if ok && n.State&netlink.NUD_PERMANENT != 0 {
			d.Neighbours = append(d.Neighbours, guestapi.Neighbour{
				Address: address.Unmap(), HardwareAddr: n.HardwareAddr.String(),
			})
		}
	}
	return d, nil
}

func toRoute(r netlink.Route) (guestapi.Route, bool) {
	gateway := r.Gw
	if gateway == nil && len(r.MultiPath) > 0 {
		gateway = r.MultiPath[0].Gw
	}
	route := guestapi.Route{
		OnLink:    r.Flags&int(netlink.FLAG_ONLINK) != 0,
		ScopeLink: r.Scope == netlink.SCOPE_LINK,
	}
	if gateway != nil {
		address, ok := netip.AddrFromSlice(gateway)
		if !ok {
			return route, false
		}
		route.Gateway = address.Unmap()
	}
	var ok bool
	if r.Dst != nil {
		route.Destination, ok = toPrefix(r.Dst)
		return route, ok
	}
	everything := netip.IPv4Unspecified()
	if r.Family == netlink.FAMILY_V6 {
		everything = netip.IPv6Unspecified()
	}
	route.Destination = netip.PrefixFrom(everything, 0)
	return route, true
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	address, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if address = address.Unmap(); !ok || bits != address.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(address, ones), true
}

// isLinkLocal6 says whether the guest's kernel makes this itself, from the hardware
// address.
func isLinkLocal6(p netip.Prefix) bool {
	return p.Addr().Is6() && (p.Addr().IsLinkLocalUnicast() || p.Addr().IsMulticast())
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
