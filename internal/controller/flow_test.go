package controller

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"

	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// flowOf are the UIDs of the FlowSchema and the level that the API server has put a request into.
func flowOf(ctx context.Context, c caller, path string) (schema, level string, err error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return "", "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath(path).String(), nil)
	if err != nil {
		return "", "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.Header.Get(flowcontrolv1.ResponseHeaderMatchedFlowSchemaUID), resp.Header.Get(flowcontrolv1.ResponseHeaderMatchedPriorityLevelConfigurationUID), err
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
	var tenants, lists, system flowcontrolv1.PriorityLevelConfiguration
	for name, level := range map[string]*flowcontrolv1.PriorityLevelConfiguration{"h8s-tenants": &tenants, "h8s-tenants-lists": &lists, "h8s-system": &system} {
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: name}, level); err != nil {
			t.Fatal(err)
		}
	}
	uid := func(name string) string {
		t.Helper()
		var schema flowcontrolv1.FlowSchema
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: name}, &schema); err != nil {
			t.Fatal(err)
		}
		return string(schema.UID)
	}
	const own, foreign = "/api/v1/namespaces/flow-a/configmaps", "/api/v1/namespaces/flow-b/configmaps"
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
		"our controller":            {tokenCaller(t, release, "h8s-controller"), "h8s-system"},
		"our agent":                 {tokenCaller(t, release, "h8s-node"), "h8s-system"},
	} {
		t.Run(name, func(t *testing.T) {
			for path, list := range map[string]bool{own: true, foreign: true, namespacesPath: true, own + "/kube-root-ca.crt": false, "/version": false, "/apis/h8s.io/v1alpha1/tenants/flow": false} {
				eventually(t, func() error { // the API server reads FlowSchemas from a cache
					schema, level, err := flowOf(ctx, tt.who, path)
					if err != nil {
						return err
					}
					wantLevel, wantSchema := &tenants, "h8s-tenant-"+tt.tenant
					switch {
					case tt.tenant == "":
						if level == string(tenants.UID) || level == string(lists.UID) || level == string(system.UID) || level == "" {
							return fmt.Errorf("%s is in level %q", path, level)
						}
						return nil
					case tt.tenant == "h8s-system":
						wantLevel, wantSchema = &system, "h8s-system"
					case list:
						wantLevel, wantSchema = &lists, "h8s-lists-"+tt.tenant
					}
					if level != string(wantLevel.UID) || schema != uid(wantSchema) {
						return fmt.Errorf("%s is in level %q and of FlowSchema %q, want %s and %s", path, level, schema, wantLevel.Name, wantSchema)
					}
					return nil
				})
			}
		})
	}

	for _, level := range []flowcontrolv1.PriorityLevelConfiguration{tenants, lists} {
		limited := level.Spec.Limited
		if *limited.LendablePercent != 0 || limited.BorrowingLimitPercent == nil || *limited.BorrowingLimitPercent != 0 || limited.LimitResponse.Type != flowcontrolv1.LimitResponseTypeQueue {
			t.Errorf("%s does not keep to itself: %+v", level.Name, limited)
		}
	}
	t.Run("it is made again, and goes with the tenant", func(t *testing.T) {
		newTenant(t, tenantOf("flow-gone", "10.0.0.0/16", member("User", "flow-zoe", v1alpha1.RoleOwner)))
		schema := &flowcontrolv1.FlowSchema{ObjectMeta: metav1.ObjectMeta{Name: "h8s-tenant-flow-gone"}}
		if err := cluster.admin.Delete(ctx, schema); err != nil {
			t.Fatal(err)
		}
		there := func() error { return cluster.admin.Get(ctx, client.ObjectKeyFromObject(schema), schema) }
		eventually(t, there)
		if err := cluster.admin.Delete(ctx, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "flow-gone"}}); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if err := there(); !apierrors.IsNotFound(err) {
				return fmt.Errorf("it is there: %w", err)
			}
			return nil
		})
	})
}
