package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// One tenant from its creation to its end, as its operator and its people see it.
func TestTenantLifecycle(t *testing.T) {
	ctx := t.Context()
	alice := as(t, "life-alice")
	tenant := tenantOf("life", "10.0.0.0/16", member("User", "life-alice", v1alpha1.RoleOwner))
	tenant.Spec.Quota.Hard = corev1.ResourceList{corev1.ResourcePods: resource.MustParse("20")}
	newTenant(t, tenant)

	t.Log("the default Network is made, numbered and ready")
	var network v1alpha1.Network
	if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "life"}, &network); err != nil {
		t.Fatal(err)
	}
	if network.Spec.Tenant != "life" || network.Status.ID == 0 || !apimeta.IsStatusConditionTrue(network.Status.Conditions, v1alpha1.ConditionReady) {
		t.Errorf("Network = %+v", network)
	}

	t.Log("the owner makes a namespace; it is labelled in the answer already")
	ns := namespaceOf("life-shop", "", map[string]string{"team": "a"})
	eventually(t, func() error { return alice.Create(ctx, ns) }) // the authorizer learns of the binding by a watch
	wantLabels := map[string]string{
		"team": "a", "kubernetes.io/metadata.name": "life-shop", "pod-security.kubernetes.io/enforce": "baseline",
		v1alpha1.LabelTenant: "life", v1alpha1.LabelNetwork: "life", v1alpha1.LabelSandbox: "gvisor",
	}
	if diff := cmp.Diff(wantLabels, ns.Labels); diff != "" {
		t.Error("labels:", diff)
	}
	if diff := cmp.Diff(map[string]string{v1alpha1.AnnotationSandboxes: "gvisor", v1alpha1.AnnotationCreator: "life-alice"}, ns.Annotations); diff != "" {
		t.Error("annotations:", diff)
	}
	eventually(t, func() error { return alice.Get(ctx, client.ObjectKeyFromObject(ns), &corev1.Namespace{}) })
	eventually(t, func() error {
		var got v1alpha1.Tenant
		if err := alice.Get(ctx, client.ObjectKey{Name: "life"}, &got); err != nil {
			return err
		}
		if !slices.Equal(got.Status.Namespaces, []string{"life-shop"}) || got.Status.Network != "life" {
			return fmt.Errorf("status = %+v", got.Status)
		}
		return tenantReady(ctx, "life")
	})

	t.Log("what somebody breaks is repaired")
	for _, obj := range []client.Object{
		&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "life-shop", Name: "h8s:admin"}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenancy.CreatorBindingName("life")}},
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: tenancy.MemberRoleName("life")}},
	} {
		if err := cluster.admin.Delete(ctx, obj); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			return cluster.admin.Get(ctx, client.ObjectKeyFromObject(obj), obj.DeepCopyObject().(client.Object))
		})
	}

	t.Log("a pod of hers runs on a node that holds a Block")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "life-node"}}
	if err := cluster.admin.Create(ctx, node); err != nil {
		t.Fatal(err)
	}
	block := &v1alpha1.Block{ObjectMeta: metav1.ObjectMeta{Name: "life-10-0-0-0"}, Spec: v1alpha1.BlockSpec{Network: "life", CIDR: "10.0.0.0/28", Node: "life-node"}}
	if err := cluster.admin.Create(ctx, block); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return alice.Create(ctx, pod("life-shop", "web", nil)) })
	eventually(t, func() error {
		if err := alice.Get(ctx, client.ObjectKey{Name: "life"}, &network); err != nil {
			return err
		}
		if network.Status.Pods != 1 || network.Status.Blocks != 1 || !slices.Equal(network.Status.Namespaces, []string{"life-shop"}) {
			return fmt.Errorf("Network status = %+v", network.Status)
		}
		return nil
	})

	t.Log("deletion: namespaces first, then the Network, which waits for the Block of a node that lives")
	held := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "life-shop", Name: "held", Finalizers: []string{"example.com/held"}}}
	if err := cluster.admin.Create(ctx, held); err != nil {
		t.Fatal(err)
	}
	if err := cluster.admin.Delete(ctx, tenant); err != nil {
		t.Fatal(err)
	}
	waits := func(reason, name string) {
		t.Helper()
		eventually(t, func() error {
			var got v1alpha1.Tenant
			if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "life"}, &got); err != nil {
				return err
			}
			c := apimeta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionDeleting)
			if c == nil || c.Reason != reason || !strings.Contains(c.Message, name) {
				return fmt.Errorf("condition Deleting = %+v, want reason %s", c, reason)
			}
			return nil
		})
	}
	waits("WaitingForNamespaces", "life-shop")
	if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "life"}, &network); err != nil || network.DeletionTimestamp != nil {
		t.Errorf("the Network went before the namespaces: %v %v", network.DeletionTimestamp, err)
	}
	if err := alice.Create(ctx, namespaceOf("life-late", "", nil)); err == nil || !strings.Contains(err.Error(), "being deleted") {
		t.Errorf("a namespace during deletion: %v", err)
	}
	held.Finalizers = nil
	if err := cluster.admin.Update(ctx, held); err != nil {
		t.Fatal(err)
	}
	waits("WaitingForNetworks", "life")
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "life"}, &network); err != nil {
			return err
		}
		if c := apimeta.FindStatusCondition(network.Status.Conditions, v1alpha1.ConditionDeleting); c == nil || c.Reason != "WaitingForBlocks" || !strings.Contains(c.Message, "life-10-0-0-0 on life-node") {
			return fmt.Errorf("condition Deleting of the Network = %+v", c)
		}
		return nil
	})

	t.Log("the node goes, and with it the last Block")
	if err := cluster.admin.Delete(ctx, node); err != nil {
		t.Fatal(err)
	}
	for _, obj := range []client.Object{
		block, &network, tenant, ns,
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: tenancy.MemberRoleName("life")}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenancy.MemberRoleName("life")}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: tenancy.CreatorBindingName("life")}},
	} {
		eventually(t, func() error {
			if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(obj), obj.DeepCopyObject().(client.Object)); !apierrors.IsNotFound(err) {
				return fmt.Errorf("%T %s is still there: %w", obj, obj.GetName(), err)
			}
			return nil
		})
	}
}

