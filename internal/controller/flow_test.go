package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// flowOf are the UIDs of the FlowSchema and the level that the API server has put a
// request into; empty for what it puts into none. The answer is not read, nor waited for.
// A request that is refused with 401 is an error: it has not come as far.
func flowOf(ctx context.Context, c caller, method, path string) (schema, level string, err error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return "", "", err
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base.String(), "/")+path, nil)
	if err != nil {
		return "", "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusUnauthorized {
		return "", "", fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	return resp.Header.Get(flowcontrolv1.ResponseHeaderMatchedFlowSchemaUID), resp.Header.Get(flowcontrolv1.ResponseHeaderMatchedPriorityLevelConfigurationUID), nil
}

// Levels of the chart.
const getLevel, longLevel, systemLevel = "h8s-tenants", "h8s-tenants-lists", "h8s-system"

// flowNames are the names of the FlowSchemas and the levels that there are, by UID.
func flowNames(t *testing.T) map[string]string {
	t.Helper()
	names := map[string]string{"": ""}
	var schemas flowcontrolv1.FlowSchemaList
	var levels flowcontrolv1.PriorityLevelConfigurationList
	if err := errors.Join(cluster.admin.List(t.Context(), &schemas), cluster.admin.List(t.Context(), &levels)); err != nil {
		t.Fatal(err)
	}
	for _, s := range schemas.Items {
		names[string(s.UID)] = s.Name
	}
	for _, l := range levels.Items {
		names[string(l.UID)] = l.Name
	}
	return names
}

