package controller

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

// ledgerOf reads what is held and reserved of a Tenant's quota.
func ledgerOf(t *testing.T, name string) *v1alpha1.QuotaLedger {
	t.Helper()
	var l v1alpha1.QuotaLedger
	if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: name}, &l); err != nil {
		t.Fatal(err)
	}
	return &l
}

// refusing has the function asked before each write of a replica, which it may refuse.
func refusing(before func() error) func(*accounts) {
	return func(a *accounts) {
		a.direct = interceptor.NewClient(a.direct, interceptor.Funcs{Update: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
			if err := before(); err != nil {
				return err
			}
			return c.Update(ctx, obj, opts...)
		}})
	}
}

// holding is a replica that has granted some creations in a new tenant, all but the first
// of them while it could not write the ledger. They are not entered by themselves, and
// count for longer than the test takes.
func holding(t *testing.T, name string, places, grants int) (*accounts, *v1alpha1.Tenant) {
	t.Helper()
	newBounded(t, name, hard("configmaps", fmt.Sprint(places)))
	tenant := getTenant(t, name)
	var readOnly atomic.Bool
	a := anotherAccounts(t, func(a *accounts) { a.delay = time.Hour; putForward(a, time.Hour) }, refusing(func() error {
		if readOnly.Load() {
			return errors.New("the test lets nobody write")
		}
		return nil
	}))
	for i := range grants {
		if err := a.reserve(t.Context(), tenant, configMapOf(fmt.Sprint(name, "-", i))); err != nil {
			t.Fatalf("creation %d: %v", i, err)
		}
		idle(t, a, name)
		readOnly.Store(true)
	}
	if l := ledgerOf(t, name); len(l.Spec.Reservations) != 1 || len(l.Spec.Holds) != 1 || !strings.HasPrefix(l.Spec.Holds[0].Holder, a.holder) {
		t.Fatalf("the ledger is %+v", l.Spec)
	}
	readOnly.Store(false)
	return a, tenant
}

// idle waits until nobody serves the tenant's line: a claim is answered a moment before.
func idle(t *testing.T, a *accounts, tenant string) {
	t.Helper()
	eventually(t, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.lines[tenant].busy {
			return errors.New("the line is being served")
		}
		return nil
	})
}

// A replica grants creations without a write each, and gives the rest back to one that
// needs it: so that they have all of the quota, and no more.
func TestHolds(t *testing.T) {
	const places, grants = 40, 5
	a, tenant := holding(t, "holds", places, grants)
	b := anotherAccounts(t)
	for i := range places - grants {
		// Near the end the other's hold is in the way, and is given back.
		if err := b.reserve(t.Context(), tenant, configMapOf(fmt.Sprint("rest-", i))); err != nil {
			t.Fatalf("place %d: %v", grants+i+1, err)
		}
	}
	for name, of := range map[string]*accounts{"who held": a, "who wanted it": b} {
		err := of.reserve(t.Context(), tenant, configMapOf("more"))
		if exceeded := new(quota.ExceededError); !errors.As(err, &exceeded) {
			t.Errorf("one more, by %s: %v, want a refusal", name, err)
		}
	}
}

// What is granted from a hold is entered into the ledger by itself, also if that fails
// at first.
func TestHoldsEntered(t *testing.T) {
	newBounded(t, "enter", hard("configmaps", "40"))
	tenant := getTenant(t, "enter")
	var fails atomic.Int32
	a := anotherAccounts(t, func(a *accounts) { a.delay = 10 * time.Millisecond }, refusing(func() error {
		if fails.Add(-1) >= 0 {
			return errors.New("the test has it fail")
		}
		return nil
	}))
	if err := a.reserve(t.Context(), tenant, configMapOf("enter-0")); err != nil {
		t.Fatal(err)
	}
	idle(t, a, "enter")
	fails.Store(3)
	if err := a.reserve(t.Context(), tenant, configMapOf("enter-1")); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if l := ledgerOf(t, "enter"); len(l.Spec.Reservations) != 2 {
			return fmt.Errorf("the ledger is %+v", l.Spec)
		}
		return nil
	})
	if n := fails.Load(); n >= 0 {
		t.Errorf("%d failures are left: it was not entered", n)
	}
}

