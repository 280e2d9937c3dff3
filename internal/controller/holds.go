package controller

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

const (
	// recallTimeout bounds how long a claim waits for what another controller holds, which
	// may have died, and recallPoll is how often it looks.
	recallTimeout, recallPoll = time.Second, 20 * time.Millisecond
	// closeTimeout bounds how long a replica that ends gives back what it holds, and
	// closeParallel how many ledgers it writes at the same time.
	closeTimeout, closeParallel = 3 * time.Second, 8
	// newestParallel is how many namespaces are listed at the same time: of a tenant with
	// hundreds all must be listed within half of the time that a sweep has for it.
	newestParallel = 8
)

// recall asks the other replicas for what they hold of the resources, and waits a moment for them to give
// it back. Then the ledger must be read again. What others want back of this one it gives
// first, or two would wait for each other.
func (a *accounts) recall(ctx context.Context, tenant string, l *line, resources []string) error {
	next := l.ledger.DeepCopy()
	l.ledger = nil
	back := l.escrow.Recalled(&next.Spec)
	if back {
		a.view.Decide(tenant, &next.Spec, nil, a.clock.Now().Add(claimTTL), l.escrow)
	}
	if l.escrow.Recall(&next.Spec, resources) || back {
		err := a.direct.Update(ctx, next)
		switch {
		case err == nil && back:
			l.escrow.Written(&next.Spec)
		case err == nil:
		default:
			l.escrow.Lost()
			if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
				return fmt.Errorf("ask for what other controllers hold of the quota of the Tenant %s, try again: %w", next.Name, err)
			}
		}
	}
	select {
	case <-time.After(recallPoll):
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the quota of the Tenant %s: %w", next.Name, quota.ErrHeld)
	}
}

// awaitHolds gives the replicas a moment to give back what they hold by an earlier quota,
// and returns the ledger as it is then.
func (a *accounts) awaitHolds(ctx context.Context, t *v1alpha1.Tenant, l *v1alpha1.QuotaLedger) (*v1alpha1.QuotaLedger, error) {
	if !quota.HeldBefore(&l.Spec) {
		return l, nil
	}
	err := wait.PollUntilContextTimeout(ctx, recallPoll, recallTimeout, false, func(ctx context.Context) (bool, error) {
		now, err := a.lookUp(ctx, t)
		if err != nil || now == nil {
			return now == nil, err
		}
		l = now
		return !quota.HeldBefore(&l.Spec), nil
	})
	if err != nil && !wait.Interrupted(err) {
		return nil, err
	}
	return l, nil
}

// giveBack writes the ledger of the Tenant if another replica wants what this one holds.
func (a *accounts) giveBack(ctx context.Context, seen *v1alpha1.QuotaLedger) {
	a.mu.Lock()
	l := a.lines[seen.Name]
	a.mu.Unlock()
	if l != nil && l.escrow.Recalled(&seen.Spec) {
		go a.enter(ctx, l, true)
	}
}

// release gives back what this replica holds for tenants that have not created anything
// for a while. Otherwise the leader would have to end these holds as those of the dead,
// by lists of all of the tenants' namespaces.
func (a *accounts) release(ctx context.Context) {
	until := a.clock.Now().Add(claimTTL)
	a.mu.Lock()
	var idle []*line
	for _, l := range a.lines {
		if !l.busy && l.escrow.Spent(until) {
			idle = append(idle, l)
		}
	}
	a.mu.Unlock()
	for _, l := range idle {
		if ctx.Err() == nil {
			a.enter(context.WithoutCancel(ctx), l, false)
		}
	}
}

// close gives back what this replica holds, and has it hold nothing any more. What it
// has no time for until ctx ends counts until the hold is overdue.
func (a *accounts) close(ctx context.Context) {
	a.mu.Lock()
	lines := slices.Collect(maps.Values(a.lines))
	a.closed = true
	a.mu.Unlock()
	turns := make(chan struct{}, closeParallel)
	var all sync.WaitGroup
	defer all.Wait()
	for _, l := range lines {
		select {
		case turns <- struct{}{}:
			all.Go(func() { a.enter(ctx, l, false); <-turns })
		case <-ctx.Done():
			return
		}
	}
	all.Wait()
	// Who serves a line meanwhile gives back after the claims that are being decided about.
	_ = wait.PollUntilContextCancel(ctx, recallPoll, true, func(context.Context) (bool, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return !slices.ContainsFunc(lines, func(l *line) bool { return l.busy }), nil
	})
}

