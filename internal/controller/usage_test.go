package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

func hard(pairs ...string) corev1.ResourceList {
	list := corev1.ResourceList{}
	for i := 0; i < len(pairs); i += 2 {
		list[corev1.ResourceName(pairs[i])] = resource.MustParse(pairs[i+1])
	}
	return list
}

// newBounded makes a tenant of alice with the quota, and its namespaces.
func newBounded(t *testing.T, name string, quota corev1.ResourceList, namespaces ...string) {
	t.Helper()
	tenant := tenantOf(name, "10.0.0.0/16", member("User", name+"-alice", v1alpha1.RoleOwner))
	tenant.Spec.Quota.Hard = quota
	newTenant(t, tenant)
	alice := as(t, name+"-alice")
	for _, ns := range namespaces {
		newNamespace(t, alice, namespaceOf(ns, "", nil))
	}
}

func podOf(namespace, name, cpu string) *corev1.Pod {
	return pod(namespace, name, func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Requests = hard("cpu", cpu)
	})
}

// used waits until the Tenant's status says so.
func used(t *testing.T, tenant string, want corev1.ResourceList) {
	t.Helper()
	eventually(t, func() error {
		var got v1alpha1.Tenant
		if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: tenant}, &got); err != nil {
			return err
		}
		if got.Status.Quota == nil || !equality.Semantic.DeepEqual(got.Status.Quota.Used, want) {
			return fmt.Errorf("status.quota = %+v, want used %s", got.Status.Quota, quota.List(want))
		}
		return nil
	})
}

// The evaluators agree with Kubernetes' own: a ResourceQuota in the tenant's only
// namespace has the same numbers.
func TestUsageIsWhatResourceQuotaCounts(t *testing.T) {
	ctx := t.Context()
	limits := hard(
		"pods", "100", "count/pods", "100", "cpu", "100", "requests.cpu", "100", "limits.cpu", "100", "memory", "1Ti", "requests.memory", "1Ti", "limits.memory", "1Ti",
		"ephemeral-storage", "1Ti", "requests.ephemeral-storage", "1Ti", "limits.ephemeral-storage", "1Ti", "requests.example.com/gpu", "10", "requests.hugepages-2Mi", "1Gi",
		"services", "100", "count/services", "100", "services.loadbalancers", "10", "services.nodeports", "10",
		"persistentvolumeclaims", "100", "requests.storage", "1Ti", "fast.storageclass.storage.k8s.io/requests.storage", "1Ti", "fast.storageclass.storage.k8s.io/persistentvolumeclaims", "10",
		"configmaps", "100", "count/configmaps", "100", "count/deployments.apps", "10", "count/serviceaccounts", "10", "count/jobs.batch", "10",
	)
	newBounded(t, "evalu", limits, "evalu-a")
	if err := cluster.admin.Create(ctx, &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "evalu-a", Name: "reference"}, Spec: corev1.ResourceQuotaSpec{Hard: limits}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return podRefusedWithout(ctx, "evalu-a") })
	all := func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources = corev1.ResourceRequirements{
			Requests: hard("cpu", "250m", "memory", "64Mi", "ephemeral-storage", "1Gi", "example.com/gpu", "2", "hugepages-2Mi", "4Mi"),
			Limits:   hard("cpu", "500m", "memory", "128Mi", "ephemeral-storage", "2Gi", "example.com/gpu", "2", "hugepages-2Mi", "4Mi"),
		}
	}
	init := corev1.Container{Name: "init", Image: "localhost/busybox:latest", Resources: corev1.ResourceRequirements{Requests: hard("cpu", "3", "memory", "1Gi"), Limits: hard("cpu", "3", "memory", "1Gi")}}
	service := func(name string, change func(*corev1.ServiceSpec)) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "evalu-a", Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "a", Port: 80}, {Name: "b", Port: 81}}}}
		change(&s.Spec)
		return s
	}
	claim := func(name string, class *string, size string) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "evalu-a", Name: name}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, Resources: corev1.VolumeResourceRequirements{Requests: hard("storage", size)},
		}}
	}
	ended := pod("evalu-a", "ended", all)
	for _, obj := range []client.Object{
		pod("evalu-a", "plain", all),
		pod("evalu-a", "init", func(p *corev1.Pod) { all(p); p.Spec.InitContainers = []corev1.Container{init} }),
		pod("evalu-a", "sidecar", func(p *corev1.Pod) {
			all(p)
			p.Spec.InitContainers = []corev1.Container{init}
			p.Spec.InitContainers[0].RestartPolicy = ptr.To(corev1.ContainerRestartPolicyAlways)
		}),
		pod("evalu-a", "whole", func(p *corev1.Pod) {
			p.Spec.Resources = &corev1.ResourceRequirements{Requests: hard("cpu", "2", "memory", "1Gi"), Limits: hard("cpu", "2", "memory", "1Gi")}
		}),
		ended,
		service("inside", func(*corev1.ServiceSpec) {}),
		service("ports", func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeNodePort }),
		service("balanced", func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeLoadBalancer }),
		service("direct", func(s *corev1.ServiceSpec) {
			s.Type, s.AllocateLoadBalancerNodePorts = corev1.ServiceTypeLoadBalancer, ptr.To(false)
		}),
		claim("fast", ptr.To("fast"), "1500M"), claim("none", ptr.To(""), "1Gi"),
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "evalu-a", Name: "one"}},
	} {
		if err := cluster.admin.Create(ctx, obj); err != nil {
			t.Fatalf("%s: %v", obj.GetName(), err)
		}
	}
	ended.Status.Phase = corev1.PodSucceeded
	if err := cluster.admin.Status().Update(ctx, ended); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		var reference corev1.ResourceQuota
		if err := cluster.admin.Get(ctx, client.ObjectKey{Namespace: "evalu-a", Name: "reference"}, &reference); err != nil {
			return err
		}
		var got v1alpha1.Tenant
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "evalu"}, &got); err != nil {
			return err
		}
		if pods := reference.Status.Used[corev1.ResourcePods]; pods.Value() != 4 {
			return fmt.Errorf("the ResourceQuota counts %s pods, and not 4 yet", pods.String())
		}
		if !equality.Semantic.DeepEqual(reference.Status.Used, got.Status.Quota.Used) {
			return fmt.Errorf("- ResourceQuota, + Tenant:\n- %s\n+ %s", quota.List(reference.Status.Used), quota.List(got.Status.Quota.Used))
		}
		return nil
	})
}

