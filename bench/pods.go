package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	tenantName = "bench"
	// tenantNamespace is the tenant's, defaultNamespace nobody's: its pods are on
	// the default network.
	tenantNamespace  = "bench-tenant"
	defaultNamespace = "bench-default"
	// plainRuntime is a RuntimeClass for pods without a sandbox, so that it is the
	// network that is measured.
	plainRuntime = "bench-runc"
	image        = "localhost/busybox:latest"
	container    = "main"
)

// fixture is the tenant and the namespaces in which the measurements run.
type fixture struct{ lab *lab }

// ensureFixture makes the fixture, once.
func (l *lab) ensureFixture(ctx context.Context, p *progress) error {
	if l.fixture != nil {
		return nil
	}
	f := &fixture{l}
	if !l.own {
		// What an earlier run left when it was killed.
		if err := f.remove(ctx, p); err != nil {
			return err
		}
	}
	if err := l.makeFixture(ctx); err != nil {
		return errors.Join(err, f.remove(context.WithoutCancel(ctx), p))
	}
	l.fixture = f
	return nil
}

func (l *lab) makeFixture(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, o := range []client.Object{
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: plainRuntime}, Handler: "runc"},
		&v1alpha1.Tenant{
			ObjectMeta: metav1.ObjectMeta{Name: tenantName},
			Spec: v1alpha1.TenantSpec{
				Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{"10.200.0.0/16"}},
				Sandbox: v1alpha1.TenantSandbox{
					Default: v1alpha1.SandboxGVisor, Allowed: []string{v1alpha1.SandboxGVisor, plainRuntime},
				},
			},
		},
		namespace(defaultNamespace, nil),
	} {
		if err := l.ensure(ctx, o); err != nil {
			return err
		}
	}
	err := poll(ctx, 100*time.Millisecond, func() error {
		var tenant v1alpha1.Tenant
		if err := l.Get(ctx, client.ObjectKey{Name: tenantName}, &tenant); err != nil {
			return err
		}
		for _, c := range tenant.Status.Conditions {
			if c.Type == v1alpha1.ConditionReady && c.Status == metav1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("tenant %s is not ready: %v", tenantName, tenant.Status.Conditions)
	})
	if err != nil {
		return err
	}
	return l.ensure(ctx, namespace(tenantNamespace, map[string]string{v1alpha1.LabelTenant: tenantName}))
}

// remove takes the fixture away; the cluster may have lost parts of it already.
func (f *fixture) remove(ctx context.Context, p *progress) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	p.say("removing tenant %q", tenantName)
	objects := []client.Object{
		&v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: tenantName}},
		namespace(defaultNamespace, nil),
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: plainRuntime}},
	}
	var errs []error
	for _, o := range objects {
		if err := f.lab.Delete(ctx, o); client.IgnoreNotFound(err) != nil {
			errs = append(errs, fmt.Errorf("delete %T %s: %w", o, o.GetName(), err))
		}
	}
	for _, o := range objects {
		errs = append(errs, f.lab.gone(ctx, o))
	}
	f.lab.fixture = nil
	return errors.Join(errs...)
}

func namespace(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

// ensure creates an object that may exist already. A webhook that does not answer
// yet, as its pod is young or restarts, is waited for.
func (l *lab) ensure(ctx context.Context, o client.Object) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var refused error
	err := poll(ctx, 200*time.Millisecond, func() error {
		err := l.Create(ctx, o)
		switch {
		case apierrors.IsAlreadyExists(err):
			return nil
		case err != nil && !apierrors.IsInternalError(err):
			refused = err
			return nil
		}
		return err
	})
	if err = errors.Join(err, refused); err != nil {
		return fmt.Errorf("create %T %s: %w", o, o.GetName(), err)
	}
	return nil
}

// gone waits until an object is deleted.
func (l *lab) gone(ctx context.Context, o client.Object) error {
	return poll(ctx, 200*time.Millisecond, func() error {
		err := l.Get(ctx, client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, fmt.Errorf("%T %s is still there", o, o.GetName()))
	})
}

// newPod is a pod that says one line and then sleeps. An empty runtimeClass is the
// namespace's default.
func newPod(namespace, name, node, runtimeClass string) *corev1.Pod {
	no, immediately := false, int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{corev1.LabelHostname: node},
			AutomountServiceAccountToken:  &no,
			EnableServiceLinks:            &no,
			TerminationGracePeriodSeconds: &immediately,
			Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{
				Name: container, Image: image, ImagePullPolicy: corev1.PullNever,
				Command: []string{"/bin/sh", "-c", "echo started; exec sleep 86400"},
			}},
		},
	}
	if runtimeClass != "" {
		pod.Spec.RuntimeClassName = &runtimeClass
	}
	return pod
}

