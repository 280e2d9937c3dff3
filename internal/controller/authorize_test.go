package controller

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/deploy/apiserver"
)

// caller sends requests as they are, with a certificate of the user.
type caller struct {
	config *rest.Config
	http   *http.Client
}

func callerAs(t *testing.T, user string, groups ...string) caller {
	t.Helper()
	u := userNamed(user)
	u.Groups = groups
	added, err := cluster.env.AddUser(u, nil)
	if err != nil {
		t.Fatal(err)
	}
	httpClient, err := rest.HTTPClientFor(added.Config())
	if err != nil {
		t.Fatal(err)
	}
	return caller{added.Config(), httpClient}
}

func (c caller) client(t *testing.T) client.Client {
	t.Helper()
	made, err := client.New(c.config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// do returns the status code and the body.
func (c caller) do(ctx context.Context, method, path, body string, header ...string) (int, string, error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return 0, "", err
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base.String(), "/")+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data), err
}

// names of the objects in a list.
func listed(body string) ([]string, error) {
	var list metav1.PartialObjectMetadataList
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		return nil, fmt.Errorf("%w: %s", err, body)
	}
	return names(list.Items, func(o *metav1.PartialObjectMetadata) string { return o.Name }), nil
}

const (
	namespacesPath = "/api/v1/namespaces"
	tenantsPath    = "/apis/h8s.io/v1alpha1/tenants"
	networksPath   = "/apis/h8s.io/v1alpha1/networks"
)

func selecting(path, selector string) string {
	return path + "?labelSelector=" + url.QueryEscape(selector)
}