func podRefusedWithout(ctx context.Context, namespace string) error {
	err := cluster.admin.Create(ctx, pod(namespace, "bare", nil), client.DryRunAll)
	if err == nil || !strings.Contains(err.Error(), "must specify") {
		return fmt.Errorf("a pod without requests is answered %w", err)
	}
	return nil
}

// Words, dry runs, and what is given back.
func TestUsage(t *testing.T) {
	ctx := t.Context()
	newBounded(t, "usage", hard("requests.cpu", "1", "count/pods", "5", "services.loadbalancers", "1", "configmaps", "4"), "usage-a", "usage-b")
	alice := as(t, "usage-alice")
	ledger := func() *v1alpha1.QuotaLedger {
		var l v1alpha1.QuotaLedger
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "usage"}, &l); err != nil {
			t.Fatal(err)
		}
		return &l
	}
	create := func(obj client.Object, options ...client.CreateOption) error {
		return alice.Create(ctx, obj, options...)
	}

	wantRefusal(t, create(pod("usage-a", "bare", nil)), "failed quota: Tenant usage: must specify requests.cpu for: main")
	if err := create(podOf("usage-a", "a", "600m")); err != nil {
		t.Fatal(err)
	}
	// The other namespace counts as well.
	err := create(podOf("usage-b", "b", "500m"))
	wantRefusal(t, err, "exceeded quota: Tenant usage, requested: requests.cpu=500m, used: requests.cpu=600m, limited: requests.cpu=1")
	if !apierrors.IsForbidden(err) {
		t.Errorf("the reason is %s, want Forbidden", apierrors.ReasonForError(err))
	}
	if err := create(podOf("usage-a", "a", "100m")); !apierrors.IsAlreadyExists(err) {
		t.Errorf("a pod that exists: %v, want AlreadyExists", err)
	}
	before := ledger().ResourceVersion
	if err := create(podOf("usage-b", "dry", "400m"), client.DryRunAll); err != nil {
		t.Error(err)
	}
	wantRefusal(t, create(podOf("usage-b", "dry", "500m"), client.DryRunAll), "exceeded quota")
	if after := ledger().ResourceVersion; after != before {
		t.Error("a dry run has written the ledger")
	}
	if err := create(podOf("usage-b", "b", "400m")); err != nil {
		t.Error(err)
	}
	used(t, "usage", hard("requests.cpu", "1", "count/pods", "2", "services.loadbalancers", "0", "configmaps", "0"))

	// Deleted is given back.
	if err := alice.Delete(ctx, podOf("usage-a", "a", "600m"), client.GracePeriodSeconds(0)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return create(podOf("usage-b", "c", "600m")) })
	// Ended pods use no CPU.
	c := podOf("usage-b", "c", "600m")
	if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(c), c); err != nil {
		t.Fatal(err)
	}
	c.Status.Phase = corev1.PodFailed
	if err := cluster.admin.Status().Update(ctx, c); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return create(podOf("usage-a", "d", "600m")) })
	used(t, "usage", hard("requests.cpu", "1", "count/pods", "3", "services.loadbalancers", "0", "configmaps", "0"))

	t.Run("a change of a Service", func(t *testing.T) {
		for _, name := range []string{"one", "two"} {
			if err := create(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "usage-a", Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}); err != nil {
				t.Fatal(err)
			}
		}
		grow := func(name string, kind corev1.ServiceType) error {
			return alice.Patch(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "usage-a", Name: name}}, client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"spec":{"type":%q}}`, kind)))
		}
		if err := grow("one", corev1.ServiceTypeLoadBalancer); err != nil {
			t.Fatal(err)
		}
		wantRefusal(t, grow("two", corev1.ServiceTypeLoadBalancer), "requested: services.loadbalancers=1, used: services.loadbalancers=1, limited: services.loadbalancers=1")
		if err := grow("one", corev1.ServiceTypeClusterIP); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error { return grow("two", corev1.ServiceTypeLoadBalancer) })
	})

	t.Run("lowered", func(t *testing.T) {
		patch := func(cpu string) {
			t.Helper()
			if err := cluster.admin.Patch(ctx, tenantOf("usage", ""), client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"spec":{"quota":{"hard":{"requests.cpu":%q}}}}`, cpu))); err != nil {
				t.Fatal(err)
			}
		}
		condition := func(status metav1.ConditionStatus, words string) {
			t.Helper()
			eventually(t, func() error {
				var got v1alpha1.Tenant
				if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "usage"}, &got); err != nil {
					return err
				}
				c := apimeta.FindStatusCondition(got.Status.Conditions, v1alpha1.ConditionQuotaReady)
				if c == nil || c.Status != status || c.ObservedGeneration != got.Generation || !strings.Contains(c.Message, words) {
					return fmt.Errorf("QuotaReady = %+v", c)
				}
				return nil
			})
		}
		patch("500m")
		condition(metav1.ConditionFalse, "requests.cpu 1 of 500m")
		wantRefusal(t, create(podOf("usage-a", "e", "1m")), "limited: requests.cpu=500m")
		patch("2")
		condition(metav1.ConditionTrue, "")
		if err := create(podOf("usage-a", "e", "1m")); err != nil {
			t.Error(err)
		}
	})
}

