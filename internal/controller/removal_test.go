package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/login"
	"h8s.io/hypernetes/internal/tenancy"
)

func suspend(t *testing.T, tenant string, suspended bool, because string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"suspended":%t,"suspendedBecause":%q}}`, suspended, because)
	if err := cluster.admin.Patch(t.Context(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: tenant}}, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
		t.Fatal(err)
	}
}

// tokenFor is a token of the ServiceAccount that the maker may make; bound to the pod if there is one.
func tokenFor(t *testing.T, maker client.Client, namespace, name string, boundTo *corev1.Pod) caller {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if boundTo != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: boundTo.Name, UID: boundTo.UID}
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	if err := maker.SubResource("token").Create(t.Context(), account, request); err != nil {
		t.Fatal(err)
	}
	return tokenClient(t, request.Status.Token)
}

// answers waits until the request is answered with the code, and a body that has the text.
func answers(t *testing.T, who caller, method, path, body string, code int, text string) {
	t.Helper()
	eventually(t, func() error {
		got, answer, err := who.do(t.Context(), method, path, body, "Content-Type", "application/json")
		if err != nil || got != code || !strings.Contains(answer, text) {
			return fmt.Errorf("%s %s: %d %w, want %d and %q: %s", method, path, got, err, code, text, answer)
		}
		return nil
	})
}

// forbidden waits until the client's request is, by what has the text.
func forbidden(t *testing.T, text string, request func() error) {
	t.Helper()
	eventually(t, func() error {
		if err := request(); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), text) {
			return fmt.Errorf("%w, want it forbidden with %q", err, text)
		}
		return nil
	})
}

// holdings are the tenant's objects with all that must not change, by kind and name.
// What the controller binds may be made anew; all else must be the same object.
func holdings(t *testing.T, tenant string, namespaces ...string) (stay, bindings map[string]string) {
	t.Helper()
	stay, bindings = map[string]string{}, map[string]string{}
	add := func(gvk string, options ...client.ListOption) {
		var list unstructured.UnstructuredList
		group, kind, _ := strings.Cut(gvk, " ")
		list.SetAPIVersion(group)
		list.SetKind(kind)
		if err := cluster.admin.List(t.Context(), &list, options...); err != nil {
			t.Fatal(err)
		}
		for _, item := range list.Items {
			key := kind + " " + item.GetNamespace() + "/" + item.GetName()
			unstructured.RemoveNestedField(item.Object, "status")
			meta := map[string]any{"labels": item.GetLabels()}
			into := stay
			switch {
			case strings.HasSuffix(kind, "Binding") && strings.HasPrefix(item.GetName(), tenancy.BindingPrefix):
				into = bindings
			case kind == "Secret": // Kubernetes notes there when the token was used
				meta = map[string]any{"uid": item.GetUID()}
			case kind == "QuotaLedger":
				unstructured.RemoveNestedField(item.Object, "spec")
				fallthrough
			default:
				meta["uid"] = item.GetUID()
			}
			item.Object["metadata"] = meta
			data, err := json.Marshal(item.Object)
			if err != nil {
				t.Fatal(err)
			}
			into[key] = string(data)
		}
	}
	ours := client.MatchingLabels{v1alpha1.LabelTenant: tenant}
	for _, gvk := range []string{
		"rbac.authorization.k8s.io/v1 ClusterRole", "rbac.authorization.k8s.io/v1 ClusterRoleBinding", "flowcontrol.apiserver.k8s.io/v1 FlowSchema",
		"v1 Namespace", "h8s.io/v1alpha1 Network",
	} {
		add(gvk, ours)
	}
	add("h8s.io/v1alpha1 QuotaLedger", client.MatchingFields{"metadata.name": tenant})
	for _, ns := range namespaces {
		for _, gvk := range []string{
			"rbac.authorization.k8s.io/v1 RoleBinding", "rbac.authorization.k8s.io/v1 Role", "v1 ServiceAccount", "v1 Secret", "v1 Pod",
			"v1 PersistentVolumeClaim", "v1 Service", "v1 ConfigMap",
		} {
			add(gvk, client.InNamespace(ns))
		}
	}
	return stay, bindings
}

// newVolume makes a claim and the volume that it has got, of the reclaim policy Retain.
func newVolume(t *testing.T, namespace, name string) {
	t.Helper()
	size := hard("storage", "1Gi")
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: namespace + "-" + name},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: size, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "disks.example.com", VolumeHandle: name}},
			ClaimRef:               &corev1.ObjectReference{Namespace: namespace, Name: name},
		},
	}
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: volume.Spec.AccessModes, Resources: corev1.VolumeResourceRequirements{Requests: size}, StorageClassName: ptr.To(""), VolumeName: volume.Name,
		},
	}
	for _, obj := range []client.Object{volume, claim} {
		if err := cluster.admin.Create(t.Context(), obj); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), volume) })
	volume.Status.Phase, claim.Status.Phase = corev1.VolumeBound, corev1.ClaimBound // nobody binds them here
	for _, obj := range []client.Object{volume, claim} {
		if err := cluster.admin.Status().Update(t.Context(), obj); err != nil {
			t.Fatal(err)
		}
	}
}

// A suspended tenant's people and machines are out, by whatever way they had in; what
// runs goes on; and all of it is there again afterwards.
func TestSuspension(t *testing.T) {
	ctx := t.Context()
	ci := namespaceOf("halt-ci", "", nil) // of no tenant
	if err := cluster.admin.Create(ctx, ci); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), ci) })
	bot := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ci.Name, Name: "bot"}}
	if err := cluster.admin.Create(ctx, bot); err != nil {
		t.Fatal(err)
	}
	halt := tenantOf("halt", "10.0.0.0/16", member("User", "halt-olga", v1alpha1.RoleOwner), member("User", "halt-vera", v1alpha1.RoleView), member("Group", "halt-team", v1alpha1.RoleEdit),
		member("ServiceAccount", "halt-ci:bot", v1alpha1.RoleAdmin))
	halt.Spec.Quota.Hard = hard("pods", "20", "persistentvolumeclaims", "1")
	newTenant(t, halt)
	newTenant(t, tenantOf("halt-other", "10.0.0.0/16", member("User", "halt-olga", v1alpha1.RoleOwner)))
	newUser(t, "halt-vera")
	olga, vera := as(t, "halt-olga"), begin(t, "halt-vera")
	certificate, err := vera.Login(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	shop := namespaceOf("halt-shop", "", map[string]string{v1alpha1.LabelTenant: "halt"})
	other := namespaceOf("halt-garden", "", map[string]string{v1alpha1.LabelTenant: "halt-other"})
	newNamespace(t, olga, shop)
	newNamespace(t, olga, other)

	robot := func(ns string) []client.Object {
		return []client.Object{
			&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "robot"}},
			&rbacv1.RoleBinding{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "robot"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "edit"},
				Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: ns, Name: "robot"}},
			},
		}
	}
	worker := pod(shop.Name, "worker", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "robot" })
	legacy := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: shop.Name, Name: "forever", Annotations: map[string]string{corev1.ServiceAccountNameKey: "robot"}},
		Type:       corev1.SecretTypeServiceAccountToken,
	}
	for _, obj := range append(append(robot(shop.Name), robot(other.Name)...), worker, legacy) {
		if err := olga.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
	}
	newVolume(t, shop.Name, "data")
	eventually(t, func() error {
		if err := olga.Get(ctx, client.ObjectKeyFromObject(legacy), legacy); err != nil || len(legacy.Data[corev1.ServiceAccountTokenKey]) == 0 {
			return fmt.Errorf("no token in the Secret: %w", err)
		}
		return nil
	})
	inPod := tokenFor(t, olga, shop.Name, "robot", worker)
	const pods, configmaps, tokens = "/api/v1/namespaces/halt-shop/pods", "/api/v1/namespaces/halt-shop/configmaps", "/api/v1/namespaces/halt-shop/serviceaccounts/robot/token"
	outside := map[string]caller{
		"a token":                       tokenFor(t, olga, shop.Name, "robot", nil),
		"a token that a pod had made":   tokenFor(t, inPod.client(t), shop.Name, "robot", nil),
		"a token in a Secret":           tokenClient(t, string(legacy.Data[corev1.ServiceAccountTokenKey])),
		"of a ServiceAccount elsewhere": tokenFor(t, cluster.admin, ci.Name, bot.Name, nil),
		"a person":                      callerAs(t, "halt-olga"),
		"a viewer":                      callerAs(t, "halt-vera"),
		"somebody of a group":           callerAs(t, "halt-gus", "halt-team"),
	}
	neighbour := tokenFor(t, olga, other.Name, "robot", nil)
	for _, who := range outside {
		answers(t, who, http.MethodGet, pods, "", http.StatusOK, "worker")
	}
	answers(t, inPod, http.MethodGet, pods, "", http.StatusOK, "worker")
	answers(t, neighbour, http.MethodGet, "/api/v1/namespaces/halt-garden/pods", "", http.StatusOK, "")
	eventually(t, func() error { return tenantReady(ctx, "halt") })
	stay, bindings := holdings(t, "halt", shop.Name)

	u, err := cluster.env.AddUser(userNamed("halt-olga"), nil)
	if err != nil {
		t.Fatal(err)
	}
	api, err := kubernetes.NewForConfig(u.Config())
	if err != nil {
		t.Fatal(err)
	}
	open, err := api.CoreV1().Services(shop.Name).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer open.Stop()

	suspend(t, "halt", true, "the bill of May")
	eventually(t, func() error {
		var got v1alpha1.Tenant
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "halt"}, &got); err != nil {
			return err
		}
		for kind, text := range map[string]string{
			v1alpha1.ConditionSuspended: "the bill of May: no member has access", v1alpha1.ConditionReady: "is suspended, as its spec wants", v1alpha1.ConditionMembersReady: "none of 4 members is bound",
		} {
			if c := apimeta.FindStatusCondition(got.Status.Conditions, kind); c == nil || c.Status != metav1.ConditionTrue || c.Reason != "Suspended" || !strings.Contains(c.Message, text) {
				return fmt.Errorf("%s = %+v, want True with %q", kind, c, text)
			}
		}
		return nil
	})

	t.Run("they are out", func(t *testing.T) {
		for name, who := range outside {
			t.Run(name, func(t *testing.T) {
				answers(t, who, http.MethodGet, pods, "", http.StatusForbidden, "")
				answers(t, who, http.MethodPost, configmaps, `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"late"}}`, http.StatusForbidden, "")
				answers(t, who, http.MethodGet, pods+"/worker/log", "", http.StatusForbidden, "")
				answers(t, who, http.MethodPost, pods+"/worker/exec?command=id&stdout=1", "", http.StatusForbidden, "")
				answers(t, who, http.MethodGet, "/apis", "", map[bool]int{true: http.StatusForbidden, false: http.StatusOK}[strings.HasPrefix(name, "a token")], "")
				answers(t, who, http.MethodGet, tenantsPath+"/halt", "", http.StatusForbidden, "")
				answers(t, who, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant=halt"), "", http.StatusForbidden, `the Tenant \"halt\" is suspended: the bill of May`)
			})
		}
		forbidden(t, `the Tenant "halt" is suspended: the bill of May`, func() error {
			return olga.Create(ctx, namespaceOf("halt-more", "halt", nil), client.DryRunAll)
		})
	})
	t.Run("a token of a pod makes no other", func(t *testing.T) {
		for name, spec := range map[string]string{
			"bound to no pod": `{}`, "in place of itself": fmt.Sprintf(`{"expirationSeconds":31536000,"boundObjectRef":{"kind":"Pod","apiVersion":"v1","name":"worker","uid":%q}}`, worker.UID),
		} {
			t.Run(name, func(t *testing.T) {
				answers(t, inPod, http.MethodPost, tokens, `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":`+spec+`}`, http.StatusForbidden, "suspended")
			})
		}
	})
	t.Run("they are told why", func(t *testing.T) {
		id, err := login.WhoAmI(ctx, as(t, "halt-vera"))
		if err != nil || len(id.Tenants) != 0 || !strings.Contains(id.Note, `the Tenant "halt" is suspended: the bill of May`) {
			t.Errorf("whoami: %+v, %v", id, err)
		}
		id, err = login.WhoAmI(ctx, olga) // who has another tenant
		if err != nil || len(id.Tenants) != 1 || id.Note != `the Tenant "halt" is suspended: the bill of May` {
			t.Errorf("whoami: %+v, %v", id, err)
		}
		if id, err := login.WhoAmI(ctx, as(t, "halt-stranger")); err != nil || id.Note != "" {
			t.Errorf("a stranger's whoami: %+v, %v", id, err)
		}
	})
	t.Run("what runs goes on", func(t *testing.T) {
		answers(t, inPod, http.MethodGet, pods, "", http.StatusOK, "worker")
		answers(t, inPod, http.MethodPut, "/api/v1/namespaces/halt-shop/serviceaccounts/robot", `{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"robot"}}`, http.StatusOK, "")
		answers(t, inPod, http.MethodPost, "/api/v1/namespaces/halt-shop/persistentvolumeclaims", `{"apiVersion":"v1","kind":"PersistentVolumeClaim","metadata":{"name":"more"},"spec":{"accessModes":["ReadWriteOnce"],"resources":{"requests":{"storage":"1Gi"}}}}`,
			http.StatusForbidden, "exceeded quota: Tenant halt")
		now, bound := holdings(t, "halt", shop.Name)
		if diff := cmp.Diff(stay, now); diff != "" {
			t.Error("before and now:", diff)
		}
		delete(bound, "ClusterRoleBinding /"+tenancy.RenewalName("halt")) // "certificates are renewed"
		if len(bound) > 0 {
			t.Error("bound are still:", bound)
		}
	})
	t.Run("certificates are renewed", func(t *testing.T) {
		if _, err := vera.Renew(ctx, certificate); err != nil {
			t.Error(err)
		}
	})
	t.Run("another tenant of theirs is as before", func(t *testing.T) {
		answers(t, outside["a person"], http.MethodGet, "/api/v1/namespaces/halt-garden/pods", "", http.StatusOK, "")
		answers(t, neighbour, http.MethodGet, "/api/v1/namespaces/halt-garden/pods", "", http.StatusOK, "")
		if err := olga.Create(ctx, namespaceOf("halt-roses", "", nil), client.DryRunAll); err != nil {
			t.Error(err)
		}
	})
	t.Run("an open watch goes on", func(t *testing.T) {
		late := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: shop.Name, Name: "late"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
		if err := cluster.admin.Create(ctx, late); err != nil {
			t.Fatal(err)
		}
		for seen := false; !seen; {
			select {
			case e, ok := <-open.ResultChan():
				if !ok {
					t.Fatal("it ended: docs/removal.md says otherwise")
				}
				service, is := e.Object.(*corev1.Service)
				seen = is && service.Name == "late"
			case <-t.Context().Done():
				t.Fatal(t.Context().Err())
			}
		}
		if err := cluster.admin.Delete(ctx, late); err != nil {
			t.Fatal(err)
		}
	})

	suspend(t, "halt", false, "")
	t.Run("restored", func(t *testing.T) {
		for _, who := range outside {
			answers(t, who, http.MethodGet, pods, "", http.StatusOK, "worker")
			answers(t, who, http.MethodPost, configmaps+"?dryRun=All", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"late"}}`, map[bool]int{true: http.StatusForbidden, false: http.StatusCreated}[who == outside["a viewer"]], "")
		}
		eventually(t, func() error { return tenantReady(ctx, "halt") })
		var got v1alpha1.Tenant
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "halt"}, &got); err != nil {
			t.Fatal(err)
		}
		if c := apimeta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionSuspended); c != nil {
			t.Errorf("Suspended = %+v", c)
		}
		now, bound := holdings(t, "halt", shop.Name)
		if diff := cmp.Diff(stay, now); diff != "" {
			t.Error("before and now:", diff)
		}
		if diff := cmp.Diff(bindings, bound); diff != "" || len(bound) < 6 {
			t.Errorf("%d bindings, before and now: %s", len(bound), diff)
		}
	})
	t.Run("a token ends with its pod", func(t *testing.T) {
		if err := olga.Delete(ctx, worker); err != nil {
			t.Fatal(err)
		}
		answers(t, inPod, http.MethodGet, pods, "", http.StatusUnauthorized, "")
	})
}

// Who is owner in one tenant and editor in another may bind the other's ServiceAccounts. They
// are out of the one, in pods or not, while it is suspended, and learn nothing by that.
// Those of no tenant are operators' and stay.
func TestSuspensionOfForeignServiceAccounts(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("lodge", "10.0.0.0/16", member("User", "lodge-olga", v1alpha1.RoleOwner)))
	newTenant(t, tenantOf("lodge-next", "10.0.0.0/16", member("User", "lodge-nina", v1alpha1.RoleOwner), member("User", "lodge-olga", v1alpha1.RoleEdit)))
	olga, nina := as(t, "lodge-olga"), as(t, "lodge-nina")
	newNamespace(t, olga, namespaceOf("lodge-a", "lodge", nil))
	newNamespace(t, olga, namespaceOf("lodge-b", "lodge", nil))
	newNamespace(t, nina, namespaceOf("lodge-out", "lodge-next", nil))
	watchers := namespaceOf("lodge-watchers", "", nil) // of no tenant
	if err := cluster.admin.Create(ctx, watchers); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), watchers) })

	const inside = "/api/v1/namespaces/lodge-a/pods"
	type robot struct {
		maker     client.Client
		namespace string
		in, out   caller // of pods
	}
	robots := map[string]*robot{"another tenant's": {maker: nina, namespace: "lodge-out"}, "of another namespace of its": {maker: olga, namespace: "lodge-b"}, "no tenant's": {maker: cluster.admin, namespace: "lodge-watchers"}}
	for name, r := range robots {
		holder := pod(r.namespace, "holder", func(p *corev1.Pod) { p.Spec.ServiceAccountName = "bot" })
		for _, obj := range []client.Object{&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "bot"}}, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: "stranger"}}, holder} {
			if err := r.maker.Create(ctx, obj); err != nil {
				t.Fatal(err)
			}
		}
		for i, namespace := range []string{"lodge-a", r.namespace} {
			binder := []client.Client{olga, r.maker}[i]
			if r.maker == cluster.admin {
				binder = cluster.admin
			}
			if err := binder.Create(ctx, &rbacv1.RoleBinding{
				ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "bot-of-" + r.namespace}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "admin"},
				Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: r.namespace, Name: "bot"}},
			}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		r.in, r.out = tokenFor(t, r.maker, r.namespace, "bot", holder), tokenFor(t, r.maker, r.namespace, "bot", nil)
		for _, who := range []caller{r.in, r.out} {
			answers(t, who, http.MethodGet, inside, "", http.StatusOK, "")
			answers(t, who, http.MethodGet, "/api/v1/namespaces/"+r.namespace+"/pods", "", http.StatusOK, "holder")
		}
	}
	foreign := robots["another tenant's"]
	stranger := tokenFor(t, nina, foreign.namespace, "stranger", nil)

	suspend(t, "lodge", true, "the bill of May")
	for name, who := range map[string]caller{"in a pod": foreign.in, "in no pod": foreign.out} {
		t.Run("another tenant's, "+name, func(t *testing.T) {
			answers(t, who, http.MethodGet, inside, "", http.StatusForbidden, "")
			answers(t, who, http.MethodGet, "/api/v1/namespaces/lodge-a/secrets", "", http.StatusForbidden, "")
			answers(t, who, http.MethodPost, "/api/v1/namespaces/lodge-a/configmaps", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"late"}}`, http.StatusForbidden, "")
			answers(t, who, http.MethodPost, "/api/v1/namespaces/lodge-a/serviceaccounts/default/token", `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenRequest","spec":{}}`, http.StatusForbidden, "")
			answers(t, who, http.MethodGet, "/api/v1/namespaces/lodge-out/pods", "", http.StatusOK, "holder")
		})
	}
	t.Run("another tenant's, impersonated", func(t *testing.T) {
		nina := callerAs(t, "lodge-nina")
		eventually(t, func() error {
			code, answer, err := nina.do(ctx, http.MethodGet, inside, "", "Impersonate-User", "system:serviceaccount:lodge-out:bot")
			if err != nil || code != http.StatusForbidden {
				return fmt.Errorf("%d %w: %s", code, err, answer)
			}
			return nil
		})
	})
	t.Run("a stranger is told nothing", func(t *testing.T) {
		refusal := func(namespace string) string {
			code, answer, err := stranger.do(ctx, http.MethodGet, "/api/v1/namespaces/"+namespace+"/secrets", "")
			if err != nil || code != http.StatusForbidden {
				t.Errorf("%s: %d, %v: %s", namespace, code, err, answer)
			}
			return strings.ReplaceAll(answer, namespace, "NAMESPACE")
		}
		if diff := cmp.Diff(refusal("lodge-nowhere"), refusal("lodge-a")); diff != "" {
			t.Error("of a namespace that does not exist, and of the tenant's:", diff)
		}
	})
	t.Run("the tenant's own", func(t *testing.T) {
		answers(t, robots["of another namespace of its"].in, http.MethodGet, inside, "", http.StatusOK, "")
		answers(t, robots["of another namespace of its"].out, http.MethodGet, inside, "", http.StatusForbidden, "suspended")
	})
	t.Run("no tenant's", func(t *testing.T) {
		answers(t, robots["no tenant's"].in, http.MethodGet, inside, "", http.StatusOK, "")
		answers(t, robots["no tenant's"].out, http.MethodGet, inside, "", http.StatusOK, "")
	})
	suspend(t, "lodge", false, "")
	answers(t, foreign.in, http.MethodGet, inside, "", http.StatusOK, "")
	answers(t, foreign.out, http.MethodGet, inside, "", http.StatusOK, "")
}