// Once a changed quota is in force nobody grants by the earlier one, even who has not
// heard of the change.
func TestHoldsOfChangedQuota(t *testing.T) {
	a, old := holding(t, "change", 40, 5)
	b := anotherAccounts(t)
	tenant := withQuota(t, "change", func(q *v1alpha1.TenantQuota) { q.Hard = hard("configmaps", "5") })
	eventually(t, func() error {
		_, err := b.enforce(t.Context(), tenant)
		return err
	})
	err := a.reserve(t.Context(), old, configMapOf("change-5"))
	if exceeded := new(quota.ExceededError); !errors.As(err, &exceeded) {
		t.Errorf("a creation by the earlier quota is answered %v, want a refusal", err)
	}
	if l := ledgerOf(t, "change"); len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 5 {
		t.Errorf("the ledger is %+v", l.Spec)
	}
}

// withQuota changes a Tenant's quota; the controller writes its status at the same time.
func withQuota(t *testing.T, name string, change func(*v1alpha1.TenantQuota)) *v1alpha1.Tenant {
	t.Helper()
	tenant := getTenant(t, name)
	before := tenant.DeepCopy()
	change(&tenant.Spec.Quota)
	if err := cluster.admin.Patch(t.Context(), tenant, client.MergeFrom(before)); err != nil {
		t.Fatal(err)
	}
	return tenant
}

// What was admitted by a quota that is taken away counts in the next one, also what is not
// entered when the sweep finds that the Tenant has none.
func TestHoldsOfQuotaTakenAway(t *testing.T) {
	holding(t, "away", 40, 5)
	b := anotherAccounts(t)
	tenant := withQuota(t, "away", func(q *v1alpha1.TenantQuota) { q.Hard = nil })
	eventually(t, func() error {
		var l v1alpha1.QuotaLedger
		if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: "away"}, &l); err != nil {
			return err
		}
		if l.Spec.TenantGeneration != tenant.Generation || len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 5 {
			return fmt.Errorf("the ledger is %+v", l.Spec)
		}
		return nil
	})
	tenant = withQuota(t, "away", func(q *v1alpha1.TenantQuota) { q.Hard = hard("configmaps", "5") })
	err := b.reserve(t.Context(), tenant, configMapOf("away-5"))
	if exceeded := new(quota.ExceededError); !errors.As(err, &exceeded) {
		t.Errorf("one more is answered %v, want a refusal", err)
	}
}

// A change of a Tenant that leaves its quota as it is waits for nobody who holds a part of it.
func TestHoldsOfUnchangedQuota(t *testing.T) {
	newBounded(t, "same", hard("configmaps", "40"))
	l := ledgerOf(t, "same")
	l.Spec.Holds = []v1alpha1.QuotaHold{{Holder: "dead", Resource: configMaps, Usage: quota.UsageOfObject(configMaps), Until: l.CreationTimestamp, TenantGeneration: l.Spec.TenantGeneration}}
	l.Spec.Holds[0].Until.Time = time.Now().Add(time.Hour)
	if err := cluster.admin.Update(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	tenant := withQuota(t, "same", func(q *v1alpha1.TenantQuota) { q.Namespaces = ptr.To(int32(7)) })
	eventually(t, func() error {
		tenant := getTenant(t, "same")
		if c := meta.FindStatusCondition(tenant.Status.Conditions, v1alpha1.ConditionQuotaReady); c == nil || c.Status != metav1.ConditionTrue || c.ObservedGeneration != tenant.Generation {
			return fmt.Errorf("the condition is %+v", c)
		}
		return nil
	})
	if l := ledgerOf(t, "same"); len(l.Spec.Holds) != 1 || l.Spec.TenantGeneration != tenant.Generation {
		t.Errorf("the ledger is %+v", l.Spec)
	}
}

// A replica that ends gives back what it holds.
func TestHoldsGivenBack(t *testing.T) {
	a, tenant := holding(t, "return", 40, 3)
	a.close(t.Context())
	if l := ledgerOf(t, "return"); len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 3 {
		t.Errorf("the ledger is %+v", l.Spec)
	}
	// It still answers, as long as it is asked.
	if err := a.reserve(t.Context(), tenant, configMapOf("late")); err != nil {
		t.Error(err)
	}
	if l := ledgerOf(t, "return"); len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 4 {
		t.Errorf("after a late claim the ledger is %+v", l.Spec)
	}
}

// A replica that ends waits for who is writing the ledger, and gives back what it holds.
func TestHoldsGivenBackByServer(t *testing.T) {
	a, _ := holding(t, "served", 40, 3)
	a.mu.Lock()
	l := a.lines["served"]
	l.busy = true // so it is this test that is writing
	a.mu.Unlock()
	closed := make(chan struct{})
	go func() { defer close(closed); a.close(t.Context()) }()
	eventually(t, func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !l.due {
			return errors.New("nobody was asked to give anything back")
		}
		return nil
	})
	go a.serve(t.Context(), l)
	<-closed
	if l := ledgerOf(t, "served"); len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 3 {
		t.Errorf("the ledger is %+v", l.Spec)
	}
}

