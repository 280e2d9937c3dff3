package cluster

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
)

// subnets is where clusters have their subnets.
var subnets = netip.MustParsePrefix("172.30.0.0/16") //nolint:gochecknoglobals // a constant

// chooseSubnet returns the first 172.30.x.0/24 that overlaps with nothing in use.
func chooseSubnet(used []netip.Prefix) (netip.Prefix, error) {
	for x := range 256 {
		address := subnets.Addr().As4()
		address[2] = byte(x)
		p := netip.PrefixFrom(netip.AddrFrom4(address), 24)
		free := true
		for _, u := range used {
			// A default route overlaps with everything and takes nothing.
			if u.Bits() > 0 && u.Overlaps(p) {
				free = false
				break
			}
		}
		if free {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("every 172.30.x.0/24 is in use on this machine: remove clusters with `h8s down`, or a route that covers 172.30.0.0/16")
}

// usedSubnets are the ranges that the machine routes, has addresses in, or that
// other clusters hold, also those that are not running.
func usedSubnets() ([]netip.Prefix, error) {
	var used []netip.Prefix
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		if a, ok := netip.AddrFromSlice(r.Dst.IP.To4()); ok {
			ones, _ := r.Dst.Mask.Size()
			used = append(used, netip.PrefixFrom(a, ones))
		}
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs {
		if a, ok := netip.AddrFromSlice(addr.IP.To4()); ok {
			ones, _ := addr.Mask.Size()
			used = append(used, netip.PrefixFrom(a, ones).Masked())
		}
	}
	files, err := filepath.Glob(filepath.Join(StateRoot, "*", "cluster.json"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // gone meanwhile
		}
		var c Config
		if json.Unmarshal(data, &c) == nil && c.Subnet.IsValid() {
			used = append(used, c.Subnet)
		}
	}
	return used, nil
}

// machineAddresses are the machine's own IPv4 addresses but loopback.
func machineAddresses() ([]netip.Prefix, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, addr := range addrs {
		if a, ok := netip.AddrFromSlice(addr.IP.To4()); ok && !a.IsLoopback() && !subnets.Contains(a) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out, nil
}
