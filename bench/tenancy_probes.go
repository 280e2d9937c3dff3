package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

const (
	// getSamples and quotaSamples are the requests of each kind at a checkpoint.
	getSamples, quotaSamples = 200, 100
	// spread is over how many namespaces the latter go, turned tenants how many are
	// out of step when the controller starts again.
	spread, turned = 5, 20
	// Namespaces of nobody, some with a ResourceQuota.
	nobody, rival = "bench-nobody", "bench-resourcequota"
)

// measureMemory asks what the controller's process holds, once nothing happens.
func (c *crowd) measureMemory(ctx context.Context) error {
	heap, err := c.Controller.Heap(ctx)
	if err != nil {
		return err
	}
	rss, err := residentSet(c.Controller.PID())
	if err != nil {
		return err
	}
	c.note("controller's heap", heap/1e6)
	c.note("controller's RSS", rss/1e6)
	return nil
}

// residentSet of a process, in bytes.
func residentSet(pid int) (float64, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			return 1024 * kb, err
		}
	}
	return 0, errors.New("/proc/PID/status has no VmRSS")
}

// getter is somebody who sends small requests.
type getter struct {
	name, user string
	groups     []string
}

// getters are somebody whom neither authorization nor flow control has to look for, a
// member of the first tenant, and one whom they find nowhere.
func getters() []getter {
	return []getter{
		{"an operator", "operator", []string{"system:masters"}},
		{"a member", nthMember(0, 0), nil},
		{"nobody's member", "stranger", nil},
	}
}

// measureGets compares requests that hardly cost anything by who sends them.
func (c *crowd) measureGets(ctx context.Context) error {
	took, err := c.gets(ctx)
	if err != nil {
		return err
	}
	for _, who := range getters() {
		c.note("GET by "+who.name+", p50", median(took[who.name]))
		c.note("GET by "+who.name+", p99", quantile(took[who.name], 0.99))
	}
	return nil
}

// gets are the milliseconds of GET /version by each of the getters, who take turns:
// RBAC and flow control (API Priority and Fairness) look through lists that grow with
// the tenants.
func (c *crowd) gets(ctx context.Context) (map[string][]float64, error) {
	took := map[string][]float64{}
	clients := map[string]*http.Client{}
	for _, who := range getters() {
		config := rest.CopyConfig(c.Config)
		config.Impersonate = rest.ImpersonationConfig{UserName: who.user, Groups: append(who.groups, "system:authenticated")}
		var err error
		if clients[who.name], err = rest.HTTPClientFor(config); err != nil {
			return nil, err
		}
	}
	for range getSamples {
		for _, who := range getters() {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.Config.Host, "/")+"/version", nil)
			if err != nil {
				return nil, err
			}
			began := time.Now()
			resp, err := clients[who.name].Do(req)
			if err != nil {
				return nil, err
			}
			_, err = io.Copy(io.Discard, resp.Body)
			took[who.name] = append(took[who.name], milliseconds(time.Since(began)))
			resp.Body.Close()
			if err != nil || resp.StatusCode != http.StatusOK {
				return nil, errors.Join(err, fmt.Errorf("GET /version by %s is answered with %s", who.name, resp.Status))
			}
		}
	}
	return took, nil
}

// measureWithout takes away, one after the other, what the API server looks through at
// each request, and puts it back.
func measureWithout(ctx context.Context, l *lab, _ options, p *progress) ([]Row, error) {
	c := l.crowd
	if c.count == 0 {
		return nil, errors.New("there are no tenants: run the section tenants as well")
	}
	// An earlier section may have failed.
	if err := c.EnsureController(ctx); err != nil {
		return nil, err
	}
	p.say("small requests without FlowSchemas and ClusterRoleBindings of tenants")
	with, err := c.gets(ctx)
	if err != nil {
		return nil, err
	}
	var rows []Row
	if err := c.whileStopped(ctx, func() error {
		rows, err = c.without(ctx, with)
		return err
	}); err != nil {
		return nil, err
	}
	_, err = c.idle(ctx)
	return rows, err
}

// whileStopped does something without the controller, and starts it again in any case.
func (c *crowd) whileStopped(ctx context.Context, do func() error) error {
	err := c.StopController()
	if err == nil {
		err = do()
	}
	return errors.Join(err, c.EnsureController(ctx))
}