// Who may, may at once; who may no more, may at once no more.
func TestMembership(t *testing.T) {
	newTenant(t, tenantOf("club", "10.0.0.0/16", member("User", "club-owner", v1alpha1.RoleOwner)))
	newNamespace(t, as(t, "club-owner"), namespaceOf("club-room", "", nil))

	can := func(c client.Client) func() bool {
		return func() bool {
			err := c.List(t.Context(), &corev1.PodList{}, client.InNamespace("club-room"))
			if err != nil && !apierrors.IsForbidden(err) {
				t.Fatal(err)
			}
			return err == nil
		}
	}
	expect := func(what string, can func() bool, want bool) {
		t.Helper()
		eventually(t, func() error {
			if can() != want {
				return fmt.Errorf("%s: access = %t, want %t", what, !want, want)
			}
			return nil
		})
	}
	members := func(m ...v1alpha1.Member) {
		t.Helper()
		eventually(t, func() error {
			var tenant v1alpha1.Tenant
			if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: "club"}, &tenant); err != nil {
				return err
			}
			tenant.Spec.Members = append([]v1alpha1.Member{member("User", "club-owner", v1alpha1.RoleOwner)}, m...)
			return cluster.admin.Update(t.Context(), &tenant)
		})
	}
	newNamespace(t, cluster.admin, namespaceOf("club-machines", "club", nil))
	machine := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "club-machines", Name: "ci"}}
	if err := cluster.admin.Create(t.Context(), machine); err != nil {
		t.Fatal(err)
	}
	subjects := map[string]struct {
		member v1alpha1.Member
		client client.Client
	}{
		"user":            {member("User", "club-ann", v1alpha1.RoleView), as(t, "club-ann")},
		"group":           {member("Group", "club-people", v1alpha1.RoleEdit), as(t, "club-gus", "club-people")},
		"service account": {member("ServiceAccount", "club-machines:ci", v1alpha1.RoleAdmin), withToken(t, machine)},
	}
	for name, s := range subjects {
		access := can(s.client)
		expect(name+" before", access, false)
		members(s.member)
		expect(name+" as member", access, true)
		members()
		expect(name+" removed", access, false)
	}

	t.Log("a disabled User loses access, and gets it back")
	members(subjects["user"].member)
	access := can(subjects["user"].client)
	expect("before", access, true)
	user := &v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: "club-ann"}, Spec: v1alpha1.UserSpec{Disabled: true}}
	if err := cluster.admin.Create(t.Context(), user); err != nil {
		t.Fatal(err)
	}
	expect("disabled", access, false)
	eventually(t, func() error {
		if err := cluster.admin.Get(t.Context(), client.ObjectKeyFromObject(user), user); err != nil {
			return err
		}
		if !slices.Equal(user.Status.Tenants, []string{"club"}) {
			return fmt.Errorf("User status = %+v", user.Status)
		}
		user.Spec.Disabled = false
		return cluster.admin.Update(t.Context(), user)
	})
	expect("enabled", access, true)
	members()
	expect("removed", access, false)
	eventually(t, func() error {
		if err := cluster.admin.Get(t.Context(), client.ObjectKeyFromObject(user), user); err != nil {
			return err
		}
		if len(user.Status.Tenants) != 0 {
			return fmt.Errorf("User status = %+v", user.Status)
		}
		return nil
	})
}

