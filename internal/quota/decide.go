package quota

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

// ErrBehind means that the View is older than the ledger: wait until it has moved,
// then decide again.
var ErrBehind = errors.New("what is known of the tenant's objects is behind the ledger of its quota: try again")

// Over lists what is used more than the quota allows, as "pods 3 of 2".
func Over(hard, used corev1.ResourceList) []string {
	var over []string
	for _, name := range sortedNames(hard) {
		limit, q := hard[name], used[name]
		if q.Cmp(limit) > 0 {
			over = append(over, fmt.Sprintf("%s %s of %s", name, q.String(), limit.String()))
		}
	}
	return over
}

// Claim is an object that somebody wants to create or change.
type Claim struct {
	UID                       types.UID
	Resource, Namespace, Name string
	// After is the revision of the object that is changed, 0 for a creation.
	After Revision
	// Before is what it uses now, and Usage what it will use, by canonical names.
	Before, Usage corev1.ResourceList
	// DryRun claims are judged and take nothing: not even back what others hold.
	DryRun bool
}

// Grows says whether the claim takes more of anything. One that does not is never refused.
func (c Claim) Grows() bool {
	for name := range c.Usage {
		if q := c.more(name); q.Sign() > 0 {
			return true
		}
	}
	return false
}

func (c Claim) more(name corev1.ResourceName) resource.Quantity {
	q := c.Usage[name].DeepCopy()
	q.Sub(c.Before[name])
	return q
}

// ExceededError says in ResourceQuota's words what a claim takes too much of.
type ExceededError struct {
	Tenant                 string
	Requested, Used, Limit corev1.ResourceList
}

func (e *ExceededError) Error() string {
	return fmt.Sprintf("exceeded quota: Tenant %s, requested: %s, used: %s, limited: %s", e.Tenant, List(e.Requested), List(e.Used), List(e.Limit))
}

// List writes quantities as ResourceQuota does.
func List(list corev1.ResourceList) string {
	parts := make([]string, 0, len(list))
	for _, name := range sortedNames(list) {
		q := list[name]
		parts = append(parts, string(name)+"="+q.String())
	}
	return strings.Join(parts, ",")
}

// Decision is the answer to some claims.
type Decision struct {
	// Errs has for each claim nil, an *ExceededError, ErrBehind, or ErrHeld.
	Errs []error
	// Reserved says that the ledger has got new reservations: a claim is granted
	// only once the ledger is written, on condition that it was not written since.
	Reserved bool
}

// Decide judges the claims one after the other and enters those that are granted
// into the ledger, until the time at which they are surely written or given up.
// First it enters what was granted from the escrow, and settles the ledger; at last it
// renews the escrow's holds.
//
// It is exact, because each object that was admitted before is in the ledger, or covered
// by a hold there, or so old that a View which the ledger does not call behind has it. If
// both have it, it counts once, as the larger of the two. What another's hold covers may
// count twice for a moment: if that is what a claim fails for, it is ErrHeld.
func (v *View) Decide(tenant string, ledger *v1alpha1.QuotaLedgerSpec, claims []Claim, until time.Time, e *Escrow) Decision {
	v.mu.Lock()
	defer v.mu.Unlock()
	renew := e.enter(ledger, until)
	v.settle(tenant, ledger)
	reserved := make(map[types.UID]int, len(ledger.Reservations))
	for i, r := range ledger.Reservations {
		reserved[r.UID] = i
	}
	books := map[string]*book{}
	d := Decision{Errs: make([]error, len(claims))}
	for i, c := range claims {
		if !v.covers(ledger, c.Resource) {
			d.Errs[i] = ErrBehind
			continue
		}
		b := books[c.Resource]
		if b == nil {
			b = v.open(tenant, c.Resource, ledger, e)
			books[c.Resource] = b
		}
		at, again := reserved[c.UID]
		want := v1alpha1.QuotaReservation{
			UID: c.UID, Resource: c.Resource, Namespace: c.Namespace, Name: c.Name,
			Usage: largest(c.Before, c.Usage), Until: metav1.NewTime(until),
		}
		if c.After > 0 {
			want.After = c.After.String()
		}
		have := v.recorded(tenant, c.Resource, c.UID)
		if again {
			old := ledger.Reservations[at]
			have = largest(have, old.Usage)
			// An older reservation that says otherwise can no longer be written; one as old, or newer, can.
			if after, err := ParseRevision(old.After); err != nil || after >= c.After {
				want.Usage, want.After = largest(want.Usage, old.Usage), old.After
			}
		}
		with := largest(v.recorded(tenant, c.Resource, c.UID), want.Usage)
		bounded, exceeded := b.check(tenant, ledger.Hard, c, have, with)
		switch {
		case errors.Is(exceeded, ErrHeld) && c.DryRun:
			continue // there is room if they give it back
		case exceeded != nil:
			d.Errs[i] = exceeded
			continue
		case !bounded || c.DryRun:
			continue
		}
		b.replace(have, with)
		d.Reserved = true
		if c.After == 0 {
			renew[c.Resource] = c.Usage
		} else if _, known := renew[c.Resource]; !known {
			renew[c.Resource] = nil
		}
		if again {
			ledger.Reservations[at] = want
		} else {
			reserved[c.UID] = len(ledger.Reservations)
			ledger.Reservations = append(ledger.Reservations, want)
		}
	}
	for kind, usage := range renew {
		b := books[kind]
		if b == nil {
			b = v.open(tenant, kind, ledger, e)
		}
		if !v.covers(ledger, kind) || !slices.Contains(Bounds(ledger.Hard), kind) {
			usage = nil
		}
		e.hold(ledger, kind, usage, b, until)
	}
	return d
}