// Kubernetes deletes RoleBindings after pods. While a pod holds up the deletion of a
// namespace, who is removed, disabled or suspended is out of it as of any other.
func TestAccessToNamespaceInDeletion(t *testing.T) {
	for _, gone := range []string{"namespace", "tenant"} {
		t.Run(gone, func(t *testing.T) {
			ctx := t.Context()
			id := "dusk-" + gone
			tenant := tenantOf(id, "10.0.0.0/16", member("User", id+"-olga", v1alpha1.RoleOwner), member("User", id+"-vera", v1alpha1.RoleView), member("User", id+"-vic", v1alpha1.RoleView), member("User", id+"-eve", v1alpha1.RoleEdit))
			newTenant(t, tenant)
			eve := newUser(t, id+"-eve")
			olga, ns := as(t, id+"-olga"), namespaceOf(id+"-a", "", nil)
			newNamespace(t, olga, ns)
			held := pod(ns.Name, "held", func(p *corev1.Pod) { p.Finalizers = []string{"example.com/held"} })
			if err := olga.Create(ctx, held); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = cluster.admin.Patch(context.Background(), held, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`)))
			})
			path := "/api/v1/namespaces/" + ns.Name + "/pods"
			has := func(member string, code int) {
				t.Helper()
				answers(t, callerAs(t, id+"-"+member), http.MethodGet, path, "", code, "")
			}
			if err := cluster.admin.Delete(ctx, map[string]client.Object{"namespace": ns, "tenant": tenant}[gone]); err != nil {
				t.Fatal(err)
			}
			eventually(t, func() error {
				if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(held), held); err != nil || held.DeletionTimestamp == nil {
					return fmt.Errorf("the pod is not being deleted: %w", err)
				}
				return nil
			})
			for _, member := range []string{"olga", "vera", "vic", "eve"} {
				has(member, http.StatusOK)
			}
			patch := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"members":[{"kind":"User","name":"%[1]s-olga","role":"owner"},{"kind":"User","name":"%[1]s-vic","role":"view"},{"kind":"User","name":"%[1]s-eve","role":"edit"}]}}`, id))
			if err := cluster.admin.Patch(ctx, tenant, patch); err != nil {
				t.Fatal(err)
			}
			if err := cluster.admin.Patch(ctx, eve, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"disabled":true}}`))); err != nil {
				t.Fatal(err)
			}
			has("vera", http.StatusForbidden)
			has("eve", http.StatusForbidden)
			has("vic", http.StatusOK)
			suspend(t, id, true, "")
			if gone == "namespace" {
				eventually(t, func() error { return tenantReady(ctx, id) })
				var bindings rbacv1.RoleBindingList
				if err := cluster.admin.List(ctx, &bindings, client.InNamespace(ns.Name)); err != nil || len(bindings.Items) > 0 {
					t.Errorf("the Tenant says that nobody has access, and there are: %v, %v", bindings.Items, err)
				}
			}
			has("olga", http.StatusForbidden)
			has("vic", http.StatusForbidden)
			if gone == "namespace" { // what cannot be given back is not waited for
				suspend(t, id, false, "")
				eventually(t, func() error { return tenantReady(ctx, id) })
			}
		})
	}
}

// Who is disabled, and then removed, loses what a membership gave and nothing that is the
// tenant's, also where it made it. A User is deleted when nobody lists it any more: so the
// deletion of a disabled one does not give it back what it had, nor to whoever gets the name next.
func TestUserLeaves(t *testing.T) {
	ctx := t.Context()
	part := tenantOf("part", "10.0.0.0/16", member("User", "part-olga", v1alpha1.RoleOwner), member("User", "part-ann", v1alpha1.RoleEdit))
	part.Spec.Quota.Hard = hard("pods", "20")
	newTenant(t, part)
	newNamespace(t, as(t, "part-olga"), namespaceOf("part-a", "", nil))
	ann := newUser(t, "part-ann")
	caller, annAtWork := callerAs(t, "part-ann"), as(t, "part-ann")
	const pods = "/api/v1/namespaces/part-a/pods"
	answers(t, caller, http.MethodGet, pods, "", http.StatusOK, "")
	for _, obj := range []client.Object{
		pod("part-a", "worker", nil), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "part-a", Name: "robot"}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "part-a", Name: "web"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}},
	} {
		if err := annAtWork.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
	}
	if err := as(t, "part-olga").Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: "part-a", Name: "robot"}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "view"},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "part-a", Name: "robot"}},
	}); err != nil {
		t.Fatal(err)
	}
	robot := tokenFor(t, annAtWork, "part-a", "robot", nil)
	answers(t, robot, http.MethodGet, pods, "", http.StatusOK, "worker")
	newVolume(t, "part-a", "data")
	eventually(t, func() error { return tenantReady(ctx, "part") })
	stay, _ := holdings(t, "part", "part-a")
	// Whose requests they are is written down in FlowSchemas, and who renews certificates in a ClusterRole.
	staysAll := func() {
		t.Helper()
		now, _ := holdings(t, "part", "part-a")
		for _, all := range []map[string]string{stay, now} {
			maps.DeleteFunc(all, func(key, _ string) bool {
				return strings.HasPrefix(key, "FlowSchema ") || key == "ClusterRole /"+tenancy.RenewalName("part")
			})
		}
		if diff := cmp.Diff(stay, now); diff != "" {
			t.Error("before and now:", diff)
		}
		answers(t, robot, http.MethodGet, pods, "", http.StatusOK, "worker")
	}

	disable := func(disabled bool) {
		t.Helper()
		patch := client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, `{"spec":{"disabled":%t}}`, disabled))
		if err := cluster.admin.Patch(ctx, ann, patch); err != nil {
			t.Fatal(err)
		}
	}
	disable(true)
	answers(t, caller, http.MethodGet, pods, "", http.StatusForbidden, "")
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(ann), ann); err != nil {
			return err
		}
		c := apimeta.FindStatusCondition(ann.Status.Conditions, v1alpha1.ConditionReady)
		if c == nil || c.Status != metav1.ConditionFalse || c.Reason != "Disabled" || c.ObservedGeneration != ann.Generation || !slices.Equal(ann.Status.Tenants, []string{"part"}) {
			return fmt.Errorf("Ready = %+v, tenants %v", c, ann.Status.Tenants)
		}
		return nil
	})
	err := cluster.admin.Delete(ctx, ann)
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "is a member of the Tenants part: take it off") {
		t.Fatalf("a member was deleted: %v", err)
	}
	if err := cluster.admin.DeleteAllOf(ctx, &v1alpha1.User{}, client.MatchingFields{"metadata.name": "part-ann"}); !apierrors.IsForbidden(err) {
		t.Fatalf("a member was deleted with others: %v", err)
	}
	answers(t, caller, http.MethodGet, pods, "", http.StatusForbidden, "")
	staysAll()

	disable(false)
	answers(t, caller, http.MethodGet, pods, "", http.StatusOK, "")
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"members":[{"kind":"User","name":"part-olga","role":"owner"}]}}`))
	if err := cluster.admin.Patch(ctx, part, patch); err != nil {
		t.Fatal(err)
	}
	answers(t, caller, http.MethodGet, pods, "", http.StatusForbidden, "")
	if err := cluster.admin.Delete(ctx, ann); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return tenantReady(ctx, "part") })
	staysAll()
	eventually(t, func() error { return noneNames(ctx, t, "part-ann", nil) })
}

