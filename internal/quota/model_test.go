package quota

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	modelLimit = 12
	modelTTL   = time.Minute
	// giveUp is when the API server no longer writes what was admitted.
	giveUp = 34 * time.Second
	acme   = "acme"
)

// world is the API server's storage and all that happens to it: the truth.
type world struct {
	now      time.Time
	revision Revision
	// history has every event of a kind, in order; a replica has heard some first part of it.
	history map[string][]happened
	objects map[types.UID]Object
	spaces  []string
	ledger  v1alpha1.QuotaLedgerSpec
	version int
	// quotas are what the Tenant's generations had: all bound the same, but not all in the same words.
	quotas []corev1.ResourceList
	// admitted are requests between the webhook's answer and the storage.
	admitted []admittedClaim
	replicas []*modelReplica
	uids     int
	starts   int
}

type happened struct {
	object  Object
	deleted bool
}

type admittedClaim struct {
	Claim
	at time.Time // when the API server asked, at the latest
}

// modelReplica is one controller. What it has heard of each kind may be any time old.
type modelReplica struct {
	view  *View
	heard map[string]int
	// ledger and version are what it has read last.
	ledger  v1alpha1.QuotaLedgerSpec
	version int
	// write is a decision on its way to the storage.
	write   *v1alpha1.QuotaLedgerSpec
	base    int // the version that it was decided on
	granted []admittedClaim
	escrow  *Escrow
	// generation of the Tenant that it has heard of.
	generation int
}

func newWorld() *world {
	w := &world{now: time.Unix(1e6, 0), history: map[string][]happened{}, objects: map[types.UID]Object{}, quotas: []corev1.ResourceList{storage(modelLimit)}}
	w.ledger.Hard = w.quotas[0]
	w.addNamespace()
	for range 2 {
		w.replicas = append(w.replicas, w.start(Namespaces, 1, Claims, 0))
	}
	return w
}

func (w *world) happen(kind string, o Object, deleted bool) {
	w.revision++
	o.Revision = w.revision
	w.history[kind] = append(w.history[kind], happened{o, deleted})
	if kind == Namespaces {
		return
	}
	if deleted {
		delete(w.objects, o.UID)
	} else {
		w.objects[o.UID] = o
	}
}

func (w *world) addNamespace() {
	name := fmt.Sprint("ns-", len(w.spaces))
	w.spaces = append(w.spaces, name)
	w.happen(Namespaces, Object{UID: types.UID(name), Name: name, Tenant: acme}, false)
}

// list is what existed after the first n events.
func (w *world) list(kind string, n int) ([]Object, Revision) {
	found := map[types.UID]Object{}
	var at Revision
	for _, e := range w.history[kind][:n] {
		at = e.object.Revision
		if e.deleted {
			delete(found, e.object.UID)
		} else {
			found[e.object.UID] = e.object
		}
	}
	return slices.Collect(maps.Values(found)), at
}

// start is a replica that lists from an API server that is behind.
func (w *world) start(kindA string, a int, kindB string, b int) *modelReplica {
	w.starts++
	r := &modelReplica{view: NewView(func() time.Time { return w.now }), heard: map[string]int{}, version: -1, escrow: NewEscrow(fmt.Sprint("r-", w.starts))}
	for kind, n := range map[string]int{kindA: a, kindB: b} {
		objects, at := w.list(kind, n)
		r.view.Replace(kind, objects, at)
		r.heard[kind] = n
	}
	return r
}

// hear tells the replica some more events, one by one or by a new list.
func (w *world) hear(r *modelReplica, kind string, to int, relist bool) {
	if relist {
		objects, at := w.list(kind, to)
		r.view.Replace(kind, objects, at)
		r.heard[kind] = to
		return
	}
	for ; r.heard[kind] < to; r.heard[kind]++ {
		e := w.history[kind][r.heard[kind]]
		if e.deleted {
			r.view.Delete(kind, e.object.UID, e.object.Revision)
		} else {
			r.view.Put(kind, e.object)
		}
	}
}

func (w *world) read(r *modelReplica) {
	r.ledger, r.version = *w.ledger.DeepCopy(), w.version
}

