package cluster

import (
	"bufio"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/network"
	"h8s.io/hypernetes/internal/portal"
)

func TestLeftovers(t *testing.T) {
	block := func(node string) []v1alpha1.Block {
		return []v1alpha1.Block{{ObjectMeta: metav1.ObjectMeta{Name: "acme-10-0-0-0"}, Spec: v1alpha1.BlockSpec{Network: "acme", CIDR: "10.0.0.0/28", Node: node}}}
	}
	attachment := func(uid string) []network.Attachment {
		return []network.Attachment{{ContainerID: "c1", IfName: "eth0", Address: netip.MustParseAddr("10.0.0.5"), Namespace: "shop", Pod: "web", PodUID: uid}}
	}
	podLink := portal.HostIfName("c1", "eth0")
	tests := map[string]struct {
		found  found
		blocks []v1alpha1.Block
		gone   bool // the product is not installed
		want   []string
	}{
		"nothing is there":                       {},
		"nothing is there, nothing is installed": {gone: true},
		"all is accounted for": {
			found: found{
				node: "n1", installed: []string{"/opt/cni/bin/h8s-cni"}, guarded: true,
				portals: []foundPortal{{"h8s-1", []string{podLink}, []string{"inet h8s"}}}, uplinks: []string{"h8su1"},
				routes: []blockRoute{{"10.0.0.0/28", "h8su1"}}, attachments: attachment("known"),
			},
			blocks: block("n1"),
		},
		"guard of no agent": {
			found: found{node: "n1", guarded: true},
			gone:  true,
			want:  []string{"nftables table inet h8s on node n1 is of no node agent"},
		},
		"CNI plugin of no agent": {
			found: found{node: "n1", installed: []string{"/opt/cni/bin/h8s-cni"}},
			gone:  true,
			want:  []string{"file /opt/cni/bin/h8s-cni on node n1 is of no node agent"},
		},
		"portal of no Network": {
			found: found{node: "n1", portals: []foundPortal{{name: "h8s-2"}}},
			want:  []string{"network namespace h8s-2 on node n1 is of no Network"},
		},
		"portal of a Network without Blocks there": {
			found:  found{node: "n1", portals: []foundPortal{{name: "h8s-1"}}},
			blocks: block("n2"),
			want:   []string{"network namespace h8s-1 on node n1 is of Network acme, which has no Block there"},
		},
		"uplink of a Network without Blocks": {
			found: found{node: "n1", uplinks: []string{"h8su1"}},
			want:  []string{"link h8su1 on node n1 is of Network acme, which has no Block there"},
		},
		"link of no pod": {
			found:  found{node: "n1", portals: []foundPortal{{"h8s-1", []string{podLink, "p0123456789"}, nil}}, attachments: attachment("known")},
			blocks: block("n1"),
			want:   []string{"link p0123456789 in h8s-1 on node n1 is of no pod"},
		},
		"table in a portal": {
			found:  found{node: "n1", portals: []foundPortal{{"h8s-1", nil, []string{"inet h8s", "ip nat"}}}},
			blocks: block("n1"),
			want:   []string{"nftables table ip nat in h8s-1 on node n1 is not of the portal"},
		},
		"uplink of no Network": {
			found: found{node: "n1", uplinks: []string{"h8su12"}},
			want:  []string{"link h8su12 on node n1 is of no Network"},
		},
		"portal with a strange name": {
			found: found{node: "n1", portals: []foundPortal{{name: "h8s-x"}}},
			want:  []string{"network namespace h8s-x on node n1 is of no Network"},
		},
		"route of no Block": {
			found:  found{node: "n1", routes: []blockRoute{{"10.0.0.16/28", "h8su1"}}},
			blocks: block("n1"),
			want:   []string{"route to 10.0.0.16/28 by h8su1 on node n1 is of no Block"},
		},
		"route to a Block of another node": {
			found:  found{node: "n1", routes: []blockRoute{{"10.0.0.0/28", "h8su1"}}},
			blocks: block("n2"),
			want:   []string{"route to 10.0.0.0/28 by h8su1 on node n1 is of no Block"},
		},
		"address of no pod": {
			found: found{node: "n1", attachments: attachment("gone")},
			want:  []string{"address 10.0.0.5 on node n1 is held for pod shop/web, which does not exist"},
		},
		"Block of no node": {
			blocks: block("n9"),
			want:   []string{"Block acme-10-0-0-0 is held by node n9, which does not exist"},
		},
		"Block of no Network": {
			blocks: []v1alpha1.Block{{ObjectMeta: metav1.ObjectMeta{Name: "gone-10-0-0-0"}, Spec: v1alpha1.BlockSpec{Network: "gone", CIDR: "10.0.0.0/28", Node: "n1"}}},
			want:   []string{"Block gone-10-0-0-0 is of Network gone, which does not exist"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := &wanted{
				agents:   !test.gone,
				networks: map[int64]string{1: "acme"},
				pods:     map[types.UID]bool{"known": true},
				nodes:    map[string]bool{"n1": true, "n2": true},
				blocks:   test.blocks,
			}
			if diff := cmp.Diff(test.want, w.leftovers([]found{test.found})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// standIn is a process with a network namespace and mounts of its own, of which
// /etc, /opt, /run and /var are empty, in which script has run.
func standIn(t *testing.T, script string) (pid int) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", "for d in etc opt run var; do mount -t tmpfs tmpfs /$d; done; "+script+"; echo done; exec sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Unshareflags: unix.CLONE_NEWNS, // the latter makes mounts private
		Pdeathsig: syscall.SIGKILL,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := &strings.Builder{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "done\n" {
		_ = cmd.Wait()
		t.Fatalf("%q, %v: %s", line, err, said)
	}
	return cmd.Process.Pid
}

func TestInspect(t *testing.T) {
	if f, err := inspect("n1", standIn(t, "true")); err != nil || len(f.names()) > 0 {
		t.Fatalf("on a machine that has nothing: %v, %v", f.names(), err)
	}
	pid := standIn(t, `
		mkdir -p /etc/cni/net.d /opt/cni/bin /var/lib/h8s/attachments /run/netns
		touch /etc/cni/net.d/00-h8s.conflist /opt/cni/bin/h8s-cni /run/netns/h8s-2
		echo '{"containerID": "c1", "ifName": "eth0", "address": "10.0.0.5"}' > /var/lib/h8s/attachments/c1-eth0.json
		ip netns add h8s-1
		ip netns add other
		ip link add h8su1 type veth peer name uplink netns h8s-1
		ip link set h8su1 up
		ip address add 169.254.77.1/32 dev h8su1
		ip route add 169.254.77.2 dev h8su1
		ip route add 10.0.0.0/28 dev h8su1
		ip -n h8s-1 link add p0123456789 type veth peer name eth0
		ip -n h8s-1 link set eth0 netns other
		nft add table inet h8s
		nft add table ip others
		ip netns exec h8s-1 nft add table inet h8s
		ip netns exec h8s-1 nft add table ip stray`)
	got, err := inspect("n1", pid)
	if err != nil {
		t.Fatal(err)
	}
	want := found{
		node: "n1", installed: []string{"/etc/cni/net.d/00-h8s.conflist", "/opt/cni/bin/h8s-cni"}, guarded: true,
		portals: []foundPortal{{"h8s-1", []string{"p0123456789"}, []string{"inet h8s", "ip stray"}}, {name: "h8s-2"}},
		uplinks: []string{"h8su1"}, routes: []blockRoute{{"10.0.0.0/28", "h8su1"}},
		attachments: []network.Attachment{{ContainerID: "c1", IfName: "eth0", Address: netip.MustParseAddr("10.0.0.5")}},
	}
	sort := cmpopts.SortSlices(func(a, b string) bool { return a < b })
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(found{}, foundPortal{}, blockRoute{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), sort); diff != "" {
		t.Error(diff)
	}
}

// A machine that is itself a node, of a cluster that is not ours.
func TestDiagnoseAgentLeftovers(t *testing.T) {
	state := t.TempDir()
	clean, used := standIn(t, "true"), standIn(t, "nft add table inet h8s; ip link add h8su7 type dummy || ip link add h8su7 type veth peer name x")
	check := func(pid int, want CheckStatus, detail string) {
		t.Helper()
		if got := diagnoseAgentLeftovers(pid, state); got.Status != want || !strings.Contains(got.Detail, detail) {
			t.Errorf("got %+v, want %s, %q", got, want, detail)
		}
	}
	check(clean, CheckOK, "")
	check(used, CheckFail, "nftables table inet h8s; link h8su7; and no agent runs")
	lock, held, err := lockFile(filepath.Join(state, "lock"))
	if err != nil || held {
		t.Fatal(held, err)
	}
	check(used, CheckOK, "its agent runs")
	lock.Close()
	check(used, CheckFail, "no agent runs")
}

func TestClosedNodes(t *testing.T) {
	node := func(name string, taints ...corev1.Taint) corev1.Node {
		return corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints}}
	}
	got := closedNodes([]corev1.Node{
		node("open"),
		node("better-not", corev1.Taint{Key: "busy", Effect: corev1.TaintEffectPreferNoSchedule}),
		node("short", corev1.Taint{Key: "node.kubernetes.io/memory-pressure", Effect: corev1.TaintEffectNoSchedule}),
	})
	if diff := cmp.Diff([]string{"node short takes no pods (node.kubernetes.io/memory-pressure)"}, got); diff != "" {
		t.Error(diff)
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
