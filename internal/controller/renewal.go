package controller

import (
	"context"
	"fmt"
	"strings"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// renewalReconciler approves the requests by which Users renew their certificates,
// and denies those that ask for anything else. Requests of other names are not its
// business. kube-controller-manager signs what is approved.
type renewalReconciler struct{ objects }

func (r *renewalReconciler) setup(mgr ctrl.Manager) error {
	ours := predicate.NewPredicateFuncs(func(obj client.Object) bool { return strings.HasPrefix(obj.GetName(), tenancy.RenewalPrefix) })
	return ctrl.NewControllerManagedBy(mgr).Named("renewal").
		For(&certificatesv1.CertificateSigningRequest{}, builder.WithPredicates(ours)).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *renewalReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var csr certificatesv1.CertificateSigningRequest
	if err := r.Get(ctx, req.NamespacedName, &csr); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if csr.DeletionTimestamp != nil || len(csr.Status.Conditions) > 0 || !strings.HasPrefix(csr.Name, tenancy.RenewalPrefix) {
		return reconcile.Result{}, nil
	}
	// A cache that is behind would renew for one who was disabled a moment ago.
	user := &v1alpha1.User{}
	switch err := r.live.Get(ctx, client.ObjectKey{Name: strings.TrimPrefix(csr.Name, tenancy.RenewalPrefix)}, user); {
	case apierrors.IsNotFound(err):
		user = nil
	case err != nil:
		return reconcile.Result{}, fmt.Errorf("get the User of the request: %w", err)
	}
	verdict := certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Renewal", Message: "the User renews its own certificate",
	}
	if err := tenancy.CheckRenewal(&csr, user); err != nil {
		verdict.Type, verdict.Reason, verdict.Message = certificatesv1.CertificateDenied, "NoRenewal", err.Error()
	}
	csr.Status.Conditions = append(csr.Status.Conditions, verdict)
	return outcome(client.IgnoreNotFound(r.SubResource("approval").Update(ctx, &csr)))
}