// recalls are what other replicas want back of what this one holds in ledgers.
type recalls struct{ *accounts }

// NeedLeaderElection implements manager.LeaderElectionRunnable: every replica holds.
func (recalls) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable: it gives back what other replicas want, and what is
// of no use, and all of it at the end.
func (r recalls) Start(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { wait.UntilWithContext(ctx, r.release, sweepInterval) })
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			var list v1alpha1.QuotaLedgerList
			return &list, r.direct.List(ctx, &list, &client.ListOptions{Raw: &options})
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return r.direct.Watch(ctx, &v1alpha1.QuotaLedgerList{}, &client.ListOptions{Raw: &options})
		},
	}, r.direct)
	cache.NewReflectorWithOptions(lw, &v1alpha1.QuotaLedger{}, ledgers{context.WithoutCancel(ctx), r.accounts}, cache.ReflectorOptions{Name: "what is held of quotas"}).RunWithContext(ctx)
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	r.close(ending)
	return nil
}

// ledgers are told every change of a ledger, as a Reflector's store that keeps nothing.
type ledgers struct {
	ctx context.Context //nolint:containedctx // of what a change starts: a Reflector gives its store none
	*accounts
}

// Add implements cache.ReflectorStore.
func (s ledgers) Add(obj any) error {
	if l, ok := obj.(*v1alpha1.QuotaLedger); ok {
		s.giveBack(s.ctx, l)
	}
	return nil
}

// Update implements cache.ReflectorStore.
func (s ledgers) Update(obj any) error { return s.Add(obj) }

// Delete implements cache.ReflectorStore: nothing is granted from the holds of a ledger that
// went with its Tenant.
func (s ledgers) Delete(obj any) error {
	if gone, ok := obj.(*v1alpha1.QuotaLedger); ok {
		s.mu.Lock()
		l := s.lines[gone.Name]
		s.mu.Unlock()
		if l != nil {
			go s.enter(s.ctx, l, true)
		}
	}
	return nil
}

// Replace implements cache.ReflectorStore.
func (s ledgers) Replace(list []any, _ string) error {
	for _, obj := range list {
		_ = s.Add(obj)
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (ledgers) Resync() error { return nil }

// newest asks the API server itself for the latest revisions of the tenant's namespaces,
// and of its objects of one resource.
func (a *accounts) newest(ctx context.Context, tenant, kind string) (map[string]quota.Revision, error) {
	var mu sync.Mutex
	newest := map[string]quota.Revision{}
	look := func(ctx context.Context, kind, namespace string, options metav1.ListOptions) ([]metav1.PartialObjectMetadata, error) {
		gvr, ok := corev1.SchemeGroupVersion.WithResource(quota.Namespaces), true
		if kind != quota.Namespaces {
			gvr, ok = quota.Find(kind)
		}
		if !ok {
			return nil, nil
		}
		list, err := a.feeds.meta.Resource(gvr).Namespace(namespace).List(ctx, options)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", kind, err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, obj := range list.Items {
			revision, err := quota.ParseRevision(obj.ResourceVersion)
			if err != nil {
				return nil, err
			}
			newest[kind] = max(newest[kind], revision)
		}
		return list.Items, nil
	}
	namespaces, err := look(ctx, quota.Namespaces, metav1.NamespaceAll, metav1.ListOptions{LabelSelector: v1alpha1.LabelTenant + "=" + tenant})
	if err != nil {
		return nil, err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(newestParallel)
	for _, ns := range namespaces {
		group.Go(func() error {
			_, err := look(ctx, kind, ns.Name, metav1.ListOptions{})
			return err
		})
	}
	return newest, group.Wait()
}
