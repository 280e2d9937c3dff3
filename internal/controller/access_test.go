package controller

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

var update = flag.Bool("update", false, "write docs/roles.md anew")

var verbs = []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}

// apiResource is one of the API server's, subresources included.
type apiResource struct {
	schema.GroupVersionResource
	kind        string
	subresource string
	namespaced  bool
	verbs       []string
}

func (r apiResource) String() string {
	name := r.Resource
	if r.subresource != "" {
		name += "/" + r.subresource
	}
	if r.Group != "" {
		name += "." + r.Group
	}
	return name
}

func apiResources(t *testing.T) []apiResource {
	t.Helper()
	api, err := discovery.NewDiscoveryClientForConfig(cluster.env.Config)
	if err != nil {
		t.Fatal(err)
	}
	_, lists, err := api.ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	var all []apiResource
	seen := map[string]bool{}
	for _, list := range lists {
		gv, err := schema.ParseGroupVersion(list.GroupVersion)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range list.APIResources {
			name, sub, _ := strings.Cut(r.Name, "/")
			res := apiResource{gv.WithResource(name), r.Kind, sub, r.Namespaced, r.Verbs}
			if !seen[res.String()] { // authorization knows no versions
				seen[res.String()] = true
				all = append(all, res)
			}
		}
	}
	// Kubernetes keeps no discovery of impersonation, which is authorized like a resource.
	all = append(all, apiResource{GroupVersionResource: schema.GroupVersionResource{Version: "v1", Resource: "users"}}, apiResource{GroupVersionResource: schema.GroupVersionResource{Version: "v1", Resource: "groups"}})
	slices.SortFunc(all, func(a, b apiResource) int { return cmp.Compare(a.String(), b.String()) })
	return all
}

// person is somebody of the matrix.
type person struct {
	name string
	role v1alpha1.Role
}

// allowed asks the API server's authorizer.
func allowed(t *testing.T, api kubernetes.Interface, user, verb, namespace, name string, r apiResource) bool {
	t.Helper()
	review, err := api.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user, Groups: []string{"system:authenticated"},
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Verb: verb, Namespace: namespace, Name: name, Group: r.Group, Version: r.Version, Resource: r.Resource, Subresource: r.subresource,
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return review.Status.Allowed
}

