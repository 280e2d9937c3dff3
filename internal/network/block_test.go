package network

import (
	"net/netip"
	"testing"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestBlockBits(t *testing.T) {
	for cidr, want := range map[string]int{
		"10.0.0.0/8": 28, "10.0.0.0/16": 28, "10.0.0.0/24": 28,
		"10.0.0.0/25": 29, "10.0.0.0/26": 30, "10.0.0.0/27": 30,
	} {
		if got := BlockBits(netip.MustParsePrefix(cidr)); got != want {
			t.Errorf("BlockBits(%s) = %d, want %d", cidr, got, want)
		}
	}
}

func TestBlockName(t *testing.T) {
	if got, want := BlockName("acme", netip.MustParsePrefix("10.0.3.16/28")), "acme-10-0-3-16"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestNextBlock(t *testing.T) {
	tests := map[string]struct {
		cidr  string
		avoid []netip.Prefix
		want  string // empty: none
	}{
		"nothing to avoid":              {"10.0.0.0/16", nil, "10.0.0.0/28"},
		"the first is taken":            {"10.0.0.0/16", prefixes("10.0.0.0/28"), "10.0.0.16/28"},
		"the lowest gap":                {"10.0.0.0/16", prefixes("10.0.0.32/28", "10.0.0.0/28"), "10.0.0.16/28"},
		"a smaller Block inside":        {"10.0.0.0/16", prefixes("10.0.0.4/30"), "10.0.0.16/28"},
		"a wide range over the start":   {"10.0.0.0/16", prefixes("10.0.0.0/20"), "10.0.16.0/28"},
		"nested ranges":                 {"10.0.0.0/16", prefixes("10.0.0.0/20", "10.0.1.0/28"), "10.0.16.0/28"},
		"ranges elsewhere":              {"10.0.0.0/16", prefixes("9.0.0.0/8", "11.0.0.0/8", "fd00::/8"), "10.0.0.0/28"},
		"everything is avoided":         {"10.0.0.0/16", prefixes("0.0.0.0/0"), ""},
		"all of a small Network":        {"10.0.0.0/26", prefixes("10.0.0.0/27", "10.0.0.32/27"), ""},
		"the last Block":                {"10.0.0.0/26", prefixes("10.0.0.0/27", "10.0.0.32/28", "10.0.0.48/29", "10.0.0.56/30"), "10.0.0.60/30"},
		"the end of the address space":  {"255.255.255.0/24", prefixes("255.255.255.0/25"), "255.255.255.128/28"},
		"the space's end is taken too":  {"255.255.255.0/24", prefixes("255.255.255.0/24"), ""},
		"a range that ends in the CIDR": {"10.0.0.0/24", prefixes("9.255.255.0/24", "10.0.0.0/27"), "10.0.0.32/28"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, ok := NextBlock(netip.MustParsePrefix(tc.cidr), tc.avoid)
			if ok != (tc.want != "") || ok && got.String() != tc.want {
				t.Errorf("got %s, %v; want %q", got, ok, tc.want)
			}
		})
	}
}

func TestAddresses(t *testing.T) {
	tests := map[string]struct {
		cidr, block  string
		first, last  string
		wantQuantity int
	}{
		"the first Block lacks the first address": {"10.0.0.0/16", "10.0.0.0/28", "10.0.0.1", "10.0.0.15", 15},
		"a Block in the middle is whole":          {"10.0.0.0/16", "10.0.7.16/28", "10.0.7.16", "10.0.7.31", 16},
		"the last Block lacks the last address":   {"10.0.0.0/16", "10.0.255.240/28", "10.0.255.240", "10.0.255.254", 15},
		"the smallest Blocks":                     {"10.0.0.0/26", "10.0.0.60/30", "10.0.0.60", "10.0.0.62", 3},
		"the end of the address space":            {"255.255.255.0/24", "255.255.255.240/28", "255.255.255.240", "255.255.255.254", 15},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got := addresses(netip.MustParsePrefix(tc.cidr), netip.MustParsePrefix(tc.block))
			if len(got) != tc.wantQuantity || got[0].String() != tc.first || got[len(got)-1].String() != tc.last {
				t.Errorf("got %v", got)
			}
		})
	}
}
