package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// demoCIDR is the address range of both tenants of the demo. That is the point.
const demoCIDR = "10.0.0.0/16"

// demoTenant is one tenant to try things with.
type demoTenant struct{ name, owner, displayName string }

var demoTenants = []demoTenant{
	{"acme", "alice", "Alice of Acme"},
	{"globex", "bob", "Bob of Globex"},
}

func (t demoTenant) namespace() string { return t.name + "-shop" }

func newObjectClient(conf *rest.Config) (client.Client, error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	return client.New(conf, client.Options{Scheme: scheme})
}

// demoLog is where the making of the demo tenants is written down.
func (b *bringUp) demoLog() string { return b.state().path("log", "demo.log") }

// makeDemo makes the tenants as an operator does, and what they run as they
// would: with their own credentials.
func (b *bringUp) makeDemo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	operator, err := b.objectClient()
	if err != nil {
		return err
	}
	out, err := openLog(b.demoLog())
	if err != nil {
		return err
	}
	defer out.Close()
	d := &demo{Config: b.Config, operator: operator, log: slog.New(slog.NewTextHandler(out, nil))}
	for _, t := range demoTenants {
		// The webhooks of a cluster that starts again may not be there yet.
		if err := d.ensure(ctx, operator, t.operatorObjects()); err != nil {
			return err
		}
	}
	for _, t := range demoTenants {
		if err := d.makeShop(ctx, t); err != nil {
			return fmt.Errorf("as %s of tenant %s: %w", t.owner, t.name, err)
		}
	}
	for _, t := range demoTenants {
		if err := d.waitWeb(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// demo is one making of the demo tenants.
type demo struct {
	*Config
	operator client.Client
	log      *slog.Logger
}

// until is poll that writes down what is done, and what it waits for meanwhile.
func (d *demo) until(ctx context.Context, what string, f func() error) error {
	last := ""
	err := poll(ctx, 100*time.Millisecond, func() error {
		err := f()
		if err != nil && err.Error() != last {
			last = err.Error()
			d.log.Info("waiting", "until", what, "error", last)
		}
		return err
	})
	if err != nil {
		d.log.Error("given up", "until", what, "error", err)
		return err
	}
	d.log.Info("done", "what", what)
	return nil
}

// ensure makes objects that are not there yet.
func (d *demo) ensure(ctx context.Context, c client.Client, objects []client.Object) error {
	for _, object := range objects {
		what := fmt.Sprintf("make %T %s", object, object.GetName())
		err := d.until(ctx, what, func() error {
			if err := c.Create(ctx, object); err != nil && !apierrors.IsAlreadyExists(err) {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// makeShop makes a tenant's namespace and what is in it, as the tenant's owner.
func (d *demo) makeShop(ctx context.Context, t demoTenant) error {
	err := d.until(ctx, "tenant "+t.name+" is ready", func() error {
		var tenant v1alpha1.Tenant
		if err := d.operator.Get(ctx, client.ObjectKey{Name: t.name}, &tenant); err != nil {
			return err
		}
		if !meta.IsStatusConditionTrue(tenant.Status.Conditions, v1alpha1.ConditionReady) {
			return fmt.Errorf("tenant is not ready: `kubectl describe tenant %s` says why", t.name)
		}
		return nil
	})
	if err != nil {
		return err
	}
	data, err := d.userKubeconfig(ctx, t.owner, nil)
	if err != nil {
		return err
	}
	conf, err := clientcmd.RESTConfigFromKubeConfig(data)
	if err != nil {
		return err
	}
	owner, err := newObjectClient(conf)
	if err != nil {
		return err
	}
	// The controller gives access to a new namespace a moment after it is made.
	return d.ensure(ctx, owner, t.ownerObjects())
}

// waitWeb waits until a tenant's pods serve.
func (d *demo) waitWeb(ctx context.Context, t demoTenant) error {
	return d.until(ctx, "the web of tenant "+t.name+" is ready", func() error {
		var web appsv1.Deployment
		if err := d.operator.Get(ctx, client.ObjectKey{Namespace: t.namespace(), Name: "web"}, &web); err != nil {
			return err
		}
		if web.Status.ReadyReplicas < *web.Spec.Replicas {
			return fmt.Errorf("%d of %d pods of tenant %s are ready: `kubectl -n %s describe pods` says why",
				web.Status.ReadyReplicas, *web.Spec.Replicas, t.name, t.namespace())
		}
		return nil
	})
}

func (t demoTenant) operatorObjects() []client.Object {
	return []client.Object{
		&v1alpha1.User{
			ObjectMeta: metav1.ObjectMeta{Name: t.owner},
			Spec:       v1alpha1.UserSpec{DisplayName: t.displayName},
		},
		&v1alpha1.Tenant{
			ObjectMeta: metav1.ObjectMeta{Name: t.name},
			Spec: v1alpha1.TenantSpec{
				Members: []v1alpha1.Member{{Kind: "User", Name: t.owner, Role: v1alpha1.RoleOwner}},
				Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{demoCIDR}},
				Sandbox: v1alpha1.TenantSandbox{Default: v1alpha1.SandboxGVisor, Allowed: []string{v1alpha1.SandboxGVisor, v1alpha1.SandboxHyper}},
			},
		},
	}
}

func (t demoTenant) ownerObjects() []client.Object {
	labels := map[string]string{"app": "web"}
	where := metav1.ObjectMeta{Namespace: t.namespace(), Name: "web", Labels: labels}
	replicas, port := int32(2), intstr.FromString("http")
	return []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.namespace()}},
		&appsv1.Deployment{
			ObjectMeta: where,
			Spec: appsv1.DeploymentSpec{
				Replicas: &replicas,
				Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: labels},
					Spec: corev1.PodSpec{Containers: []corev1.Container{{
						Name:            "web",
						Image:           "localhost/agnhost:latest",
						ImagePullPolicy: corev1.PullNever,
						Args:            []string{"netexec", "--http-port=8080"},
						Ports:           []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
						ReadinessProbe: &corev1.Probe{
							ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: port}},
							PeriodSeconds: 2,
						},
					}}},
				},
			},
		},
		&corev1.Service{
			ObjectMeta: where,
			Spec: corev1.ServiceSpec{
				Selector: labels,
				Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: port}},
			},
		},
	}
}

