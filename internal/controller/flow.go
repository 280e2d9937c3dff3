package controller

import (
	"context"
	"fmt"
	"maps"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// ensureFlow keeps the FlowSchemas of the tenant's requests.
func (r *tenantReconciler) ensureFlow(ctx context.Context, t *v1alpha1.Tenant, namespaces []string, disabled tenancy.Disabled) error {
	wanted := tenancy.FlowSchemas(t, namespaces, disabled)
	if len(wanted) == 0 {
		return r.removeFlow(ctx, t.Name)
	}
	for i := range wanted {
		want := &wanted[i]
		var have flowcontrolv1.FlowSchema
		var known client.Object
		switch err := r.Get(ctx, client.ObjectKeyFromObject(want), &have); {
		case apierrors.IsNotFound(err):
		case err != nil:
			return fmt.Errorf("get the FlowSchema %s: %w", want.Name, err)
		case equality.Semantic.DeepEqual(have.Spec, want.Spec) && maps.Equal(have.Labels, want.Labels):
			continue
		default:
			known = &have
		}
		if err := r.write(ctx, want, known); err != nil {
			return fmt.Errorf("make the FlowSchema %s: %w", want.Name, err)
		}
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