// replica is a webhook server that knows nothing of the one of TestMain.
type replica struct {
	*accounts
	address string
	stop    func()
}

func newReplica(t *testing.T) *replica {
	t.Helper()
	accounts, err := newAccounts(cluster.env.Config, cluster.admin)
	if err != nil {
		t.Fatal(err)
	}
	accounts.timeout = patience
	accounts.patience = patience / 2
	accounts.clock = &shiftedClock{}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	_ = listener.Close()
	server := NewWebhookServer("127.0.0.1", port, cluster.hooks.LocalServingCertDir, "", nil)
	server.Register("/validate-usage", &admission.Webhook{Handler: &usageWebhook{accounts}})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = accounts.feeds.Start(ctx) })
	running.Go(func() { _ = recalls{accounts}.Start(ctx) })
	running.Go(func() {
		if err := server.Start(ctx); err != nil {
			t.Errorf("webhook server: %v", err)
		}
	})
	stop := sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(stop)
	eventually(t, func() error { return server.StartedChecker()(nil) })
	return &replica{accounts: accounts, address: fmt.Sprintf("127.0.0.1:%d", port), stop: stop}
}

// balancer gives its connections to the backends in turn, as a Service does.
type balancer struct {
	listener net.Listener
	mu       sync.Mutex
	backends []string
	next     int
	conns    map[string][]net.Conn
}