// waitForever makes of a pod one that is never started, but exists: kubelet waits
// for a Secret that nobody makes. What asks the API server who a pod is finds it.
func waitForever(pod *corev1.Pod) *corev1.Pod {
	pod.Spec.Volumes = []corev1.Volume{{
		Name:         "never",
		VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "never"}},
	}}
	return pod
}

// createPod creates a pod, as soon as its namespace is ready to have one: its
// ServiceAccount and, for a tenant, labels and policies follow its creation.
func (l *lab) createPod(ctx context.Context, pod *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := poll(ctx, 200*time.Millisecond, func() error { return l.Create(ctx, pod) })
	if err != nil {
		return fmt.Errorf("create pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

// waitPod waits until a pod fulfils a condition, and reads it.
func (l *lab) waitPod(ctx context.Context, pod *corev1.Pod, what string, is func(*corev1.Pod) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	return poll(ctx, 100*time.Millisecond, func() error {
		if err := l.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil {
			return fmt.Errorf("read pod: %w", err)
		}
		if !is(pod) {
			return fmt.Errorf("pod %s/%s is not %s: %s", pod.Namespace, pod.Name, what, pod.Status.Phase)
		}
		return nil
	})
}

func isReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func isScheduled(pod *corev1.Pod) bool { return pod.Spec.NodeName != "" }

// placeOf is where the processes of a pod without a sandbox are.
func (l *lab) placeOf(pod *corev1.Pod) (place, error) {
	addr, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return place{}, fmt.Errorf("address of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	pids, err := processes("/pod"+string(pod.UID), func(proc string) bool {
		_, err := os.Stat(filepath.Join(proc, "ns", "net"))
		return err == nil
	})
	if err != nil {
		return place{}, err
	}
	if len(pids) == 0 {
		return place{}, fmt.Errorf("pod %s/%s has no process", pod.Namespace, pod.Name)
	}
	return place{netns: fmt.Sprintf("/proc/%d/ns/net", pids[0]), addr: addr}, nil
}

func podName(prefix string, i int) string { return fmt.Sprintf("%s-%d", prefix, i) }

// runPlaces starts one pod without a sandbox on each of the named nodes.
func (l *lab) runPlaces(ctx context.Context, namespace, prefix, runtimeClass string, nodes ...node) ([]place, error) {
	var pods []*corev1.Pod
	for i, n := range nodes {
		pod := newPod(namespace, podName(prefix, i), n.name, runtimeClass)
		if err := l.createPod(ctx, pod); err != nil {
			return nil, err
		}
		pods = append(pods, pod)
	}
	var places []place
	for _, pod := range pods {
		if err := l.waitPod(ctx, pod, "ready", isReady); err != nil {
			return nil, err
		}
		p, err := l.placeOf(pod)
		if err != nil {
			return nil, err
		}
		places = append(places, p)
	}
	return places, nil
}

// exposePod makes a Service of a pod and returns its address.
func (l *lab) exposePod(ctx context.Context, namespace, pod string) (netip.AddrPort, error) {
	return l.expose(ctx, namespace, pod, map[string]string{"app": pod})
}

// exposePlace makes a Service of a place that is no pod, and returns its address.
func (l *lab) exposePlace(ctx context.Context, namespace, name string, p place, n node) (netip.AddrPort, error) {
	service, err := l.expose(ctx, namespace, name, nil)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, protocol := int32(benchPort), corev1.ProtocolTCP
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{p.addr.String()}, NodeName: &n.name}},
		Ports:       []discoveryv1.EndpointPort{{Port: &port, Protocol: &protocol}},
	}
	if err := l.Create(ctx, slice); err != nil {
		return netip.AddrPort{}, fmt.Errorf("create EndpointSlice %s/%s: %w", namespace, name, err)
	}
	return service, nil
}

func (l *lab) expose(ctx context.Context, namespace, name string, selector map[string]string) (netip.AddrPort, error) {
	const port = 80
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{
			Selector: selector,
			Ports:    []corev1.ServicePort{{Port: port, TargetPort: intstr.FromInt32(benchPort)}},
		},
	}
	if err := l.Create(ctx, service); err != nil {
		return netip.AddrPort{}, fmt.Errorf("create Service %s/%s: %w", namespace, name, err)
	}
	addr, err := netip.ParseAddr(service.Spec.ClusterIP)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address of Service %s/%s: %w", namespace, name, err)
	}
	return netip.AddrPortFrom(addr, port), nil
}
