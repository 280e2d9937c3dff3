//go:build linux

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// linkTimeout is how long a card may take to appear.
const linkTimeout = 10 * time.Second

// links are the machine's network cards as they were at boot, and as they were set up since: to ask
// the kernel for them is a large part of a set-up where each instruction is translated anew in each
// clone of a template.
type links struct {
	netlink *netlink.Handle

	mu    sync.Mutex
	cards []netlink.Link
}

// raiseLinks brings up the cards that are there, which the clones of a template then find done, too.
// Such a link is mute: see raise.
func raiseLinks() (*links, error) {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	l := &links{netlink: handle}
	if err := l.find(); err != nil {
		return nil, err
	}
	for _, card := range l.cards {
		if err := l.raise(card); err != nil {
			return nil, fmt.Errorf("link %s: %w", card.Attrs().Name, err)
		}
	}
	return l, nil
}

// setUp makes an interface what want says. It is idempotent.
func (l *links) setUp(ctx context.Context, want guestapi.Link) error {
	hardware, err := net.ParseMAC(want.HardwareAddr)
	if err != nil {
		return badRequestError{err}
	}
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	card := chooseLink(l.cards, hardware)
	err = poll(ctx, func() (bool, error) {
		if card != nil {
			return true, nil
		}
		err := l.find()
		card = chooseLink(l.cards, hardware)
		return card != nil, err
	})
	if err != nil {
		return fmt.Errorf("find the card with %s: %w", hardware, err)
	}
	return l.configure(card, hardware, want)
}

// raise brings up a card that is down. The link has nothing to say yet, whatever its hardware
// address is: without an address IPv4 neither asks nor answers, and IPv6, which would give itself
// one of that hardware address and announce it, is off.
func (l *links) raise(card netlink.Link) error {
	a := card.Attrs()
	for parameter, value := range map[string]string{
		"disable_ipv6": "1",
		// Its addresses are the host's to give: no advertised routers, no addresses of its own.
		"accept_ra": "0", "autoconf": "0",
	} {
		if err := setIPv6(a.Name, parameter, value); err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	if err := l.netlink.LinkSetUp(card); err != nil {
		return err
	}
	a.Flags |= net.FlagUp
	return nil
}

// setIPv6 sets a parameter of IPv6 on an interface.
func setIPv6(link, parameter, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", link, parameter), []byte(value), 0)
}

// configure makes card what want says. The link speaks after it has its hardware address: a clone's
// card has the template's until then.
func (l *links) configure(card netlink.Link, hardware net.HardwareAddr, want guestapi.Link) error {
	a := card.Attrs()
	if !bytes.Equal(a.HardwareAddr, hardware) {
		if err := l.netlink.LinkSetHardwareAddr(card, hardware); err != nil {
			return fmt.Errorf("hardware address: %w", err)
		}
		a.HardwareAddr = hardware
	}
	if a.Name != want.Name {
		// Only a link that is down takes a name.
		if err := l.netlink.LinkSetDown(card); err != nil {
			return err
		}
		a.Flags &^= net.FlagUp
		if err := l.netlink.LinkSetName(card, want.Name); err != nil {
			return fmt.Errorf("name: %w", err)
		}
		a.Name = want.Name
	}
	if want.MTU > 0 && a.MTU != want.MTU {
		if err := l.netlink.LinkSetMTU(card, want.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", want.MTU, err)
		}
		a.MTU = want.MTU
	}
	if a.Flags&net.FlagUp == 0 {
		if err := l.raise(card); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(want.Addresses, func(a netip.Prefix) bool { return a.Addr().Is6() }) {
		if err := setIPv6(want.Name, "disable_ipv6", "0"); err != nil {
			return err
		}
	}
	for _, p := range want.Addresses {
		address := &netlink.Addr{IPNet: ipNet(p.Addr(), p.Bits())}
		if p.Addr().Is6() {
			address.Flags = unix.IFA_F_NODAD // the host knows that it is free
		}
		if err := l.netlink.AddrReplace(card, address); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	for _, n := range want.Neighbours {
		hardware, err := net.ParseMAC(n.HardwareAddr)
		if err != nil {
			return badRequestError{err}
		}
		err = l.netlink.NeighSet(&netlink.Neigh{
			LinkIndex: a.Index, State: netlink.NUD_PERMANENT,
			IP: n.Address.AsSlice(), HardwareAddr: hardware,
		})
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", n.Address, err)
		}
	}
	// Gateways may be reached by the routes that have none.
	for _, gateways := range []bool{false, true} {
		for _, r := range want.Routes {
			if r.Gateway.IsValid() != gateways {
				continue
			}
			if err := l.netlink.RouteReplace(route(a.Index, r)); err != nil {
				return fmt.Errorf("route to %s: %w", r.Destination, err)
			}
		}
	}
	return nil
}

func route(index int, r guestapi.Route) *netlink.Route {
	route := &netlink.Route{LinkIndex: index, Dst: ipNet(r.Destination.Addr(), r.Destination.Bits())}
	if r.Gateway.IsValid() {
		route.Gw = r.Gateway.AsSlice()
	}
	if r.OnLink {
		route.SetFlag(netlink.FLAG_ONLINK)
	}
	if r.ScopeLink {
		route.Scope = netlink.SCOPE_LINK
	}
	return route
}

func ipNet(a netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}

// find asks the kernel for the cards.
func (l *links) find() error {
	all, err := l.netlink.LinkList()
	if err != nil {
		return err
	}
	l.cards = nil
	for _, one := range all {
		if one.Type() == "device" && one.Attrs().Flags&net.FlagLoopback == 0 {
			l.cards = append(l.cards, one)
		}
	}
	return nil
}

// chooseLink returns the card with that address, or the only one there is, or none.
func chooseLink(cards []netlink.Link, hardware net.HardwareAddr) netlink.Link {
	for _, c := range cards {
		if c.Attrs().HardwareAddr.String() == hardware.String() {
			return c
		}
	}
	if len(cards) == 1 {
		return cards[0]
	}
	return nil
}
