package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/controlplane"
)

// tenancySuite measures what the number of tenants does to the controller and to the
// API server: a control plane without nodes, one tenant made after the other.
const tenancySuite = "tenancy"

const (
	namespacesPerTenant = 3
	// idleFor is how long the controller must do nothing to be done. What it tries again,
	// 100 ms after a conflict and 5 ms, 10 ms and so on after errors, is not among what waits.
	idleFor = time.Second
	// readyLimit is for the slowest tenant's creation; deleting all of them takes longer.
	readyLimit = time.Minute
	// readyTarget is the issue's: the 99th percentile when there are as many tenants as asked for.
	readyTarget = 1000
	// flatTarget is by how much the last tenants may be slower than the first, p50.
	flatTarget = 1.25
	// memoryTarget in KB per tenant, restartTarget in seconds, quotaTarget in ms.
	memoryTarget, restartTarget, quotaTarget = 100, 10, 2
)

// memberRoles are a tenant's five members.
func memberRoles() []v1alpha1.Role {
	return []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleEdit, v1alpha1.RoleView}
}

// crowd is the tenants of a run, and what was measured of them.
type crowd struct {
	*controlplane.Plane
	p     *progress
	seen  *sightings
	count int
	dir   string
	// made are the milliseconds of each tenant's making, by metric, in order.
	made map[string][]float64
	// values are those of each checkpoint, by metric.
	values map[string]*Series
	tokens *tokenIssuer
	// tokensErr is why tokens could not be measured the last time they could not.
	tokensErr error
}