func newBalancer(t *testing.T, backends ...string) *balancer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{listener: listener, backends: backends, conns: map[string][]net.Conn{}}
	go b.serve()
	t.Cleanup(func() {
		_ = listener.Close()
		for _, backend := range backends {
			b.kill(backend)
		}
	})
	return b
}

func (b *balancer) serve() {
	for {
		in, err := b.listener.Accept()
		if err != nil {
			return
		}
		b.mu.Lock()
		backend := b.backends[b.next%len(b.backends)]
		b.next++
		out, err := net.Dial("tcp", backend)
		if err != nil {
			_ = in.Close()
		} else {
			b.conns[backend] = append(b.conns[backend], in, out)
			go func() { _, _ = io.Copy(out, in); _ = out.Close() }()
			go func() { _, _ = io.Copy(in, out); _ = in.Close() }()
		}
		b.mu.Unlock()
	}
}

// used says how many connections a backend has got.
func (b *balancer) used(backend string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.conns[backend])
}

// kill breaks what a backend is doing, and lets others do the rest.
func (b *balancer) kill(backend string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.conns[backend] {
		_ = c.Close()
	}
	var rest []string
	for _, other := range b.backends {
		if other != backend {
			rest = append(rest, other)
		}
	}
	if len(rest) > 0 {
		b.backends = rest
	}
}

// secondAPIServer has the same etcd, and clients of its own.
func secondAPIServer(t *testing.T) func(user string) client.Client {
	t.Helper()
	first := cluster.env.ControlPlane.GetAPIServer()
	server := &envtest.APIServer{Path: first.Path, EtcdURL: cluster.env.ControlPlane.Etcd.URL, StartTimeout: startTimeout, StopTimeout: time.Minute}
	server.Configure().Disable("disable-admission-plugins").Set("service-cluster-ip-range", "10.96.0.0/16")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Errorf("stop the second API server: %v", err)
		}
	})
	plane := &envtest.ControlPlane{APIServer: server}
	return func(user string) client.Client {
		u, err := plane.AddUser(envtest.User{Name: user}, nil)
		if err != nil {
			t.Fatal(err)
		}
		config := u.Config()
		config.QPS = -1
		c, err := client.New(config, client.Options{Scheme: cluster.scheme, Mapper: cluster.admin.RESTMapper()})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

// callQuotaAt has the API servers ask this address about quotas, until the test is over.
func callQuotaAt(t *testing.T, address string) {
	t.Helper()
	set := func(ctx context.Context, change func(*admissionregistrationv1.ValidatingWebhook)) error {
		var config admissionregistrationv1.ValidatingWebhookConfiguration
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "h8s"}, &config); err != nil {
			return err
		}
		for i := range config.Webhooks {
			if config.Webhooks[i].Name == "quota.h8s.io" {
				change(&config.Webhooks[i])
			}
		}
		return cluster.admin.Update(ctx, &config)
	}
	var before admissionregistrationv1.ValidatingWebhook
	if err := set(t.Context(), func(w *admissionregistrationv1.ValidatingWebhook) {
		before = *w.DeepCopy()
		w.ClientConfig.URL, w.TimeoutSeconds = ptr.To("https://"+address+"/validate-usage"), ptr.To(int32(30)) // machines of tests are slow
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set(context.Background(), func(w *admissionregistrationv1.ValidatingWebhook) { *w = before }); err != nil {
			t.Errorf("restore the webhook: %v", err)
		}
	})
}