// without compares small requests with those by which it was measured how it is.
func (c *crowd) without(ctx context.Context, with map[string][]float64) ([]Row, error) {
	var rows []Row
	for _, step := range []struct {
		name   string
		kind   client.Object
		list   client.ObjectList
		settle func(context.Context) error
	}{
		{"FlowSchemas", &flowcontrolv1.FlowSchema{}, &flowcontrolv1.FlowSchemaList{}, c.settleFlows},
		{"FlowSchemas and ClusterRoleBindings", &rbacv1.ClusterRoleBinding{}, &rbacv1.ClusterRoleBindingList{}, c.settleRoles},
	} {
		ours := client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy} // not the chart's
		if err := c.List(ctx, step.list, ours); err != nil {
			return nil, err
		}
		n := apimeta.LenList(step.list)
		if err := c.DeleteAllOf(ctx, step.kind, ours); err != nil {
			return nil, fmt.Errorf("delete the %s: %w", step.name, err)
		}
		if err := step.settle(ctx); err != nil {
			return nil, fmt.Errorf("wait until the API server knows that the %s are gone: %w", step.name, err)
		}
		without, err := c.gets(ctx)
		if err != nil {
			return nil, err
		}
		for _, who := range getters() {
			r, err := row(fmt.Sprintf("%d tenants", c.count), "GET by "+who.name+", p50", "ms",
				newSide("as it is", []float64{median(with[who.name])}), newSide("without "+step.name, []float64{median(without[who.name])}), nil)
			if err != nil {
				return nil, err
			}
			r.Note = fmt.Sprintf("%d %T", n, step.kind)
			rows = append(rows, r)
		}
	}
	return rows, nil
}

// lastMember is whose objects are the last by name. They are deleted last, and the API
// server's watches tell it in that order.
func (c *crowd) lastMember() string { return nthMember(c.count-1, len(memberRoles())-1) }

// settleFlows returns when the API server puts a tenant's member into no FlowSchema of
// the tenant's.
func (c *crowd) settleFlows(ctx context.Context) error {
	config := rest.CopyConfig(c.Config)
	config.Impersonate = rest.ImpersonationConfig{UserName: c.lastMember(), Groups: []string{"system:authenticated"}}
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	var everybody flowcontrolv1.FlowSchema
	if err := c.Get(ctx, client.ObjectKey{Name: "global-default"}, &everybody); err != nil {
		return err
	}
	return apiwait.PollUntilContextTimeout(ctx, 50*time.Millisecond, readyLimit, true, func(ctx context.Context) (bool, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.Config.Host, "/")+"/version", nil)
		if err != nil {
			return false, err
		}
		resp, err := httpClient.Do(req)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		_, err = io.Copy(io.Discard, resp.Body)
		return resp.Header.Get(flowcontrolv1.ResponseHeaderMatchedFlowSchemaUID) == string(everybody.UID), err
	})
}

// settleRoles returns when the API server refuses a member what the last of its tenant's
// bindings by name gave it: to look at its request for a certificate.
func (c *crowd) settleRoles(ctx context.Context) error {
	member, err := c.impersonate(c.lastMember())
	if err != nil {
		return err
	}
	return apiwait.PollUntilContextTimeout(ctx, 50*time.Millisecond, readyLimit, true, func(ctx context.Context) (bool, error) {
		err := member.Get(ctx, client.ObjectKey{Name: tenancy.RenewalPrefix + c.lastMember()}, &certificatesv1.CertificateSigningRequest{})
		return apierrors.IsForbidden(err), client.IgnoreNotFound(ignore(err, apierrors.IsForbidden))
	})
}

// makeRivals makes the namespaces of nobody, half of them with a ResourceQuota.
func (c *crowd) makeRivals(ctx context.Context) error {
	for i := range spread {
		for _, name := range []string{nobody, rival} {
			if err := c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(name, "-", i)}}); err != nil {
				return err
			}
		}
		q := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprint(rival, "-", i), Name: "ample"}, Spec: corev1.ResourceQuotaSpec{Hard: ample()}}
		if err := c.Create(ctx, q); err != nil {
			return err
		}
		if err := apiwait.PollUntilContextTimeout(ctx, 20*time.Millisecond, readyLimit, true, func(ctx context.Context) (bool, error) {
			err := c.Get(ctx, client.ObjectKeyFromObject(q), q)
			return len(q.Status.Hard) > 0, err
		}); err != nil {
			return fmt.Errorf("wait for the ResourceQuota %s: %w", q.Name, err)
		}
	}
	return nil
}

// measureQuota compares creations of ConfigMaps where a quota counts them and where
// none does, of ours and of Kubernetes'. All take turns.
func (c *crowd) measureQuota(ctx context.Context) error {
	if c.count == 0 {
		return nil
	}
	// The last ones that were made.
	of := func(quota bool, n int) string {
		var all []int
		for i := c.count - 1; i >= 0 && len(all) < spread; i-- {
			if hasQuota(i) == quota {
				all = append(all, i)
			}
		}
		return nthNamespace(all[n%len(all)], 0)
	}
	kinds := map[string]func(n int) string{
		"nobody":        func(n int) string { return fmt.Sprint(nobody, "-", n%spread) },
		"ResourceQuota": func(n int) string { return fmt.Sprint(rival, "-", n%spread) },
		"tenant":        func(n int) string { return of(false, n) },
		"quota":         func(n int) string { return of(true, n) },
	}
	var variants []variant
	for name, namespace := range kinds {
		variants = append(variants, variant{name, func(ctx context.Context, round int) (map[string]float64, error) {
			m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace(round), Name: fmt.Sprintf("bench-%d-%d", c.count, round)}}
			began := time.Now()
			err := c.Create(ctx, m)
			return map[string]float64{"ms": milliseconds(time.Since(began))}, err
		}})
	}
	took, err := interleave(ctx, quotaSamples, variants)
	if err != nil {
		return err
	}
	p50 := func(kind string) float64 { return median(took[kind]["ms"]) }
	c.note("quota adds, p50", p50("quota")-p50("tenant"))
	c.note("a ResourceQuota adds, p50", p50("ResourceQuota")-p50("nobody"))
	c.note("create in a tenant, p50", p50("tenant"))
	return nil
}