// A claim that waits for what this replica has not seen yet keeps no other waiting for
// what this one holds.
func TestHoldsGivenBackByWhoIsBehind(t *testing.T) {
	newBounded(t, "behind", hard("configmaps", "40"))
	a := anotherAccounts(t, func(a *accounts) { a.delay = time.Hour })
	if err := a.feeds.sync(t.Context(), quota.Namespaces, configMaps); err != nil {
		t.Fatal(err)
	}
	ledger := ledgerOf(t, "behind")
	ledger.Spec.Settled = map[string]string{configMaps: strconv.FormatUint(math.MaxUint64, 10)}
	ledger.Spec.Holds = []v1alpha1.QuotaHold{{Holder: "me", Resource: configMaps, Usage: quota.UsageOfObject(configMaps), Recalled: true}}
	ledger.Spec.Holds[0].Until.Time = time.Now().Add(time.Hour)
	if err := cluster.admin.Update(t.Context(), ledger); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	tenant := getTenant(t, "behind")
	p := &pending{Claim: configMapOf("waits"), ctx: t.Context(), tenant: tenant, answer: make(chan error, 1)}
	go a.serve(ctx, &line{escrow: quota.NewEscrow("me"), tenant: tenant, waiting: []*pending{p}, busy: true, due: true, stale: true})
	eventually(t, func() error {
		if l := ledgerOf(t, "behind"); len(l.Spec.Holds) > 0 {
			return fmt.Errorf("held: %+v", l.Spec.Holds)
		}
		return nil
	})
	cancel()
	// Or it is not yet decided about.
	if err := <-p.answer; !errors.Is(err, quota.ErrBehind) && !errors.Is(err, context.Canceled) {
		t.Errorf("the claim is answered %v, want %v", err, quota.ErrBehind)
	}
}

// What a replica holds and has no use for, it gives back itself.
func TestHoldsReleased(t *testing.T) {
	a, _ := holding(t, "idle", 40, 3)
	a.mu.Lock()
	l := a.lines["idle"]
	a.mu.Unlock()
	a.enter(t.Context(), l, false)
	a.release(t.Context())
	if l := ledgerOf(t, "idle"); len(l.Spec.Holds) != 1 {
		t.Errorf("while it can be used, the ledger is %+v", l.Spec)
	}
	putForward(a, 2*time.Minute)
	a.release(t.Context())
	eventually(t, func() error { // somebody else may be at it
		if l := ledgerOf(t, "idle"); len(l.Spec.Holds) > 0 || len(l.Spec.Reservations) != 3 {
			return fmt.Errorf("the ledger is %+v", l.Spec)
		}
		return nil
	})
}