// While no controller answers, nothing grows; but what is deleted can go, finalizers and all.
func TestUsageWithoutController(t *testing.T) {
	ctx := t.Context()
	newBounded(t, "headless", nil, "headless-a")
	key := metav1.ObjectMeta{Namespace: "headless-a", Name: "data"}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: key, Spec: corev1.PersistentVolumeClaimSpec{
		StorageClassName: ptr.To(""), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, Resources: corev1.VolumeResourceRequirements{Requests: hard("storage", "1Gi")},
	}}
	service := &corev1.Service{ObjectMeta: key, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
	for _, obj := range []client.Object{claim, service} {
		obj.SetFinalizers([]string{"example.com/test"})
		if err := cluster.admin.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
	}
	callQuotaAt(t, "127.0.0.1:1")
	wantFailure := func(err error) error {
		if err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
			return fmt.Errorf("answer %w, want the failure of the webhook", err)
		}
		return nil
	}
	eventually(t, func() error {
		return wantFailure(cluster.admin.Create(ctx, &corev1.ConfigMap{ObjectMeta: key}, client.DryRunAll))
	})
	patch := func(obj client.Object, change string) error {
		return cluster.admin.Patch(ctx, obj, client.RawPatch(types.MergePatchType, []byte(change)))
	}
	if err := wantFailure(patch(service, `{"spec":{"type":"NodePort"}}`)); err != nil {
		t.Error(err)
	}
	for _, obj := range []client.Object{claim, service} {
		if err := cluster.admin.Delete(ctx, obj); err != nil {
			t.Error(err)
		}
		if err := patch(obj, `{"metadata":{"finalizers":null}}`); err != nil {
			t.Errorf("take the finalizers off: %v", err)
		}
	}
}

