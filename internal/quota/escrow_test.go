package quota

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

// decideNew has an escrow decide about the creation of a claim, in a tenant that has
// used so much of its quota, and returns the ledger as it is to be written.
func decideNew(t *testing.T, e *Escrow, ledger v1alpha1.QuotaLedgerSpec, used int64, claim Claim, until time.Time) (*v1alpha1.QuotaLedgerSpec, error) {
	t.Helper()
	v := NewView(func() time.Time { return until.Add(-time.Minute) })
	v.Replace(Namespaces, []Object{{UID: "ns", Name: "ns", Tenant: acme, Revision: 1}}, 1)
	v.Replace(Claims, []Object{{UID: "old", Namespace: "ns", Name: "old", Revision: 2, Usage: storage(used)}}, 2)
	next := ledger.DeepCopy()
	d := v.Decide(acme, next, []Claim{claim}, until, e)
	return next, d.Errs[0]
}

func newClaim(uid string, size int64) Claim {
	return Claim{UID: types.UID(uid), Resource: Claims, Namespace: "ns", Name: uid, Usage: storage(size)}
}

// A hold is for more of the same, takes at most a quarter of what is free, and none is
// taken by who may not.
func TestHold(t *testing.T) {
	until := time.Unix(2000, 0)
	others := v1alpha1.QuotaHold{Holder: "other", Resource: Claims, Usage: storage(40), Until: metav1.NewTime(until)}
	mine := v1alpha1.QuotaHold{Holder: "me", Resource: Claims, Usage: storage(8), Until: metav1.NewTime(until)}
	recalled := mine
	recalled.Recalled = true
	spent := mine
	spent.Until = metav1.NewTime(until.Add(-time.Second))
	for name, tt := range map[string]struct {
		limit, used, size int64
		generation        int64
		holds             []v1alpha1.QuotaHold
		settled           string
		granted           bool // one, from the hold
		closed            bool
		claim             func(*Claim)
		want              int64
		err               error
	}{
		"there is plenty":              {limit: 1000, size: 1, want: 32},
		"of larger ones":               {limit: 1000, size: 5, want: 160},
		"a quarter of the rest":        {limit: 100, used: 50, size: 1, want: 8},
		"just one":                     {limit: 100, used: 95, size: 1, want: 1},
		"near the limit":               {limit: 100, used: 96, size: 1},
		"it replaces the old one":      {limit: 100, used: 50, size: 1, holds: []v1alpha1.QuotaHold{mine}, want: 8},
		"others hold, too":             {limit: 100, used: 50, size: 1, holds: []v1alpha1.QuotaHold{others}, want: 2},
		"it is wanted back":            {limit: 100, used: 50, size: 1, holds: []v1alpha1.QuotaHold{recalled}},
		"what is left is another's":    {limit: 100, used: 60, size: 1, holds: []v1alpha1.QuotaHold{others}, err: ErrHeld},
		"and not even that would do":   {limit: 100, used: 60, size: 41, holds: []v1alpha1.QuotaHold{others}, err: &ExceededError{}},
		"by the quota of before":       {limit: 100, used: 50, size: 1, generation: 8, holds: []v1alpha1.QuotaHold{mine}, want: 8},
		"the view is behind":           {limit: 100, size: 1, settled: "3", err: ErrBehind},
		"what is held stays":           {limit: 100, size: 1, holds: []v1alpha1.QuotaHold{mine}, settled: "3", err: ErrBehind, want: 8},
		"unless it must be renewed":    {limit: 100, size: 1, holds: []v1alpha1.QuotaHold{mine}, settled: "3", granted: true, err: ErrBehind},
		"nothing is bounded any more":  {size: 1, holds: []v1alpha1.QuotaHold{mine}, granted: true},
		"the controller ends":          {limit: 100, size: 1, holds: []v1alpha1.QuotaHold{mine}, closed: true},
		"an update is for none":        {limit: 100, size: 1, claim: func(c *Claim) { c.After = 1 }},
		"a dry run neither":            {limit: 100, size: 1, claim: func(c *Claim) { c.DryRun = true }},
		"it leaves what is held":       {limit: 100, size: 1, holds: []v1alpha1.QuotaHold{mine}, claim: func(c *Claim) { c.DryRun = true }, want: 8},
		"but not what is of no use":    {limit: 100, size: 1, holds: []v1alpha1.QuotaHold{spent}, claim: func(c *Claim) { c.DryRun = true }},
		"a dry run takes nothing back": {limit: 100, used: 60, size: 1, holds: []v1alpha1.QuotaHold{others}, claim: func(c *Claim) { c.DryRun = true }},
		"and is refused as others":     {limit: 100, used: 60, size: 41, holds: []v1alpha1.QuotaHold{others}, claim: func(c *Claim) { c.DryRun = true }, err: &ExceededError{}},
	} {
		t.Run(name, func(t *testing.T) {
			e := NewEscrow("me")
			if tt.closed {
				e.Close()
			}
			ledger := v1alpha1.QuotaLedgerSpec{TenantGeneration: tt.generation, Hard: storage(tt.limit), Holds: tt.holds, Settled: map[string]string{Claims: tt.settled}}
			if tt.limit == 0 {
				ledger.Hard = nil
			}
			if tt.granted {
				e.Written(&ledger)
				e.Take(newClaim("granted", 1), tt.generation, until)
			}
			claim := newClaim("new", tt.size)
			if tt.claim != nil {
				tt.claim(&claim)
			}
			next, err := decideNew(t, e, ledger, tt.used, claim, until)
			if exceeded := (&ExceededError{}); !errors.Is(err, tt.err) && (!errors.As(err, &exceeded) || !errors.As(tt.err, &exceeded)) {
				t.Errorf("decided: %v, want %v", err, tt.err)
			}
			var got int64
			for _, h := range next.Holds {
				if h.Holder == "me" {
					got += value(h.Usage)
				}
			}
			if got != tt.want {
				t.Errorf("it holds %d, want %d: %+v", got, tt.want, next.Holds)
			}
		})
	}
}

