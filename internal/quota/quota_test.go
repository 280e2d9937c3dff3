package quota

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"h8s.io/hypernetes/api/v1alpha1"
)

func quantity(n int64) resource.Quantity { return *resource.NewQuantity(n, resource.DecimalSI) }

func storage(n int64) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceRequestsStorage: quantity(n)}
}

func value(list corev1.ResourceList) int64 {
	q := list[corev1.ResourceRequestsStorage]
	return q.Value()
}

func TestOwner(t *testing.T) {
	for name, want := range map[corev1.ResourceName]string{
		"pods": "pods", "count/pods": "pods", "cpu": "pods", "limits.memory": "pods", "requests.ephemeral-storage": "pods",
		"hugepages-2Mi": "pods", "requests.hugepages-1Gi": "pods", "requests.example.com/gpu": "pods",
		"services": "services", "count/services": "services", "services.nodeports": "services",
		"requests.storage": "persistentvolumeclaims", "fast.storageclass.storage.k8s.io/requests.storage": "persistentvolumeclaims",
		"configmaps": "configmaps", "count/configmaps": "configmaps", "count/deployments.apps": "deployments.apps",
		// Not counted: a quota of these would promise what is not kept.
		"deployments": "", "count/deployments": "", "example.com/gpu": "", "limits.example.com/gpu": "", "requests.kubernetes.io/x": "", "requests.": "",
		"count/": "", "count/namespaces": "", "serviceaccounts": "", ".storageclass.storage.k8s.io/requests.storage": "", "fast.storageclass.storage.k8s.io/pods": "",
		"gpu.deviceclass.resource.k8s.io/devices": "", "no such thing": "",
	} {
		t.Run(string(name), func(t *testing.T) {
			got, err := Owner(name)
			if got != want || (err == nil) != (want != "") {
				t.Errorf("Owner = %q, %v; want %q", got, err, want)
			}
		})
	}
}

func TestCheckPod(t *testing.T) {
	list := func(names ...corev1.ResourceName) corev1.ResourceList {
		out := corev1.ResourceList{}
		for _, name := range names {
			out[name] = quantity(1)
		}
		return out
	}
	bare := func(name string) corev1.Container { return corev1.Container{Name: name} }
	full := corev1.Container{Name: "full", Resources: corev1.ResourceRequirements{Requests: list("cpu", "memory"), Limits: list("cpu", "memory")}}
	for name, tt := range map[string]struct {
		hard corev1.ResourceList
		spec corev1.PodSpec
		want string
	}{
		"not asked":   {list("pods", "requests.ephemeral-storage"), corev1.PodSpec{Containers: []corev1.Container{bare("a")}}, ""},
		"has all":     {list("cpu", "memory", "limits.cpu", "limits.memory"), corev1.PodSpec{Containers: []corev1.Container{full}}, ""},
		"lacks some":  {list("requests.memory", "limits.cpu"), corev1.PodSpec{Containers: []corev1.Container{bare("b"), full, bare("a")}}, "must specify limits.cpu for: a,b; requests.memory for: a,b"},
		"init too":    {list("cpu"), corev1.PodSpec{Containers: []corev1.Container{full}, InitContainers: []corev1.Container{bare("i")}}, "must specify cpu for: i"},
		"of the pod":  {list("cpu"), corev1.PodSpec{Resources: &corev1.ResourceRequirements{Requests: list("cpu")}, Containers: []corev1.Container{bare("a")}}, ""},
		"no quota":    {nil, corev1.PodSpec{Containers: []corev1.Container{bare("a")}}, ""},
		"zero counts": {list("cpu"), corev1.PodSpec{Containers: []corev1.Container{{Name: "z", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": {}}}}}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := ""
			if err := CheckPod(tt.hard, &corev1.Pod{Spec: tt.spec}); err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// A pod that is being resized uses the larger of what it has and what it asks for, also
// if its node has refused an earlier resize.
func TestUsageOfPodResized(t *testing.T) {
	cpu := func(n int64) corev1.ResourceList { return corev1.ResourceList{corev1.ResourceCPU: quantity(n)} }
	pod := func(wanted, has int64, reason string) *corev1.Pod {
		resources := corev1.ResourceRequirements{Requests: cpu(wanted), Limits: cpu(wanted)}
		had := corev1.ResourceRequirements{Requests: cpu(has), Limits: cpu(has)}
		p := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Resources: resources}}}}
		if reason != "" {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: reason}}
		}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "a", AllocatedResources: had.Requests, Resources: &had}}
		return p
	}
	for name, tt := range map[string]struct {
		pod  *corev1.Pod
		want int64
	}{
		"as it was":                     {pod(1, 1, ""), 1},
		"grows":                         {pod(3, 1, ""), 3},
		"shrinks":                       {pod(1, 3, ""), 3},
		"deferred":                      {pod(3, 1, corev1.PodReasonDeferred), 3},
		"infeasible":                    {pod(3, 1, corev1.PodReasonInfeasible), 3},
		"infeasible, and asks for less": {pod(1, 3, corev1.PodReasonInfeasible), 3},
	} {
		t.Run(name, func(t *testing.T) {
			usage, _ := UsageOfPod(tt.pod, time.Now())
			for _, name := range []corev1.ResourceName{corev1.ResourceRequestsCPU, corev1.ResourceLimitsCPU} {
				if q := usage[name]; q.Value() != tt.want {
					t.Errorf("%s = %s, want %d", name, q.String(), tt.want)
				}
			}
		})
	}
}