// openCrowd starts a control plane, and a Keystone if tokens are to be measured.
func openCrowd(ctx context.Context, o options, p *progress) (_ *lab, err error) {
	ctrllog.SetLogger(logr.Discard())
	c := &crowd{p: p, made: map[string][]float64{}, values: map[string]*Series{}}
	l := &lab{bin: o.bin, crowd: c}
	if l.version, err = l.programVersion(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	opts := controlplane.Options{Bin: o.bin, Chart: filepath.Join(o.root, "deploy", "h8s")}
	if c.dir, err = os.MkdirTemp("", "h8s-bench-"); err != nil {
		return nil, err
	}
	if len(o.only) == 0 || slices.Contains(o.only, tokensSection) {
		p.say("starting Keystone")
		if c.tokens, opts.KeystoneClouds, err = newTokenIssuer(ctx, c.dir); err != nil {
			return nil, err
		}
	}
	p.say("starting etcd, API server and controller")
	if c.Plane, err = controlplane.Start(ctx, opts); err != nil {
		return nil, err
	}
	c.seen, err = watchTenants(ctx, c.Plane)
	return l, err
}

func (c *crowd) close() error {
	var errs []error
	if c.seen != nil {
		c.seen.stop()
	}
	if c.Plane != nil {
		errs = append(errs, c.Plane.Close())
	}
	if c.tokens != nil {
		errs = append(errs, c.tokens.server.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(c.dir))...)
}

// checkpoints are the numbers of tenants at which all is measured that is not the
// tenants' own making.
func checkpoints(tenants int) []int {
	points := []int{0}
	for _, percent := range []int{10, 25, 50, 75, 100} {
		n := max(2, tenants*percent/100) // one with a quota and one without
		if n > points[len(points)-1] {
			points = append(points, n)
		}
	}
	return points
}

// measureTenants makes all tenants, one after the other, and looks at each checkpoint
// at what else may depend on their number. What it has when it fails is not lost.
func measureTenants(ctx context.Context, l *lab, o options, _ *progress) ([]Row, error) {
	c := l.crowd
	err := c.fill(ctx, o)
	if s := c.values["controller's heap"]; s == nil || len(s.X) < 3 { // nothing that could be compared
		return nil, err
	}
	l.curves = append(l.curves, c.curves()...)
	rows, sumErr := c.rows()
	return rows, errors.Join(err, sumErr)
}

// fill makes the tenants.
func (c *crowd) fill(ctx context.Context, o options) error {
	if err := c.makeRivals(ctx); err != nil {
		return err
	}
	for _, n := range checkpoints(o.tenants) {
		finish := func() error { return nil }
		if n == o.tenants && o.profiles != "" {
			finish = c.profile(ctx, o.profiles)
		}
		if err := errors.Join(c.grow(ctx, n), finish()); err != nil {
			return err
		}
		for _, measure := range []func(context.Context) error{c.measureMemory, c.measureGets, c.measureQuota, c.tryTokens, c.measureRestart} {
			if err := measure(ctx); err != nil {
				return fmt.Errorf("with %d tenants: %w", c.count, err)
			}
		}
	}
	return nil
}

// grow makes tenants until there are n.
func (c *crowd) grow(ctx context.Context, n int) error {
	added := n - c.count
	if added == 0 {
		_, err := c.idle(ctx)
		return err
	}
	c.p.say("making tenants %d to %d", c.count+1, n)
	// People are there before their tenant.
	if err := inParallel(ctx, c.count, n, func(ctx context.Context, i int) error {
		for m := range memberRoles() {
			if err := c.Create(ctx, &v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: nthMember(i, m)}}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return fmt.Errorf("make Users: %w", err)
	}
	if _, err := c.idle(ctx); err != nil {
		return err
	}
	before, err := c.Requests(ctx)
	if err != nil {
		return err
	}
	for c.count < n {
		if err := c.makeTenant(ctx, c.count); err != nil {
			return fmt.Errorf("tenant %d: %w", c.count+1, err)
		}
		c.count++
	}
	if _, err := c.idle(ctx); err != nil {
		return err
	}
	after, err := c.Requests(ctx)
	if err != nil {
		return err
	}
	c.note("controller's requests per tenant", (after-before)/float64(added))
	return nil
}

// profile takes one of the controller's CPU time while the last tenants are made, and
// when that is finished one of its heap (go tool pprof reads them).
func (c *crowd) profile(ctx context.Context, dir string) (finish func() error) {
	const seconds = 20
	done := make(chan error, 1)
	go func() {
		err := os.MkdirAll(dir, 0o755)
		if err == nil {
			err = c.Controller.Profile(ctx, fmt.Sprintf("profile?seconds=%d", seconds), filepath.Join(dir, "cpu.pprof"))
		}
		done <- err
	}()
	return func() error {
		return errors.Join(<-done, c.Controller.Profile(ctx, "heap?gc=1", filepath.Join(dir, "heap.pprof")))
	}
}

// inParallel calls for each number from first on below end, a few at a time.
func inParallel(ctx context.Context, first, end int, call func(ctx context.Context, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i := first; i < end; i++ {
		group.Go(func() error { return call(ctx, i) })
	}
	return group.Wait()
}

func nthTenant(i int) string       { return fmt.Sprintf("tenant-%04d", i) }
func nthMember(i, m int) string    { return fmt.Sprintf("tenant-%04d-member-%d", i, m) }
func nthNamespace(i, k int) string { return fmt.Sprintf("tenant-%04d-%d", i, k) }

// hasQuota says whether the tenant is one of the half with a quota.
func hasQuota(i int) bool { return i%2 == 0 }

// ample is a quota that nobody reaches.
func ample() corev1.ResourceList {
	hard := corev1.ResourceList{}
	for _, name := range []corev1.ResourceName{"pods", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory", "configmaps"} {
		hard[name] = resource.MustParse("1G")
	}
	return hard
}

// makeTenant makes one tenant as an operator, and its namespaces as its owner.
func (c *crowd) makeTenant(ctx context.Context, i int) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	t := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: nthTenant(i)}, Spec: v1alpha1.TenantSpec{Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{"10.0.0.0/16"}}}}
	for m, role := range memberRoles() {
		t.Spec.Members = append(t.Spec.Members, v1alpha1.Member{Kind: "User", Name: nthMember(i, m), Role: role})
	}
	if hasQuota(i) {
		t.Spec.Quota.Hard = ample()
	}
	owner, err := c.impersonate(nthMember(i, 0))
	if err != nil {
		return err
	}
	began := time.Now()
	if err := c.Create(ctx, t); err != nil {
		return err
	}
	at, err := c.seen.await(ctx, t.Name, func(t *v1alpha1.Tenant) bool { return t != nil && boundIn(t, 0) })
	if err != nil {
		return fmt.Errorf("wait until it is Ready: %w", err)
	}
	c.noteMade("Ready", at.Sub(began))
	for k := range namespacesPerTenant {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: nthNamespace(i, k)}}
		first := time.Now()
		// The API server's authorizer may not know the new bindings yet.
		if err := apiwait.PollUntilContextCancel(ctx, 5*time.Millisecond, true, func(ctx context.Context) (bool, error) {
			err := owner.Create(ctx, ns.DeepCopy())
			return err == nil, ignore(err, apierrors.IsForbidden)
		}); err != nil {
			return fmt.Errorf("make the namespace %s: %w", ns.Name, err)
		}
		c.noteMade("namespace", time.Since(first))
	}
	if at, err = c.seen.await(ctx, t.Name, func(t *v1alpha1.Tenant) bool { return t != nil && boundIn(t, namespacesPerTenant) }); err != nil {
		return fmt.Errorf("wait until its members are bound: %w", err)
	}
	c.noteMade("Ready with its namespaces", at.Sub(began))
	return nil
}