// total is what the tenant really uses.
func (w *world) total() (n int64) {
	for _, o := range w.objects {
		n += value(o.Usage)
	}
	return n
}

// land writes an admitted request, if the API server still can.
func (w *world) land(c admittedClaim) {
	current, exists := w.objects[c.UID]
	if w.now.Sub(c.at) > giveUp || (c.After == 0) == exists || (c.After > 0 && current.Revision != c.After) {
		return
	}
	if c.After == 0 && w.everWas(c.UID) {
		return
	}
	w.happen(c.Resource, Object{UID: c.UID, Namespace: c.Namespace, Name: c.Name, Usage: c.Usage}, false)
}

func (w *world) everWas(uid types.UID) bool {
	return slices.ContainsFunc(w.history[Claims], func(e happened) bool { return e.object.UID == uid })
}

// write replaces the ledger if nobody else has.
func (w *world) write(r *modelReplica, answered bool) {
	if r.write != nil && r.base == w.version {
		w.ledger, w.version = *r.write.DeepCopy(), w.version+1
		r.ledger, r.version = *r.write, w.version
		if answered {
			w.admitted = append(w.admitted, r.granted...)
			r.escrow.Written(r.write)
		}
	}
	if r.write != nil && !answered {
		r.escrow.Lost()
	}
	r.write, r.granted = nil, nil
}

// sweep is what the leader does, with its own view.
func (w *world) sweep(r *modelReplica) {
	w.read(r)
	r.view.Settle(acme, &r.ledger)
	for _, o := range Overdue(&r.ledger, w.now) {
		Lapse(&r.ledger, o.UID, w.objects[o.UID].Revision, w.history[Namespaces][len(w.spaces)-1].object.Revision)
	}
	for _, h := range OverdueHolds(&r.ledger, w.now) {
		newest := map[string]Revision{Namespaces: w.history[Namespaces][len(w.spaces)-1].object.Revision}
		for _, o := range w.objects {
			newest[Claims] = max(newest[Claims], o.Revision)
		}
		LapseHold(&r.ledger, h, newest)
	}
	r.view.Settle(acme, &r.ledger)
	w.ledger, w.version = *r.ledger.DeepCopy(), w.version+1
	r.version = w.version
}

// enter writes what the replica has granted from its escrow, and gives back what is recalled.
func (w *world) enter(r *modelReplica, answered bool) {
	w.read(r)
	r.decide(w, nil)
	w.write(r, answered)
}

func (w *world) claim(t *rapid.T) Claim {
	size := rapid.Int64Range(1, 2).Draw(t, "size")
	uids := slices.Sorted(maps.Keys(w.objects))
	if len(uids) > 0 && rapid.Bool().Draw(t, "update") {
		o := w.objects[rapid.SampledFrom(uids).Draw(t, "object")]
		return Claim{UID: o.UID, Resource: Claims, Namespace: o.Namespace, Name: o.Name, After: o.Revision, Before: o.Usage, Usage: storage(value(o.Usage) + size)}
	}
	w.uids++
	name := fmt.Sprint("o-", w.uids)
	return Claim{UID: types.UID(name), Resource: Claims, Namespace: rapid.SampledFrom(w.spaces).Draw(t, "namespace"), Name: name, Usage: storage(size)}
}