// A pod that is stuck after its grace period stops counting without any event.
func TestTick(t *testing.T) {
	start := time.Unix(1000, 0)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &metav1.Time{Time: start}, DeletionGracePeriodSeconds: ptr.To(int64(30))}}
	for name, tt := range map[string]struct {
		after time.Duration
		want  string
	}{
		"at the end": {30 * time.Second, "count/pods=1,pods=1"},
		"after it":   {31 * time.Second, "count/pods=1,pods=0"},
	} {
		t.Run(name, func(t *testing.T) {
			now := start
			v := NewView(func() time.Time { return now })
			v.Replace(Namespaces, []Object{{UID: "ns", Name: "ns", Tenant: acme, Revision: 1}}, 1)
			usage, ends := UsageOfPod(pod, now)
			v.Replace(Pods, []Object{{UID: "p", Namespace: "ns", Name: "p", Revision: 2, Usage: usage, Ends: ends, Rest: UsageOfObject(Pods)}}, 2)
			now = start.Add(tt.after)
			v.Tick(Pods)
			if got := List(v.Used(acme, corev1.ResourceList{"pods": quantity(9), "count/pods": quantity(9)})); got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
		})
	}
}

func TestDecide(t *testing.T) {
	until := time.Unix(2000, 0)
	exists := Object{UID: "old", Namespace: "ns", Name: "old", Revision: 5, Usage: storage(4)}
	create := func(uid string, n int64) Claim {
		return Claim{UID: "new", Resource: Claims, Namespace: "ns", Name: uid, Usage: storage(n)}
	}
	grow := func(n int64) Claim {
		return Claim{UID: "old", Resource: Claims, Namespace: "ns", Name: "old", After: 5, Before: storage(4), Usage: storage(n)}
	}
	for name, tt := range map[string]struct {
		settled  string
		reserved []v1alpha1.QuotaReservation
		claim    Claim
		want     string // the error, "reserved" or "free"
		left     int    // reservations afterwards
	}{
		"fits":                        {claim: create("a", 6), want: "reserved", left: 1},
		"does not":                    {claim: create("a", 7), want: "exceeded quota: Tenant acme, requested: requests.storage=7, used: requests.storage=4, limited: requests.storage=10"},
		"grows":                       {claim: grow(10), want: "reserved", left: 1},
		"grows too much":              {claim: grow(11), want: "exceeded quota: Tenant acme, requested: requests.storage=7, used: requests.storage=4, limited: requests.storage=10"},
		"shrinks":                     {claim: grow(1), want: "free"},
		"dry run":                     {claim: Claim{UID: "d", Resource: Claims, Namespace: "ns", Usage: storage(6), DryRun: true}, want: "free"},
		"dry run of too much":         {claim: Claim{UID: "d", Resource: Claims, Namespace: "ns", Usage: storage(7), DryRun: true}, want: "exceeded quota: Tenant acme, requested: requests.storage=7, used: requests.storage=4, limited: requests.storage=10"},
		"what is not bounded":         {claim: Claim{UID: "c", Resource: Claims, Namespace: "ns", Usage: corev1.ResourceList{Claims: quantity(1)}}, want: "free"},
		"another is being made":       {reserved: []v1alpha1.QuotaReservation{{UID: "x", Usage: storage(3)}}, claim: create("a", 4), want: "exceeded quota: Tenant acme, requested: requests.storage=4, used: requests.storage=7, limited: requests.storage=10", left: 1},
		"the same again":              {reserved: []v1alpha1.QuotaReservation{{UID: "new", Usage: storage(6)}}, claim: create("a", 6), want: "reserved", left: 1},
		"seen, so settled":            {reserved: []v1alpha1.QuotaReservation{{UID: "old", Usage: storage(4)}}, claim: create("a", 6), want: "reserved", left: 1},
		"an update that is not seen":  {reserved: []v1alpha1.QuotaReservation{{UID: "old", After: "5", Usage: storage(5)}}, claim: create("a", 6), want: "exceeded quota: Tenant acme, requested: requests.storage=6, used: requests.storage=5, limited: requests.storage=10", left: 1},
		"an update that has lost":     {reserved: []v1alpha1.QuotaReservation{{UID: "old", After: "4", Usage: storage(5)}}, claim: create("a", 6), want: "reserved", left: 1},
		"two updates at a time":       {reserved: []v1alpha1.QuotaReservation{{UID: "old", After: "5", Usage: storage(9)}}, claim: grow(5), want: "reserved", left: 1},
		"behind":                      {settled: "8", claim: create("a", 1), want: ErrBehind.Error()},
		"as new as it must be":        {settled: "7", claim: create("a", 1), want: "reserved", left: 1},
		"a ledger that is unreadable": {settled: "x", claim: create("a", 1), want: ErrBehind.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			v := NewView(time.Now)
			v.Replace(Namespaces, []Object{{UID: "ns", Name: "ns", Tenant: acme, Revision: 1}, {UID: "other", Name: "other", Tenant: "globex", Revision: 2}}, 2)
			v.Replace(Claims, []Object{exists, {UID: "theirs", Namespace: "other", Revision: 6, Usage: storage(100)}}, 7)
			ledger := v1alpha1.QuotaLedgerSpec{Hard: storage(10), Settled: map[string]string{Claims: tt.settled}}
			for _, r := range tt.reserved {
				r.Resource, r.Namespace = Claims, "ns"
				ledger.Reservations = append(ledger.Reservations, r)
			}
			d := v.Decide(acme, &ledger, []Claim{tt.claim}, until, NewEscrow("me"))
			got := "free"
			if d.Errs[0] != nil {
				got = d.Errs[0].Error()
			} else if d.Reserved {
				got = "reserved"
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || len(ledger.Reservations) != tt.left {
				t.Errorf("%d reservations, want %d; - want, + got:\n%s", len(ledger.Reservations), tt.left, diff)
			}
			if tt.want == ErrBehind.Error() && !errors.Is(d.Errs[0], ErrBehind) {
				t.Error("it is not ErrBehind")
			}
		})
	}
}

