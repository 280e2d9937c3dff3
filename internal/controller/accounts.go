package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

const (
	// claimTTL is how long an object counts that was admitted and cannot be seen.
	// The API server gives up on a request after 34 seconds; the rest is for
	// clocks that differ.
	claimTTL = time.Minute
	// commitTimeout bounds one group of claims, under the webhook's own timeout of
	// five seconds (deploy/h8s/templates/webhooks.yaml): clients read why.
	commitTimeout = 4 * time.Second
	// enterAfter is how long what was granted from a hold may wait to be written into the
	// ledger, together with what comes meanwhile.
	enterAfter = time.Second
	// sweepInterval is how often Tenants' status.quota is brought up to date, and
	// ledgers are looked through for reservations whose time is over.
	sweepInterval = 5 * time.Second
)

// accounts keeps the quotas of tenants, together with those of the other replicas.
// Most creations are granted at once, from what this replica holds in the tenant's
// ledger. Claims that cannot be, and those that come while the ledger is being
// written, wait and are written together: a crowd costs hardly more writes than one.
type accounts struct {
	// holder is this process in ledgers: the names of its lines' escrows begin with it.
	holder string
	cached client.Reader
	// direct asks the API server, and does not wait for the reconcilers' rate limit.
	direct client.WithWatch
	view   *quota.View
	feeds  *feeds
	clock  clock.PassiveClock
	// timeout of one group of claims.
	timeout time.Duration
	// delay is how long what was granted from a hold may wait to be entered.
	delay time.Duration
	// patience is how long a claim waits for what other replicas hold.
	patience time.Duration
	// changed tells the tenant reconciler which Tenants to look at again.
	changed chan event.GenericEvent

	mu     sync.Mutex
	lines  map[string]*line
	closed bool
}

// line is the claims on one tenant, in this process.
type line struct {
	waiting []*pending
	busy    bool
	// ledger is as it was last read or written here, nil if that is not known.
	// Only who has set busy may touch it.
	ledger *v1alpha1.QuotaLedger
	// escrow belongs to who has set busy, and to nobody but under the lock while it is not.
	escrow *quota.Escrow
	// due says that the ledger is to be looked at without a claim, and planned that it will
	// be due; stale that somebody has written it.
	due, planned, stale bool
	// tenant is the latest that claims came with.
	tenant *v1alpha1.Tenant
}

type pending struct {
	quota.Claim
	// ctx is the client's: once it is over, nobody creates the object.
	ctx    context.Context
	tenant *v1alpha1.Tenant
	answer chan error
}

func (p *pending) abandoned() bool { return p.ctx.Err() != nil }

func newAccounts(config *rest.Config, cached client.Client) (*accounts, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1
	direct, err := client.NewWithWatch(config, client.Options{Scheme: cached.Scheme(), Mapper: cached.RESTMapper()})
	if err != nil {
		return nil, fmt.Errorf("make a client of quotas: %w", err)
	}
	view := quota.NewView(time.Now)
	feeds, err := newFeeds(config, view)
	if err != nil {
		return nil, err
	}
	return &accounts{
		holder: string(uuid.NewUUID()), cached: cached, direct: direct, view: view, feeds: feeds, clock: clock.RealClock{}, timeout: commitTimeout, delay: enterAfter, patience: recallTimeout,
		changed: make(chan event.GenericEvent), lines: map[string]*line{},
	}, nil
}

// reserve takes from the tenant's quota what the claim needs, or says in an
// *quota.ExceededError why not. Other errors are ours.
func (a *accounts) reserve(ctx context.Context, t *v1alpha1.Tenant, claim quota.Claim) error {
	if err := a.feeds.sync(ctx, quota.Namespaces, claim.Resource); err != nil {
		return err
	}
	p := &pending{Claim: claim, ctx: ctx, tenant: t, answer: make(chan error, 1)}
	a.mu.Lock()
	l := a.lines[t.Name]
	if l == nil {
		// Of a name of its own: a line that was forgotten may still write.
		l = &line{escrow: quota.NewEscrow(a.holder + "/" + string(uuid.NewUUID()))}
		a.lines[t.Name] = l
	}
	if !l.busy && !a.closed && l.tenant != nil && l.tenant.UID == t.UID && l.escrow.Take(claim, t.Generation, a.clock.Now().Add(claimTTL)) {
		a.plan(ctx, l)
		a.mu.Unlock()
		return nil
	}
	l.waiting = append(l.waiting, p)
	turn := !l.busy
	l.busy = true
	a.mu.Unlock()
	if turn {
		// Not under ctx: it is one client's, and the group may be of many.
		go a.serve(context.WithoutCancel(ctx), l)
	}
	select {
	case err := <-p.answer:
		if ctx.Err() == nil { // or it was decided about as abandoned
			return err
		}
	case <-ctx.Done():
	}
	return fmt.Errorf("wait for the quota of the Tenant %s, try again: %w", t.Name, ctx.Err())
}