// TestModel: whatever the order of what replicas hear, decide, write and lose, of
// what the API server writes, and of crashes, the tenant never has more than its
// quota; and once all is quiet, it may have all of it.
func TestModel(t *testing.T) {
	// What breaks it takes some hundreds of histories to be found: see what happens
	// without the line `settled(ledger, kind, revision)` of LapseHold.
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		if err := flag.Set(f.Name, "2000"); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		kinds := rapid.SampledFrom([]string{Claims, Claims, Namespaces})
		take := func(r *modelReplica) { // not while a write is under way
			c := w.claim(t)
			if r.write != nil || !r.escrow.Take(c, int64(r.generation), w.now.Add(modelTTL)) {
				return
			}
			w.admitted = append(w.admitted, admittedClaim{c, w.now})
			if by := w.quotas[r.generation]; !HeldBefore(&w.ledger) && int64(r.generation) < w.ledger.TenantGeneration && List(by) != List(w.ledger.Hard) {
				t.Fatalf("granted by the quota %s, when %s is in force", List(by), List(w.ledger.Hard))
			}
		}
		enforce := func(r *modelReplica) {
			r.generation = len(w.quotas) - 1
			w.read(r)
			if r.adopt(w, &r.ledger) {
				w.ledger, w.version = *r.ledger.DeepCopy(), w.version+1
				r.version = w.version
			}
		}
		landAll := func() {
			for _, c := range w.admitted {
				w.land(c)
			}
			w.admitted = nil
		}
		crash := func(r *modelReplica) {
			spaces := rapid.IntRange(0, len(w.history[Namespaces])).Draw(t, "namespaces")
			*r = *w.start(Namespaces, spaces, Claims, rapid.IntRange(0, len(w.history[Claims])).Draw(t, "objects"))
			r.generation = rapid.IntRange(0, len(w.quotas)-1).Draw(t, "generation")
		}
		actions := map[string]func(*modelReplica){
			"read": w.read,
			"decide": func(r *modelReplica) {
				if r.version >= 0 {
					r.decide(w, rapid.SliceOfN(rapid.Custom(w.claim), 1, 3).Draw(t, "claims"))
				}
			},
			"again": func(r *modelReplica) { // the API server asks another replica about the same object
				if len(w.admitted) > 0 && r.version >= 0 {
					r.decide(w, []Claim{rapid.SampledFrom(w.admitted).Draw(t, "claim").Claim})
				}
			},
			// The answer to a write may be lost: then nothing is created.
			"write": func(r *modelReplica) { w.write(r, rapid.IntRange(0, 4).Draw(t, "lost") > 0) },
			"admit": func(r *modelReplica) { // as a rule it all goes well
				w.read(r)
				r.decide(w, []Claim{w.claim(t)})
				w.write(r, true)
			},
			"take": take,
			"orphan": func(r *modelReplica) { // what it held is ended by the leader
				take(r)
				take(r)
				if rapid.Bool().Draw(t, "lands") {
					landAll()
				}
				if rapid.Bool().Draw(t, "crashes") {
					crash(r)
				}
				w.now = w.now.Add(modelTTL + holdTime + time.Second)
				w.sweep(w.replicas[rapid.IntRange(0, len(w.replicas)-1).Draw(t, "leader")])
				take(r)
			},
			"recall": func(r *modelReplica) {
				w.read(r)
				if r.escrow.Recall(&r.ledger, []string{Claims}) {
					w.ledger, w.version = *r.ledger.DeepCopy(), w.version+1
					r.version = w.version
				}
			},
			"enter": func(r *modelReplica) { w.enter(r, rapid.IntRange(0, 4).Draw(t, "lost") > 0) },
			"fill": func(r *modelReplica) { // somebody wants all that is left, one by one
				for range modelLimit {
					w.read(r)
					w.uids++
					name := fmt.Sprint("o-", w.uids)
					r.decide(w, []Claim{{UID: types.UID(name), Resource: Claims, Namespace: w.spaces[0], Name: name, Usage: storage(1)}})
					w.write(r, true)
				}
			},
			"land all": func(*modelReplica) { landAll() },
			"land": func(*modelReplica) {
				if len(w.admitted) > 0 {
					i := rapid.IntRange(0, len(w.admitted)-1).Draw(t, "request")
					w.land(w.admitted[i])
					w.admitted = slices.Delete(w.admitted, i, i+1)
				}
			},
			"hear": func(r *modelReplica) {
				kind := kinds.Draw(t, "kind")
				w.hear(r, kind, rapid.IntRange(r.heard[kind], len(w.history[kind])).Draw(t, "to"), rapid.IntRange(0, 3).Draw(t, "relist") == 0)
			},
			"hear all": func(r *modelReplica) {
				kind := kinds.Draw(t, "kind")
				w.hear(r, kind, len(w.history[kind]), false)
			},
			"crash": crash,
			"delete": func(*modelReplica) {
				if uids := slices.Sorted(maps.Keys(w.objects)); len(uids) > 0 {
					w.happen(Claims, w.objects[rapid.SampledFrom(uids).Draw(t, "object")], true)
				}
			},
			"touch": func(*modelReplica) { // a status, or less than before: admission is not asked
				if uids := slices.Sorted(maps.Keys(w.objects)); len(uids) > 0 {
					o := w.objects[rapid.SampledFrom(uids).Draw(t, "object")]
					o.Usage = storage(rapid.Int64Range(1, value(o.Usage)).Draw(t, "size"))
					w.happen(Claims, o, false)
				}
			},
			"namespace": func(*modelReplica) {
				if len(w.spaces) < 4 {
					w.addNamespace()
				}
			},
			// The quota is changed, or something else is, and put into force by who has heard of it.
			"tenant": func(r *modelReplica) {
				for range rapid.IntRange(1, 2).Draw(t, "changes") {
					quota := storage(modelLimit)
					if rapid.Bool().Draw(t, "counts") {
						quota[Claims] = quantity(1000)
					}
					w.quotas = append(w.quotas, quota)
					if rapid.Bool().Draw(t, "enforced") {
						enforce(r)
					}
				}
				take(w.replicas[rapid.IntRange(0, len(w.replicas)-1).Draw(t, "another")])
			},
			"hear of tenant": func(r *modelReplica) {
				r.generation = rapid.IntRange(r.generation, len(w.quotas)-1).Draw(t, "generation")
			},
			"sweep": w.sweep,
			"time": func(*modelReplica) {
				w.now = w.now.Add(rapid.SampledFrom([]time.Duration{time.Second, giveUp, modelTTL}).Draw(t, "passes"))
			},
		}
		names := slices.Sorted(maps.Keys(actions))
		for range 2 { // the more usual ones
			names = append(names, "read", "decide", "write", "admit", "take", "take", "take", "land", "land", "land all", "hear", "hear all", "tenant")
		}
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			actions[rapid.SampledFrom(names).Draw(t, "action")](w.replicas[rapid.IntRange(0, len(w.replicas)-1).Draw(t, "replica")])
			if n := w.total(); n > modelLimit {
				t.Fatalf("the tenant uses %d of %d", n, modelLimit)
			}
		}

		// Quiet: nothing leaks.
		w.admitted = nil
		for _, r := range w.replicas {
			w.enter(r, true)
		}
		w.now = w.now.Add(modelTTL + holdTime + time.Second)
		for _, r := range w.replicas {
			for _, kind := range []string{Namespaces, Claims} {
				w.hear(r, kind, len(w.history[kind]), false)
			}
		}
		r := w.replicas[0]
		w.sweep(r)
		if n := len(w.ledger.Reservations); n > 0 {
			t.Fatalf("%d reservations are left: %+v", n, w.ledger.Reservations)
		}
		if n := len(w.ledger.Holds); n > 0 {
			t.Fatalf("%d holds are left: %+v", n, w.ledger.Holds)
		}
		if rest := modelLimit - w.total(); rest > 0 {
			all := Claim{UID: "last", Resource: Claims, Namespace: "ns-0", Name: "last", Usage: storage(rest)}
			if d := r.view.Decide(acme, &r.ledger, []Claim{all}, w.now, r.escrow); d.Errs[0] != nil || !d.Reserved {
				t.Fatalf("%d are free, and cannot be had: %v", rest, d.Errs[0])
			}
		}
	})
}

func (r *modelReplica) adopt(w *world, ledger *v1alpha1.QuotaLedgerSpec) bool {
	return Adopt(ledger, int64(r.generation), w.quotas[r.generation])
}

func (r *modelReplica) decide(w *world, claims []Claim) {
	next := r.ledger.DeepCopy()
	r.adopt(w, next)
	d := r.view.Decide(acme, next, claims, w.now.Add(modelTTL), r.escrow)
	r.write, r.granted = nil, nil
	if !d.Reserved && len(claims) > 0 {
		return
	}
	r.write, r.base = next, r.version
	for i, err := range d.Errs {
		if err == nil {
			r.granted = append(r.granted, admittedClaim{claims[i], w.now})
		} else if exceeded := (&ExceededError{}); !errors.As(err, &exceeded) && !errors.Is(err, ErrBehind) && !errors.Is(err, ErrHeld) {
			panic(err)
		}
	}
}
