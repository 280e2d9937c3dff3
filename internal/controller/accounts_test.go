package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

const configMaps = "configmaps"

// anotherAccounts are those of a controller that knows nothing of the one of TestMain.
func anotherAccounts(t *testing.T, change ...func(*accounts)) *accounts {
	t.Helper()
	return accountsWith(t, cluster.env.Config, change...)
}

// accountsWith changes them before they start.
func accountsWith(t *testing.T, config *rest.Config, change ...func(*accounts)) *accounts {
	t.Helper()
	a, err := newAccounts(config, cluster.admin)
	if err != nil {
		t.Fatal(err)
	}
	a.timeout = patience
	a.patience = patience / 2
	a.clock = &shiftedClock{}
	for _, change := range change {
		change(a)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = a.feeds.Start(ctx) })
	running.Go(func() { _ = recalls{a}.Start(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return a
}

// shiftedClock goes right, and can be put forward while others look at it.
type shiftedClock struct{ by atomic.Int64 }

func (c *shiftedClock) Now() time.Time                  { return time.Now().Add(time.Duration(c.by.Load())) }
func (c *shiftedClock) Since(t time.Time) time.Duration { return c.Now().Sub(t) }

// putForward lets time pass for a replica.
func putForward(a *accounts, by time.Duration) { a.clock.(*shiftedClock).by.Add(int64(by)) }

// configMapOf is the claim of a ConfigMap that is being created.
func configMapOf(uid string) quota.Claim {
	return quota.Claim{UID: types.UID(uid), Resource: configMaps, Namespace: "none", Name: uid, Usage: quota.UsageOfObject(configMaps)}
}

func getTenant(t *testing.T, name string) *v1alpha1.Tenant {
	t.Helper()
	var tenant v1alpha1.Tenant
	if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: name}, &tenant); err != nil {
		t.Fatal(err)
	}
	return &tenant
}

// A Tenant that is made anew has its own quota from the first claim on, though its
// generation is no higher than that of the one whose ledger is remembered.
func TestAccountsOfTenantMadeAnew(t *testing.T) {
	ctx := t.Context()
	a := anotherAccounts(t)
	newBounded(t, "anew", hard("configmaps", "5", "pods", "5"))
	first := getTenant(t, "anew")
	if err := a.reserve(ctx, first, configMapOf("one")); err != nil {
		t.Fatal(err)
	}
	if err := cluster.admin.Delete(ctx, first); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(first), &v1alpha1.Tenant{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the Tenant is there: %w", err)
		}
		return nil
	})
	newBounded(t, "anew", hard("services", "0", "configmaps", "0"))
	service := quota.Claim{UID: "two", Resource: quota.Services, Namespace: "none", Name: "two", Usage: hard("services", "1")}
	err := a.reserve(ctx, getTenant(t, "anew"), service)
	if exceeded := new(quota.ExceededError); !errors.As(err, &exceeded) {
		t.Errorf("a Service is answered %v, want a refusal", err)
	}
	// What was held of the earlier one is not granted.
	err = a.reserve(ctx, getTenant(t, "anew"), configMapOf("four"))
	if exceeded := new(quota.ExceededError); !errors.As(err, &exceeded) {
		t.Errorf("a ConfigMap is answered %v, want a refusal", err)
	}
	// Who holds the earlier one still does not decide by the later one's ledger.
	if err := a.reserve(ctx, first, configMapOf("three")); err == nil {
		t.Error("a claim on the earlier Tenant was granted")
	}
}

// The line of a tenant goes with it, unless somebody waits in it.
func TestAccountsForget(t *testing.T) {
	a := &accounts{lines: map[string]*line{"there": {}, "gone": {}, "gone-busy": {busy: true}}}
	a.forget([]v1alpha1.Tenant{*tenantOf("there", "")})
	if a.lines["there"] == nil || a.lines["gone-busy"] == nil || len(a.lines) != 2 {
		t.Errorf("lines = %v", a.lines)
	}
}