// A tenant's people list what is theirs by label, whatever their role, by the
// API server's own authorization; and by no selector what is another's.
func TestListByLabel(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("sel", "10.0.0.0/16",
		member("User", "sel-olga", v1alpha1.RoleOwner), member("User", "sel-vera", v1alpha1.RoleView), member("Group", "sel-team", v1alpha1.RoleEdit),
		member("User", "sel-both", v1alpha1.RoleView), member("ServiceAccount", "sel-a:default", v1alpha1.RoleView)))
	newTenant(t, tenantOf("sel-other", "10.0.0.0/16", member("User", "sel-bob", v1alpha1.RoleOwner), member("User", "sel-both", v1alpha1.RoleView)))
	newNamespace(t, as(t, "sel-olga"), namespaceOf("sel-a", "", nil))
	newNamespace(t, as(t, "sel-olga"), namespaceOf("sel-b", "", map[string]string{"team": "b"}))
	newNamespace(t, as(t, "sel-bob"), namespaceOf("sel-c", "", nil))
	second := networkOf("sel-second", "sel", "10.9.0.0/16")
	if err := cluster.admin.Create(ctx, second); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the controller labels what operators make
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(second), second); err != nil {
			return err
		}
		if second.Labels[v1alpha1.LabelTenant] != "sel" {
			return fmt.Errorf("labels %v", second.Labels)
		}
		return nil
	})
	olga, both := callerAs(t, "sel-olga"), callerAs(t, "sel-both")

	t.Run("members", func(t *testing.T) {
		for name, who := range map[string]caller{
			"owner": olga, "viewer": callerAs(t, "sel-vera"), "of a group": callerAs(t, "sel-guest", "sel-team"), "of two tenants": both,
			"ServiceAccount": tokenCaller(t, "sel-a", "default"),
		} {
			for path, want := range map[string][]string{namespacesPath: {"sel-a", "sel-b"}, networksPath: {"sel", "sel-second"}, tenantsPath: {"sel"}} {
				code, body, err := who.do(ctx, http.MethodGet, selecting(path, "h8s.io/tenant=sel"), "")
				if err != nil {
					t.Fatal(err)
				}
				if got, err := listed(body); err != nil || code != http.StatusOK || !slices.Equal(got, want) {
					t.Errorf("%s lists %s: %d %v, want %v, %v", name, path, code, got, want, err)
				}
			}
		}
		for selector, want := range map[string][]string{
			"h8s.io/tenant=sel,team=b":                            {"sel-b"},
			"h8s.io/tenant=sel,h8s.io/tenant=sel-other":           nil,
			"h8s.io/tenant in (sel),!team":                        {"sel-a"},
			"h8s.io/tenant==sel,kubernetes.io/metadata.name":      {"sel-a", "sel-b"},
			"h8s.io/tenant=sel,kubernetes.io/metadata.name=sel-c": nil,
		} {
			code, body, err := olga.do(ctx, http.MethodGet, selecting(namespacesPath, selector), "")
			if err != nil {
				t.Fatal(err)
			}
			if got, err := listed(body); err != nil || code != http.StatusOK || !slices.Equal(got, want) {
				t.Errorf("-l %s: %d %v, want %v, %v", selector, code, got, want, err)
			}
		}
		code, body, err := both.do(ctx, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant in (sel,sel-other)"), "")
		if got, _ := listed(body); err != nil || code != http.StatusOK || !slices.Equal(got, []string{"sel-a", "sel-b", "sel-c"}) {
			t.Errorf("both tenants: %d %v, %v", code, got, err)
		}
	})

	t.Run("refused", func(t *testing.T) {
		sel := url.QueryEscape("h8s.io/tenant=sel")
		other := url.QueryEscape("h8s.io/tenant=sel-other")
		for name, tt := range map[string]struct {
			method, path, body string
			header             []string
		}{
			"all":                            {path: namespacesPath},
			"all Networks":                   {path: networksPath},
			"all Tenants":                    {path: tenantsPath},
			"empty selector":                 {path: namespacesPath + "?labelSelector="},
			"another's":                      {path: selecting(namespacesPath, "h8s.io/tenant=sel-other")},
			"another's Networks":             {path: selecting(networksPath, "h8s.io/tenant=sel-other")},
			"another's Tenant":               {path: selecting(tenantsPath, "h8s.io/tenant=sel-other")},
			"one that does not exist":        {path: selecting(namespacesPath, "h8s.io/tenant=sel-nobody")},
			"in both":                        {path: selecting(namespacesPath, "h8s.io/tenant in (sel,sel-other)")},
			"in both, the other way":         {path: selecting(namespacesPath, "h8s.io/tenant in (sel-other,sel)")},
			"not another's":                  {path: selecting(namespacesPath, "h8s.io/tenant!=sel-other")},
			"not hers":                       {path: selecting(namespacesPath, "h8s.io/tenant!=sel")},
			"notin":                          {path: selecting(namespacesPath, "h8s.io/tenant notin (sel-other)")},
			"exists":                         {path: selecting(namespacesPath, "h8s.io/tenant")},
			"of no tenant":                   {path: selecting(namespacesPath, "!h8s.io/tenant")},
			"of the empty tenant":            {path: selecting(namespacesPath, "h8s.io/tenant=")},
			"hers or empty":                  {path: selecting(namespacesPath, "h8s.io/tenant in (sel,)")},
			"by a label that she may set":    {path: selecting(namespacesPath, "team=b")},
			"by the label of the Network":    {path: selecting(namespacesPath, "h8s.io/network=sel")},
			"upper case":                     {path: selecting(namespacesPath, "H8S.io/tenant=sel")},
			"unparsable":                     {path: selecting(namespacesPath, "h8s.io/tenant=sel,((")},
			"not a value":                    {path: selecting(namespacesPath, "h8s.io/tenant=sel*")},
			"twice, another's first":         {path: namespacesPath + "?labelSelector=" + other + "&labelSelector=" + sel},
			"twice, nothing first":           {path: namespacesPath + "?labelSelector=&labelSelector=" + sel},
			"as a field":                     {path: namespacesPath + "?fieldSelector=" + url.QueryEscape("metadata.labels.h8s.io/tenant=sel")},
			"another's by field":             {path: namespacesPath + "?fieldSelector=metadata.name=sel-c"},
			"another's Tenant by field":      {path: tenantsPath + "?fieldSelector=metadata.name=sel-other"},
			"not by field":                   {path: namespacesPath + "?fieldSelector=metadata.name!=sel-c"},
			"get with a selector":            {path: namespacesPath + "/sel-c?labelSelector=" + sel},
			"get a Tenant with a selector":   {path: tenantsPath + "/sel-other?labelSelector=" + sel},
			"status with a selector":         {path: networksPath + "/sel-other/status?labelSelector=" + sel},
			"deletecollection":               {method: http.MethodDelete, path: selecting(networksPath, "h8s.io/tenant=sel")},
			"deletecollection of namespaces": {method: http.MethodDelete, path: selecting(namespacesPath, "h8s.io/tenant=sel")},
			"create with a selector":         {method: http.MethodPost, path: selecting(networksPath, "h8s.io/tenant=sel"), body: `{"apiVersion":"h8s.io/v1alpha1","kind":"Network","metadata":{"name":"sel-x"},"spec":{"tenant":"sel","cidrs":["10.8.0.0/16"]}}`},
			"Blocks":                         {path: selecting("/apis/h8s.io/v1alpha1/blocks", "h8s.io/tenant=sel")},
			"Users":                          {path: selecting("/apis/h8s.io/v1alpha1/users", "h8s.io/tenant=sel")},
			"nodes":                          {path: selecting("/api/v1/nodes", "h8s.io/tenant=sel")},
			"pods of all namespaces":         {path: selecting("/api/v1/pods", "h8s.io/tenant=sel")},
			"RoleBindings everywhere":        {path: selecting("/apis/rbac.authorization.k8s.io/v1/rolebindings", "h8s.io/tenant=sel")},
			"the old way to watch":           {path: selecting("/api/v1/watch/namespaces", "h8s.io/tenant=sel")},
			"the old way to watch one":       {path: selecting("/api/v1/watch/namespaces/sel-c", "h8s.io/tenant=sel")},
			"watch all":                      {path: namespacesPath + "?watch=1&timeoutSeconds=1"},
			"watch another's":                {path: selecting(namespacesPath, "h8s.io/tenant=sel-other") + "&watch=true&timeoutSeconds=1"},
			"watch what she does not parse":  {path: namespacesPath + "?watch=yes&labelSelector=" + url.QueryEscape("!") + "&timeoutSeconds=1"},
			"as another":                     {path: selecting(namespacesPath, "h8s.io/tenant=sel-other"), header: []string{"Impersonate-User", "sel-bob"}},
		} {
			t.Run(name, func(t *testing.T) {
				if tt.method == "" {
					tt.method = http.MethodGet
				}
				code, body, err := olga.do(ctx, tt.method, tt.path, tt.body, append(tt.header, "Content-Type", "application/json")...)
				if err != nil || code != http.StatusForbidden && code != http.StatusNotFound {
					t.Errorf("%d, %v, want a refusal: %s", code, err, body)
				}
				if code == http.StatusNotFound && !strings.Contains(body, "page not found") { // of an object, and so an oracle
					t.Errorf("it was looked up: %s", body)
				}
			})
		}
	})

	// The selector that is authorized is the one that selects: the first of several.
	t.Run("twice, hers first", func(t *testing.T) {
		code, body, err := olga.do(ctx, http.MethodGet, namespacesPath+"?labelSelector="+url.QueryEscape("h8s.io/tenant=sel")+"&labelSelector="+url.QueryEscape("h8s.io/tenant=sel-other"), "")
		if got, _ := listed(body); err != nil || code != http.StatusOK || !slices.Equal(got, []string{"sel-a", "sel-b"}) {
			t.Errorf("%d %v, %v", code, got, err)
		}
	})
	t.Run("pages", func(t *testing.T) {
		code, body, err := olga.do(ctx, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant=sel")+"&limit=1", "")
		var list metav1.PartialObjectMetadataList
		if jsonErr := json.Unmarshal([]byte(body), &list); err != nil || jsonErr != nil || code != http.StatusOK {
			t.Fatalf("%d %s %v", code, body, err)
		}
		if list.RemainingItemCount != nil { // it would count everybody's
			t.Errorf("%d more are told of", *list.RemainingItemCount)
		}
		if len(list.Items) != 1 || list.Continue == "" {
			t.Fatalf("%d, continue %q", len(list.Items), list.Continue)
		}
		// The place where it goes on is in her hands: it leads nowhere else.
		code, body, err = olga.do(ctx, http.MethodGet, namespacesPath+"?limit=1&continue="+url.QueryEscape(list.Continue), "")
		if err != nil || code != http.StatusForbidden {
			t.Errorf("going on without the selector: %d, %v: %s", code, err, body)
		}
		code, body, err = olga.do(ctx, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant=sel")+"&continue="+url.QueryEscape(list.Continue), "")
		if got, _ := listed(body); err != nil || code != http.StatusOK || !slices.Equal(got, []string{"sel-b"}) {
			t.Errorf("going on: %d %v, %v", code, got, err)
		}
	})
	t.Run("the refusal tells how", func(t *testing.T) {
		for who, want := range map[string]string{"sel-vera": "you may list, with -l 'h8s.io/tenant=sel'", "sel-both": "-l 'h8s.io/tenant in (sel,sel-other)'"} {
			_, body, err := callerAs(t, who).do(ctx, http.MethodGet, namespacesPath, "")
			if err != nil || !strings.Contains(body, want) {
				t.Errorf("%v, and does not say %q: %s", err, want, body)
			}
		}
		_, body, err := callerAs(t, "sel-stranger").do(ctx, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant=sel"), "")
		if err != nil || strings.Contains(body, "-l") || !strings.Contains(body, "cannot list") {
			t.Errorf("to somebody of no tenant: %v: %s", err, body)
		}
	})
}

// tokenCaller sends requests with a token of the ServiceAccount.
func tokenCaller(t *testing.T, namespace, name string) caller {
	t.Helper()
	api, err := kubernetes.NewForConfig(cluster.env.Config)
	if err != nil {
		t.Fatal(err)
	}
	token, err := api.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return tokenClient(t, token.Status.Token)
}

func tokenClient(t *testing.T, token string) caller {
	t.Helper()
	config := rest.AnonymousClientConfig(cluster.env.Config)
	config.BearerToken = token
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	return caller{config, httpClient}
}

// A watch by label shows namespaces that come into the tenant and leave it, and
// of those nothing that they are before or afterwards.
func TestWatchByLabel(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("sew", "10.0.0.0/16", member("User", "sew-olga", v1alpha1.RoleOwner)))
	newTenant(t, tenantOf("sew-other", "10.0.0.0/16"))
	newNamespace(t, as(t, "sew-olga"), namespaceOf("sew-a", "", nil))
	u, err := cluster.env.AddUser(userNamed("sew-olga"), nil)
	if err != nil {
		t.Fatal(err)
	}
	olga, err := kubernetes.NewForConfig(u.Config())
	if err != nil {
		t.Fatal(err)
	}
	list, err := olga.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: "h8s.io/tenant=sew"})
	if err != nil {
		t.Fatal(err)
	}
	// A namespace of another tenant, with a past that is not hers to know.
	wandering := namespaceOf("sew-w", "sew-other", map[string]string{"past": "secret"})
	newNamespace(t, cluster.admin, wandering)
	relabel := func(labels string) {
		t.Helper()
		patch := client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":`+labels+`}}`))
		if err := cluster.admin.Patch(ctx, namespaceOf("sew-w", "", nil), patch); err != nil {
			t.Fatal(err)
		}
	}
	relabel(`{"h8s.io/tenant":"sew","h8s.io/network":"sew","past":null}`)
	relabel(`{"h8s.io/tenant":"sew-other","h8s.io/network":"sew-other","future":"secret"}`)

	for name, from := range map[string]metav1.ListOptions{
		"from a version":        {ResourceVersion: list.ResourceVersion},
		"with what there is":    {SendInitialEvents: new(true), AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan},
		"from any version":      {ResourceVersion: "0"},
		"from the most recent":  {},
		"a version long past":   {ResourceVersion: "1"},
		"a version of tomorrow": {ResourceVersion: "9999999999", TimeoutSeconds: new(int64(1))},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			from.LabelSelector = "h8s.io/tenant=sew"
			w, err := olga.CoreV1().Namespaces().Watch(ctx, from)
			if err != nil {
				if apierrors.IsForbidden(err) {
					t.Fatal(err)
				}
				return // Expired, or Timeout: nothing was seen
			}
			defer w.Stop()
			relabel(`{"end":null}`)
			marker := namespaceOf("sew-a", "", nil) // an event that ends the watch
			patch := fmt.Sprintf(`{"metadata":{"labels":{"end":"%d"}}}`, time.Now().UnixNano())
			if err := cluster.admin.Patch(ctx, marker, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
				t.Fatal(err)
			}
			var came, left bool
			for e := range w.ResultChan() {
				ns, ok := e.Object.(*corev1.Namespace)
				if !ok {
					if e.Type == watch.Error || e.Type == watch.Bookmark {
						continue
					}
					t.Fatalf("%s of %T", e.Type, e.Object)
				}
				if e.Type == watch.Bookmark {
					continue
				}
				if ns.Labels[v1alpha1.LabelTenant] != "sew" || ns.Labels["past"] != "" || ns.Labels["future"] != "" {
					t.Errorf("%s of %s shows %v", e.Type, ns.Name, ns.Labels)
				}
				if ns.Name == "sew-w" {
					came = came || e.Type == watch.Added
					left = left || e.Type == watch.Deleted
				}
				if ns.Name == "sew-a" && ns.Labels["end"] == marker.Labels["end"] {
					break
				}
			}
			if name == "from a version" && (!came || !left) {
				t.Errorf("it came: %t, it left: %t; want both", came, left)
			}
		})
	}
}

