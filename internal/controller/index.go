package controller

import (
	"context"
	"fmt"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// Fields by which objects are found without looking at all of them. What is asked of
// the API server itself must be a selectable field of the CRD (KEP-4358); the others
// are the cache's alone.
const (
	// fieldTenant of Networks, and fieldNetwork of Blocks: in the cache and the API server.
	fieldTenant  = "spec.tenant"
	fieldNetwork = "spec.network"
	// fieldID of Networks: in the API server.
	fieldID = "status.id"
	// fieldMember of Tenants is each member's kind and name, fieldDisabled of Users is
	// "true" or nothing: in the cache.
	fieldMember   = "spec.members"
	fieldDisabled = "spec.disabled"
)

// indexFields prepares the cache for them.
func indexFields(ctx context.Context, indexer client.FieldIndexer) error {
	for _, index := range []struct {
		obj    client.Object
		field  string
		values client.IndexerFunc
	}{
		{&v1alpha1.Network{}, fieldTenant, func(obj client.Object) []string { return []string{obj.(*v1alpha1.Network).Spec.Tenant} }},
		{&v1alpha1.Block{}, fieldNetwork, func(obj client.Object) []string { return []string{obj.(*v1alpha1.Block).Spec.Network} }},
		{&v1alpha1.Tenant{}, fieldMember, func(obj client.Object) []string {
			var members []string
			for _, m := range obj.(*v1alpha1.Tenant).Spec.Members {
				members = append(members, memberKey(m.Kind, m.Name))
			}
			return members
		}},
		{&v1alpha1.User{}, fieldDisabled, func(obj client.Object) []string {
			if obj.(*v1alpha1.User).Spec.Disabled {
				return []string{"true"}
			}
			return nil
		}},
	} {
		if err := indexer.IndexField(ctx, index.obj, index.field, index.values); err != nil {
			return fmt.Errorf("index %T by %s: %w", index.obj, index.field, err)
		}
	}
	return nil
}

func memberKey(kind, name string) string { return kind + "/" + name }

// tenantsWith are the Tenants that list the requester, by name, group or as
// ServiceAccount. They are the cache's own: read only.
func tenantsWith(ctx context.Context, cached client.Reader, who tenancy.Requester) ([]v1alpha1.Tenant, error) {
	keys := []string{memberKey(tenancy.KindUser, who.Name)}
	for _, g := range who.Groups {
		keys = append(keys, memberKey(tenancy.KindGroup, g))
	}
	if namespace, account, ok := tenancy.SplitServiceAccountUser(who.Name); ok {
		keys = append(keys, memberKey(tenancy.KindServiceAccount, namespace+":"+account))
	}
	var found []v1alpha1.Tenant
	have := map[string]bool{}
	for _, key := range keys {
		var list v1alpha1.TenantList
		if err := cached.List(ctx, &list, client.MatchingFields{fieldMember: key}, client.UnsafeDisableDeepCopy); err != nil {
			return nil, fmt.Errorf("list Tenants: %w", err)
		}
		for i := range list.Items {
			if t := &list.Items[i]; !have[t.Name] {
				have[t.Name] = true
				found = append(found, *t)
			}
		}
	}
	return found, nil
}