func ignore(err error, is func(error) bool) error {
	if is(err) {
		return nil
	}
	return err
}

// impersonate is a client of a person. Its connection is the operator's.
func (c *crowd) impersonate(user string, groups ...string) (client.Client, error) {
	config := rest.CopyConfig(c.Config)
	config.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: append(groups, "system:authenticated")}
	return client.New(config, client.Options{Scheme: c.Scheme(), Mapper: c.RESTMapper()})
}

// isReady says whether the Tenant is, with so many namespaces.
func boundIn(t *v1alpha1.Tenant, namespaces int) bool {
	ready := apimeta.FindStatusCondition(t.Status.Conditions, v1alpha1.ConditionReady)
	return ready != nil && ready.Status == metav1.ConditionTrue && ready.ObservedGeneration == t.Generation && len(t.Status.Namespaces) == namespaces
}

func (c *crowd) noteMade(metric string, took time.Duration) {
	c.made[metric] = append(c.made[metric], milliseconds(took))
}

// note adds a point to a series.
func (c *crowd) note(metric string, value float64) {
	s := c.values[metric]
	if s == nil {
		s = &Series{Name: metric}
		c.values[metric] = s
	}
	s.X, s.Y = append(s.X, float64(c.count)), append(s.Y, value)
}

// idle returns when the controller has reconciled every object, nothing waits, and it has
// been so for a while. It says since when.
func (c *crowd) idle(ctx context.Context) (since time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	least := map[string]int{"tenant": c.count, "network": c.count, "namespace": namespacesPerTenant * c.count, "user": len(memberRoles()) * c.count}
	const busy = -1.0
	last := busy // or how often it had reconciled when it was first seen idle
	err = apiwait.PollUntilContextCancel(ctx, idleFor/10, true, func(ctx context.Context) (bool, error) {
		m, err := c.Controller.Metrics(ctx)
		if err != nil {
			return false, fmt.Errorf("ask the controller what it does: %w", err)
		}
		const reconciles = "controller_runtime_reconcile_total"
		idle := m.Sum("workqueue_depth") == 0 && m.Sum("controller_runtime_active_workers") == 0
		for name, n := range least {
			idle = idle && m.Sum(reconciles, `controller="`+name+`"`) >= float64(n)
		}
		total := m.Sum(reconciles)
		switch {
		case !idle:
			last = busy
		case total != last:
			since, last = time.Now(), total
		}
		return idle && time.Since(since) >= idleFor, nil
	})
	return since, err
}

// sightings tell when a Tenant was seen to be as somebody waits for it to be.
type sightings struct {
	informer cache.Informer
	stop     context.CancelFunc
	mu       sync.Mutex
	waiting  map[string]*sighting
	known    map[string]*v1alpha1.Tenant
}

