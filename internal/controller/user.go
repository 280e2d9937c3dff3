package controller

import (
	"context"
	"fmt"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// userReconciler says on each User which tenants list it.
type userReconciler struct{ objects }

func (r *userReconciler) setup(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).Named("user").
		For(&v1alpha1.User{}).
		// On an update the old and the new Tenant are asked, so one who left is told as well.
		Watches(&v1alpha1.Tenant{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, obj client.Object) []reconcile.Request {
			var requests []reconcile.Request
			for _, m := range obj.(*v1alpha1.Tenant).Spec.Members {
				if m.Kind == tenancy.KindUser {
					requests = append(requests, request(m.Name))
				}
			}
			return requests
		})).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *userReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var u v1alpha1.User
	if err := r.Get(ctx, req.NamespacedName, &u); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if u.DeletionTimestamp != nil {
		return reconcile.Result{}, nil
	}
	var tenants v1alpha1.TenantList
	if err := r.List(ctx, &tenants); err != nil {
		return reconcile.Result{}, fmt.Errorf("list Tenants: %w", err)
	}
	before := u.DeepCopy()
	u.Status.ObservedGeneration = u.Generation
	u.Status.Tenants = tenancy.TenantsOf(tenants.Items, u.Name)
	ready := condition{v1alpha1.ConditionReady, true, "Active", "memberships of this User are in force"}
	if u.Spec.Disabled {
		ready = condition{v1alpha1.ConditionReady, false, "Disabled", "memberships of this User are suspended: set spec.disabled to false to restore them"}
	}
	setConditions(&u.Status.Conditions, u.Generation, ready)
	return outcome(r.patchStatus(ctx, &u, before))
}
