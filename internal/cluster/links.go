package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// aliasPrefix starts the alias of every link that a cluster has in the machine's
// own namespace; the cluster's name ends it.
const aliasPrefix = "h8s cluster "

// bridgeName is the cluster's name as far as it fits into the 15 bytes of a
// link's name; names that do not fit end in a hash, so that they differ.
func bridgeName(cluster string) string {
	name := "h8s-" + cluster
	if len(name) <= 15 {
		return name
	}
	return name[:10] + shortHash(cluster, 5)
}

// vethName names the machine's end of a node's network card.
func vethName(cluster, node string) string {
	return "h8sv" + shortHash(cluster+"/"+node, 11)
}

func shortHash(s string, n int) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])[:n]
}

// ensureBridge makes the cluster's bridge, with the machine's address on it.
func ensureBridge(c *Config) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName(c.Name)
	// A fixed address: otherwise it changes with the links that join.
	attrs.HardwareAddr = hardwareAddr(c.gateway())
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil && !isExist(err) {
		return nil, fmt.Errorf("make bridge %s: %w", attrs.Name, err)
	}
	bridge, err := netlink.LinkByName(attrs.Name)
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", attrs.Name, err)
	}
	if err := netlink.LinkSetAlias(bridge, aliasPrefix+c.Name); err != nil {
		return nil, fmt.Errorf("set alias of bridge %s: %w", attrs.Name, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(c.gateway(), c.Subnet.Bits()))}
	if err := netlink.AddrReplace(bridge, addr); err != nil {
		return nil, fmt.Errorf("give bridge %s its address: %w", attrs.Name, err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return nil, fmt.Errorf("set bridge %s up: %w", attrs.Name, err)
	}
	return bridge, nil
}

// plugNode connects the network namespace of process pid to the bridge.
func plugNode(c *Config, n Node, bridge netlink.Link, pid int) error {
	name := vethName(c.Name, n.Name)
	// The one of a life before goes with its namespace, but not at once.
	if old, err := netlink.LinkByName(name); err == nil {
		if err := netlink.LinkDel(old); err != nil && !isNotFound(err) {
			return fmt.Errorf("remove old link %s: %w", name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex, attrs.MTU = name, bridge.Attrs().Index, bridge.Attrs().MTU
	veth := &netlink.Veth{
		LinkAttrs:        attrs,
		PeerName:         nodeLink,
		PeerHardwareAddr: hardwareAddr(n.Address),
		PeerNamespace:    netlink.NsPid(pid),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make link %s of node %s: %w", name, n.Name, err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetAlias(link, aliasPrefix+c.Name); err != nil {
		return fmt.Errorf("set alias of link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

// clusterLinks are the links in the machine's namespace by the cluster they
// belong to.
func clusterLinks() (map[string][]netlink.Link, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	byCluster := map[string][]netlink.Link{}
	for _, l := range links {
		if name, ok := strings.CutPrefix(l.Attrs().Alias, aliasPrefix); ok {
			byCluster[name] = append(byCluster[name], l)
		}
	}
	return byCluster, nil
}

// removeLinks removes every link of a cluster, known by alias or by name.
func removeLinks(cluster string, nodes []Node) error {
	byCluster, err := clusterLinks()
	if err != nil {
		return err
	}
	links := byCluster[cluster]
	names := []string{bridgeName(cluster)}
	for _, n := range nodes {
		names = append(names, vethName(cluster, n.Name))
	}
	for _, name := range names {
		if l, err := netlink.LinkByName(name); err == nil {
			links = append(links, l)
		}
	}
	var errs []error
	for _, l := range links {
		if err := netlink.LinkDel(l); err != nil && !isNotFound(err) {
			errs = append(errs, fmt.Errorf("remove link %s: %w", l.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// hardwareAddr is a locally administered MAC address made from an IPv4 address: a
// node that boots again keeps it, and nobody's neighbour cache is stale.
func hardwareAddr(a netip.Addr) net.HardwareAddr {
	return append(net.HardwareAddr{0x0e, 0x58}, a.AsSlice()...)
}

func isExist(err error) bool { return errors.Is(err, unix.EEXIST) }

func isNotFound(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.As(err, new(netlink.LinkNotFoundError))
}