type sighting struct {
	is   func(*v1alpha1.Tenant) bool
	seen chan time.Time
}

func watchTenants(ctx context.Context, p *controlplane.Plane) (*sightings, error) {
	informers, err := cache.New(p.Config, cache.Options{Scheme: p.Scheme(), Mapper: p.RESTMapper()})
	if err != nil {
		return nil, err
	}
	s := &sightings{waiting: map[string]*sighting{}, known: map[string]*v1alpha1.Tenant{}}
	// It goes on while the run is interrupted and cleans up.
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.stop = stop
	go func() { _ = informers.Start(running) }()
	if s.informer, err = informers.GetInformer(ctx, &v1alpha1.Tenant{}); err != nil {
		stop()
		return nil, fmt.Errorf("watch Tenants: %w", err)
	}
	_, err = s.informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { s.see(obj.(*v1alpha1.Tenant).Name, obj.(*v1alpha1.Tenant)) },
		UpdateFunc: func(_, obj any) { s.see(obj.(*v1alpha1.Tenant).Name, obj.(*v1alpha1.Tenant)) },
		DeleteFunc: func(obj any) {
			if name, err := toolscache.DeletionHandlingMetaNamespaceKeyFunc(obj); err == nil {
				s.see(name, nil)
			}
		},
	})
	return s, err
}

// see notes a Tenant, nil if it is gone.
func (s *sightings) see(name string, t *v1alpha1.Tenant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t == nil {
		delete(s.known, name)
	} else {
		s.known[name] = t
	}
	if w := s.waiting[name]; w != nil && w.is(t) {
		w.seen <- time.Now()
		delete(s.waiting, name)
	}
}

// await returns when the Tenant was seen so, which may be now.
func (s *sightings) await(ctx context.Context, name string, is func(*v1alpha1.Tenant) bool) (time.Time, error) {
	w := &sighting{is, make(chan time.Time, 1)}
	s.mu.Lock()
	if t := s.known[name]; is(t) {
		s.mu.Unlock()
		return time.Now(), nil
	}
	s.waiting[name] = w
	s.mu.Unlock()
	select {
	case at := <-w.seen:
		return at, nil
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		return time.Time{}, fmt.Errorf("%w; it is %+v", context.Cause(ctx), s.known[name])
	}
}

func (s *sightings) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.known)
}

// firstAndLast are the first and the last of the samples, at most 100 and at most half of
// them.
func firstAndLast(samples []float64) (first, last []float64) {
	n := min(100, (len(samples)+1)/2)
	return samples[:n], samples[len(samples)-n:]
}

// lastPlace says at how many tenants the series ends, as rows name it. A run that is cut
// short may have made more.
func lastPlace(s *Series) string { return fmt.Sprintf("%.0f tenants", s.X[len(s.X)-1]) }

