package controller

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestChooseID(t *testing.T) {
	first, err := chooseID("a", nil)
	if err != nil || first < 1 || first > maxID {
		t.Fatalf("chooseID = %d, %v", first, err)
	}
	if again, _ := chooseID("a", map[int32]bool{first - 1: true}); again != first {
		t.Errorf("the same UID gives %d, then %d", first, again)
	}
	if next, _ := chooseID("a", map[int32]bool{first: true}); next != first%maxID+1 {
		t.Errorf("next to %d is %d", first, next)
	}
	t.Run("never twice", func(t *testing.T) {
		taken := map[int32]bool{}
		for i := range 20000 {
			id, err := chooseID(types.UID(fmt.Sprint(i)), taken)
			if err != nil || id < 1 || id > maxID || taken[id] {
				t.Fatalf("chooseID = %d, %v; taken: %t", id, err, taken[id])
			}
			taken[id] = true
		}
	})
	t.Run("behind the last one comes the first", func(t *testing.T) {
		const near = 1000 // a UID whose hash is that close to the end is soon found
		for i := 0; ; i++ {
			uid := types.UID(fmt.Sprint("near the end ", i))
			start, _ := chooseID(uid, nil)
			if start < maxID-near {
				continue
			}
			taken := map[int32]bool{}
			for id := start; id <= maxID; id++ {
				taken[id] = true
			}
			if id, err := chooseID(uid, taken); err != nil || id != 1 {
				t.Errorf("chooseID = %d, %v, want 1", id, err)
			}
			return
		}
	})
}

// Many Networks at once get different numbers, and one address range is no obstacle.
func TestNetworkNumbers(t *testing.T) {
	newTenant(t, tenantOf("many", "10.0.0.0/16"))
	const n = 30
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := cluster.admin.Create(t.Context(), networkOf(fmt.Sprintf("many-%d", i), "many", "10.0.0.0/16")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	eventually(t, func() error {
		var list v1alpha1.NetworkList
		if err := cluster.admin.List(t.Context(), &list); err != nil {
			return err
		}
		ids, ready := map[int32]string{}, 0
		for _, net := range list.Items {
			if net.Status.ID == 0 {
				continue
			}
			if other, ok := ids[net.Status.ID]; ok {
				t.Fatalf("%s and %s have the number %d", net.Name, other, net.Status.ID)
			}
			ids[net.Status.ID] = net.Name
			if net.Spec.Tenant == "many" && apimeta.IsStatusConditionTrue(net.Status.Conditions, v1alpha1.ConditionReady) {
				ready++
			}
		}
		if ready != n+1 {
			return fmt.Errorf("%d of %d Networks are ready", ready, n+1)
		}
		return nil
	})
}

// A number is given once, also if the cache does not know yet who has it.
func TestNetworkNumberTaken(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("numbers", "10.0.0.0/16"))
	const uid = "of another Network"
	wanted, err := chooseID(uid, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &networkReconciler{objects: objects{live: cluster.admin}}
	if id, err := r.freeID(ctx, uid); err != nil || id != wanted {
		t.Errorf("nobody has it: %d, %v, want %d", id, err, wanted)
	}
	eventually(t, func() error {
		var n v1alpha1.Network
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "numbers"}, &n); err != nil {
			return err
		}
		n.Status.ID = wanted
		return cluster.admin.Status().Update(ctx, &n)
	})
	if id, err := r.freeID(ctx, uid); err != nil || id != wanted+1 {
		t.Errorf("another has it: %d, %v, want %d", id, err, wanted+1)
	}
}