// Which requests are of which level: those that are short wait for none that are long.
// An exec and the like are of none: the API server does not count what lasts.
func TestFlowOfVerb(t *testing.T) {
	newTenant(t, tenantOf("verb", "10.0.0.0/16", member("User", "verb-olga", v1alpha1.RoleOwner)))
	olga := callerAs(t, "verb-olga")
	newNamespace(t, as(t, "verb-olga"), namespaceOf("verb-a", "", nil))
	eventually(t, func() error { return tenantReady(t.Context(), "verb") })
	names := flowNames(t)
	const (
		core     = "/api/v1/namespaces/verb-a"
		maps     = core + "/configmaps"
		one      = maps + "/none"
		pod      = core + "/pods/none"
		scale    = "/apis/apps/v1/namespaces/verb-a/deployments/none/scale"
		networks = "/apis/h8s.io/v1alpha1/networks"
	)
	get := map[string]string{getLevel: "h8s-tenant-verb"}
	long := map[string]string{longLevel: "h8s-lists-verb"}
	none := map[string]string{"": ""}
	for name, tt := range map[string]struct {
		method, path string
		want         map[string]string
	}{
		"get":                     {http.MethodGet, one, get},
		"get, the head":           {http.MethodHead, one, get},
		"get a subresource":       {http.MethodGet, scale, get},
		"get a custom resource":   {http.MethodGet, networks + "/verb", get},
		"get no resource":         {http.MethodGet, "/version", get},
		"post to no resource":     {http.MethodPost, "/version", get},
		"discovery":               {http.MethodGet, "/apis/apps/v1", get},
		"create":                  {http.MethodPost, maps, long},
		"create in another's":     {http.MethodPost, "/api/v1/namespaces/default/configmaps", long},
		"update":                  {http.MethodPut, one, long},
		"patch":                   {http.MethodPatch, one, long},
		"delete":                  {http.MethodDelete, one, long},
		"update a subresource":    {http.MethodPut, scale, long},
		"patch a custom resource": {http.MethodPatch, networks + "/verb", long},
		"bind":                    {http.MethodPost, pod + "/binding", long},
		"bind the old way":        {http.MethodPost, core + "/bindings", long},
		"evict":                   {http.MethodPost, pod + "/eviction", long},
		"debug":                   {http.MethodPatch, pod + "/ephemeralcontainers", long},
		"resize":                  {http.MethodPatch, pod + "/resize", long},
		"status":                  {http.MethodPatch, pod + "/status", long},
		"make a token":            {http.MethodPost, core + "/serviceaccounts/default/token", long},
		"review":                  {http.MethodPost, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", long},
		"list":                    {http.MethodGet, maps, long},
		"list one":                {http.MethodGet, maps + "?fieldSelector=metadata.name%3Dnone", long},
		"list everywhere":         {http.MethodGet, "/api/v1/configmaps", long},
		"watch":                   {http.MethodGet, maps + "?watch=1", long},
		"watch one":               {http.MethodGet, maps + "?watch=1&fieldSelector=metadata.name%3Dnone", long},
		"watch the old way":       {http.MethodGet, "/api/v1/watch/namespaces/verb-a/configmaps", long},
		"deletecollection":        {http.MethodDelete, maps + "?dryRun=All", long},
		"no verb":                 {http.MethodOptions, one, long},
		"exec":                    {http.MethodPost, pod + "/exec?command=sh", none},
		"exec by get":             {http.MethodGet, pod + "/exec?command=sh", none},
		"attach":                  {http.MethodPost, pod + "/attach", none},
		"port-forward":            {http.MethodPost, pod + "/portforward", none},
		"log":                     {http.MethodGet, pod + "/log", none},
		"proxy":                   {http.MethodPost, core + "/services/none/proxy/", none},
	} {
		t.Run(name, func(t *testing.T) {
			eventually(t, func() error { // the API server reads FlowSchemas from a cache
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel() // a watch
				schema, level, err := flowOf(ctx, olga, tt.method, tt.path)
				if err != nil {
					return err
				}
				for _, uid := range []string{schema, level} {
					if _, ok := names[uid]; !ok {
						return fmt.Errorf("no FlowSchema or level has the UID %s", uid)
					}
				}
				if diff := cmp.Diff(tt.want, map[string]string{names[level]: names[schema]}); diff != "" {
					return fmt.Errorf("- want, + got:\n%s", diff)
				}
				return nil
			})
		})
	}
}

// Each tenant's requests, whoever of it makes them and whatever they are for, are
// one flow in the level of all tenants; nobody else's are. No more than that: how
// fast the answers come is for bench, suite neighbours.
func TestFlowOfTenant(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("flow", "10.0.0.0/16", member("User", "flow-olga", v1alpha1.RoleOwner), member("User", "flow-vera", v1alpha1.RoleView),
		member("Group", "flow-team", v1alpha1.RoleEdit)))
	newTenant(t, tenantOf("flow-other", "10.0.0.0/16", member("User", "flow-bob", v1alpha1.RoleOwner)))
	newNamespace(t, as(t, "flow-olga"), namespaceOf("flow-a", "", nil))
	newNamespace(t, as(t, "flow-bob"), namespaceOf("flow-b", "", nil))
	for _, tenant := range []string{"flow", "flow-other"} {
		eventually(t, func() error { return tenantReady(ctx, tenant) })
	}
	names := flowNames(t)
	const own, foreign = "/api/v1/namespaces/flow-a/configmaps", "/api/v1/namespaces/flow-b/configmaps"
	type request struct{ method, path string }
	levels := map[request]string{
		{http.MethodGet, own + "/kube-root-ca.crt"}:            getLevel,
		{http.MethodGet, "/version"}:                           getLevel,
		{http.MethodGet, "/apis/h8s.io/v1alpha1/tenants/flow"}: getLevel,
		{http.MethodPost, own + "?dryRun=All"}:                 longLevel,
		{http.MethodPost, foreign + "?dryRun=All"}:             longLevel,
		{http.MethodGet, own}:                                  longLevel,
		{http.MethodGet, foreign}:                              longLevel,
		{http.MethodGet, namespacesPath}:                       longLevel,
	}
	prefixes := map[string]string{getLevel: "h8s-tenant-", longLevel: "h8s-lists-"}
	agent, err := kubernetes.NewForConfig(cluster.env.Config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.CoreV1().ServiceAccounts("flow-a").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "robot"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		who    caller
		tenant string // empty: none
	}{
		"an owner":                  {callerAs(t, "flow-olga"), "flow"},
		"a viewer":                  {callerAs(t, "flow-vera"), "flow"},
		"somebody of a group":       {callerAs(t, "flow-guest", "flow-team"), "flow"},
		"a ServiceAccount":          {tokenCaller(t, "flow-a", "default"), "flow"},
		"another ServiceAccount":    {tokenCaller(t, "flow-a", "robot"), "flow"},
		"another tenant":            {callerAs(t, "flow-bob"), "flow-other"},
		"another tenant's robot":    {tokenCaller(t, "flow-b", "default"), "flow-other"},
		"somebody of no tenant":     {callerAs(t, "flow-stranger"), ""},
		"the cluster's own account": {tokenCaller(t, "kube-system", "default"), ""},
		"our controller":            {tokenCaller(t, release, "h8s-controller"), systemLevel},
		"our agent":                 {tokenCaller(t, release, "h8s-node"), systemLevel},
	} {
		t.Run(name, func(t *testing.T) {
			for req, wantLevel := range levels {
				eventually(t, func() error { // the API server reads FlowSchemas from a cache
					schema, level, err := flowOf(ctx, tt.who, req.method, req.path)
					if err != nil {
						return err
					}
					if level == "" {
						return fmt.Errorf("%s %s is in no level", req.method, req.path)
					}
					wantSchema := prefixes[wantLevel] + tt.tenant
					switch tt.tenant {
					case "":
						if names[level] == systemLevel || prefixes[names[level]] != "" {
							return fmt.Errorf("%s %s is in level %s", req.method, req.path, names[level])
						}
						return nil
					case systemLevel:
						wantLevel, wantSchema = systemLevel, systemLevel
					}
					if names[level] != wantLevel || names[schema] != wantSchema {
						return fmt.Errorf("%s %s is in level %s and of FlowSchema %s, want %s and %s", req.method, req.path, names[level], names[schema], wantLevel, wantSchema)
					}
					return nil
				})
			}
		})
	}
}

