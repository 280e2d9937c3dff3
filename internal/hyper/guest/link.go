//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// linkTimeout is how long a card may take to appear.
const linkTimeout = 10 * time.Second

// setUpLink makes an interface what l says. It is idempotent.
func setUpLink(ctx context.Context, l guestapi.Link) error {
	hardware, err := net.ParseMAC(l.HardwareAddr)
	if err != nil {
		return badRequestError{err}
	}
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	var card netlink.Link
	err = poll(ctx, func() (bool, error) {
		cards, err := physicalLinks()
		if err != nil {
			return false, err
		}
		card = chooseLink(cards, hardware)
		return card != nil, nil
	})
	if err != nil {
		return fmt.Errorf("find the card with %s: %w", hardware, err)
	}
	return configureLink(card, l)
}

// configureLink makes card what l says.
func configureLink(card netlink.Link, l guestapi.Link) error {
	hardware, err := net.ParseMAC(l.HardwareAddr)
	if err != nil {
		return badRequestError{err}
	}
	if card.Attrs().HardwareAddr.String() != hardware.String() {
		if err := netlink.LinkSetHardwareAddr(card, hardware); err != nil {
			return fmt.Errorf("hardware address: %w", err)
		}
	}
	if card.Attrs().Name != l.Name {
		// Only a link that is down takes a name.
		if err := netlink.LinkSetDown(card); err != nil {
			return err
		}
		if err := netlink.LinkSetName(card, l.Name); err != nil {
			return fmt.Errorf("name: %w", err)
		}
	}
	if l.MTU > 0 {
		if err := netlink.LinkSetMTU(card, l.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", l.MTU, err)
		}
	}
	// Its addresses are the host's to give: no advertised routers, no addresses of its own.
	for _, name := range []string{"accept_ra", "autoconf"} {
		err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", l.Name, name), []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return err
		}
	}
	if err := netlink.LinkSetUp(card); err != nil {
		return err
	}
	for _, a := range l.Addresses {
		address := &netlink.Addr{IPNet: ipNet(a.Addr(), a.Bits())}
		if a.Addr().Is6() {
			address.Flags = unix.IFA_F_NODAD // the host knows that it is free
		}
		if err := netlink.AddrReplace(card, address); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	for _, n := range l.Neighbours {
		hardware, err := net.ParseMAC(n.HardwareAddr)
		if err != nil {
			return badRequestError{err}
		}
		err = netlink.NeighSet(&netlink.Neigh{
			LinkIndex: card.Attrs().Index, State: netlink.NUD_PERMANENT,
			IP: n.Address.AsSlice(), HardwareAddr: hardware,
		})
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", n.Address, err)
		}
	}
	// Gateways may be reached by the routes that have none.
	for _, gateways := range []bool{false, true} {
		for _, r := range l.Routes {
			if r.Gateway.IsValid() != gateways {
				continue
			}
			if err := netlink.RouteReplace(route(card.Attrs().Index, r)); err != nil {
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

// physicalLinks are the machine's cards.
func physicalLinks() ([]netlink.Link, error) {
	all, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var cards []netlink.Link
	for _, l := range all {
		if l.Type() == "device" && l.Attrs().Flags&net.FlagLoopback == 0 {
			cards = append(cards, l)
		}
	}
	return cards, nil
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