// measureRestart stops the controller, puts some tenants out of step, starts it, and
// waits until it has looked at every object, has nothing left to do, and they are in
// step again.
func (c *crowd) measureRestart(ctx context.Context) error {
	if c.count == 0 { // nothing to wait for
		return nil
	}
	var broken []client.ObjectKey
	var before float64
	if err := c.whileStopped(ctx, func() (err error) {
		for i := range min(turned, c.count) {
			key := client.ObjectKey{Namespace: nthNamespace(i*c.count/min(turned, c.count), 0), Name: "h8s:view"}
			if err := c.Delete(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}}); err != nil {
				return fmt.Errorf("put a tenant out of step: %w", err)
			}
			broken = append(broken, key)
		}
		before, err = c.Requests(ctx)
		return err
	}); err != nil {
		return err
	}
	ready := time.Since(c.Controller.Started)
	converged, err := c.idle(ctx)
	if err != nil {
		return fmt.Errorf("wait until the controller has converged: %w", err)
	}
	after, err := c.Requests(ctx)
	if err != nil {
		return err
	}
	for _, key := range broken {
		if err := c.Get(ctx, key, &rbacv1.RoleBinding{}); err != nil {
			return fmt.Errorf("the controller has nothing left to do, but %s is not in step: %w", key, err)
		}
	}
	c.note("restart to ready", ready.Seconds())
	c.note("restart to converged", converged.Sub(c.Controller.Started).Seconds())
	c.note("requests of a restart", after-before)
	return nil
}

// measureDeletion deletes all tenants at once. Their people stay.
func measureDeletion(ctx context.Context, l *lab, _ options, p *progress) ([]Row, error) {
	c := l.crowd
	if c.count == 0 {
		return nil, errors.New("there are no tenants to delete: run the section tenants as well")
	}
	// An earlier section may have failed.
	if err := c.EnsureController(ctx); err != nil {
		return nil, err
	}
	p.say("deleting %d tenants", c.count)
	before, err := c.Requests(ctx)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	// One more may be there, whose making failed.
	if err := inParallel(ctx, 0, c.count+1, func(ctx context.Context, i int) error {
		return client.IgnoreNotFound(c.Delete(ctx, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: nthTenant(i)}}))
	}); err != nil {
		return nil, fmt.Errorf("delete a Tenant: %w", err)
	}
	left := Series{Name: "tenants"}
	spaces := Series{Name: "their namespaces"}
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		n := c.seen.count()
		var list metav1.PartialObjectMetadataList
		list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NamespaceList"))
		if err := c.List(ctx, &list, client.HasLabels{v1alpha1.LabelTenant}); err != nil {
			return nil, err
		}
		at := time.Since(began).Seconds()
		left.X, left.Y = append(left.X, at), append(left.Y, float64(n))
		spaces.X, spaces.Y = append(spaces.X, at), append(spaces.Y, float64(len(list.Items)))
		if n == 0 {
			break
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("%d tenants are left: %w", n, context.Cause(ctx))
		}
	}
	took := time.Since(began)
	after, err := c.Requests(ctx)
	if err != nil {
		return nil, err
	}
	var roles rbacv1.ClusterRoleList
	if err := c.List(ctx, &roles, client.HasLabels{v1alpha1.LabelTenant}); err != nil {
		return nil, err
	}
	if len(roles.Items) > 0 {
		return nil, fmt.Errorf("%d ClusterRoles of tenants are left", len(roles.Items))
	}
	l.curves = append(l.curves, Curve{File: "deletion", Title: fmt.Sprintf("Deletion of %d tenants at once", c.count), X: "seconds", Y: "left", Series: []Series{left, spaces}})
	group := fmt.Sprintf("%d tenants", c.count)
	rows := []Row{
		absolute(group, "deletion of all", "s", newSide("h8s-controller", []float64{took.Seconds()}), nil),
		absolute(group, "controller's requests per deleted tenant", "", newSide("h8s-controller", []float64{(after - before) / float64(c.count)}), nil),
	}
	c.count = 0
	return rows, nil
}