// What an operator does with labels alone.
func TestOperatorNamespace(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("house", "10.0.0.0/16", member("User", "house-alice", v1alpha1.RoleOwner)))
	get := func() (*corev1.Namespace, error) {
		var ns corev1.Namespace
		return &ns, cluster.admin.Get(ctx, client.ObjectKey{Name: "house-a"}, &ns)
	}

	t.Log("only the tenant is named: the rest comes")
	newNamespace(t, cluster.admin, namespaceOf("house-a", "house", map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}))
	eventually(t, func() error {
		ns, err := get()
		if err != nil {
			return err
		}
		want := map[string]string{
			"kubernetes.io/metadata.name": "house-a", "pod-security.kubernetes.io/enforce": "baseline",
			v1alpha1.LabelTenant: "house", v1alpha1.LabelNetwork: "house", v1alpha1.LabelSandbox: "gvisor",
		}
		if diff := cmp.Diff(want, ns.Labels); diff != "" || ns.Annotations[v1alpha1.AnnotationSandboxes] != "gvisor" {
			return fmt.Errorf("labels: %s; annotations: %v", diff, ns.Annotations)
		}
		return nil
	})

	t.Log("a change of the tenant's sandboxes follows")
	eventually(t, func() error {
		var tenant v1alpha1.Tenant
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "house"}, &tenant); err != nil {
			return err
		}
		tenant.Spec.Sandbox = v1alpha1.TenantSandbox{Default: "hyper", Allowed: []string{"gvisor", "hyper"}}
		return cluster.admin.Update(ctx, &tenant)
	})
	eventually(t, func() error {
		ns, err := get()
		if err != nil {
			return err
		}
		if ns.Annotations[v1alpha1.AnnotationSandboxes] != "gvisor,hyper" || ns.Labels[v1alpha1.LabelSandbox] != "hyper" {
			return fmt.Errorf("labels %v, annotations %v", ns.Labels, ns.Annotations)
		}
		return nil
	})

	t.Log("taken out of the tenant, it is closed to the tenant's people")
	eventually(t, func() error {
		ns, err := get()
		if err != nil {
			return err
		}
		delete(ns.Labels, v1alpha1.LabelTenant)
		return cluster.admin.Update(ctx, ns)
	})
	eventually(t, func() error {
		ns, err := get()
		if err != nil {
			return err
		}
		var bindings rbacv1.RoleBindingList
		if err := cluster.admin.List(ctx, &bindings, client.InNamespace("house-a")); err != nil {
			return err
		}
		if len(bindings.Items) != 0 || ns.Labels[v1alpha1.LabelNetwork] != "" || ns.Annotations[v1alpha1.AnnotationSandboxes] != "" {
			return fmt.Errorf("labels %v, annotations %v, %d RoleBindings", ns.Labels, ns.Annotations, len(bindings.Items))
		}
		return nil
	})

	t.Log("a tenant that does not exist gives nobody access, and an event says so")
	newTypo := namespaceOf("house-typo", "huose", nil)
	if err := cluster.admin.Create(ctx, newTypo); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), newTypo) })
	eventually(t, func() error {
		var list corev1.EventList
		if err := cluster.admin.List(ctx, &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.InvolvedObject.Name == "house-typo" && e.Reason == "TenantNotFound" && strings.Contains(e.Message, "huose") {
				return nil
			}
		}
		return fmt.Errorf("no event among %d", len(list.Items))
	})
}