// What the people of tenant access-acme may do, for every verb and resource that
// the API server has: in their own namespace, in the namespace of access-globex
// (nothing), and outside namespaces (a short list). docs/roles.md is written from it.
func TestAccessMatrix(t *testing.T) {
	ctx := t.Context()
	people := []person{{"access-olga", v1alpha1.RoleOwner}, {"access-adam", v1alpha1.RoleAdmin}, {"access-eve", v1alpha1.RoleEdit}, {"access-vera", v1alpha1.RoleView}}
	acme := tenantOf("access-acme", "10.0.0.0/16")
	for _, p := range people {
		acme.Spec.Members = append(acme.Spec.Members, member("User", p.name, p.role))
	}
	newTenant(t, acme)
	newTenant(t, tenantOf("access-globex", "10.0.0.0/16", member("User", "access-bob", v1alpha1.RoleOwner)))
	newNamespace(t, as(t, "access-olga"), namespaceOf("access-a", "", nil))
	newNamespace(t, as(t, "access-bob"), namespaceOf("access-b", "", nil))
	api, err := kubernetes.NewForConfig(cluster.env.Config)
	if err != nil {
		t.Fatal(err)
	}
	resources := apiResources(t)
	special := []string{"impersonate", "bind", "escalate", "approve", "sign"}

	var own strings.Builder
	t.Run("own namespace", func(t *testing.T) {
		var closed []string
		for _, r := range resources {
			if !r.namespaced {
				continue
			}
			cells, open := []string{r.String()}, false
			for _, p := range people {
				var may []string
				for _, verb := range append(slices.Clone(verbs), "impersonate") {
					if allowed(t, api, p.name, verb, "access-a", "", r) {
						may = append(may, verb)
						open = true
					}
				}
				cells = append(cells, short(may))
			}
			if !open {
				closed = append(closed, r.String())
				continue
			}
			row(&own, cells...)
		}
		fmt.Fprintf(&own, "\nClosed to all of them: %s.\n", strings.Join(closed, ", "))
	})

	t.Run("another tenant's namespace", func(t *testing.T) {
		for _, r := range resources {
			if !r.namespaced {
				continue
			}
			for _, p := range people {
				for _, verb := range append(slices.Clone(verbs), "impersonate") {
					if allowed(t, api, p.name, verb, "access-b", "", r) {
						t.Errorf("%s may %s %s in access-b", p.role, verb, r)
					}
				}
			}
		}
	})

	may := map[string]map[v1alpha1.Role][]string{} // outside namespaces: verbs, by what and role
	t.Run("outside namespaces", func(t *testing.T) {
		// What each may on a resource, by name where it has one.
		creators := []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin}
		everyone := append(slices.Clone(creators), v1alpha1.RoleEdit, v1alpha1.RoleView)
		expected := map[string][]v1alpha1.Role{
			"create namespaces": creators,
			"create selfsubjectaccessreviews.authorization.k8s.io": everyone,
			"create selfsubjectrulesreviews.authorization.k8s.io":  everyone,
			"create selfsubjectreviews.authentication.k8s.io":      everyone,
			"get tenants.h8s.io access-acme":                       everyone,
			"list tenants.h8s.io access-acme":                      everyone,
			"watch tenants.h8s.io access-acme":                     everyone,
			"get networks.h8s.io access-acme":                      everyone,
			"list networks.h8s.io access-acme":                     everyone,
			"watch networks.h8s.io access-acme":                    everyone,
		}
		for _, verb := range []string{"get", "list", "watch"} {
			expected[verb+" namespaces access-a"] = everyone
		}
		expected["delete namespaces access-a"] = creators
		for _, r := range resources {
			if r.namespaced {
				continue
			}
			for _, p := range people {
				names := []string{""}
				switch {
				case r.subresource != "":
				case r.Group == v1alpha1.GroupVersion.Group:
					names = append(names, "access-acme", "access-globex")
				case r.Resource == "namespaces":
					names = append(names, "access-a", "access-b", release)
				}
				for _, verb := range append(slices.Clone(verbs), special...) {
					for _, name := range names {
						what := strings.TrimSpace(fmt.Sprintf("%s %s %s", verb, r, name))
						if verb == "create" { // which has no name yet when it is authorized by a rule without names
							what = fmt.Sprintf("%s %s", verb, r)
						}
						want := slices.Contains(expected[what], p.role)
						inside := ""
						if r.Resource == "namespaces" { // the API server authorizes it as inside itself
							inside = name
						}
						got := allowed(t, api, p.name, verb, inside, name, r)
						if got != want {
							t.Errorf("%s may %s: %t, want %t", p.role, what, got, want)
						}
						if got {
							note(may, strings.TrimSpace(strings.TrimPrefix(what, verb)), p.role, verb)
						}
					}
				}
			}
		}
	})

	t.Run("paths", func(t *testing.T) {
		for path, want := range map[string]bool{"/version": true, "/healthz": true, "/api": true, "/metrics": false, "/logs": false, "/debug/pprof": false, "/configz": false} {
			review, err := api.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User: "access-olga", Groups: []string{"system:authenticated"}, NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: path, Verb: "get"},
			}}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if review.Status.Allowed != want {
				t.Errorf("get %s: %t, want %t", path, review.Status.Allowed, want)
			}
		}
	})

	t.Run("requests", func(t *testing.T) { requests(ctx, t, resources) })

	t.Run("lists", func(t *testing.T) {
		for _, r := range resources {
			if r.namespaced || r.subresource != "" {
				continue
			}
			for _, p := range people {
				for _, verb := range verbs {
					anyhow := selects(t, api, p.name, verb, "", r)
					want := anyhow || (verb == "list" || verb == "watch") && slices.Contains([]string{"namespaces", "tenants.h8s.io", "networks.h8s.io"}, r.String())
					got := selects(t, api, p.name, verb, "access-acme", r)
					if got != want {
						t.Errorf("%s may %s %s by label: %t, want %t", p.role, verb, r, got, want)
					}
					if got && !anyhow {
						note(may, r.String()+" -l h8s.io/tenant=access-acme", p.role, verb)
					}
					if others := selects(t, api, p.name, verb, "access-globex", r); others != anyhow {
						t.Errorf("%s may %s %s of another tenant by label", p.role, verb, r)
					}
				}
			}
		}
	})

	var outside strings.Builder
	for _, what := range slices.Sorted(maps.Keys(may)) {
		cells := []string{strings.NewReplacer("access-acme", "TENANT", "access-a", "NAMESPACE").Replace(what)}
		for _, p := range people {
			cells = append(cells, short(slices.Compact(may[what][p.role])))
		}
		row(&outside, cells...)
	}
	documentRoles(t, outside.String(), own.String())
}