// plan has the ledger written in a moment. It is called under the lock.
func (a *accounts) plan(ctx context.Context, l *line) {
	if l.planned {
		return
	}
	l.planned = true
	if ctx.Done() != nil { // or each try would wrap the one before
		ctx = context.WithoutCancel(ctx)
	}
	time.AfterFunc(a.delay, func() {
		a.mu.Lock()
		l.planned = false
		a.mu.Unlock()
		a.enter(ctx, l, false)
	})
}

// enter has the ledger written now, if that is due, and returns when it is, or somebody
// else does it.
func (a *accounts) enter(ctx context.Context, l *line, stale bool) {
	a.mu.Lock()
	l.due, l.stale = true, l.stale || stale
	turn := !l.busy
	l.busy = true
	a.mu.Unlock()
	if turn {
		a.serve(ctx, l)
	}
}

// serve answers groups of claims until none is left, and writes the ledger if it is due.
func (a *accounts) serve(ctx context.Context, l *line) {
	failed := false
	for {
		a.mu.Lock()
		group := slices.DeleteFunc(l.waiting, (*pending).abandoned)
		l.waiting = nil
		if len(group) == 0 && !l.due {
			l.busy = false
			if failed || l.escrow.Owes() { // it may be that others wait for what is held here
				a.plan(ctx, l)
			}
			a.mu.Unlock()
			return
		}
		if l.stale { // what another wants back does not wait for what is wanted here
			l.ledger, l.waiting, group = nil, group, nil
		}
		if a.closed {
			l.escrow.Close()
		}
		l.due, l.stale = false, false
		a.mu.Unlock()
		errs, err := a.commit(ctx, l, group)
		failed = err != nil
		if err != nil && len(group) == 0 {
			log.FromContext(ctx).Error(err, "enter what was granted into the ledger of a quota; tried again in a moment")
		}
		for i, p := range group {
			if err != nil {
				p.answer <- err
			} else {
				p.answer <- errs[i]
			}
		}
	}
}

// commit decides about the group and writes the ledger. A grant counts once it is
// written. A refusal counts if the ledger was not written since it was read.
func (a *accounts) commit(ctx context.Context, l *line, group []*pending) ([]error, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	tenant := l.tenant
	if len(group) > 0 {
		tenant = group[0].tenant
	}
	claims := make([]quota.Claim, len(group))
	for _, p := range group {
		// Not by generation: a Tenant made anew begins with 1.
		if order, err := resourceversion.CompareResourceVersion(p.tenant.ResourceVersion, tenant.ResourceVersion); err == nil && order > 0 {
			tenant = p.tenant
		}
	}
	if tenant == nil {
		return nil, nil
	}
	a.mu.Lock()
	if l.tenant != nil && l.tenant.UID != tenant.UID {
		l.escrow.Lost() // it was held in the ledger of another Tenant of that name
	}
	l.tenant = tenant
	a.mu.Unlock()
	if l.ledger != nil && !metav1.IsControlledBy(l.ledger, tenant) {
		l.ledger = nil // of an earlier Tenant of that name
	}
	var recalled time.Time // when the others were asked for what they hold
	for {
		fresh := l.ledger == nil
		if fresh {
			var err error
			if len(group) > 0 {
				l.ledger, err = a.ledger(ctx, tenant)
			} else if l.ledger, err = a.lookUp(ctx, tenant); l.ledger == nil && err == nil {
				l.escrow.Gone(a.clock.Now())
				return nil, nil
			}
			if err != nil {
				return nil, err
			}
		}
		for i, p := range group {
			claims[i] = p.Claim
			claims[i].DryRun = p.DryRun || p.abandoned()
		}
		next := l.ledger.DeepCopy()
		adopt(next, tenant)
		moved := a.view.Moved()
		until := a.clock.Now().Add(claimTTL)
		d := a.view.Decide(tenant.Name, &next.Spec, claims, until, l.escrow)
		refused := false
		behind := false
		var held []string // of which resources others hold what is wanted here
		for i, err := range d.Errs {
			refused = refused || err != nil
			behind = behind || errors.Is(err, quota.ErrBehind)
			if errors.Is(err, quota.ErrHeld) {
				held = append(held, claims[i].Resource)
			}
		}
		waited := !recalled.IsZero() && a.clock.Since(recalled) > a.patience
		switch {
		case behind:
			// Another replica has seen more than this one. It comes.
			select {
			case <-moved:
				continue
			case <-ctx.Done():
				return nil, fmt.Errorf("the quota of the Tenant %s: %w", tenant.Name, quota.ErrBehind)
			}
		case len(held) > 0 && !waited:
			if recalled.IsZero() {
				recalled = a.clock.Now()
			}
			if err := a.recall(ctx, tenant.Name, l, held); err != nil {
				return nil, err
			}
			continue
		case d.Reserved, l.escrow.Due(&l.ledger.Spec, until):
			err := a.direct.Update(ctx, next)
			switch {
			case err == nil:
				l.ledger = next
				l.escrow.Written(&next.Spec)
				return d.Errs, nil
			case apierrors.IsConflict(err), apierrors.IsNotFound(err):
				l.ledger = nil
				l.escrow.Lost() // a request that was repeated, as its answer was lost, looks the same
				continue
			}
			l.ledger = nil
			l.escrow.Lost()
			return nil, fmt.Errorf("write the quota of the Tenant %s, try again: %w", tenant.Name, err)
		case refused && !fresh:
			l.ledger = nil
			continue
		}
		return d.Errs, nil
	}
}