func TestGrows(t *testing.T) {
	both := corev1.ResourceList{corev1.ResourceServicesNodePorts: quantity(2), corev1.ResourceServicesLoadBalancers: quantity(1)}
	for name, tt := range map[string]struct {
		before, usage corev1.ResourceList
		want          bool
	}{
		"created":               {nil, storage(1), true},
		"the same":              {both, both, false},
		"less":                  {storage(2), storage(1), false},
		"nothing any more":      {storage(2), nil, false},
		"more":                  {storage(1), storage(2), true},
		"less of one, and more": {corev1.ResourceList{corev1.ResourceServicesNodePorts: quantity(3)}, both, true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := (Claim{Before: tt.before, Usage: tt.usage}).Grows(); got != tt.want {
				t.Errorf("grows: %v, want %v", got, tt.want)
			}
		})
	}
}

// What becomes of a reservation of which nothing was seen in time: it ends, and whoever
// decides must have seen what was written.
func TestLapse(t *testing.T) {
	for name, tt := range map[string]struct {
		after             string
		exists, namespace Revision
		want              map[string]string // Settled
	}{
		"never created":               {"", 0, 0, nil},
		"created, not seen":           {"", 7, 3, map[string]string{Claims: "7", Namespaces: "3"}},
		"updated, not seen":           {"5", 7, 9, map[string]string{Claims: "7", Namespaces: "9"}},
		"not updated, maybe not seen": {"5", 5, 3, map[string]string{Claims: "5", Namespaces: "3"}},
		"deleted":                     {"5", 0, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ledger := v1alpha1.QuotaLedgerSpec{Reservations: []v1alpha1.QuotaReservation{{UID: "a", Resource: Claims, After: tt.after}}}
			Lapse(&ledger, "another", 8, 8)
			if len(ledger.Reservations) != 1 || len(ledger.Settled) > 0 {
				t.Fatalf("the end of another is the end of this: %+v", ledger)
			}
			Lapse(&ledger, "a", tt.exists, tt.namespace)
			if diff := cmp.Diff(tt.want, ledger.Settled); len(ledger.Reservations) > 0 || diff != "" {
				t.Errorf("%+v; settled (- want, + got):\n%s", ledger.Reservations, diff)
			}
		})
	}
}