// summary says what was made and what to try.
func (b *bringUp) summary() {
	name := ""
	if b.Name != DefaultName {
		name = " --name " + b.Name
	}
	var s strings.Builder
	fmt.Fprintf(&s, "\nCluster %q is up: Kubernetes at %s", b.Name, b.apiServer())
	if !b.opts.Product {
		fmt.Fprintf(&s, ", without Hypernetes.\n\n  export KUBECONFIG=%s\n  %s/kubectl get nodes\n", b.state().adminKubeconfig(), b.BinDir)
		fmt.Fprint(b.opts.Out, s.String())
		return
	}
	fmt.Fprint(&s, ", with Hypernetes.\n")
	if b.Keystone {
		fmt.Fprintf(&s, "\nKeystone is at %s: its users log in with tokens. Its administrator:\n  export OS_CLIENT_CONFIG_FILE=%s OS_CLOUD=%s\n", b.keystoneURL(), b.keystoneCloudsFile(), b.keystoneAdminCloud())
	}
	if !b.opts.Demo {
		fmt.Fprintf(&s, "\n  export KUBECONFIG=%s\n  %s/kubectl get tenants,networks,users\n", b.state().adminKubeconfig(), b.BinDir)
		fmt.Fprint(b.opts.Out, s.String())
		return
	}
	for _, t := range demoTenants {
		fmt.Fprintf(&s, "  tenant %-7s on %s: namespace %s of %s, Deployment and Service web\n", t.name, demoCIDR, t.namespace(), t.owner)
	}
	first, second := demoTenants[0], demoTenants[1]
	fmt.Fprintf(&s, `
Try:
  %[2]s/kubectl --kubeconfig %[1]s get tenants,networks,pods -A -o wide
  %[2]s/h8s kubeconfig%[3]s --user %[4]s > %[4]s.kubeconfig; %[2]s/kubectl --kubeconfig %[4]s.kubeconfig -n %[5]s exec deploy/web -- wget -qO- http://web/hostname
  %[2]s/kubectl --kubeconfig %[4]s.kubeconfig -n %[6]s get pods   # %[7]s's, and therefore refused
`, b.state().adminKubeconfig(), b.BinDir, name, first.owner, first.namespace(), second.namespace(), second.name)
	fmt.Fprint(b.opts.Out, s.String())
}
