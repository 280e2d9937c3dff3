package quota

import (
	"errors"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	// holdTime is how long a controller grants from a hold after it has written it.
	holdTime = time.Minute
	// holdObjects is how many objects like the last one a hold is for, at most. A hold
	// takes no more than a quarter of what is free, so that near the limit there is none.
	holdObjects, holdShare = 32, 4
	// holdPause is how long a controller takes no hold of what another wanted back: longer
	// than that one waits, or a stream of small claims here would keep a large one there out.
	holdPause = 2 * time.Second
)

// ErrHeld means that there is room if other controllers give back what they hold:
// Recall it, and decide again by the ledger that they have written.
var ErrHeld = errors.New("the rest of the quota is held by another controller: try again")

// Escrow is what one controller may grant of a tenant's quota without writing the ledger
// first: its holds there. What it has granted so is entered by the next Decide whose
// ledger is written. Nothing may be taken between a Decide and the Written or Lost that
// tells how it has ended. An Escrow is not safe for concurrent use.
type Escrow struct {
	holder string
	// room is what is left of the holds, by resource.
	room map[string]room
	// granted is not known to be in the ledger.
	granted []v1alpha1.QuotaReservation
	// paused says, by resource, for claims until when no hold is taken.
	paused map[string]time.Time
	closed bool
}

// room is what is left of a hold, of each name that was bounded when it was taken.
type room struct {
	generation int64
	until      time.Time
	left       corev1.ResourceList
	bounded    map[corev1.ResourceName]bool
}

// NewEscrow is empty. The holder's name must be its own, also after a restart.
func NewEscrow(holder string) *Escrow {
	return &Escrow{holder: holder, room: map[string]room{}, paused: map[string]time.Time{}}
}

// Take grants a creation, by the quota of that generation of the Tenant, if a hold has
// room for it. It counts until the time at which it is surely written or given up.
func (e *Escrow) Take(c Claim, generation int64, until time.Time) bool {
	r, ok := e.room[c.Resource]
	if !ok || c.After > 0 || c.DryRun || r.generation != generation || until.After(r.until) {
		return false
	}
	for name, q := range c.Usage {
		if left := r.left[name]; r.bounded[name] && q.Cmp(left) > 0 {
			return false
		}
	}
	for name, q := range c.Usage {
		if r.bounded[name] {
			left := r.left[name].DeepCopy()
			left.Sub(q)
			r.left[name] = left
		}
	}
	e.granted = append(e.granted, v1alpha1.QuotaReservation{
		UID: c.UID, Resource: c.Resource, Namespace: c.Namespace, Name: c.Name, Usage: c.Usage, Until: metav1.NewTime(until),
	})
	return true
}

// Owes says whether there is something to enter into the ledger: write it soon.
func (e *Escrow) Owes() bool { return len(e.granted) > 0 }

// Written tells that the ledger of the last Decide is in force.
func (e *Escrow) Written(ledger *v1alpha1.QuotaLedgerSpec) {
	e.granted = nil
	clear(e.room)
	for _, h := range ledger.Holds {
		if h.Holder != e.holder {
			continue
		}
		r := room{generation: ledger.TenantGeneration, until: h.Until.Time, left: h.Usage.DeepCopy(), bounded: map[corev1.ResourceName]bool{}}
		for name := range ledger.Hard {
			r.bounded[canonical(name)] = true
		}
		e.room[h.Resource] = r
	}
}

// Lost tells that it is not known whether the ledger of the last Decide is in force.
func (e *Escrow) Lost() { clear(e.room) }

// Gone tells that there is no ledger any more: nothing is bounded. What was granted a
// moment ago is kept for the next one.
func (e *Escrow) Gone(now time.Time) {
	clear(e.room)
	e.granted = slices.DeleteFunc(e.granted, func(r v1alpha1.QuotaReservation) bool { return now.After(r.Until.Time) })
}

// Close has the next Decide give back all holds, and none be taken again.
func (e *Escrow) Close() {
	e.closed = true
	clear(e.room)
}

// Spent says whether the escrow has a hold of which nothing can be taken any more that
// counts until then.
func (e *Escrow) Spent(until time.Time) bool {
	for _, r := range e.room {
		if until.After(r.until) {
			return true
		}
	}
	return false
}

// enter makes reservations of what was granted, and removes the holds that are over. It
// returns the resources whose holds must be made anew, each with what the last object
// uses: nil where none is wanted.
func (e *Escrow) enter(ledger *v1alpha1.QuotaLedgerSpec, until time.Time) map[string]corev1.ResourceList {
	renew := map[string]corev1.ResourceList{}
	at := make(map[types.UID]int, len(ledger.Reservations))
	for i, r := range ledger.Reservations {
		at[r.UID] = i
	}
	for _, r := range e.granted {
		renew[r.Resource] = r.Usage
		if i, again := at[r.UID]; again { // by another controller, or by a write whose answer was lost
			have := &ledger.Reservations[i]
			have.Usage = largest(have.Usage, r.Usage)
			if have.Until.Before(&r.Until) {
				have.Until = r.Until
			}
			continue
		}
		at[r.UID] = len(ledger.Reservations)
		ledger.Reservations = append(ledger.Reservations, r)
	}
	for _, h := range ledger.Holds {
		if h.Holder == e.holder && h.Recalled {
			e.paused[h.Resource] = until.Add(holdPause)
		}
	}
	ledger.Holds = slices.DeleteFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool { return e.over(ledger, h, until) })
	return renew
}