// A reservation whose object came and went is given back, and asks nothing of other Views.
func TestSettleGone(t *testing.T) {
	for name, forget := range map[string]func(*View){
		"by an event": func(v *View) { v.Delete(Claims, "a", 9) },
		"by a list":   func(v *View) { v.Replace(Claims, nil, 9) },
	} {
		t.Run(name, func(t *testing.T) {
			v := NewView(time.Now)
			v.Replace(Namespaces, []Object{{UID: "ns", Name: "ns", Tenant: acme, Revision: 1}}, 1)
			v.Replace(Claims, []Object{{UID: "a", Namespace: "ns", Revision: 5, Usage: storage(1)}}, 5)
			forget(v)
			ledger := v1alpha1.QuotaLedgerSpec{Reservations: []v1alpha1.QuotaReservation{{UID: "a", Resource: Claims, Namespace: "ns"}, {UID: "b", Resource: Claims, Namespace: "ns"}}}
			v.Settle(acme, &ledger)
			if len(ledger.Reservations) != 1 || ledger.Reservations[0].UID != "b" || len(ledger.Settled) > 0 {
				t.Errorf("ledger = %+v", ledger)
			}
		})
	}
}

// An update that takes more of one thing and less of another may not be written: both ends count.
func TestReserveBothEnds(t *testing.T) {
	v := NewView(time.Now)
	v.Replace(Namespaces, []Object{{UID: "ns", Name: "ns", Tenant: acme, Revision: 1}}, 1)
	v.Replace(Services, nil, 1)
	ledger := v1alpha1.QuotaLedgerSpec{Hard: corev1.ResourceList{corev1.ResourceServicesNodePorts: quantity(9), corev1.ResourceServicesLoadBalancers: quantity(9)}}
	v.Decide(acme, &ledger, []Claim{{
		UID: "a", Resource: Services, Namespace: "ns", After: 1,
		Before: corev1.ResourceList{corev1.ResourceServicesNodePorts: quantity(2)}, Usage: corev1.ResourceList{corev1.ResourceServicesLoadBalancers: quantity(1)},
	}}, time.Now(), NewEscrow("me"))
	if got := List(ledger.Reservations[0].Usage); got != "services.loadbalancers=1,services.nodeports=2" {
		t.Errorf("reserved %s", got)
	}
}