// noneNames fails if any object that the API server has, of whatever kind, says the name,
// but for those that may.
func noneNames(ctx context.Context, t *testing.T, name string, may func(*unstructured.Unstructured) bool) error {
	t.Helper()
	c, err := dynamic.NewForConfig(cluster.env.Config)
	if err != nil {
		t.Fatal(err)
	}
	var found []error
	for _, r := range apiResources(t) {
		// Events end by themselves; componentstatuses are no objects.
		if r.subresource != "" || !slices.Contains(r.verbs, "list") || r.Resource == "events" || r.Resource == "componentstatuses" {
			continue
		}
		list, err := c.Resource(r.GroupVersionResource).List(ctx, metav1.ListOptions{LabelSelector: labels.Everything().String()})
		if err != nil {
			return fmt.Errorf("list %s: %w", r, err)
		}
		for i := range list.Items {
			obj := &list.Items[i]
			obj.SetManagedFields(nil)
			data, err := obj.MarshalJSON()
			if err != nil {
				return err
			}
			if strings.Contains(string(data), name) && (may == nil || !may(obj)) {
				found = append(found, fmt.Errorf("%s still says %s: %s", r, name, data))
			}
		}
	}
	return errors.Join(found...)
}

// After a Tenant and its people nothing is left of them, in any kind, but the volumes that
// their operator wants to retain. While the deletion waits, access ends as it would otherwise.
func TestNothingIsLeft(t *testing.T) {
	ctx := t.Context()
	trace := tenantOf("vestige", "10.0.0.0/16", member("User", "vestige-olga", v1alpha1.RoleOwner), member("User", "vestige-vera", v1alpha1.RoleView), member("Group", "vestige-team", v1alpha1.RoleEdit))
	trace.Spec.Quota.Hard = hard("pods", "20")
	newTenant(t, trace)
	users := []*v1alpha1.User{newUser(t, "vestige-olga"), newUser(t, "vestige-vera")}
	olga := as(t, "vestige-olga")
	newNamespace(t, olga, namespaceOf("vestige-a", "", nil))
	newNamespace(t, olga, namespaceOf("vestige-b", "", nil))
	if err := cluster.admin.Create(ctx, networkOf("vestige-second", "vestige", "10.9.0.0/16")); err != nil {
		t.Fatal(err)
	}
	held := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "vestige-a", Name: "held", Finalizers: []string{"example.com/held"}}}
	for _, obj := range []client.Object{
		held, pod("vestige-a", "web", nil), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "vestige-a", Name: "robot"}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "vestige-b", Name: "web"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}},
	} {
		if err := olga.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
	}
	robot := tokenFor(t, olga, "vestige-a", "robot", nil)
	newVolume(t, "vestige-b", "data")
	if err := noneNames(ctx, t, "vestige", nil); err == nil || !strings.Contains(err.Error(), "networks.h8s.io still says") {
		t.Fatalf("the search finds nothing: %v", err)
	}

	if err := cluster.admin.Delete(ctx, trace); err != nil {
		t.Fatal(err)
	}
	answers(t, robot, http.MethodGet, "/version", "", http.StatusUnauthorized, "") // its ServiceAccount has gone
	olgas := callerAs(t, "vestige-olga")
	answers(t, olgas, http.MethodGet, tenantsPath+"/vestige", "", http.StatusOK, "WaitingForNamespaces")
	wantRefusal(t, cluster.admin.Delete(ctx, users[0]), "the Tenants vestige, each of which is being deleted: wait")
	suspend(t, "vestige", true, "")
	answers(t, olgas, http.MethodGet, tenantsPath+"/vestige", "", http.StatusForbidden, "")
	answers(t, olgas, http.MethodGet, "/api/v1/namespaces/vestige-a", "", http.StatusForbidden, "")
	if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(held), held); err != nil {
		t.Fatal(err)
	}
	held.Finalizers = nil
	if err := cluster.admin.Update(ctx, held); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(trace), trace); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the Tenant is still there: %w: %+v", err, trace.Status.Conditions)
		}
		return nil
	})
	for _, u := range users {
		if err := cluster.admin.Delete(ctx, u); err != nil {
			t.Fatal(err)
		}
	}
	retained := 0
	eventually(t, func() error {
		retained = 0
		return noneNames(ctx, t, "vestige", func(obj *unstructured.Unstructured) bool {
			if obj.GetKind() != "PersistentVolume" {
				return false
			}
			retained++
			return true
		})
	})
	if retained != 1 {
		t.Errorf("%d volumes are retained, want 1", retained)
	}
}