// However many create at once, of whichever API server they ask it, whichever
// webhook server that asks, and whoever dies: never more than the quota, and in the
// end all of it.
func TestUsageOfCrowds(t *testing.T) {
	ctx := t.Context()
	const places, creations = 40, 240
	newBounded(t, "crowd", hard("pods", fmt.Sprint(places), "requests.storage", "30Gi"), "crowd-a", "crowd-b", "crowd-c")
	second := secondAPIServer(t)
	one, two := newReplica(t), newReplica(t)
	b := newBalancer(t, one.address, two.address)
	callQuotaAt(t, b.listener.Addr().String())
	clients := []client.Client{as(t, "crowd-alice"), second("crowd-alice"), as(t, "crowd-alice"), second("crowd-alice")}
	namespaces := []string{"crowd-a", "crowd-b", "crowd-c"}
	eventually(t, func() error { // both API servers know of all this, and each asks another webhook server
		var errs []error
		for _, c := range clients {
			for _, ns := range namespaces {
				errs = append(errs, c.Create(ctx, pod(ns, "warm", nil), client.DryRunAll))
			}
		}
		if b.used(one.address) == 0 || b.used(two.address) == 0 {
			errs = append(errs, errors.New("one of the webhook servers is not asked"))
		}
		return errors.Join(errs...)
	})

	// crowd creates pods at the same time, and counts those that were admitted.
	crowd := func(t *testing.T, prefix string, tolerate func(error) bool, meanwhile func(i int)) (admitted int32) {
		t.Helper()
		var n atomic.Int32
		var wg sync.WaitGroup
		for i := range creations {
			wg.Go(func() {
				meanwhile(i)
				err := clients[i%len(clients)].Create(ctx, pod(namespaces[i%len(namespaces)], fmt.Sprintf("%s-%d", prefix, i), nil))
				switch {
				case err == nil:
					n.Add(1)
				case !strings.Contains(err.Error(), "exceeded quota: Tenant crowd, requested: pods=1") && !tolerate(err):
					t.Errorf("pod %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		return n.Load()
	}
	count := func(t *testing.T) (n int) {
		t.Helper()
		for _, ns := range namespaces {
			var pods corev1.PodList
			if err := cluster.admin.List(ctx, &pods, client.InNamespace(ns)); err != nil {
				t.Fatal(err)
			}
			n += len(pods.Items)
		}
		return n
	}
	empty := func(t *testing.T) {
		t.Helper()
		for _, ns := range namespaces {
			if err := cluster.admin.DeleteAllOf(ctx, &corev1.Pod{}, client.InNamespace(ns), client.GracePeriodSeconds(0)); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range []*replica{one, two} {
			eventually(t, func() error {
				used := r.view.Used("crowd", hard("pods", "1"))
				if pods := used[corev1.ResourcePods]; !pods.IsZero() {
					return fmt.Errorf("%s pods are still seen", pods.String())
				}
				return nil
			})
		}
	}
	never := func(error) bool { return false }

	t.Run("Creations", func(t *testing.T) {
		admitted := crowd(t, "all", never, func(int) {})
		if n := count(t); n != places || int(admitted) != places {
			t.Errorf("%d pods were admitted and %d exist, want %d", admitted, n, places)
		}
		empty(t)
	})
	t.Run("Growth", func(t *testing.T) {
		testGrowth(t, clients, "crowd-a")
	})
	t.Run("Death", func(t *testing.T) {
		dead := func(err error) bool {
			return strings.Contains(err.Error(), "failed calling webhook") || apierrors.IsServiceUnavailable(err)
		}
		var kill sync.Once
		crowd(t, "dead", dead, func(i int) {
			if i > creations/8 {
				kill.Do(func() { b.kill(one.address); one.stop() })
			}
		})
		if n := count(t); n > places {
			t.Fatalf("%d pods exist, want %d at most", n, places)
		}
		// What the dead one had reserved for nothing is given back, after its time.
		putForward(two.accounts, 3*claimTTL)
		eventually(t, func() error {
			var l v1alpha1.QuotaLedger
			if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "crowd"}, &l); err != nil {
				return err
			}
			if err := two.settle(ctx, "crowd", &l); err != nil || len(l.Spec.Reservations)+len(l.Spec.Holds) > 0 {
				return fmt.Errorf("%d reservations and %d holds are left: %w", len(l.Spec.Reservations), len(l.Spec.Holds), err)
			}
			return nil
		})
		crowd(t, "heir", never, func(int) {})
		if n := count(t); n != places {
			t.Errorf("%d pods exist, want %d", n, places)
		}
	})
}

// testGrowth has 20 claims of 1Gi grow to 2Gi at once, of which 30Gi allow 10, each twice.
func testGrowth(t *testing.T, clients []client.Client, namespace string) {
	ctx := t.Context()
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "crowd"}, Provisioner: "example.com/none", AllowVolumeExpansion: ptr.To(true)}
	if err := cluster.admin.Create(ctx, class); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), class) })
	const claims = 20
	for i := range claims {
		c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("c-", i)}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class.Name, VolumeName: fmt.Sprint("crowd-", i), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: hard("storage", "1Gi")},
		}}
		if err := cluster.admin.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
		c.Status.Phase, c.Status.Capacity = corev1.ClaimBound, hard("storage", "1Gi")
		if err := cluster.admin.Status().Update(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for i := range 2 * claims {
		wg.Go(func() {
			c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprint("c-", i%claims)}}
			err := clients[i%len(clients)].Patch(ctx, c, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)))
			if err != nil && !strings.Contains(err.Error(), "exceeded quota: Tenant crowd, requested: requests.storage=1Gi") {
				t.Errorf("claim %d: %v", i%claims, err)
			}
		})
	}
	wg.Wait()
	var list corev1.PersistentVolumeClaimList
	if err := cluster.admin.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		t.Fatal(err)
	}
	var total resource.Quantity
	for _, c := range list.Items {
		total.Add(c.Spec.Resources.Requests[corev1.ResourceStorage])
	}
	if want := resource.MustParse("30Gi"); total.Cmp(want) != 0 {
		t.Errorf("the claims have %s, want %s", total.String(), want.String())
	}
}