// book is what a tenant uses of one resource, by canonical names: used has its objects
// and the reservations, held what other controllers hold.
type book struct{ used, held corev1.ResourceList }

func (v *View) open(tenant, kind string, ledger *v1alpha1.QuotaLedgerSpec, e *Escrow) *book {
	b := &book{used: v.total(tenant, kind), held: corev1.ResourceList{}}
	for _, h := range ledger.Holds {
		if h.Resource == kind && h.Holder != e.holder {
			for name, q := range h.Usage {
				add(b.held, name, q)
			}
		}
	}
	for _, r := range ledger.Reservations {
		if r.Resource == kind {
			have := v.recorded(tenant, kind, r.UID)
			b.replace(have, largest(have, r.Usage))
		}
	}
	return b
}

func (b *book) replace(have, with corev1.ResourceList) {
	for name, q := range with {
		more := q.DeepCopy()
		more.Sub(have[name])
		add(b.used, name, more)
	}
	for name, q := range have {
		if _, ok := with[name]; !ok {
			q = q.DeepCopy()
			q.Neg()
			add(b.used, name, q)
		}
	}
}

// fits says whether there is room for so much more.
func (b *book) fits(hard, more corev1.ResourceList) bool {
	for limitName, limit := range hard {
		name := canonical(limitName)
		q, ok := more[name]
		if !ok {
			continue
		}
		total := b.used[name].DeepCopy()
		total.Add(b.held[name])
		total.Add(q)
		if total.Cmp(limit) > 0 {
			return false
		}
	}
	return true
}

// check says whether the claim takes more of anything that is bounded, and whether it is too much.
func (b *book) check(tenant string, hard corev1.ResourceList, c Claim, have, with corev1.ResourceList) (bounded bool, err error) {
	e := &ExceededError{Tenant: tenant, Requested: corev1.ResourceList{}, Used: corev1.ResourceList{}, Limit: corev1.ResourceList{}}
	held := false
	for limitName, limit := range hard {
		name := canonical(limitName)
		requested := c.more(name)
		if requested.Sign() <= 0 {
			continue // what does not grow is not asked about, even over quota
		}
		bounded = true
		total := b.used[name].DeepCopy()
		total.Sub(have[name])
		total.Add(with[name])
		if total.Cmp(limit) > 0 {
			e.Requested[limitName], e.Used[limitName], e.Limit[limitName] = requested, b.used[name], limit
		}
		total.Add(b.held[name])
		held = held || total.Cmp(limit) > 0
	}
	switch {
	case len(e.Requested) > 0:
		return bounded, e
	case held:
		return bounded, ErrHeld
	}
	return bounded, nil
}

