package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/retry"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// reservationTTL is how long an admitted namespace counts that cannot be seen
// yet. The API server gives up on a creation after 34 seconds; the rest is for
// clocks that differ. A creation that fails gives its place back when it is over.
const reservationTTL = time.Minute

// quotaWebhook counts a namespace against the quota of the tenant that
// namespaceWebhook has put it into. It validates, so it comes when all else has
// been checked and the API server has given the object its name and its UID.
//
// Two creations at the same moment do not see each other's namespace, or both
// would get the last place. So each writes a reservation into the Tenant's
// status, on condition that nobody has written since it counted: that is exact
// for any number of controllers, and outlives them.
type quotaWebhook struct {
	objects
	decoder admission.Decoder
	clock   clock.PassiveClock
	// Creations that come to this process take turns, rather than make each
	// other count anew.
	mu sync.Mutex
}

func newQuotaWebhook(objects objects, decoder admission.Decoder) *quotaWebhook {
	return &quotaWebhook{objects: objects, decoder: decoder, clock: clock.RealClock{}}
}

// Handle implements admission.Handler.
func (w *quotaWebhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	var ns corev1.Namespace
	if err := w.decoder.Decode(req, &ns); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	refusal, err := w.reserve(ctx, &ns, req.DryRun != nil && *req.DryRun)
	return verdict(refusal, err, http.StatusInternalServerError)
}

// verdict answers with a refusal, which is for the user to read, with an error of
// ours, which has the HTTP status code, or with neither.
func verdict(refusal, err error, code int32) admission.Response {
	var known apierrors.APIStatus
	switch {
	case err != nil:
		return admission.Errored(code, err)
	case errors.As(refusal, &known): // says what the API server itself would say
		status := known.Status()
		return admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{Result: &status}}
	case refusal != nil:
		return admission.Denied(refusal.Error())
	}
	return admission.Allowed("")
}

// reserve takes a place for the namespace. A refusal is for the user to read; an error is ours.
func (w *quotaWebhook) reserve(ctx context.Context, ns *corev1.Namespace, dryRun bool) (refusal, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	// The others who write a Tenant's status are few; every round one of them is through.
	rounds := wait.Backoff{Steps: 50, Duration: 5 * time.Millisecond, Factor: 1.2, Jitter: 1, Cap: 200 * time.Millisecond}
	err = retry.OnError(rounds, apierrors.IsConflict, func() error {
		refusal, err = w.tryReserve(ctx, ns, dryRun)
		return err
	})
	return refusal, err
}

// tryReserve is one round of reserve. It fails with a conflict if the Tenant was written meanwhile.
func (w *quotaWebhook) tryReserve(ctx context.Context, ns *corev1.Namespace, dryRun bool) (refusal, err error) {
	name := ns.Labels[v1alpha1.LabelTenant]
	// The Tenant is read first: a reservation of another that is not in it makes
	// the write fail, and one that is in it is seen, here or as a namespace.
	var t v1alpha1.Tenant
	switch err := w.live.Get(ctx, client.ObjectKey{Name: name}, &t); {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the Tenant %q does not exist: correct the label %s", name, v1alpha1.LabelTenant), nil
	case err != nil:
		return nil, fmt.Errorf("get the Tenant %s: %w", name, err)
	case t.DeletionTimestamp != nil:
		return fmt.Errorf("the Tenant %q is being deleted and takes no new namespaces", name), nil
	case t.Spec.Quota.Namespaces == nil:
		return nil, nil
	}
	// This creation would fail later, and keep its place for a while.
	var other metav1.PartialObjectMetadata
	other.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	switch err := w.live.Get(ctx, client.ObjectKeyFromObject(ns), &other); {
	case err == nil:
		return apierrors.NewAlreadyExists(corev1.Resource("namespaces"), ns.Name), nil
	case !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("look for a namespace %s: %w", ns.Name, err)
	}
	exist, err := w.namespaceUIDs(ctx, name)
	if err != nil {
		return nil, err
	}
	now := w.clock.Now()
	before := t.DeepCopy()
	t.Status.Reservations = tenancy.Outstanding(t.Status.Reservations, exist, now)
	if refusal := tenancy.CheckQuota(name, "namespaces", len(exist)+len(t.Status.Reservations), t.Spec.Quota.Namespaces); refusal != nil {
		return refusal, nil
	}
	if dryRun {
		return nil, nil
	}
	t.Status.Reservations = append(t.Status.Reservations, v1alpha1.Reservation{UID: ns.UID, Namespace: ns.Name, Until: metav1.NewTime(now.Add(reservationTTL))})
	if err := w.Status().Patch(ctx, &t, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return nil, fmt.Errorf("reserve a place in the quota of the Tenant %s, try again: %w", name, err)
	}
	return nil, nil
}

// namespaceUIDs are the namespaces that the tenant has, those being deleted included.
func (o objects) namespaceUIDs(ctx context.Context, tenant string) (map[types.UID]bool, error) {
	var list metav1.PartialObjectMetadataList
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
	if err := o.live.List(ctx, &list, client.MatchingLabels{v1alpha1.LabelTenant: tenant}); err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	uids := map[types.UID]bool{}
	for _, ns := range list.Items {
		uids[ns.UID] = true
	}
	return uids, nil
}