// Services that were there before their namespace became a tenant's change hands
// with it, and come back when it leaves.
func TestAdoptedServices(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("adopt", "10.0.0.0/16", member("User", "adopt-alice", v1alpha1.RoleOwner)))
	ns := namespaceOf("adopt-a", "", nil)
	if err := cluster.admin.Create(ctx, ns); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), namespaceOf("adopt-a", "", nil)) })
	for name, externalIPs := range map[string][]string{"plain": nil, "external": {"198.51.100.1"}} {
		service := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: name},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}, ExternalIPs: externalIPs},
		}
		if err := cluster.admin.Create(ctx, service); err != nil {
			t.Fatal(err)
		}
	}
	give := func(tenant string) {
		t.Helper()
		eventually(t, func() error {
			if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(ns), ns); err != nil {
				return err
			}
			ns.Labels[v1alpha1.LabelTenant] = tenant
			if tenant == "" {
				delete(ns.Labels, v1alpha1.LabelTenant)
			}
			return cluster.admin.Update(ctx, ns)
		})
	}
	servedBy := func(want string) error {
		var service corev1.Service
		if err := cluster.admin.Get(ctx, client.ObjectKey{Namespace: ns.Name, Name: "plain"}, &service); err != nil {
			return err
		}
		if got := service.Labels[labelServiceProxyName]; got != want {
			return fmt.Errorf("the Service is served by %q, want %q", got, want)
		}
		return nil
	}

	give("adopt")
	eventually(t, func() error { return servedBy(v1alpha1.ServiceProxyName) })
	eventually(t, func() error {
		var list corev1.EventList
		if err := cluster.admin.List(ctx, &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.InvolvedObject.Name == ns.Name && e.Reason == "ServiceRefused" && strings.Contains(e.Message, "externalIPs") {
				return nil
			}
		}
		return fmt.Errorf("no event among %d", len(list.Items))
	})
	// The one that is refused does not keep the rest from being done.
	eventually(t, func() error {
		var bindings rbacv1.RoleBindingList
		if err := cluster.admin.List(ctx, &bindings, client.InNamespace(ns.Name)); err != nil || len(bindings.Items) == 0 {
			return fmt.Errorf("%d RoleBindings, %w", len(bindings.Items), err)
		}
		return tenantReady(ctx, "adopt")
	})
	give("")
	eventually(t, func() error { return servedBy("") })
}

// A Tenant that waits for something says for what.
func TestTenantConditions(t *testing.T) {
	ctx := t.Context()
	message := func(name, kind string) (string, error) {
		var got v1alpha1.Tenant
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: name}, &got); err != nil {
			return "", err
		}
		c := apimeta.FindStatusCondition(got.Status.Conditions, kind)
		if c == nil || c.Status != metav1.ConditionFalse {
			return "", fmt.Errorf("%s = %+v", kind, c)
		}
		ready := apimeta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionReady)
		if ready == nil || ready.Status != metav1.ConditionFalse || ready.Message != c.Message {
			return "", fmt.Errorf("Ready = %+v does not repeat %+v", ready, c)
		}
		return c.Message, nil
	}
	expect := func(name, kind, want string) {
		t.Helper()
		eventually(t, func() error {
			got, err := message(name, kind)
			if err == nil && !strings.Contains(got, want) {
				return fmt.Errorf("message %q has no %q", got, want)
			}
			return err
		})
	}

	t.Run("a Network by name that does not exist, then exists, then belongs to another", func(t *testing.T) {
		tenant := tenantOf("late", "10.0.0.0/16")
		tenant.Spec.Network = v1alpha1.TenantNetwork{Name: "late-net"}
		if err := cluster.admin.Create(ctx, tenant); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), tenant) })
		expect("late", v1alpha1.ConditionNetworkReady, "late-net does not exist")
		if err := cluster.admin.Create(ctx, networkOf("late-net", "late", "10.0.0.0/16")); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error { return tenantReady(ctx, "late") })

		thief := tenantOf("thief", "10.0.0.0/16")
		thief.Spec.Network = v1alpha1.TenantNetwork{Name: "late-net"}
		if err := cluster.admin.Create(ctx, thief); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), thief) })
		expect("thief", v1alpha1.ConditionNetworkReady, "belongs to the Tenant late")
	})

	t.Run("a quota of what is not counted", func(t *testing.T) {
		tenant := tenantOf("odd", "10.0.0.0/16")
		tenant.Spec.Quota.Hard = corev1.ResourceList{"no such thing": resource.MustParse("1")}
		if err := cluster.admin.Create(ctx, tenant); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), tenant) })
		expect("odd", v1alpha1.ConditionQuotaReady, `"no such thing", which is not counted`)
	})

	t.Run("more namespaces than allowed", func(t *testing.T) {
		tenant := tenantOf("full", "10.0.0.0/16")
		tenant.Spec.Quota.Namespaces = ptr.To(int32(0))
		newTenant(t, tenant)
		if err := cluster.admin.Create(ctx, namespaceOf("full-a", "full", nil)); err != nil {
			t.Fatal(err)
		}
		expect("full", v1alpha1.ConditionQuotaReady, "1 namespaces and may have 0")
	})
}
