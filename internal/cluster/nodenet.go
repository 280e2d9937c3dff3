package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeLink is a node's network card, as the supervisor gave it.
const nodeLink = "eth0"

// setupNodeNetwork configures the node's own network namespace: its address, the
// way out, and the way to the other nodes' pods. It may run again.
func setupNodeNetwork(c *Config, n Node) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	link, err := netlink.LinkByName(nodeLink)
	if err != nil {
		return fmt.Errorf("find %s: %w", nodeLink, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(n.Address, c.Subnet.Bits()))}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("give %s its address: %w", nodeLink, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", nodeLink, err)
	}
	routes := []netlink.Route{{LinkIndex: link.Attrs().Index, Gw: c.gateway().AsSlice()}}
	for _, other := range c.Nodes {
		if other.Name != n.Name {
			routes = append(routes, netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(other.PodCIDR), Gw: other.Address.AsSlice()})
		}
	}
	for _, route := range routes {
		if err := netlink.RouteReplace(&route); err != nil {
			return fmt.Errorf("add route %s: %w", route, err)
		}
	}
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		err := os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0o644)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // no IPv6 in the kernel
			return fmt.Errorf("let the node forward packets: %w", err)
		}
	}
	nft := exec.Command("nft", "-f", "-")
	nft.Stdin = strings.NewReader(masqueradeRules(n))
	if out, err := nft.CombinedOutput(); err != nil {
		return fmt.Errorf("masquerade the default network: %w: %s", err, out)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// supportsOverlay tries whether overlayfs can be mounted on top of dir.
func supportsOverlay(dir string) bool {
	scratch, err := os.MkdirTemp(dir, "overlay-")
	if err != nil {
		return false
	}
	defer os.RemoveAll(scratch)
	options := "lowerdir=" + scratch + "/lower,upperdir=" + scratch + "/upper,workdir=" + scratch + "/work"
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if os.Mkdir(scratch+"/"+d, 0o755) != nil {
			return false
		}
	}
	if unix.Mount("overlay", scratch+"/merged", "overlay", 0, options) != nil {
		return false
	}
	return unix.Unmount(scratch+"/merged", 0) == nil
}
