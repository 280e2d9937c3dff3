package controller

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"h8s.io/hypernetes/api/v1alpha1"
)

// newQuota makes a tenant with a quota of namespaces.
func newQuota(t *testing.T, name string, namespaces int32) {
	t.Helper()
	tenant := tenantOf(name, "10.0.0.0/16", member("User", name+"-alice", v1alpha1.RoleOwner))
	tenant.Spec.Quota.Namespaces = ptr.To(namespaces)
	newTenant(t, tenant)
}

// admitted is a namespace as the API server shows it to validating webhooks.
func admitted(tenant, name string) *corev1.Namespace {
	ns := namespaceOf(name, tenant, nil)
	ns.UID = types.UID("uid-" + name)
	return ns
}

// anotherController is the webhook as a controller has it that is not the one of TestMain.
func anotherController() *quotaWebhook {
	return newQuotaWebhook(objects{Client: cluster.admin, live: cluster.admin}, admission.NewDecoder(cluster.scheme))
}

func reserve(t *testing.T, w *quotaWebhook, ns *corev1.Namespace) (refusal error) {
	t.Helper()
	refusal, err := w.reserve(t.Context(), ns, false)
	if err != nil {
		t.Error(err)
	}
	return refusal
}

// Controllers that know nothing of each other give out no place twice.
func TestQuotaOfSeveralControllers(t *testing.T) {
	newQuota(t, "quotwo", 5)
	controllers := []*quotaWebhook{anotherController(), anotherController(), anotherController()}
	var places atomic.Int32
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			if reserve(t, controllers[i%len(controllers)], admitted("quotwo", fmt.Sprintf("quotwo-%d", i))) == nil {
				places.Add(1)
			}
		})
	}
	wg.Wait()
	if places.Load() != 5 {
		t.Errorf("%d places were given out, want 5", places.Load())
	}
}

// A place is taken while a creation is under way, and not for longer.
func TestReservation(t *testing.T) {
	ctx := t.Context()
	newQuota(t, "quores", 1)
	alice := as(t, "quores-alice")
	const full = `the Tenant "quores" has 1 of 1 namespaces`
	// It waits: the Tenant learns of a namespace by a watch.
	wantNone := func(t *testing.T) {
		t.Helper()
		eventually(t, func() error {
			var tenant v1alpha1.Tenant
			err := cluster.admin.Get(ctx, client.ObjectKey{Name: "quores"}, &tenant)
			if err != nil || len(tenant.Status.Reservations) > 0 {
				return fmt.Errorf("reservations %v, %w", tenant.Status.Reservations, err)
			}
			return nil
		})
	}

	t.Run("none for a dry run", func(t *testing.T) {
		eventually(t, func() error { return alice.Create(ctx, namespaceOf("quores-dry", "", nil), client.DryRunAll) })
		wantNone(t)
	})
	t.Run("none for what exists", func(t *testing.T) {
		if err := alice.Create(ctx, namespaceOf("default", "", nil)); !apierrors.IsAlreadyExists(err) {
			t.Errorf("answer %v, want AlreadyExists", err)
		}
		wantNone(t)
	})
	t.Run("none for what is invalid", func(t *testing.T) {
		if err := alice.Create(ctx, namespaceOf("No_Name", "", nil)); !apierrors.IsInvalid(err) {
			t.Errorf("answer %v, want Invalid", err)
		}
		wantNone(t)
	})
	t.Run("counts until the namespace appears", func(t *testing.T) {
		if err := alice.Create(ctx, namespaceOf("quores-1", "", nil)); err != nil {
			t.Fatal(err)
		}
		wantNone(t)
		wantRefusal(t, alice.Create(ctx, namespaceOf("quores-2", "", nil)), full)
		// She deletes it, and has its place back at once.
		if err := alice.Delete(ctx, namespaceOf("quores-1", "", nil)); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			return client.IgnoreNotFound(cluster.admin.Get(ctx, client.ObjectKey{Name: "quores-1"}, &corev1.Namespace{}))
		})
		eventually(t, func() error { return alice.Create(ctx, namespaceOf("quores-2", "", nil), client.DryRunAll) })
	})
	t.Run("of a creation that failed", func(t *testing.T) {
		clock := clocktesting.NewFakePassiveClock(time.Now())
		w := anotherController()
		w.clock = clock
		var first error
		eventually(t, func() error { first = reserve(t, w, admitted("quores", "quores-failed")); return first })
		clock.SetTime(clock.Now().Add(reservationTTL - 2*time.Second))
		wantRefusal(t, reserve(t, w, admitted("quores", "quores-2")), full)
		clock.SetTime(clock.Now().Add(4 * time.Second))
		wantRefusal(t, reserve(t, w, admitted("quores", "quores-2")), "")
	})
	t.Run("no Tenant", func(t *testing.T) {
		wantRefusal(t, reserve(t, anotherController(), admitted("quores-none", "quores-3")), `the Tenant "quores-none" does not exist`)
	})
}