// Access by label ends with the membership, when the API server's cache does
// (authorizedTTL, 5s), and for a disabled User however she is a member.
func TestListByLabelEnds(t *testing.T) {
	ctx := t.Context()
	tenant := tenantOf("see", "10.0.0.0/16", member("User", "see-olga", v1alpha1.RoleOwner), member("User", "see-vera", v1alpha1.RoleView), member("Group", "see-team", v1alpha1.RoleView))
	newTenant(t, tenant)
	user := &v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: "see-guest"}}
	if err := cluster.admin.Create(ctx, user); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), user) })
	vera, guest := callerAs(t, "see-vera"), callerAs(t, "see-guest", "see-team")
	answer := func(c caller, want int) {
		t.Helper()
		eventually(t, func() error {
			code, body, err := c.do(ctx, http.MethodGet, selecting(namespacesPath, "h8s.io/tenant=see"), "")
			if err != nil || code != want {
				return fmt.Errorf("%d %w, want %d: %s", code, err, want, body)
			}
			return nil
		})
	}
	answer(vera, http.StatusOK)
	answer(guest, http.StatusOK)
	patch := client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"members":[{"kind":"User","name":"see-olga","role":"owner"},{"kind":"Group","name":"see-team","role":"view"}]}}`))
	if err := cluster.admin.Patch(ctx, tenant, patch); err != nil {
		t.Fatal(err)
	}
	if err := cluster.admin.Patch(ctx, user, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"disabled":true}}`))); err != nil {
		t.Fatal(err)
	}
	answer(vera, http.StatusForbidden)
	answer(guest, http.StatusForbidden)
	answer(callerAs(t, "see-olga"), http.StatusOK)
}

