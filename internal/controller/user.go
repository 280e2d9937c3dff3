package controller

import (
	"context"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// userReconciler says on each User which tenants list it, and what follows from that.
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
		}), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *userReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var u v1alpha1.User
	if err := r.Get(ctx, req.NamespacedName, &u); err != nil || u.DeletionTimestamp != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	tenants, err := r.memberships(ctx, u.Name)
	if err != nil {
		return reconcile.Result{}, err
	}
	before := u.DeepCopy()
	u.Status.ObservedGeneration = u.Generation
	u.Status.Tenants = tenants
	ready := condition{v1alpha1.ConditionReady, true, "Active", "memberships of this User are in force, and its certificate is renewed"}
	switch {
	case u.Spec.Disabled:
		ready = condition{v1alpha1.ConditionReady, false, "Disabled", "memberships of this User count for nothing, and its certificate is not renewed; what it has by a group stays until the identity provider takes it away, and tokens of ServiceAccounts that it made stay; set spec.disabled to false to restore the User"}
	case len(tenants) == 0:
		ready.reason, ready.message = "InNoTenant", "no Tenant lists this User, so it has no access, and its certificate is not renewed: list it in the spec.members of one"
	}
	setConditions(&u.Status.Conditions, u.Generation, ready)
	return outcome(r.patchStatus(ctx, &u, before))
}
