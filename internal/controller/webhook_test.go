package controller

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestNamespaceAdmission(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("nsa", "10.0.0.0/16",
		member("User", "nsa-alice", v1alpha1.RoleOwner), member("User", "nsa-both", v1alpha1.RoleAdmin),
		member("User", "nsa-mixed", v1alpha1.RoleAdmin), member("User", "nsa-eve", v1alpha1.RoleEdit), member("Group", "nsa-team", v1alpha1.RoleAdmin)))
	newTenant(t, tenantOf("nsb", "10.0.0.0/16",
		member("User", "nsa-both", v1alpha1.RoleOwner), member("User", "nsa-mixed", v1alpha1.RoleView)))
	if err := cluster.admin.Create(ctx, networkOf("nsa-second", "nsa", "10.9.0.0/16")); err != nil {
		t.Fatal(err)
	}
	alice, both, mixed, eve := as(t, "nsa-alice"), as(t, "nsa-both"), as(t, "nsa-mixed"), as(t, "nsa-eve")
	team, stranger := as(t, "nsa-someone", "nsa-team"), as(t, "nsa-stranger")
	label := func(kv ...string) map[string]string {
		labels := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			labels[kv[i]] = kv[i+1]
		}
		return labels
	}
	for name, tt := range map[string]struct {
		who    client.Client
		labels map[string]string
		tenant string // that it lands in
		want   string // or the refusal
	}{
		"owner":                             {alice, nil, "nsa", ""},
		"owner who says so":                 {alice, label(v1alpha1.LabelTenant, "nsa"), "nsa", ""},
		"member of a group":                 {team, nil, "nsa", ""},
		"stricter pods":                     {alice, label("pod-security.kubernetes.io/enforce", "restricted"), "nsa", ""},
		"another Network of the tenant":     {alice, label(v1alpha1.LabelNetwork, "nsa-second"), "nsa", ""},
		"two tenants":                       {both, nil, "", "in several Tenants (nsa, nsb): say which one with the label h8s.io/tenant"},
		"two tenants, one named":            {both, label(v1alpha1.LabelTenant, "nsb"), "nsb", ""},
		"admin of one, viewer of the other": {mixed, nil, "nsa", ""},
		"named where she only views":        {mixed, label(v1alpha1.LabelTenant, "nsb"), "", `not an owner or admin of a Tenant "nsb"`},
		"another's tenant":                  {alice, label(v1alpha1.LabelTenant, "nsb"), "", `not an owner or admin of a Tenant "nsb"`},
		"a tenant that does not exist":      {alice, label(v1alpha1.LabelTenant, "nsx"), "", `not an owner or admin of a Tenant "nsx"`},
		"another's Network":                 {alice, label(v1alpha1.LabelNetwork, "nsb"), "", `has no Network "nsb"`},
		"a Network that does not exist":     {alice, label(v1alpha1.LabelNetwork, "nsx"), "", `has no Network "nsx"`},
		"privileged pods":                   {alice, label("pod-security.kubernetes.io/enforce", "privileged"), "", "are set by operators and by the cluster only"},
		"an old baseline":                   {alice, label("pod-security.kubernetes.io/enforce-version", "v1.0"), "", "are set by operators"},
		"another sandbox":                   {alice, label(v1alpha1.LabelSandbox, "runc"), "", "h8s.io/sandbox are set by operators"},
		"devices of others":                 {alice, label("resource.kubernetes.io/admin-access", "true"), "", "are set by operators"},
		"role without creation":             {eve, nil, "", "forbidden"},
		"stranger":                          {stranger, nil, "", "forbidden"},
		"operator, of no tenant":            {cluster.admin, nil, "-", ""},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespaceOf("nsa-x", "", tt.labels)
			err := tt.who.Create(ctx, ns, client.DryRunAll)
			wantRefusal(t, err, tt.want)
			if tt.tenant == "" || err != nil {
				return
			}
			if tt.tenant == "-" {
				if _, ok := ns.Labels[v1alpha1.LabelTenant]; ok {
					t.Errorf("labels %v", ns.Labels)
				}
				return
			}
			network := tt.tenant
			if n := tt.labels[v1alpha1.LabelNetwork]; n != "" {
				network = n
			}
			level := "baseline"
			if l := tt.labels["pod-security.kubernetes.io/enforce"]; l != "" {
				level = l
			}
			if ns.Labels[v1alpha1.LabelTenant] != tt.tenant || ns.Labels[v1alpha1.LabelNetwork] != network || ns.Labels["pod-security.kubernetes.io/enforce"] != level {
				t.Errorf("labels %v, want tenant %s, network %s, level %s", ns.Labels, tt.tenant, network, level)
			}
		})
	}

	t.Run("a disabled User who is in a group", func(t *testing.T) {
		user := &v1alpha1.User{Spec: v1alpha1.UserSpec{Disabled: true}}
		user.Name = "nsa-someone"
		if err := cluster.admin.Create(ctx, user); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), user) })
		eventually(t, func() error {
			err := team.Create(ctx, namespaceOf("nsa-x", "", nil), client.DryRunAll)
			if err == nil || !strings.Contains(err.Error(), `the User "nsa-someone" is disabled`) {
				return fmt.Errorf("answer: %w", err)
			}
			return nil
		})
	})
}

// However many come at once, no more than the quota get in, whether their names
// are given or made by the API server.
func TestNamespaceQuota(t *testing.T) {
	const quota, attempts = 3, 10
	for name, next := range map[string]func(tenant string, i int) *corev1.Namespace{
		"given": func(tenant string, i int) *corev1.Namespace {
			return namespaceOf(fmt.Sprintf("%s-%d", tenant, i), "", nil)
		},
		"generated": func(tenant string, _ int) *corev1.Namespace {
			return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: tenant + "-"}}
		},
		"mixed": func(tenant string, i int) *corev1.Namespace {
			if i%2 == 0 {
				return namespaceOf(fmt.Sprintf("%s-%d", tenant, i), "", nil)
			}
			return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: tenant + "-"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			tenant := tenantOf("quo-"+name, "10.0.0.0/16", member("User", "quo-alice-"+name, v1alpha1.RoleOwner))
			tenant.Spec.Quota.Namespaces = ptr.To(int32(quota))
			newTenant(t, tenant)
			alice := as(t, "quo-alice-"+name)
			eventually(t, func() error { return alice.Create(ctx, namespaceOf(tenant.Name, "", nil)) })
			var created atomic.Int32
			var wg sync.WaitGroup
			for i := range attempts {
				wg.Go(func() {
					switch err := alice.Create(ctx, next(tenant.Name, i)); {
					case err == nil:
						created.Add(1)
					case !strings.Contains(err.Error(), fmt.Sprintf(`the Tenant %q has 3 of 3 namespaces: delete one, or ask an operator`, tenant.Name)):
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if created.Load() != quota-1 {
				t.Errorf("%d were created after the first, want %d", created.Load(), quota-1)
			}
		})
	}
}
