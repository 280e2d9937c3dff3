package controller

import (
	"context"
	"fmt"
	"reflect"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// userReconciler says on each User which tenants list it, and lets Users that are not
// disabled renew their certificates.
type userReconciler struct{ objects }

func (r *userReconciler) setup(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).Named("user").
		For(&v1alpha1.User{}).
		Owns(&rbacv1.ClusterRole{}).
		Owns(&rbacv1.ClusterRoleBinding{}).
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
	switch err := r.Get(ctx, req.NamespacedName, &u); {
	case apierrors.IsNotFound(err):
		return outcome(r.endRenewal(ctx, req.Name))
	case err != nil:
		return reconcile.Result{}, err
	case u.DeletionTimestamp != nil:
		return reconcile.Result{}, nil
	}
	tenants, err := r.memberships(ctx, u.Name)
	if err != nil {
		return reconcile.Result{}, err
	}
	if err := r.ensureRenewal(ctx, &u); err != nil {
		return outcome(err)
	}
	before := u.DeepCopy()
	u.Status.ObservedGeneration = u.Generation
	u.Status.Tenants = tenants
	ready := condition{v1alpha1.ConditionReady, true, "Active", "memberships of this User are in force, and its certificate is renewed"}
	if u.Spec.Disabled {
		ready = condition{v1alpha1.ConditionReady, false, "Disabled", "memberships of this User count for nothing, and its certificate is not renewed; what it has by a group stays until the identity provider takes it away, and tokens of ServiceAccounts that it made stay; set spec.disabled to false to restore the User"}
	}
	setConditions(&u.Status.Conditions, u.Generation, ready)
	return outcome(r.patchStatus(ctx, &u, before))
}

// ensureRenewal keeps what lets the User renew its certificate; a disabled one has
// nothing of it.
func (r *userReconciler) ensureRenewal(ctx context.Context, u *v1alpha1.User) error {
	if u.Spec.Disabled {
		return r.endRenewal(ctx, u.Name)
	}
	role, binding := tenancy.RenewalRole(u.Name), tenancy.RenewalBinding(u.Name)
	haveRole, haveBinding := &rbacv1.ClusterRole{}, &rbacv1.ClusterRoleBinding{}
	for _, o := range []struct {
		want, have client.Object
		same       func() bool
	}{
		{&role, haveRole, func() bool { return reflect.DeepEqual(haveRole.Rules, role.Rules) }},
		{&binding, haveBinding, func() bool {
			return haveBinding.RoleRef == binding.RoleRef && reflect.DeepEqual(haveBinding.Subjects, binding.Subjects)
		}},
	} {
		// What is left by a User that was deleted while nobody looked is found by its owner.
		if err := controllerutil.SetControllerReference(u, o.want, r.Scheme()); err != nil {
			return err
		}
		err := r.Get(ctx, client.ObjectKeyFromObject(o.want), o.have)
		switch {
		case apierrors.IsNotFound(err):
			err = r.write(ctx, o.want, nil)
		case err == nil && (!o.same() || !metav1.IsControlledBy(o.have, u)):
			err = r.write(ctx, o.want, o.have)
		}
		if err != nil {
			return fmt.Errorf("let the User renew its certificate: %s: %w", o.want.GetName(), err)
		}
	}
	return nil
}

// endRenewal takes away what ensureRenewal gave.
func (r *userReconciler) endRenewal(ctx context.Context, user string) error {
	for _, have := range []client.Object{&rbacv1.ClusterRoleBinding{}, &rbacv1.ClusterRole{}} {
		err := r.Get(ctx, client.ObjectKey{Name: tenancy.RenewalPrefix + user}, have)
		if apierrors.IsNotFound(err) {
			continue
		}
		if err == nil {
			err = r.remove(ctx, have)
		}
		if err != nil {
			return fmt.Errorf("end the renewal of the User's certificate: %w", err)
		}
	}
	return nil
}