// Who had to give back a hold does not take it again before the other had its turn.
func TestHoldPause(t *testing.T) {
	until := time.Unix(2000, 0)
	for name, tt := range map[string]struct {
		resource string
		after    time.Duration
		want     int
	}{
		"at once":                {Claims, 0, 0},
		"while the other waits":  {Claims, holdPause - 1, 0},
		"later":                  {Claims, holdPause, 1},
		"of another, it may all": {Services, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			e := NewEscrow("me")
			ledger := v1alpha1.QuotaLedgerSpec{Hard: storage(1000), Holds: []v1alpha1.QuotaHold{
				{Holder: "me", Resource: tt.resource, Usage: storage(8), Until: metav1.NewTime(until), Recalled: true},
			}}
			next, _ := decideNew(t, e, ledger, 0, newClaim("one", 1), until)
			e.Written(next)
			next, err := decideNew(t, e, *next, 0, newClaim("two", 1), until.Add(tt.after))
			if err != nil || len(next.Holds) != tt.want {
				t.Errorf("decided: %v, and it has %d holds, want %d", err, len(next.Holds), tt.want)
			}
		})
	}
}

// What is taken from a hold is bounded by it in size, time and kind, and is entered by
// the next decision.
func TestTake(t *testing.T) {
	until := time.Unix(2000, 0)
	with := func(change func(*Claim)) Claim {
		c := newClaim("one", 1)
		change(&c)
		return c
	}
	for name, tt := range map[string]struct {
		claim      Claim
		generation int64
		until      time.Time
		before     func(*Escrow)
		want       bool
	}{
		"a creation":                     {claim: newClaim("one", 1), want: true},
		"all that is held":               {claim: newClaim("one", 8), want: true},
		"more":                           {claim: newClaim("one", 9)},
		"what is left":                   {claim: newClaim("one", 5), before: func(e *Escrow) { e.Take(newClaim("zero", 3), 7, until) }, want: true},
		"more than is left":              {claim: newClaim("one", 6), before: func(e *Escrow) { e.Take(newClaim("zero", 3), 7, until) }},
		"what no quota bounds":           {claim: with(func(c *Claim) { c.Usage = corev1.ResourceList{Claims: quantity(99)} }), want: true},
		"another resource":               {claim: with(func(c *Claim) { c.Resource = Services })},
		"an update":                      {claim: with(func(c *Claim) { c.After = 3 })},
		"a dry run":                      {claim: with(func(c *Claim) { c.DryRun = true })},
		"by another quota":               {claim: newClaim("one", 1), generation: 8},
		"at the last moment":             {claim: newClaim("one", 1), until: until.Add(holdTime), want: true},
		"too late":                       {claim: newClaim("one", 1), until: until.Add(holdTime + 1)},
		"after a write of unknown end":   {claim: newClaim("one", 1), before: (*Escrow).Lost},
		"after the end of the ledger":    {claim: newClaim("one", 1), before: func(e *Escrow) { e.Gone(until) }},
		"after it has given back":        {claim: newClaim("one", 1), before: (*Escrow).Close},
		"after the hold was not renewed": {claim: newClaim("one", 1), before: func(e *Escrow) { e.Written(&v1alpha1.QuotaLedgerSpec{TenantGeneration: 7}) }},
	} {
		t.Run(name, func(t *testing.T) {
			e := NewEscrow("me")
			ledger := v1alpha1.QuotaLedgerSpec{TenantGeneration: 7, Hard: storage(1000), Holds: []v1alpha1.QuotaHold{
				{Holder: "me", Resource: Claims, Usage: storage(8), Until: metav1.NewTime(until.Add(holdTime)), TenantGeneration: 7},
				{Holder: "other", Resource: Claims, Usage: storage(100), Until: metav1.NewTime(until.Add(holdTime)), TenantGeneration: 7},
			}}
			e.Written(&ledger)
			if tt.before != nil {
				tt.before(e)
			}
			if tt.generation == 0 {
				tt.generation = 7
			}
			if tt.until.IsZero() {
				tt.until = until
			}
			if got := e.Take(tt.claim, tt.generation, tt.until); got != tt.want {
				t.Fatalf("Take() = %v, want %v", got, tt.want)
			}
			next, _ := decideNew(t, e, ledger, 0, Claim{UID: "last", Resource: Claims, Namespace: "ns", Name: "last", Usage: storage(1)}, until)
			var entered []string
			for _, r := range next.Reservations {
				if r.Name == tt.claim.Name {
					entered = append(entered, List(r.Usage))
				}
			}
			var want []string
			if tt.want {
				want = []string{List(tt.claim.Usage)}
			}
			if diff := cmp.Diff(want, entered); diff != "" {
				t.Errorf("entered: - want, + got:\n%s", diff)
			}
			if e.Written(next); e.Owes() || e.Due(next, until) {
				t.Error("it still owes something once all is written")
			}
		})
	}
}