// The levels of the tenants keep to themselves, and where there are few seats each has
// one, and all of them together no more than are of use to the processors.
func TestFlowLevels(t *testing.T) {
	var levels flowcontrolv1.PriorityLevelConfigurationList
	if err := cluster.admin.List(t.Context(), &levels); err != nil {
		t.Fatal(err)
	}
	const seats = 150 // of two processors, as `h8s up` has it
	var sum int32
	for _, level := range levels.Items {
		if level.Spec.Limited != nil {
			sum += *level.Spec.Limited.NominalConcurrencyShares
		}
	}
	got := map[string]int32{}
	for _, level := range levels.Items {
		if !strings.HasPrefix(level.Name, getLevel) {
			continue
		}
		limited := level.Spec.Limited
		got[level.Name] = (seats**limited.NominalConcurrencyShares + sum - 1) / sum
		if *limited.LendablePercent != 0 || limited.BorrowingLimitPercent == nil || *limited.BorrowingLimitPercent != 0 || limited.LimitResponse.Type != flowcontrolv1.LimitResponseTypeQueue {
			t.Errorf("%s does not keep to itself: %+v", level.Name, limited)
		}
	}
	if diff := cmp.Diff(map[string]int32{getLevel: 3, longLevel: 1}, got); diff != "" {
		t.Errorf("seats of %d: - want, + got:\n%s", seats, diff)
	}
}

// A tenant's FlowSchemas are made again when somebody deletes or changes one, or an
// earlier version has made others, and go with the tenant.
func TestFlowRepair(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("flow-gone", "10.0.0.0/16", member("User", "flow-zoe", v1alpha1.RoleOwner)))
	flows := func() (map[string]flowcontrolv1.FlowSchemaSpec, error) {
		var have flowcontrolv1.FlowSchemaList
		err := cluster.admin.List(ctx, &have, client.MatchingLabels(tenancy.ObjectLabels("flow-gone")))
		specs := map[string]flowcontrolv1.FlowSchemaSpec{}
		for _, s := range have.Items {
			specs[s.Name] = s.Spec
		}
		return specs, err
	}
	eventually(t, func() error { return tenantReady(ctx, "flow-gone") })
	want, err := flows()
	if err != nil {
		t.Fatal(err)
	}
	if got := slices.Sorted(maps.Keys(want)); !slices.Equal(got, []string{"h8s-lists-flow-gone", "h8s-tenant-flow-gone"}) {
		t.Fatalf("it has %q", got)
	}
	change := func(t *testing.T, name string, with func(*flowcontrolv1.FlowSchema)) {
		t.Helper()
		var schema flowcontrolv1.FlowSchema
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: name}, &schema); err != nil {
			t.Fatal(err)
		}
		before := schema.DeepCopy()
		with(&schema)
		if err := cluster.admin.Patch(ctx, &schema, client.MergeFrom(before)); err != nil { // the API server writes the status meanwhile
			t.Fatal(err)
		}
	}
	remove := func(t *testing.T, name string) {
		t.Helper()
		if err := cluster.admin.Delete(ctx, &flowcontrolv1.FlowSchema{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	for name, breakIt := range map[string]func(*testing.T){
		"all are deleted": func(t *testing.T) {
			for name := range want {
				remove(t, name)
			}
		},
		"another precedence": func(t *testing.T) {
			change(t, "h8s-tenant-flow-gone", func(s *flowcontrolv1.FlowSchema) { s.Spec.MatchingPrecedence = 5000 })
		},
		"one of another version": func(t *testing.T) {
			other := &flowcontrolv1.FlowSchema{ObjectMeta: metav1.ObjectMeta{Name: "h8s-other-flow-gone", Labels: tenancy.ObjectLabels("flow-gone")}, Spec: want["h8s-lists-flow-gone"]}
			if err := cluster.admin.Create(ctx, other); err != nil {
				t.Fatal(err)
			}
		},
		"another level": func(t *testing.T) {
			change(t, "h8s-lists-flow-gone", func(s *flowcontrolv1.FlowSchema) { s.Spec.PriorityLevelConfiguration.Name = "exempt" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			breakIt(t)
			eventually(t, func() error {
				have, err := flows()
				if diff := cmp.Diff(want, have); err == nil && diff != "" {
					err = fmt.Errorf("- want, + got:\n%s", diff)
				}
				return err
			})
		})
	}
	if err := cluster.admin.Delete(ctx, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "flow-gone"}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if have, err := flows(); err != nil || len(have) > 0 {
			return fmt.Errorf("there are %v: %w", have, err)
		}
		return nil
	})
}
