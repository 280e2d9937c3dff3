package quota

import (
	"fmt"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
)

// keepGone is how long a View remembers that an object was deleted: longer than any
// reservation, so that one whose object came and went is given back.
const keepGone = 5 * time.Minute

// Revision is a resourceVersion. Those of one resource can be compared (KEP-5504).
type Revision uint64

// ParseRevision reads a resourceVersion; an empty one is 0, which is before all others.
func ParseRevision(s string) (Revision, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the resourceVersion %q is no number: quotas need an API server of Kubernetes 1.35 or later", s)
	}
	return Revision(n), nil
}

func (r Revision) String() string { return strconv.FormatUint(uint64(r), 10) }

// Object is what a View knows of one object.
type Object struct {
	UID             types.UID
	Namespace, Name string
	Revision        Revision
	// Tenant that a namespace belongs to, empty for none and for other objects.
	Tenant string
	// Usage is read only: objects may share it.
	Usage corev1.ResourceList
	// Ends, if not zero, is when the object uses no more than Rest without any further event.
	Ends time.Time
	Rest corev1.ResourceList
}

// View is what one process knows of the objects that exist, as of some revision of
// each resource. Whoever watches a resource tells it every event, in order.
type View struct {
	mu    sync.Mutex
	sets  map[string]*set
	moved chan struct{}
	// spaces are the namespaces of each tenant, by name.
	spaces map[string]map[string]bool
	now    func() time.Time
}

// set is the objects of one resource in all namespaces, as of the revision.
type set struct {
	revision Revision
	objects  map[types.UID]Object
	byName   map[types.NamespacedName]types.UID
	totals   map[string]corev1.ResourceList // by namespace
	ending   map[types.UID]bool
	gone     map[types.UID]time.Time
}

// NewView knows nothing yet.
func NewView(now func() time.Time) *View {
	return &View{sets: map[string]*set{}, spaces: map[string]map[string]bool{}, now: now}
}

// Moved is closed at the next change. Ask for it first, then look.
func (v *View) Moved() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.moved == nil {
		v.moved = make(chan struct{})
	}
	return v.moved
}

func (v *View) wake() {
	if v.moved != nil {
		close(v.moved)
		v.moved = nil
	}
}

// Replace tells what exists of a resource at the revision, and nothing else does.
func (v *View) Replace(kind string, objects []Object, revision Revision) {
	v.mu.Lock()
	defer v.mu.Unlock()
	defer v.wake()
	old := v.sets[kind]
	s := &set{
		revision: revision, objects: make(map[types.UID]Object, len(objects)), byName: make(map[types.NamespacedName]types.UID, len(objects)),
		totals: map[string]corev1.ResourceList{}, ending: map[types.UID]bool{}, gone: map[types.UID]time.Time{},
	}
	v.sets[kind] = s
	if kind == Namespaces {
		v.spaces = map[string]map[string]bool{}
	}
	for _, o := range objects {
		v.put(kind, s, o)
	}
	if old == nil {
		return
	}
	s.gone = old.gone
	for uid := range old.objects {
		if _, ok := s.objects[uid]; !ok {
			s.gone[uid] = v.now()
		}
	}
}

// Put tells that the object is now so.
func (v *View) Put(kind string, o Object) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.sets[kind]
	if s == nil {
		return // an event before the first list
	}
	v.put(kind, s, o)
	s.revision = o.Revision
	v.wake()
}

// Delete tells that the object is gone since the revision.
func (v *View) Delete(kind string, uid types.UID, revision Revision) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.sets[kind]
	if s == nil {
		return
	}
	v.drop(kind, s, uid)
	s.gone[uid] = v.now()
	s.revision = revision
	v.wake()
}

// Advance tells that nothing has changed up to the revision.
func (v *View) Advance(kind string, revision Revision) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s := v.sets[kind]; s != nil {
		s.revision = revision
		v.wake()
	}
}