// short abbreviates verbs as docs/roles.md says.
func short(may []string) string {
	s := strings.Join(may, " ")
	s = strings.Replace(s, strings.Join(verbs[:3], " "), "read", 1)
	s = strings.Replace(s, strings.Join(verbs[3:], " "), "write", 1)
	return cmp.Or(s, "-")
}

func row(w *strings.Builder, cells ...string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

func note(may map[string]map[v1alpha1.Role][]string, what string, role v1alpha1.Role, verb string) {
	if may[what] == nil {
		may[what] = map[v1alpha1.Role][]string{}
	}
	may[what][role] = append(may[what][role], verb)
}

// selects asks whether the user may, with a selector of the tenant's objects; of
// any objects if tenant is empty.
func selects(t *testing.T, api kubernetes.Interface, user, verb, tenant string, r apiResource) bool {
	t.Helper()
	attributes := &authorizationv1.ResourceAttributes{Verb: verb, Group: r.Group, Version: r.Version, Resource: r.Resource}
	if tenant != "" {
		attributes.LabelSelector = &authorizationv1.LabelSelectorAttributes{Requirements: []metav1.LabelSelectorRequirement{
			{Key: v1alpha1.LabelTenant, Operator: metav1.LabelSelectorOpIn, Values: []string{tenant}},
		}}
	}
	review, err := api.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{User: user, Groups: []string{"system:authenticated"}, ResourceAttributes: attributes},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return review.Status.Allowed
}

// documentRoles compares docs/roles.md with what the API server has answered.
func documentRoles(t *testing.T, outside, own string) {
	t.Helper()
	const head = "| | owner | admin | edit | view |\n|---|---|---|---|---|\n"
	text := "# Roles\n\n" + rolesIntroduction + "\n## In a namespace of the tenant\n\n" + head + own + "\n" + rolesAdmission +
		"\n## Outside namespaces\n\n" + head + outside + "\n" + rolesOutside
	const file = "../../docs/roles.md"
	if *update {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil { //nolint:gosec // to be read by all
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := gocmp.Diff(string(want), text); diff != "" {
		t.Errorf("access has changed; if that is meant, run make generate:\n%s", diff)
	}
}

// The words of docs/roles.md, which the test writes whole.
const (
	rolesIntroduction = `What a member of a Tenant may do, by ` + "`spec.members[].role`" + `: each line was asked of a real API server, for every resource and verb that it knows, with the chart's
roles and Kubernetes' own controllers at work. ` + "`make generate`" + ` writes this page, and a test fails when it is no longer true.

*read* is get, list and watch; *write* is create, update, patch, delete and deletecollection. The roles admin, edit and view are Kubernetes' own aggregated ClusterRoles: what an operator's
CRDs add to those by aggregation, members get too. An owner has what an admin has.
`
	rolesAdmission = `Admission takes some of it away again, whatever the role:

| | |
|---|---|
| pods/proxy, services/proxy | refused (policy h8s-proxy): the API server would dial an address of the tenant's from a node |
| rolebindings | may name ServiceAccounts of the tenant's own namespaces only; those called ` + "`h8s:…`" + ` are the controller's (policy h8s-rolebinding) |
| roles, rolebindings | give no more than the giver has (Kubernetes) |
| pods, and whatever makes pods | Pod Security baseline; sandbox, Network and node are not theirs to choose (policy h8s-pod) |
| services | no externalIPs, no other proxy (policy h8s-service) |
`
	rolesOutside = `TENANT, NAMESPACE: the member's own. A list by name is one with ` + "`--field-selector metadata.name=…`" + `, as ` + "`kubectl wait`" + ` makes it; one by label needs an API server that asks
h8s-controller ([operations](operations.md#members-list-what-is-theirs)). A namespace that is created is put into the tenant, and counted, by admission. All else, of other tenants and of
the cluster, is closed.
`
)

// requests sends what the matrix asked about, with an owner's certificate: every
// verb of every resource, against another tenant and the cluster. All must be
// refused as forbidden, before anything is looked up.
func requests(ctx context.Context, t *testing.T, resources []apiResource) {
	user, err := cluster.env.AddUser(userNamed("access-olga"), nil)
	if err != nil {
		t.Fatal(err)
	}
	config := user.Config()
	config.QPS = -1
	olga, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	everyoneMay := map[string]bool{"selfsubjectaccessreviews": true, "selfsubjectrulesreviews": true, "selfsubjectreviews": true}
	tried := 0
	for _, r := range resources {
		if r.kind == "" || everyoneMay[r.Resource] {
			continue
		}
		var target dynamic.ResourceInterface = olga.Resource(r.GroupVersionResource)
		name := "access-globex"
		if r.namespaced {
			target, name = olga.Resource(r.GroupVersionResource).Namespace("access-b"), "default"
		} else if r.Resource == "namespaces" {
			name = "access-b"
		}
		obj := &unstructured.Unstructured{Object: map[string]any{"apiVersion": r.GroupVersion().String(), "kind": r.kind, "metadata": map[string]any{"name": name}}}
		var sub []string
		if r.subresource != "" {
			sub = []string{r.subresource}
		}
		calls := map[string]func() error{
			"get":    func() error { _, err := target.Get(ctx, name, metav1.GetOptions{}, sub...); return err },
			"update": func() error { _, err := target.Update(ctx, obj, metav1.UpdateOptions{}, sub...); return err },
			"patch": func() error {
				_, err := target.Patch(ctx, name, types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{}, sub...)
				return err
			},
		}
		if r.subresource == "" {
			calls["list"] = func() error { _, err := target.List(ctx, metav1.ListOptions{}); return err }
			calls["watch"] = func() error { _, err := target.Watch(ctx, metav1.ListOptions{}); return err }
			calls["delete"] = func() error { return target.Delete(ctx, name, metav1.DeleteOptions{}) }
			calls["deletecollection"] = func() error { return target.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}) }
		}
		if r.Resource != "namespaces" || r.subresource != "" {
			calls["create"] = func() error { _, err := target.Create(ctx, obj, metav1.CreateOptions{}, sub...); return err }
		}
		for verb, call := range calls {
			if !slices.Contains(r.verbs, verb) {
				continue
			}
			tried++
			if err := call(); !apierrors.IsForbidden(err) {
				t.Errorf("%s %s %s: %v, want forbidden", verb, r, name, err)
			}
		}
	}
	t.Logf("%d requests refused", tried)
}

// An owner can do her work: the positive side of the matrix, by real requests.
func TestOwnerAtWork(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("work", "10.0.0.0/16", member("User", "work-alice", v1alpha1.RoleOwner), member("User", "work-vera", v1alpha1.RoleView)))
	alice, vera := as(t, "work-alice"), as(t, "work-vera")
	ns := namespaceOf("work-a", "", nil)
	newNamespace(t, alice, ns)
	meta := metav1.ObjectMeta{Namespace: "work-a", Name: "x"}
	for _, obj := range []client.Object{
		pod("work-a", "x", nil),
		&corev1.ConfigMap{ObjectMeta: meta},
		&corev1.Secret{ObjectMeta: meta},
		&corev1.ServiceAccount{ObjectMeta: meta},
		&corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}},
	} {
		t.Run(fmt.Sprintf("%T", obj), func(t *testing.T) {
			if err := vera.Create(ctx, obj.DeepCopyObject().(client.Object)); !apierrors.IsForbidden(err) {
				t.Errorf("a viewer creates: %v", err)
			}
			if err := alice.Create(ctx, obj); err != nil {
				t.Fatal(err)
			}
			if err := alice.Get(ctx, client.ObjectKeyFromObject(obj), obj); err != nil {
				t.Error(err)
			}
			if err := alice.Delete(ctx, obj); err != nil {
				t.Error(err)
			}
		})
	}
	var own v1alpha1.Tenant
	if err := vera.Get(ctx, client.ObjectKey{Name: "work"}, &own); err != nil {
		t.Error(err)
	}
	if err := vera.Delete(ctx, ns); !apierrors.IsForbidden(err) {
		t.Errorf("a viewer deletes the namespace: %v", err)
	}
	if err := alice.Delete(ctx, ns); err != nil {
		t.Error(err)
	}
}