// The labels by which members list are those that the specs say, also against operators.
func TestTenantLabel(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("lab", "10.0.0.0/16"))
	patch := func(obj client.Object, value string) error {
		return cluster.admin.Patch(ctx, obj, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"h8s.io/tenant":`+value+`}}}`)))
	}
	objects := map[string]func() client.Object{
		"Tenant":  func() client.Object { return &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "lab"}} },
		"Network": func() client.Object { return &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: "lab"}} },
	}
	for kind, obj := range objects {
		t.Run(kind, func(t *testing.T) {
			wantRefusal(t, patch(obj(), `"globex"`), "the label h8s.io/tenant of a "+kind+" is its")
			wantRefusal(t, patch(obj(), `null`), "")
			eventually(t, func() error {
				got := obj()
				if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(got), got); err != nil {
					return err
				}
				if got.GetLabels()[v1alpha1.LabelTenant] != "lab" {
					return fmt.Errorf("labels %v", got.GetLabels())
				}
				return nil
			})
		})
	}
	wrong := networkOf("lab-x", "lab", "10.9.0.0/16")
	wrong.Labels = map[string]string{v1alpha1.LabelTenant: "globex"}
	wantRefusal(t, cluster.admin.Create(ctx, wrong), "the label h8s.io/tenant of a Network is its spec.tenant")
	wantRefusal(t, cluster.admin.Create(ctx, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{GenerateName: "lab-"}, Spec: v1alpha1.TenantSpec{Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{"10.0.0.0/16"}}}}, client.DryRunAll), "")
}

// What is no proper SubjectAccessReview gets no answer that could be taken for one.
func TestAuthorizerInput(t *testing.T) {
	reader := cluster.admin
	for name, tt := range map[string]struct {
		method, body string
		want         int
	}{
		"a GET":                 {http.MethodGet, "", http.StatusMethodNotAllowed},
		"nothing":               {http.MethodPost, "", http.StatusBadRequest},
		"not JSON":              {http.MethodPost, "authorize me", http.StatusBadRequest},
		"another kind":          {http.MethodPost, `{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview"}`, http.StatusBadRequest},
		"another version":       {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1beta1","kind":"SubjectAccessReview"}`, http.StatusBadRequest},
		"too large":             {http.MethodPost, `{"apiVersion":"` + strings.Repeat("x", maxReview) + `"}`, http.StatusBadRequest},
		"neither":               {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{}}`, http.StatusOK},
		"nobody":                {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{"resourceAttributes":{"verb":"list","resource":"namespaces"}}}`, http.StatusOK},
		"an unparsed one":       {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{"user":"x","resourceAttributes":{"verb":"list","resource":"namespaces","labelSelector":{"rawSelector":"h8s.io/tenant=x"}}}}`, http.StatusOK},
		"that says it may":      {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{"user":"x"},"status":{"allowed":true}}`, http.StatusOK},
		"that knows the future": {http.MethodPost, `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{"user":"x","oracle":true}}`, http.StatusOK},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			(&authorizer{reader}).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), tt.method, apiserver.AuthorizePath, bytes.NewReader([]byte(tt.body))))
			var review authorizationv1.SubjectAccessReview
			if w.Code == http.StatusOK {
				if err := json.Unmarshal(w.Body.Bytes(), &review); err != nil {
					t.Fatal(err)
				}
			}
			if w.Code != tt.want || review.Status.Allowed || review.Status.Denied {
				t.Errorf("%d: %s", w.Code, w.Body)
			}
		})
	}
}