// Tick is for what happens by time alone. Call it now and then for each resource.
func (v *View) Tick(kind string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.sets[kind]
	if s == nil {
		return
	}
	now := v.now()
	for uid := range s.ending {
		if o := s.objects[uid]; now.After(o.Ends) {
			o.Usage, o.Ends, o.Rest = o.Rest, time.Time{}, nil
			v.put(kind, s, o)
		}
	}
	for uid, since := range s.gone {
		if now.Sub(since) > keepGone {
			delete(s.gone, uid)
		}
	}
}

func (v *View) put(kind string, s *set, o Object) {
	v.drop(kind, s, o.UID)
	s.objects[o.UID] = o
	s.byName[types.NamespacedName{Namespace: o.Namespace, Name: o.Name}] = o.UID
	if !o.Ends.IsZero() {
		s.ending[o.UID] = true
	}
	if kind == Namespaces {
		if o.Tenant != "" {
			if v.spaces[o.Tenant] == nil {
				v.spaces[o.Tenant] = map[string]bool{}
			}
			v.spaces[o.Tenant][o.Name] = true
		}
		return
	}
	total := s.totals[o.Namespace]
	if total == nil {
		total = corev1.ResourceList{}
		s.totals[o.Namespace] = total
	}
	for name, q := range o.Usage {
		add(total, name, q)
	}
}

func (v *View) drop(kind string, s *set, uid types.UID) {
	o, ok := s.objects[uid]
	if !ok {
		return
	}
	delete(s.objects, uid)
	delete(s.ending, uid)
	if key := (types.NamespacedName{Namespace: o.Namespace, Name: o.Name}); s.byName[key] == uid {
		delete(s.byName, key)
	}
	if kind == Namespaces {
		delete(v.spaces[o.Tenant], o.Name)
		if len(v.spaces[o.Tenant]) == 0 {
			delete(v.spaces, o.Tenant)
		}
		return
	}
	total := s.totals[o.Namespace]
	for name, q := range o.Usage {
		sum := total[name].DeepCopy()
		sum.Sub(q)
		if sum.IsZero() {
			delete(total, name)
		} else {
			total[name] = sum
		}
	}
	if len(total) == 0 {
		delete(s.totals, o.Namespace)
	}
}

// TenantOf is the tenant that a namespace belongs to, empty if there is none or it is not known.
func (v *View) TenantOf(namespace string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	o, _ := v.namespace(namespace)
	return o.Tenant
}

func (v *View) namespace(name string) (Object, bool) {
	s := v.sets[Namespaces]
	if s == nil {
		return Object{}, false
	}
	o, ok := s.objects[s.byName[types.NamespacedName{Name: name}]]
	return o, ok
}

// Has says whether there was an object of that name when the View last heard of it.
func (v *View) Has(kind, namespace, name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := v.sets[kind]
	if s == nil {
		return false
	}
	_, ok := s.byName[types.NamespacedName{Namespace: namespace, Name: name}]
	return ok
}

// Synced says whether anything is known of the resource.
func (v *View) Synced(kind string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.sets[kind] != nil
}

// Used is what the tenant's objects use of the quota, by the quota's names.
func (v *View) Used(tenant string, hard corev1.ResourceList) corev1.ResourceList {
	v.mu.Lock()
	defer v.mu.Unlock()
	used := corev1.ResourceList{}
	totals := map[string]corev1.ResourceList{}
	for name, limit := range hard {
		owner, err := Owner(name)
		if err != nil {
			continue
		}
		if totals[owner] == nil {
			totals[owner] = v.total(tenant, owner)
		}
		q := totals[owner][canonical(name)].DeepCopy()
		q.Format = limit.Format
		used[name] = q
	}
	return used
}

// total is what the tenant's objects of a resource use, by canonical names.
func (v *View) total(tenant, kind string) corev1.ResourceList {
	sum := corev1.ResourceList{}
	s := v.sets[kind]
	if s == nil {
		return sum
	}
	for namespace := range v.spaces[tenant] {
		for name, q := range s.totals[namespace] {
			add(sum, name, q)
		}
	}
	return sum
}

func add(list corev1.ResourceList, name corev1.ResourceName, q resource.Quantity) {
	sum := list[name].DeepCopy()
	sum.Add(q)
	list[name] = sum
}