// lookUp reads the tenant's ledger; nil if there is none.
func (a *accounts) lookUp(ctx context.Context, t *v1alpha1.Tenant) (*v1alpha1.QuotaLedger, error) {
	var l v1alpha1.QuotaLedger
	err := a.direct.Get(ctx, client.ObjectKey{Name: t.Name}, &l)
	switch {
	case apierrors.IsNotFound(err), err == nil && !metav1.IsControlledBy(&l, t):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("get the QuotaLedger %s: %w", t.Name, err)
	}
	return &l, nil
}

// ledger reads the tenant's ledger, and makes it if there is none.
func (a *accounts) ledger(ctx context.Context, t *v1alpha1.Tenant) (*v1alpha1.QuotaLedger, error) {
	for {
		var l v1alpha1.QuotaLedger
		err := a.direct.Get(ctx, client.ObjectKey{Name: t.Name}, &l)
		switch {
		case err == nil && metav1.IsControlledBy(&l, t):
			return &l, nil
		case err == nil: // of an earlier Tenant of that name, or ours is the earlier one
			var live v1alpha1.Tenant
			if err := a.direct.Get(ctx, client.ObjectKey{Name: t.Name}, &live); err != nil {
				return nil, fmt.Errorf("get the Tenant %s: %w", t.Name, err)
			}
			if live.UID != t.UID {
				return nil, fmt.Errorf("the Tenant %s was made anew and is not known yet: try again", t.Name)
			}
			if err := a.direct.Delete(ctx, &l, client.Preconditions{UID: &l.UID}); client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
				return nil, fmt.Errorf("delete the QuotaLedger of an earlier Tenant %s: %w", t.Name, err)
			}
		case !apierrors.IsNotFound(err):
			return nil, fmt.Errorf("get the QuotaLedger %s: %w", t.Name, err)
		}
		l = v1alpha1.QuotaLedger{ObjectMeta: metav1.ObjectMeta{
			Name:            t.Name,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(t, v1alpha1.GroupVersion.WithKind("Tenant"))},
		}}
		adopt(&l, t)
		err = a.direct.Create(ctx, &l)
		if err == nil {
			return &l, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("make the QuotaLedger %s: %w", t.Name, err)
		}
	}
}

// adopt puts the Tenant's quota into force, unless a newer one is. It says whether anything changed.
func adopt(l *v1alpha1.QuotaLedger, t *v1alpha1.Tenant) bool {
	return quota.Adopt(&l.Spec, t.Generation, t.Spec.Quota.Hard)
}