// A hold is for as long as the Tenant has the quota by which it was taken, whatever else
// of it changes.
func TestAdopt(t *testing.T) {
	for name, tt := range map[string]struct {
		generation int64
		hard       corev1.ResourceList
		changed    bool
		held       []string // whose holds are not wanted back
	}{
		"the same quota":      {generation: 8, hard: corev1.ResourceList{corev1.ResourceRequestsStorage: resource.MustParse("1k")}, changed: true, held: []string{"me"}},
		"another quota":       {generation: 8, hard: storage(999), changed: true},
		"no quota":            {generation: 8, changed: true},
		"one that is known":   {generation: 7, hard: storage(1000), held: []string{"me"}},
		"one that is earlier": {generation: 6, hard: storage(999), held: []string{"me"}},
	} {
		t.Run(name, func(t *testing.T) {
			ledger := v1alpha1.QuotaLedgerSpec{TenantGeneration: 7, Hard: storage(1000), Holds: []v1alpha1.QuotaHold{
				{Holder: "me", Resource: Claims, TenantGeneration: 7},
				{Holder: "late", Resource: Claims, TenantGeneration: 6},
			}}
			if changed := Adopt(&ledger, tt.generation, tt.hard); changed != tt.changed || ledger.TenantGeneration != max(7, tt.generation) {
				t.Errorf("changed: %v, want %v; the generation is %d", changed, tt.changed, ledger.TenantGeneration)
			}
			var held []string
			for _, h := range ledger.Holds {
				if !NewEscrow(h.Holder).Recalled(&ledger) {
					held = append(held, h.Holder)
				}
			}
			if diff := cmp.Diff(tt.held, held); diff != "" {
				t.Errorf("held on: - want, + got:\n%s", diff)
			}
		})
	}
}

// Only what is wanted is asked back.
func TestRecall(t *testing.T) {
	for name, tt := range map[string]struct {
		recalled  bool
		resources []string
		want      []bool // of a hold of claims, one of services, and one of the escrow's own
		changed   bool
	}{
		"one resource":   {resources: []string{Claims}, want: []bool{true, false, false}, changed: true},
		"two":            {resources: []string{Services, Claims, Claims}, want: []bool{true, true, false}, changed: true},
		"nobody has any": {resources: []string{Pods}, want: []bool{false, false, false}},
		"once again":     {recalled: true, resources: []string{Claims}, want: []bool{true, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			ledger := v1alpha1.QuotaLedgerSpec{Holds: []v1alpha1.QuotaHold{
				{Holder: "other", Resource: Claims, Recalled: tt.recalled}, {Holder: "other", Resource: Services}, {Holder: "me", Resource: Claims},
			}}
			if changed := NewEscrow("me").Recall(&ledger, tt.resources); changed != tt.changed {
				t.Errorf("changed: %v, want %v", changed, tt.changed)
			}
			var got []bool
			for _, h := range ledger.Holds {
				got = append(got, h.Recalled)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("recalled: - want, + got:\n%s", diff)
			}
		})
	}
}