func TestNetworkAdmission(t *testing.T) {
	ctx := t.Context()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "adm-node"}, Spec: corev1.NodeSpec{PodCIDR: "10.200.7.0/24", PodCIDRs: []string{"10.200.7.0/24"}}}
	if err := cluster.admin.Create(ctx, node); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), node) })
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.5.11"}, {Type: corev1.NodeHostName, Address: "adm-node"}}
	if err := cluster.admin.Status().Update(ctx, node); err != nil {
		t.Fatal(err)
	}
	services := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "adm-more"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.97.0.0/24"}}}
	if err := cluster.admin.Create(ctx, services); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), services) })
	tenant := tenantOf("adm", "10.0.0.0/16")
	tenant.Spec.Quota.Networks = ptr.To(int32(2))
	newTenant(t, tenant)

	for name, tt := range map[string]struct{ cidr, want string }{
		"free":                      {"10.0.0.0/16", ""},
		"smallest":                  {"10.0.0.0/26", ""},
		"Services by flag":          {"10.96.0.0/12", "overlaps with 10.96.0.0/16 (Services of the cluster)"},
		"Services by object":        {"10.97.0.0/16", "overlaps with 10.97.0.0/24 (Services of the cluster)"},
		"default network":           {"10.244.128.0/20", "overlaps with 10.244.0.0/16 (pods of the default network)"},
		"default network of a node": {"10.200.0.0/16", "overlaps with 10.200.7.0/24 (pods of the default network on node adm-node)"},
		"address of a node":         {"192.168.0.0/16", "overlaps with 192.168.5.11/32 (address of node adm-node)"},
		"infrastructure":            {"198.18.0.0/15", "overlaps with 198.18.0.0/24 (infrastructure of the cluster)"},
		"link-local":                {"169.254.169.0/24", "link-local"},
		"loopback":                  {"127.0.0.0/8", "loopback"},
		"multicast":                 {"230.0.0.0/8", "multicast"},
		"not a CIDR":                {"10.0.0.0", "not a CIDR: write it as address/length"},
		"an address with zeros":     {"010.0.0.0/16", "not a CIDR"},
		"not canonical":             {"10.0.1.0/16", "not canonical"},
		"too small":                 {"10.0.0.0/27", "must be between /8 and /26"},
		"too large":                 {"8.0.0.0/7", "must be between /8 and /26"},
		"IPv6":                      {"fd00::/64", "IPv6 is not supported yet"},
	} {
		t.Run(name, func(t *testing.T) {
			eventually(t, func() error { // the controller may learn of the Node and the ServiceCIDR a moment later
				err := cluster.admin.Create(ctx, networkOf("adm-x", "adm", tt.cidr), client.DryRunAll)
				if tt.want != "" && err == nil {
					return fmt.Errorf("%s is accepted", tt.cidr)
				}
				wantRefusal(t, err, tt.want)
				return nil
			})
			wantRefusal(t, cluster.admin.Create(ctx, tenantOf("adm-x", tt.cidr), client.DryRunAll), tt.want)
		})
	}

	t.Run("tenant unknown", func(t *testing.T) {
		wantRefusal(t, cluster.admin.Create(ctx, networkOf("adm-x", "amd", "10.0.0.0/16"), client.DryRunAll), `the Tenant "amd" does not exist`)
	})
	t.Run("a name that is taken", func(t *testing.T) {
		if err := cluster.admin.Create(ctx, networkOf("adm-second", "adm", "10.0.0.0/16")); err != nil {
			t.Fatal(err)
		}
		wantRefusal(t, cluster.admin.Create(ctx, tenantOf("adm-second", "10.0.0.0/16"), client.DryRunAll), `a Network "adm-second" of the Tenant "adm" exists already`)
	})
	t.Run("over quota", func(t *testing.T) {
		wantRefusal(t, cluster.admin.Create(ctx, networkOf("adm-third", "adm", "10.0.0.0/16"), client.DryRunAll), "has 2 of 2 networks")
	})
	t.Run("immutable", func(t *testing.T) {
		for name, tt := range map[string]struct{ patch, want string }{
			"tenant":   {`{"spec":{"tenant":"other"}}`, "tenant is immutable"},
			"cidrs":    {`{"spec":{"cidrs":["10.1.0.0/16"]}}`, "cidrs are immutable"},
			"provider": {`{"spec":{"provider":"neutron"}}`, "Unsupported value"},
			"egress":   {`{"spec":{"egress":{"internet":false}}}`, ""},
		} {
			t.Run(name, func(t *testing.T) {
				network := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "adm"}}
				wantRefusal(t, cluster.admin.Patch(ctx, network, client.RawPatch(types.MergePatchType, []byte(tt.patch)), client.DryRunAll), tt.want)
			})
		}
		got := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "adm"}}
		wantRefusal(t, cluster.admin.Patch(ctx, got, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"network":{"cidrs":["10.1.0.0/16"]}}}`)), client.DryRunAll), "default network is immutable")
	})
	t.Run("deleted while in use", func(t *testing.T) {
		newNamespace(t, cluster.admin, namespaceOf("adm-a", "adm", nil))
		network := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "adm"}}
		wantRefusal(t, cluster.admin.Delete(ctx, network), `the Network "adm" is in use by the namespaces adm-a: delete those first`)
		wantRefusal(t, cluster.admin.DeleteAllOf(ctx, &v1alpha1.Network{}, client.MatchingFields{"metadata.name": "adm"}), `the Network "adm" is in use`)
		wantRefusal(t, cluster.admin.Delete(ctx, &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "adm-second"}}), "")
	})
}

// A node that joins with an address inside a Network makes a conflict, which ends when it leaves.
func TestNetworkConflict(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("clash", "172.20.0.0/16"))
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "clash-node"}}
	if err := cluster.admin.Create(ctx, node); err != nil {
		t.Fatal(err)
	}
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "172.20.3.4"}}
	if err := cluster.admin.Status().Update(ctx, node); err != nil {
		t.Fatal(err)
	}
	conditions := func() (ready, conflict *metav1.Condition, err error) {
		var n v1alpha1.Network
		err = cluster.admin.Get(ctx, client.ObjectKey{Name: "clash"}, &n)
		return apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionReady), apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionConflict), err
	}
	eventually(t, func() error {
		ready, conflict, err := conditions()
		if err != nil {
			return err
		}
		if conflict == nil || conflict.Status != "True" || ready.Status != "False" || !strings.Contains(ready.Message, "address of node clash-node") {
			return fmt.Errorf("Ready = %+v, Conflict = %+v", ready, conflict)
		}
		return nil
	})
	eventually(t, func() error {
		if err := tenantReady(ctx, "clash"); err == nil {
			return fmt.Errorf("the Tenant is ready still")
		}
		return nil
	})
	if err := cluster.admin.Delete(ctx, node); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		ready, conflict, err := conditions()
		if err != nil {
			return err
		}
		if conflict != nil || ready.Status != "True" {
			return fmt.Errorf("Ready = %+v, Conflict = %+v", ready, conflict)
		}
		return nil
	})
}

// Blocks of a node that is gone go too, while the Network lives.
func TestBlocksOfLostNode(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("lost", "10.0.0.0/16"))
	var blocks []*v1alpha1.Block
	for i, name := range []string{"lost-n1", "lost-n2"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := cluster.admin.Create(ctx, node); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = client.IgnoreNotFound(cluster.admin.Delete(context.Background(), node)) })
		b := &v1alpha1.Block{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("lost-10-0-0-%d", 16*i)},
			Spec:       v1alpha1.BlockSpec{Network: "lost", CIDR: fmt.Sprintf("10.0.0.%d/28", 16*i), Node: name},
		}
		if err := cluster.admin.Create(ctx, b); err != nil {
			t.Fatal(err)
		}
		blocks = append(blocks, b)
	}
	if err := cluster.admin.Delete(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "lost-n1"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(blocks[0]), &v1alpha1.Block{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("Block of the lost node: %w", err)
		}
		var n v1alpha1.Network
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "lost"}, &n); err != nil {
			return err
		}
		if n.Status.Blocks != 1 {
			return fmt.Errorf("status.blocks = %d", n.Status.Blocks)
		}
		return nil
	})
	if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(blocks[1]), &v1alpha1.Block{}); err != nil {
		t.Errorf("Block of the living node: %v", err)
	}
	if err := cluster.admin.Delete(ctx, blocks[1]); err != nil {
		t.Fatal(err)
	}
}