// enforce puts the Tenant's quota into force and returns what is used of it. If that
// is not known yet it fails with errCounting, and does not wait: the sweep asks again.
func (a *accounts) enforce(ctx context.Context, t *v1alpha1.Tenant) (*v1alpha1.TenantQuotaStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	// Once it is in force, only a change of the Tenant can change that.
	if in := t.Status.Quota; in == nil || t.Status.ObservedGeneration != t.Generation {
		l, err := a.ledger(ctx, t)
		if err != nil {
			return nil, err
		}
		if adopt(l, t) {
			if err := a.direct.Update(ctx, l); err != nil {
				return nil, fmt.Errorf("put the quota of the Tenant %s into force: %w", t.Name, err)
			}
			if l, err = a.awaitHolds(ctx, t, l); err != nil {
				return nil, err
			}
		}
		if quota.HeldBefore(&l.Spec) {
			return nil, fmt.Errorf("%w: a controller may still grant by the earlier quota", errCounting)
		}
	}
	used, err := a.used(ctx, t)
	if err != nil {
		return nil, err
	}
	return &v1alpha1.TenantQuotaStatus{Hard: t.Spec.Quota.Hard, Used: used}, nil
}

// used is what the Tenant uses of its quota. It fails with errCounting if that is not known yet.
func (a *accounts) used(ctx context.Context, t *v1alpha1.Tenant) (corev1.ResourceList, error) {
	if err := a.feeds.ready(ctx, append(quota.Bounds(t.Spec.Quota.Hard), quota.Namespaces)...); err != nil {
		return nil, err
	}
	return a.view.Used(t.Name, t.Spec.Quota.Hard), nil
}

// NeedLeaderElection implements manager.LeaderElectionRunnable: one who settles is enough.
func (*accounts) NeedLeaderElection() bool { return true }

// Start implements manager.Runnable: it sweeps now and then.
func (a *accounts) Start(ctx context.Context) error {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		if err := a.sweep(ctx); err != nil && ctx.Err() == nil {
			log.FromContext(ctx).Error(err, "settle the quotas of tenants; tried again in a moment")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// sweep settles ledgers, also those of tenants whose quota was taken away, and has the
// status written of tenants that use more or less than it says.
func (a *accounts) sweep(ctx context.Context) error {
	var tenants v1alpha1.TenantList
	if err := a.cached.List(ctx, &tenants); err != nil {
		return fmt.Errorf("list Tenants: %w", err)
	}
	var ledgers v1alpha1.QuotaLedgerList
	// From the API server's cache: whoever writes what is old by then is refused.
	if err := a.direct.List(ctx, &ledgers, &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: "0"}}); err != nil {
		return fmt.Errorf("list QuotaLedgers: %w", err)
	}
	a.forget(tenants.Items)
	byName := map[string]*v1alpha1.QuotaLedger{}
	for i := range ledgers.Items {
		byName[ledgers.Items[i].Name] = &ledgers.Items[i]
	}
	var errs []error
	for i := range tenants.Items {
		t := &tenants.Items[i]
		if err := a.sweepOne(ctx, t, byName[t.Name]); err != nil {
			errs = append(errs, fmt.Errorf("the Tenant %s: %w", t.Name, err))
		}
	}
	if len(errs) > 0 { // of many it is mostly the same
		return fmt.Errorf("%d of %d Tenants; the first: %w", len(errs), len(tenants.Items), errs[0])
	}
	return nil
}

// sweepOne sweeps one Tenant and its ledger, nil if it has none. It takes a limited
// time, and waits for no other tenant's resources.
func (a *accounts) sweepOne(ctx context.Context, t *v1alpha1.Tenant, l *v1alpha1.QuotaLedger) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	var err error
	switch {
	case t.DeletionTimestamp != nil:
		return nil
	case len(t.Spec.Quota.Hard) == 0 && l == nil:
		return nil
	case len(t.Spec.Quota.Hard) == 0:
		return a.retire(ctx, t, l)
	case l == nil:
		_, err = a.ledger(ctx, t)
	default:
		err = a.settle(ctx, t.Name, l)
	}
	used, unknown := a.used(ctx, t)
	if have := t.Status.Quota; unknown == nil && (have == nil || !equality.Semantic.DeepEqual(have.Used, used)) {
		select {
		case a.changed <- event.GenericEvent{Object: t}:
		case <-ctx.Done():
		}
	}
	return errors.Join(err, unknown)
}

