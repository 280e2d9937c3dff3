package tenancy

import (
	"fmt"
	"net/netip"
	"strings"

	"h8s.io/hypernetes/api/v1alpha1"
)

// Range is a range of addresses that somebody has already, and what it is.
type Range struct {
	Prefix netip.Prefix
	What   string
}

// Reserved are the ranges that no Network may have whatever the cluster looks
// like: they mean something else on every host (RFC 6890), and link-local
// addresses connect portals with their node.
func Reserved() []Range {
	return []Range{
		{netip.MustParsePrefix("0.0.0.0/8"), "\"this network\""},
		{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
		{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
		{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
		{netip.MustParsePrefix("240.0.0.0/4"), "reserved by the IETF"},
	}
}

// ParseRanges reads CIDRs, or single addresses, that are all of one kind.
func ParseRanges(what string, cidrs ...string) ([]Range, error) {
	var ranges []Range
	for _, s := range cidrs {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			addr, addrErr := netip.ParseAddr(s)
			if addrErr != nil {
				return nil, fmt.Errorf("%s: %q is neither a CIDR nor an address", what, s)
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		ranges = append(ranges, Range{prefix.Masked(), what})
	}
	return ranges, nil
}

// CheckCIDRs refuses CIDRs of which one overlaps with a range that is taken.
func CheckCIDRs(cidrs []v1alpha1.CIDR, taken []Range) error {
	var conflicts []string
	for _, c := range cidrs {
		prefix, err := netip.ParsePrefix(string(c))
		if err != nil {
			return fmt.Errorf("%q is not a CIDR: write it as address/length, such as 10.0.0.0/16", c)
		}
		for _, r := range taken {
			if prefix.Overlaps(r.Prefix) {
				conflicts = append(conflicts, fmt.Sprintf("%s overlaps with %s (%s)", c, r.Prefix, r.What))
			}
		}
	}
	if len(conflicts) == 0 {
		return nil
	}
	const show = 3 // a large cluster has thousands of nodes
	if more := len(conflicts) - show; more > 0 {
		conflicts = append(conflicts[:show], fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("%s: choose a range that the cluster does not use itself", strings.Join(conflicts, ", "))
}
