package tenancy

import (
	"fmt"
	"strings"
	"testing"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestCheckCIDRs(t *testing.T) {
	taken, err := ParseRanges("Services", "10.96.0.0/16", "fd00::/108")
	if err != nil {
		t.Fatal(err)
	}
	node, err := ParseRanges("node n1", "192.168.5.11")
	if err != nil {
		t.Fatal(err)
	}
	taken = append(append(taken, node...), Reserved()...)
	for name, tt := range map[string]struct {
		cidr v1alpha1.CIDR
		want string
	}{
		"free":            {"10.0.0.0/16", ""},
		"just before":     {"10.95.0.0/16", ""},
		"just behind":     {"10.97.0.0/16", ""},
		"equal":           {"10.96.0.0/16", "10.96.0.0/16 overlaps with 10.96.0.0/16 (Services): choose"},
		"inside":          {"10.96.4.0/24", "(Services)"},
		"around":          {"10.0.0.0/8", "(Services)"},
		"one address":     {"192.168.5.0/24", "192.168.5.11/32 (node n1)"},
		"several":         {"0.0.0.0/0", "and 4 more"},
		"metadata server": {"169.254.0.0/17", "link-local"},
		"malformed":       {"10.0.0.0", "not a CIDR"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckCIDRs([]v1alpha1.CIDR{tt.cidr}, taken)
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("CheckCIDRs = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestParseRanges(t *testing.T) {
	for in, want := range map[string]string{"10.1.2.3/16": "10.1.0.0/16", "10.1.2.3": "10.1.2.3/32", "fd00::1": "fd00::1/128"} {
		ranges, err := ParseRanges("x", in)
		if err != nil || fmt.Sprint(ranges[0].Prefix) != want {
			t.Errorf("ParseRanges(%s) = %v, %v; want %s", in, ranges, err, want)
		}
	}
	if _, err := ParseRanges("pods of the default network", "10.0.0.0/99"); err == nil || !strings.Contains(err.Error(), "pods of the default network") {
		t.Error(err)
	}
}
