package cluster

import (
	"net/netip"
	"strings"
	"testing"
)

func TestValidateName(t *testing.T) {
	tests := map[string]bool{
		"default":               true,
		"a":                     true,
		"a-1":                   true,
		strings.Repeat("a", 20): true,
		strings.Repeat("a", 21): false,
		"":                      false,
		"-a":                    false,
		"a-":                    false,
		"Upper":                 false,
		"a.b":                   false,
		"a/b":                   false,
		"..":                    false,
	}
	for name, valid := range tests {
		t.Run(name, func(t *testing.T) {
			if err := ValidateName(name); (err == nil) != valid {
				t.Errorf("ValidateName(%q) = %v, want valid: %t", name, err, valid)
			}
		})
	}
}

func testConfig(t *testing.T, nodes int) *Config {
	t.Helper()
	c, err := newConfig("test", nodes, netip.MustParsePrefix("172.30.7.0/24"), "/bin", nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNewConfig(t *testing.T) {
	c := testConfig(t, 3)
	want := []Node{
		{"n1", netip.MustParseAddr("172.30.7.11"), netip.MustParsePrefix("10.244.1.0/24")},
		{"n2", netip.MustParseAddr("172.30.7.12"), netip.MustParsePrefix("10.244.2.0/24")},
		{"n3", netip.MustParseAddr("172.30.7.13"), netip.MustParsePrefix("10.244.3.0/24")},
	}
	for i, n := range want {
		if c.Nodes[i] != n {
			t.Errorf("node %d = %v, want %v", i, c.Nodes[i], n)
		}
	}
	if got := c.gateway().String(); got != "172.30.7.1" {
		t.Errorf("gateway = %s, want 172.30.7.1", got)
	}
	if got := c.apiServer(); got != "https://172.30.7.11:6443" {
		t.Errorf("API server = %s", got)
	}
}

func TestNewConfigRefuses(t *testing.T) {
	tests := map[string]struct {
		nodes     int
		resolvers []string
		want      string
	}{
		"no node":                {0, nil, "at least one node"},
		"too many nodes":         {51, nil, "at most 50"},
		"resolver without port":  {1, []string{"192.0.2.1"}, "address:port"},
		"resolver of a bad name": {1, []string{"dns.example:53"}, "address:port"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := newConfig("test", test.nodes, netip.MustParsePrefix("172.30.0.0/24"), "/bin", test.resolvers)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want one that contains %q", err, test.want)
			}
		})
	}
}

// Unix sockets have names of 107 bytes at most.
func TestSocketPathsFit(t *testing.T) {
	c, err := newConfig(strings.Repeat("x", maxName), maxNodes, netip.MustParsePrefix("172.30.0.0/24"), "/bin", nil)
	if err != nil {
		t.Fatal(err)
	}
	path := c.state().node(c.Nodes[maxNodes-1].Name, containerdSocket)
	if len(path) > 107 {
		t.Errorf("%s has %d bytes", path, len(path))
	}
}

func TestChooseSubnet(t *testing.T) {
	prefixes := func(s ...string) (out []netip.Prefix) {
		for _, p := range s {
			out = append(out, netip.MustParsePrefix(p))
		}
		return out
	}
	tests := map[string]struct {
		used []netip.Prefix
		want string // empty: an error
	}{
		"nothing used":                 {nil, "172.30.0.0/24"},
		"a default route takes none":   {prefixes("0.0.0.0/0"), "172.30.0.0/24"},
		"the first is taken":           {prefixes("172.30.0.0/24"), "172.30.1.0/24"},
		"a wider range covers some":    {prefixes("172.30.0.0/22"), "172.30.4.0/24"},
		"a narrower range is inside":   {prefixes("172.30.0.128/25", "172.30.2.0/24"), "172.30.1.0/24"},
		"others do not matter":         {prefixes("10.0.0.0/8", "192.168.0.0/16"), "172.30.0.0/24"},
		"all is covered":               {prefixes("172.16.0.0/12"), ""},
		"all is covered by two halves": {prefixes("172.30.0.0/17", "172.30.128.0/17"), ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := chooseSubnet(test.used)
			if test.want == "" {
				if err == nil {
					t.Errorf("got %s, want an error", got)
				}
				return
			}
			if err != nil || got.String() != test.want {
				t.Errorf("got %s, %v, want %s", got, err, test.want)
			}
		})
	}
}