// retire puts into force that a Tenant has no quota, as far as is known, which recalls all
// holds, and settles what was admitted by the earlier one. The ledger stays as long as the
// Tenant, which may get another quota: it says what whoever decides by that must have seen.
func (a *accounts) retire(ctx context.Context, t *v1alpha1.Tenant, l *v1alpha1.QuotaLedger) error {
	if !metav1.IsControlledBy(l, t) || l.Spec.TenantGeneration > t.Generation {
		return nil // it has got a quota since, or another Tenant is in its place
	}
	if !adopt(l, t) {
		return a.settle(ctx, t.Name, l)
	}
	if err := a.direct.Update(ctx, l); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		return fmt.Errorf("take the quota of the Tenant %s out of force: %w", t.Name, err)
	}
	return nil
}

// forget drops the idle lines of tenants that do not exist.
func (a *accounts) forget(tenants []v1alpha1.Tenant) {
	exist := make(map[string]bool, len(tenants))
	for i := range tenants {
		exist[tenants[i].Name] = true
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.lines, func(name string, l *line) bool { return !exist[name] && !l.busy && !l.planned })
}

// settle drops the reservations that are seen, and those that were never written, and
// ends the holds of the dead, if the time of one is over. Not before: until then they do
// no harm, the next claim drops what is seen, and it should find the ledger as it has left it.
// What fails, or takes too long, is left for the next time: the rest is written.
func (a *accounts) settle(ctx context.Context, tenant string, l *v1alpha1.QuotaLedger) error {
	now := a.clock.Now()
	if len(quota.Overdue(&l.Spec, now))+len(quota.OverdueHolds(&l.Spec, now)) == 0 {
		return nil
	}
	before := l.DeepCopy()
	a.view.Settle(tenant, &l.Spec) // what is seen need not be looked for
	failed := a.lapse(ctx, tenant, &l.Spec, now)
	a.view.Settle(tenant, &l.Spec)
	if equality.Semantic.DeepEqual(before.Spec, l.Spec) {
		return failed
	}
	if err := a.direct.Update(ctx, l); err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		return fmt.Errorf("settle the quota of the Tenant %s: %w", tenant, err)
	}
	return failed
}

// lapse ends what is overdue in the ledger, as far as it gets in half of the time, of which no
// resource takes another's share. It returns the first error: of many they are mostly the same.
func (a *accounts) lapse(ctx context.Context, tenant string, ledger *v1alpha1.QuotaLedgerSpec, now time.Time) (failed error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout/2)
	defer cancel()
	deadline, _ := ctx.Deadline()
	holds := map[string][]v1alpha1.QuotaHold{}
	for _, h := range quota.OverdueHolds(ledger, now) {
		holds[h.Resource] = append(holds[h.Resource], h)
	}
	left := len(holds) + 1 // the reservations come last
	for kind, of := range holds {
		share, cancel := context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		newest, err := a.newest(share, tenant, kind)
		cancel()
		left--
		if err != nil {
			failed = cmp.Or(failed, err)
			continue
		}
		for _, h := range of {
			quota.LapseHold(ledger, h, newest)
		}
	}
	for _, r := range quota.Overdue(ledger, now) {
		object, namespace, err := a.exists(ctx, tenant, r)
		if err != nil {
			failed = cmp.Or(failed, err)
			continue
		}
		quota.Lapse(ledger, r.UID, object, namespace)
	}
	return failed
}

// exists asks the API server itself for the revision of what was reserved for, and for that
// of its namespace; 0 if it is not there, or in a namespace that is not the tenant's.
func (a *accounts) exists(ctx context.Context, tenant string, r v1alpha1.QuotaReservation) (object, namespace quota.Revision, err error) {
	gvr, ok := quota.Find(r.Resource)
	if !ok {
		return 0, 0, nil
	}
	of, err := a.feeds.namespace(ctx, r.Namespace)
	if apierrors.IsNotFound(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("get the namespace %s: %w", r.Namespace, err)
	}
	obj, err := a.feeds.meta.Resource(gvr).Namespace(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look for %s %s/%s: %w", r.Resource, r.Namespace, r.Name, err)
	}
	if obj.UID != r.UID || of.Labels[v1alpha1.LabelTenant] != tenant {
		return 0, 0, nil
	}
	if object, err = quota.ParseRevision(obj.ResourceVersion); err != nil {
		return 0, 0, err
	}
	namespace, err = quota.ParseRevision(of.ResourceVersion)
	return object, namespace, err
}