// Settle drops the reservations of objects that the View has seen written, or
// deleted, and says how new a View must be from now on.
func (v *View) Settle(tenant string, ledger *v1alpha1.QuotaLedgerSpec) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.settle(tenant, ledger)
}

func (v *View) settle(tenant string, ledger *v1alpha1.QuotaLedgerSpec) {
	ledger.Reservations = slices.DeleteFunc(ledger.Reservations, func(r v1alpha1.QuotaReservation) bool {
		s := v.sets[r.Resource]
		if s == nil {
			return false
		}
		if _, gone := s.gone[r.UID]; gone {
			return true
		}
		o, ok := s.objects[r.UID]
		after, err := ParseRevision(r.After)
		// An update is written on condition that the object has not changed since. So
		// it was written if the object is newer, or it never will be.
		if !ok || err != nil || o.Revision <= after {
			return false
		}
		// Another View counts it only if it knows whose namespace this is.
		namespace, ok := v.namespace(r.Namespace)
		if !ok || namespace.Tenant != tenant {
			return false
		}
		settled(ledger, r.Resource, o.Revision)
		settled(ledger, Namespaces, namespace.Revision)
		return true
	})
}

// settled has everyone wait who has not seen the resource as of the revision.
func settled(ledger *v1alpha1.QuotaLedgerSpec, kind string, revision Revision) {
	if have, err := ParseRevision(ledger.Settled[kind]); err != nil || have >= revision {
		return
	}
	if ledger.Settled == nil {
		ledger.Settled = map[string]string{}
	}
	ledger.Settled[kind] = revision.String()
}

// covers says whether the View is as new as the ledger wants it, for one resource.
func (v *View) covers(ledger *v1alpha1.QuotaLedgerSpec, kind string) bool {
	for _, kind := range []string{kind, Namespaces} {
		s := v.sets[kind]
		settled, err := ParseRevision(ledger.Settled[kind])
		if s == nil || err != nil || s.revision < settled {
			return false
		}
	}
	return true
}

// recorded is what the View counts of one object for the tenant.
func (v *View) recorded(tenant, kind string, uid types.UID) corev1.ResourceList {
	s := v.sets[kind]
	if s == nil {
		return nil
	}
	if o, ok := s.objects[uid]; ok && v.spaces[tenant][o.Namespace] {
		return o.Usage
	}
	return nil
}

// Overdue are the reservations whose time is over, and of which nothing is known.
// Each must be looked for at the API server, which Lapse is told.
func Overdue(ledger *v1alpha1.QuotaLedgerSpec, now time.Time) []v1alpha1.QuotaReservation {
	var out []v1alpha1.QuotaReservation
	for _, r := range ledger.Reservations {
		if now.After(r.Until.Time) {
			out = append(out, r)
		}
	}
	return out
}

// Lapse ends an overdue reservation. Exists is the revision of its object at the API
// server, after the reservation's time, and namespace that of the object's namespace; 0 if
// there is none: then it was never created, or is gone. What the reservation was for, and
// was written, is no newer, and whoever decides from now on must have seen it.
func Lapse(ledger *v1alpha1.QuotaLedgerSpec, uid types.UID, exists, namespace Revision) {
	i := slices.IndexFunc(ledger.Reservations, func(r v1alpha1.QuotaReservation) bool { return r.UID == uid })
	if i < 0 {
		return
	}
	kind := ledger.Reservations[i].Resource
	ledger.Reservations = slices.Delete(ledger.Reservations, i, i+1)
	if exists > 0 {
		settled(ledger, kind, exists)
		settled(ledger, Namespaces, namespace)
	}
}

func largest(a, b corev1.ResourceList) corev1.ResourceList {
	out := make(corev1.ResourceList, max(len(a), len(b)))
	for _, list := range []corev1.ResourceList{a, b} {
		for name, q := range list {
			if have, ok := out[name]; !ok || have.Cmp(q) < 0 {
				out[name] = q
			}
		}
	}
	return out
}