// rows sums up what was measured.
func (c *crowd) rows() ([]Row, error) {
	var rows []Row
	end := fmt.Sprintf("%d tenants", c.count)
	for _, metric := range slices.Sorted(maps.Keys(c.made)) {
		first, last := firstAndLast(c.made[metric])
		for _, of := range []struct {
			q  string
			at float64
		}{{"p50", 0.5}, {"p99", 0.99}} {
			q, at := of.q, of.at
			old, now := newSide(fmt.Sprintf("first %d", len(first)), []float64{quantile(first, at)}), newSide(fmt.Sprintf("last %d", len(last)), []float64{quantile(last, at)})
			target := &Target{Value: flatTarget}
			if q == "p99" {
				target = nil // of so few samples it is one sample
				rows = append(rows, absolute(end, metric+" "+q, "ms", now, &Target{Value: readyTarget}))
			}
			r, err := row(end, metric+" "+q+", last against first", "ms", now, old, target)
			if err != nil {
				return nil, err
			}
			rows = append(rows, r)
		}
	}
	value := func(metric, unit string, target float64) {
		var t *Target
		if target > 0 {
			t = &Target{Value: target}
		}
		if s := c.values[metric]; s != nil {
			rows = append(rows, absolute(lastPlace(s), metric, unit, newSide("h8s-controller", []float64{s.Y[len(s.Y)-1]}), t))
		}
	}
	value("controller's requests per tenant", "", 0)
	for _, of := range []string{"heap", "RSS"} {
		// Without the first place, no tenants: what is allocated once is in all the others.
		all := c.values["controller's "+of]
		slope := Series{X: all.X[1:], Y: all.Y[1:]}.slope()
		rows = append(rows, absolute(lastPlace(all), "controller's "+of+" per tenant", "KB", newSide("h8s-controller", []float64{1000 * slope}), &Target{Value: memoryTarget}))
	}
	value("restart to ready", "s", 0)
	value("restart to converged", "s", restartTarget)
	value("requests of a restart", "", 0)
	value("quota adds, p50", "ms", quotaTarget)
	value("a ResourceQuota adds, p50", "ms", 0)
	for _, who := range getters() {
		value("GET by "+who.name+", p50", "ms", 0)
		value("GET by "+who.name+", p99", "ms", 0)
	}
	return rows, nil
}

// curves are what is plotted.
func (c *crowd) curves() []Curve {
	of := func(names ...string) []Series {
		var all []Series
		for _, name := range names {
			if s := c.values[name]; s != nil {
				all = append(all, *s)
			}
		}
		return all
	}
	var curves []Curve
	add := func(curve Curve) {
		curve.X = "tenants"
		if len(curve.Series) > 0 {
			curves = append(curves, curve)
		}
	}
	add(Curve{File: "ready", Title: "From the creation of a Tenant until it is Ready", Y: "ms", Series: running("Ready", c.made["Ready"])})
	add(Curve{File: "complete", Title: "From the creation of a Tenant until its owner's three namespaces are bound", Y: "ms", Series: running("all", c.made["Ready with its namespaces"]), Target: readyTarget})
	add(Curve{File: "memory", Title: "Memory of h8s-controller", Y: "MB", Series: of("controller's heap", "controller's RSS")})
	add(Curve{File: "requests", Title: "Requests of h8s-controller to the API server, per tenant made", Y: "requests", Series: of("controller's requests per tenant")})
	add(Curve{File: "restart", Title: "h8s-controller started again", Y: "seconds", Series: of("restart to ready", "restart to converged"), Target: restartTarget})
	add(Curve{File: "restart-requests", Title: "Requests of h8s-controller when it is started again", Y: "requests", Series: of("requests of a restart")})
	add(Curve{File: "quota", Title: "What a quota adds to the creation of a ConfigMap, p50", Y: "ms", Series: of("quota adds, p50", "a ResourceQuota adds, p50"), Target: quotaTarget})
	var gets []string
	for _, who := range getters() {
		gets = append(gets, "GET by "+who.name+", p50")
	}
	add(Curve{File: "get", Title: "GET /version, p50", Y: "ms", Series: of(gets...)})
	add(Curve{File: "token-review", Title: "Review of a Keystone token by the webhook", Y: "ms", Series: of(tokenMetrics()[0].name, tokenMetrics()[1].name, tokenMetrics()[3].name, tokenMetrics()[4].name)})
	add(Curve{File: "token-rate", Title: "Reviews of Keystone tokens", Y: "reviews per second", Series: of(tokenMetrics()[2].name, tokenMetrics()[5].name)})
	return curves
}

// running are the quantiles of each twentieth of the samples, at its end.
func running(name string, samples []float64) []Series {
	p50, p99 := Series{Name: name + ", p50"}, Series{Name: name + ", p99"}
	size := max(1, len(samples)/20)
	for end := size; end <= len(samples); end += size {
		part := samples[end-size : end]
		p50.X, p50.Y = append(p50.X, float64(end)), append(p50.Y, median(part))
		p99.X, p99.Y = append(p99.X, float64(end)), append(p99.Y, quantile(part, 0.99))
	}
	return []Series{p50, p99}
}