// What a dead replica held is nobody's until it is surely written or given up. Nobody is
// told meanwhile that the quota is exceeded, and what fits beside it is granted.
func TestHoldsOfTheDead(t *testing.T) {
	newBounded(t, "dead", hard("configmaps", "40"))
	tenant := getTenant(t, "dead")
	b := anotherAccounts(t, func(a *accounts) { a.patience = 100 * time.Millisecond })
	l := ledgerOf(t, "dead")
	l.Spec.Holds = []v1alpha1.QuotaHold{{Holder: "dead", Resource: configMaps, Usage: quota.UsageOfObject(configMaps), Until: l.CreationTimestamp}}
	l.Spec.Holds[0].Until.Time = time.Now().Add(time.Hour)
	if err := cluster.admin.Update(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	for i := range 39 {
		if err := b.reserve(t.Context(), tenant, configMapOf(fmt.Sprint("dead-", i))); err != nil {
			t.Fatalf("place %d: %v", i+1, err)
		}
	}
	if err := b.reserve(t.Context(), tenant, configMapOf("last")); !errors.Is(err, quota.ErrHeld) {
		t.Errorf("the last place: %v, want %v", err, quota.ErrHeld)
	}
	putForward(b, 2*time.Hour)
	eventually(t, func() error { // somebody else may write it, too
		l := ledgerOf(t, "dead")
		if err := b.settle(t.Context(), "dead", l); err != nil {
			return err
		}
		if l = ledgerOf(t, "dead"); len(l.Spec.Holds) > 0 {
			return fmt.Errorf("held: %+v", l.Spec.Holds)
		}
		return nil
	})
	// The reservations lapse as well: of none of them is there an object.
	for i := range 40 {
		if err := b.reserve(t.Context(), tenant, configMapOf(fmt.Sprint("heir-", i))); err != nil {
			t.Fatalf("place %d: %v", i+1, err)
		}
	}
}

// transport asks some function before a request goes on its way.
type transport struct {
	http.RoundTripper
	before func(*http.Request) error
}

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.before(req); err != nil {
		return nil, err
	}
	return t.RoundTripper.RoundTrip(req)
}

// The holds of the dead of one resource end together, by one list of each namespace, and
// though those of another cannot be ended in time.
func TestHoldsOfManyDead(t *testing.T) {
	newBounded(t, "holds-many", hard("configmaps", "40", "services", "40"), "holds-many-a", "holds-many-b")
	l := ledgerOf(t, "holds-many")
	for i, kind := range []string{quota.Services, configMaps, quota.Services, configMaps, configMaps} {
		h := v1alpha1.QuotaHold{Holder: fmt.Sprint("dead-", i), Resource: kind, Usage: quota.UsageOfObject(kind)}
		h.Until.Time = time.Now().Add(time.Hour)
		l.Spec.Holds = append(l.Spec.Holds, h)
	}
	if err := cluster.admin.Update(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	var attempts, lists atomic.Int32
	config := rest.CopyConfig(cluster.env.Config)
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper {
		return transport{rt, func(req *http.Request) error {
			switch {
			case strings.HasPrefix(req.URL.Path, "/api/v1/namespaces/holds-many-") && strings.HasSuffix(req.URL.Path, "/services"):
				<-req.Context().Done()
				return req.Context().Err()
			case strings.HasPrefix(req.URL.Path, "/api/v1/namespaces/holds-many-") && strings.HasSuffix(req.URL.Path, "/configmaps"):
				lists.Add(1)
			}
			return nil
		}}
	})
	a := accountsWith(t, config, func(a *accounts) { a.timeout = 2 * time.Second })
	putForward(a, 2*time.Hour)
	eventually(t, func() error {
		attempts.Add(1)
		l := ledgerOf(t, "holds-many")
		ctx, cancel := context.WithTimeout(t.Context(), a.timeout)
		defer cancel()
		err := a.settle(ctx, "holds-many", l)
		l = ledgerOf(t, "holds-many")
		if len(l.Spec.Holds) != 2 || l.Spec.Holds[0].Resource != quota.Services || l.Spec.Holds[1].Resource != quota.Services {
			return fmt.Errorf("held: %+v: %w", l.Spec.Holds, err)
		}
		return nil
	})
	if n := lists.Load(); n > 2*attempts.Load() {
		t.Errorf("ConfigMaps were listed %d times in %d attempts, want once per namespace", n, attempts.Load())
	}
}