// over says whether it is a hold of the escrow's that it is to give back: nothing that
// counts until then will be taken from it.
func (e *Escrow) over(ledger *v1alpha1.QuotaLedgerSpec, h v1alpha1.QuotaHold, until time.Time) bool {
	return h.Holder == e.holder && (e.closed || wanted(ledger, h) || until.After(h.Until.Time))
}

// hold replaces the holder's hold of one resource: it is for more objects that use as much.
// There is none for a while after another controller wanted it back.
func (e *Escrow) hold(ledger *v1alpha1.QuotaLedgerSpec, kind string, usage corev1.ResourceList, b *book, until time.Time) {
	ledger.Holds = slices.DeleteFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool { return h.Holder == e.holder && h.Resource == kind })
	if until.Before(e.paused[kind]) || e.closed {
		return
	}
	for n := int64(holdObjects); n > 0 && len(usage) > 0; n /= 2 {
		if want := times(usage, n); b.fits(ledger.Hard, times(want, holdShare)) {
			ledger.Holds = append(ledger.Holds, v1alpha1.QuotaHold{Holder: e.holder, Resource: kind, Usage: want, Until: metav1.NewTime(until.Add(holdTime)), TenantGeneration: ledger.TenantGeneration})
			return
		}
	}
}

func times(list corev1.ResourceList, n int64) corev1.ResourceList {
	out := make(corev1.ResourceList, len(list))
	for name, q := range list {
		q = q.DeepCopy()
		q.Mul(n)
		out[name] = q
	}
	return out
}

// Recall asks all other holders for what they hold of the resources. It says whether that
// changes the ledger.
func (e *Escrow) Recall(ledger *v1alpha1.QuotaLedgerSpec, resources []string) bool {
	changed := false
	for i := range ledger.Holds {
		if h := &ledger.Holds[i]; h.Holder != e.holder && !h.Recalled && slices.Contains(resources, h.Resource) {
			h.Recalled, changed = true, true
		}
	}
	return changed
}

// Recalled says whether what the holder holds is wanted back.
func (e *Escrow) Recalled(ledger *v1alpha1.QuotaLedgerSpec) bool {
	return slices.ContainsFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool { return h.Holder == e.holder && wanted(ledger, h) })
}

// Adopt puts the quota of a generation of the Tenant into force, unless a later one is. It
// says whether anything changed. What is held by the same quota is held on: whoever still
// goes by the earlier generation grants no other than this one does.
func Adopt(ledger *v1alpha1.QuotaLedgerSpec, generation int64, hard corev1.ResourceList) bool {
	if ledger.TenantGeneration >= generation {
		return false
	}
	if equality.Semantic.DeepEqual(ledger.Hard, hard) {
		for i := range ledger.Holds {
			if h := &ledger.Holds[i]; h.TenantGeneration == ledger.TenantGeneration {
				h.TenantGeneration = generation
			}
		}
	}
	ledger.TenantGeneration, ledger.Hard = generation, hard
	return true
}

// HeldBefore says whether somebody may still grant by an earlier quota than the ledger's.
func HeldBefore(ledger *v1alpha1.QuotaLedgerSpec) bool {
	return slices.ContainsFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool { return h.TenantGeneration < ledger.TenantGeneration })
}

func wanted(ledger *v1alpha1.QuotaLedgerSpec, h v1alpha1.QuotaHold) bool {
	return h.Recalled || h.TenantGeneration < ledger.TenantGeneration
}

// Due says whether what Decide makes of the ledger must be written even if it reserves nothing.
func (e *Escrow) Due(ledger *v1alpha1.QuotaLedgerSpec, until time.Time) bool {
	return e.Owes() || slices.ContainsFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool { return e.over(ledger, h, until) })
}

// OverdueHolds are those whose holders did not give them back in time. LapseHold ends one.
func OverdueHolds(ledger *v1alpha1.QuotaLedgerSpec, now time.Time) []v1alpha1.QuotaHold {
	var out []v1alpha1.QuotaHold
	for _, h := range ledger.Holds {
		if now.After(h.Until.Time) {
			out = append(out, h)
		}
	}
	return out
}

// LapseHold ends an overdue hold. Newest has the latest revision, at the API server and
// after the hold's time, of the tenant's namespaces and of its objects of the resource:
// what was granted from the hold, and written, is no newer, and whoever decides from now
// on must have seen it.
func LapseHold(ledger *v1alpha1.QuotaLedgerSpec, overdue v1alpha1.QuotaHold, newest map[string]Revision) {
	ledger.Holds = slices.DeleteFunc(ledger.Holds, func(h v1alpha1.QuotaHold) bool {
		return h.Holder == overdue.Holder && h.Resource == overdue.Resource
	})
	for kind, revision := range newest {
		settled(ledger, kind, revision)
	}
}
