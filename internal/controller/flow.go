package controller

import (
	"context"
	"fmt"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// ensureFlow keeps the FlowSchemas of the tenant's requests.
func (r *tenantReconciler) ensureFlow(ctx context.Context, t *v1alpha1.Tenant, namespaces []string, disabled tenancy.Disabled) error {
	var have flowcontrolv1.FlowSchemaList
	if err := r.List(ctx, &have, client.MatchingLabels(tenancy.ObjectLabels(t.Name))); err != nil {
		return fmt.Errorf("list FlowSchemas: %w", err)
	}
	if err := bringInStep(ctx, r.objects, have.Items, tenancy.FlowSchemas(t, namespaces, disabled), func(have, want *flowcontrolv1.FlowSchema) bool {
		return equality.Semantic.DeepEqual(have.Spec, want.Spec)
	}); err != nil {
		return fmt.Errorf("FlowSchemas: %w", err)
	}
	return nil
}

func (r *tenantReconciler) removeFlow(ctx context.Context, tenant string) error {
	for _, name := range tenancy.FlowSchemaNames(tenant) {
		schema := &flowcontrolv1.FlowSchema{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := client.IgnoreNotFound(r.Delete(ctx, schema)); err != nil {
			return fmt.Errorf("delete the FlowSchema %s: %w", schema.Name, err)
		}
	}
	return nil
}
