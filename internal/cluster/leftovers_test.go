package cluster

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/types"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/network"
)

func TestLeftovers(t *testing.T) {
	w := &wanted{
		networks: map[int64]string{1: "acme"},
		pods:     map[types.UID]bool{"known": true},
		nodes:    map[string]bool{"n1": true},
	}
	block := func(node string) []v1alpha1.Block {
		return []v1alpha1.Block{{ObjectMeta: metav1.ObjectMeta{Name: "acme-10-0-0-0"}, Spec: v1alpha1.BlockSpec{Network: "acme", CIDR: "10.0.0.0/28", Node: node}}}
	}
	attachment := func(uid string) []network.Attachment {
		return []network.Attachment{{Address: netip.MustParseAddr("10.0.0.5"), Namespace: "shop", Pod: "web", PodUID: uid}}
	}
	tests := map[string]struct {
		found  found
		blocks []v1alpha1.Block
		want   []string
	}{
		"nothing is there": {},
		"all is accounted for": {
			found: found{
				node: "n1", portals: []string{"h8s-1"}, uplinks: []string{"h8su1"},
				routes: []blockRoute{{"10.0.0.0/28", "h8su1"}}, attachments: attachment("known"),
			},
			blocks: block("n1"),
		},
		"portal of no Network": {
			found: found{node: "n1", portals: []string{"h8s-2"}},
			want:  []string{"network namespace h8s-2 on node n1 is of no Network"},
		},
		"uplink of no Network": {
			found: found{node: "n1", uplinks: []string{"h8su12"}},
			want:  []string{"link h8su12 on node n1 is of no Network"},
		},
		"portal with a strange name": {
			found: found{node: "n1", portals: []string{"h8s-x"}},
			want:  []string{"network namespace h8s-x on node n1 is of no Network"},
		},
		"route of no Block": {
			found:  found{node: "n1", routes: []blockRoute{{"10.0.0.16/28", "h8su1"}}},
			blocks: block("n1"),
			want:   []string{"route to 10.0.0.16/28 by h8su1 on node n1 is of no Block"},
		},
		"route to a Block of another node": {
			found:  found{node: "n1", routes: []blockRoute{{"10.0.0.0/28", "h8su1"}}},
			blocks: []v1alpha1.Block{{Spec: v1alpha1.BlockSpec{Network: "acme", CIDR: "10.0.0.0/28", Node: "n2"}}},
			want:   []string{"route to 10.0.0.0/28 by h8su1 on node n1 is of no Block", "Block  is held by node n2, which does not exist"},
		},
		"address of no pod": {
			found: found{node: "n1", attachments: attachment("gone")},
			want:  []string{"address 10.0.0.5 on node n1 is held for pod shop/web, which does not exist"},
		},
		"Block of no node": {
			blocks: block("n9"),
			want:   []string{"Block acme-10-0-0-0 is held by node n9, which does not exist"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w.blocks = test.blocks
			if diff := cmp.Diff(test.want, w.leftovers([]found{test.found})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// The doctor changes nothing on the machine, and this machine can run a cluster:
// the other tests do.
func TestDiagnoseKernel(t *testing.T) {
	for _, check := range diagnoseKernel(testContext(t)) {
		if check.Status == CheckFail {
			t.Errorf("%s: %s", check.Name, check.Detail)
		}
	}
}

func TestDemoIsTwoTenantsOfOneRange(t *testing.T) {
	var ranges []v1alpha1.CIDR
	for _, tenant := range demoTenants {
		for _, object := range tenant.operatorObjects() {
			if o, ok := object.(*v1alpha1.Tenant); ok {
				ranges = append(ranges, o.Spec.Network.CIDRs...)
			}
		}
	}
	if !slices.Equal(ranges, []v1alpha1.CIDR{demoCIDR, demoCIDR}) {
		t.Errorf("ranges = %v", ranges)
	}
}