// The ledger of a quota that was taken away stays, empty but for what others must have seen.
// The sweep's Tenants and ledgers are from caches.
func TestAccountsRetire(t *testing.T) {
	ctx := t.Context()
	a := anotherAccounts(t)
	newBounded(t, "retire", hard("pods", "5"))
	live := ledgerOf(t, "retire")
	live.Spec.Settled = map[string]string{quota.Pods: "7"}
	live.Spec.Reservations = []v1alpha1.QuotaReservation{{UID: "never-created", Resource: quota.Pods, Namespace: "retire", Name: "never-created", Usage: quota.UsageOfObject(quota.Pods)}}
	live.Spec.Reservations[0].Until.Time = time.Now().Add(time.Hour)
	putForward(a, 2*time.Hour)
	if err := cluster.admin.Update(ctx, live); err != nil {
		t.Fatal(err)
	}
	stale := live.DeepCopy()
	stale.ResourceVersion = "1"
	for _, tt := range []struct {
		name           string
		tenant         func(*v1alpha1.Tenant)
		ledger         *v1alpha1.QuotaLedger
		hard, reserved int // how much of either the ledger then has
	}{
		{"of an older generation", func(t *v1alpha1.Tenant) { t.Generation-- }, nil, 1, 1},
		{"of another Tenant of that name", func(t *v1alpha1.Tenant) { t.UID, t.Generation = "another", 9 }, nil, 1, 1},
		{"written since", func(t *v1alpha1.Tenant) { t.Generation++ }, stale, 1, 1},
		{"first it is put into force", func(t *v1alpha1.Tenant) { t.Generation++ }, nil, 0, 1},
		{"then what was admitted before is settled", func(t *v1alpha1.Tenant) { t.Generation++ }, nil, 0, 0},
		{"and what others must have seen stays", func(t *v1alpha1.Tenant) { t.Generation++ }, nil, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tenant := getTenant(t, "retire")
			tenant.Spec.Quota.Hard = nil
			tt.tenant(tenant)
			if tt.ledger == nil {
				tt.ledger = ledgerOf(t, "retire")
			}
			if err := a.retire(ctx, tenant, tt.ledger); err != nil {
				t.Fatal(err)
			}
			now := ledgerOf(t, "retire")
			if now.UID != live.UID || now.Spec.Settled[quota.Pods] != "7" || len(now.Spec.Hard) != tt.hard || len(now.Spec.Reservations) != tt.reserved {
				t.Errorf("the ledger is %+v", now.Spec)
			}
		})
	}
}

// A claim whose client has gone takes nothing, whether it waits in the line or is being
// decided about.
func TestAccountsAbandoned(t *testing.T) {
	a := anotherAccounts(t)
	newBounded(t, "abandon", hard("configmaps", "1"))
	tenant := getTenant(t, "abandon")
	if err := a.feeds.sync(t.Context(), quota.Namespaces, configMaps); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	dead := &pending{Claim: configMapOf("dead"), ctx: gone, tenant: tenant, answer: make(chan error, 2)}
	for name, decide := range map[string]func(l *line){
		"waiting":       func(l *line) { l.waiting = []*pending{dead}; l.busy = true; a.serve(t.Context(), l) },
		"decided about": func(l *line) { _, _ = a.commit(t.Context(), l, []*pending{dead}) },
	} {
		t.Run(name, func(t *testing.T) {
			decide(&line{escrow: quota.NewEscrow(a.holder)})
			var l v1alpha1.QuotaLedger
			if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: "abandon"}, &l); err != nil {
				t.Fatal(err)
			}
			if len(l.Spec.Reservations) > 0 {
				t.Errorf("reserved: %+v", l.Spec.Reservations)
			}
		})
	}
	if err := a.reserve(t.Context(), tenant, configMapOf("alive")); err != nil {
		t.Errorf("the place that nobody has: %v", err)
	}
}

// seen is a cache of Tenants that is behind.
type seen struct {
	client.Reader
	tenants []v1alpha1.Tenant
}

func (s seen) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	list.(*v1alpha1.TenantList).Items = s.tenants
	return nil
}

// A resource that cannot be listed delays nobody but the tenants whose quotas name it,
// and of these only what depends on it.
func TestAccountsUnlistable(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "unlistable"}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{"h8s.io"}, Resources: []string{"*"}, Verbs: []string{"*"}},
		{APIGroups: []string{""}, Resources: []string{"namespaces", "pods"}, Verbs: []string{"*"}},
	}}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: role.ObjectMeta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: "unlistable"}},
	}
	for _, obj := range []client.Object{role, binding} {
		if err := cluster.admin.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), obj) })
	}
	config := rest.CopyConfig(cluster.env.Config)
	config.Impersonate.UserName = "unlistable"
	a := accountsWith(t, config, func(a *accounts) {
		a.timeout = time.Hour
		a.changed = make(chan event.GenericEvent, 2)
	})
	newBounded(t, "unlist-a", hard("configmaps", "1"))
	newBounded(t, "unlist-b", hard("pods", "1"))
	blocked, free := getTenant(t, "unlist-a"), getTenant(t, "unlist-b")
	known := blocked.DeepCopy()
	blocked.Status.Quota, free.Status.Quota = nil, nil
	a.cached = seen{tenants: []v1alpha1.Tenant{*blocked, *free}}

	eventually(t, func() error {
		if err := a.sweep(ctx); !errors.Is(err, errCounting) {
			return fmt.Errorf("sweep: %w", err)
		}
		select {
		case e := <-a.changed:
			if e.Object.GetName() != free.Name {
				t.Errorf("%s is to be reconciled", e.Object.GetName())
			}
			return nil
		default:
			return fmt.Errorf("%s was not swept", free.Name)
		}
	})
	r := &tenantReconciler{objects{cluster.admin, cluster.admin}, a}
	if c, err := r.quotaReady(ctx, blocked, nil); !errors.Is(err, errCounting) || c.ok || c.reason != "Counting" || !strings.Contains(c.message, configMaps) {
		t.Errorf("a new Tenant: %+v, %v", c, err)
	}
	if c, err := r.quotaReady(ctx, known, nil); err != nil || !c.ok || known.Status.Quota == nil {
		t.Errorf("a Tenant that was counted before: %+v, %v", c, err)
	}
	if ctx.Err() != nil {
		t.Error("it has waited")
	}
}
