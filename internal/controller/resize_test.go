package controller

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// resize asks for other requests of the pod's only container, in place (KEP-1287).
func resize(t *testing.T, c client.Client, p *corev1.Pod, requests corev1.ResourceList, options ...client.SubResourcePatchOption) error {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":%q,"memory":%q}}}]}}`, requests.Cpu(), requests.Memory())
	return c.SubResource("resize").Patch(t.Context(), p.DeepCopy(), client.RawPatch(types.StrategicMergePatchType, []byte(patch)), options...)
}

// scalerOf is who resizes pods: Kubernetes' roles admin and edit do not have it, so an
// operator, or what an operator runs, such as the vertical pod autoscaler.
func scalerOf(t *testing.T, namespaces ...string) client.Client {
	t.Helper()
	for _, ns := range namespaces {
		role := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "scaler"}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods/resize"}, Verbs: []string{"patch"}}}}
		binding := &rbacv1.RoleBinding{
			ObjectMeta: role.ObjectMeta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "scaler"},
			Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "resize-scaler"}},
		}
		for _, obj := range []client.Object{role, binding} {
			if err := cluster.admin.Create(t.Context(), obj); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := as(t, "resize-scaler")
	eventually(t, func() error {
		for _, ns := range namespaces {
			review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
				ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: ns, Verb: "patch", Resource: "pods", Subresource: "resize"},
			}}
			if err := c.Create(t.Context(), review); err != nil || !review.Status.Allowed {
				return fmt.Errorf("the scaler may not resize in %s yet: %w", ns, err)
			}
		}
		return nil
	})
	return c
}

// A pod that grows in place is bounded as one that is created, and what it gives back
// can be had by others when its node has taken it away.
func TestResize(t *testing.T) {
	ctx := t.Context()
	newBounded(t, "resize", hard("requests.cpu", "1", "requests.memory", "1Gi"), "resize-a", "resize-b")
	alice, scaler := as(t, "resize-alice"), scalerOf(t, "resize-a", "resize-b")
	of := func(namespace, name, cpu, memory string) *corev1.Pod {
		return pod(namespace, name, func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = hard("cpu", cpu, "memory", memory) })
	}
	create := func(p *corev1.Pod) *corev1.Pod {
		t.Helper()
		if err := alice.Create(ctx, p); err != nil {
			t.Fatal(err)
		}
		return p
	}
	// runs has the pod's status say what its node gives it.
	runs := func(p *corev1.Pod, given corev1.ResourceList) {
		t.Helper()
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(p), p); err != nil {
			t.Fatal(err)
		}
		p.Status.Phase = corev1.PodRunning
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{
			Name: "main", AllocatedResources: given, Resources: &corev1.ResourceRequirements{Requests: given},
			State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
		}}
		if err := cluster.admin.Status().Update(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	a, b := create(of("resize-a", "a", "400m", "100Mi")), create(of("resize-b", "b", "400m", "100Mi"))
	runs(a, hard("cpu", "400m", "memory", "100Mi"))

	const exceeded = "exceeded quota: Tenant resize, requested: "
	// Sums of all namespaces, for pods that run and pods that wait.
	for _, p := range []*corev1.Pod{a, b} {
		wantRefusal(t, resize(t, scaler, p, hard("cpu", "700m", "memory", "100Mi")), exceeded+"requests.cpu=300m, used: requests.cpu=800m, limited: requests.cpu=1")
		wantRefusal(t, resize(t, scaler, p, hard("cpu", "400m", "memory", "1Gi")), exceeded+"requests.memory=924Mi")
		wantRefusal(t, resize(t, scaler, p, hard("cpu", "700m", "memory", "100Mi"), client.DryRunAll), exceeded)
	}
	if err := resize(t, scaler, b, hard("cpu", "700m", "memory", "100Mi")); !apierrors.IsForbidden(err) {
		t.Errorf("the refusal is %v, want Forbidden", err)
	}
	wantRefusal(t, resize(t, scaler, b, hard("cpu", "600m", "memory", "100Mi"), client.DryRunAll), "")
	used(t, "resize", hard("requests.cpu", "800m", "requests.memory", "200Mi"))

	wantRefusal(t, resize(t, scaler, b, hard("cpu", "600m", "memory", "924Mi")), "")
	used(t, "resize", hard("requests.cpu", "1", "requests.memory", "1Gi"))
	wantRefusal(t, resize(t, scaler, a, hard("cpu", "401m", "memory", "100Mi")), exceeded+"requests.cpu=1m")
	wantRefusal(t, alice.Create(ctx, of("resize-a", "c", "1m", "1Mi")), exceeded)
	// Neither does the owner herself, nor do resources change by the other way.
	wantRefusal(t, resize(t, alice, a, hard("cpu", "300m", "memory", "100Mi")), `cannot patch resource "pods/resize"`)
	err := alice.Patch(ctx, a.DeepCopy(), client.RawPatch(types.StrategicMergePatchType, []byte(`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"1m"}}}]}}`)))
	wantRefusal(t, err, "may not change fields")

	// It asks for less, and has as much as before until its node says otherwise: that is
	// not another's yet.
	wantRefusal(t, resize(t, scaler, a, hard("cpu", "100m", "memory", "100Mi")), "")
	wantRefusal(t, resize(t, scaler, b, hard("cpu", "800m", "memory", "924Mi")), exceeded+"requests.cpu=200m, used: requests.cpu=1,")
	runs(a, hard("cpu", "100m", "memory", "100Mi"))
	used(t, "resize", hard("requests.cpu", "700m", "requests.memory", "1Gi"))
	wantRefusal(t, resize(t, scaler, b, hard("cpu", "900m", "memory", "924Mi")), "")
	used(t, "resize", hard("requests.cpu", "1", "requests.memory", "1Gi"))
}

// However many pods grow at once: never more than the quota, and in the end all of it.
func TestResizeOfCrowds(t *testing.T) {
	ctx := t.Context()
	newBounded(t, "grow", hard("requests.cpu", "300m", "requests.memory", "1Gi"), "grow-a")
	alice, scaler := as(t, "grow-alice"), scalerOf(t, "grow-a")
	const pods = 20
	for i := range pods {
		p := pod("grow-a", fmt.Sprint("p-", i), func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = hard("cpu", "10m", "memory", "1Mi") })
		if err := alice.Create(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range 2 * pods { // each twice
		wg.Go(func() {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "grow-a", Name: fmt.Sprint("p-", i%pods)}}
			err := resize(t, scaler, p, hard("cpu", "20m", "memory", "1Mi"))
			if err != nil && !strings.Contains(err.Error(), "exceeded quota: Tenant grow, requested: requests.cpu=10m") {
				t.Errorf("pod %s: %v", p.Name, err)
			}
		})
	}
	wg.Wait()
	var list corev1.PodList
	if err := cluster.admin.List(ctx, &list, client.InNamespace("grow-a")); err != nil {
		t.Fatal(err)
	}
	var total resource.Quantity
	for _, p := range list.Items {
		total.Add(p.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU])
	}
	if want := resource.MustParse("300m"); total.Cmp(want) != 0 {
		t.Errorf("the pods request %s, want %s", total.String(), want.String())
	}
	used(t, "grow", hard("requests.cpu", "300m", "requests.memory", "20Mi"))
}
