package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/deploy/apiserver"
	"h8s.io/hypernetes/internal/controlplane"
)

const (
	release        = "h8s-system"
	controllerUser = "system:serviceaccount:" + release + ":h8s-controller"
	nodeAgent      = "system:serviceaccount:" + release + ":h8s-node"
	// patience with a busy machine, where a deadline is not what is tested. After a minute
	// (reservationTTL, claimTTL) some things come right by themselves.
	patience = 50 * time.Second
	// startTimeout is that of programs which others start beside.
	startTimeout = 3 * time.Minute
)

// cluster is a real API server with Kubernetes' own controllers, the chart's
// objects, and our controller, which runs as the chart's ServiceAccount and so
// with the rights that the chart gives it. There are no nodes: pods are admitted
// and stay pending.
var cluster struct {
	env    *envtest.Environment
	scheme *runtime.Scheme
	admin  client.Client
	hooks  *envtest.WebhookInstallOptions
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithCancel(context.Background())
	stop, err := start(ctx)
	defer func() {
		cancel()
		if err := errors.Join(sharedKeystone.close(), stop()); err != nil {
			fmt.Fprintln(os.Stderr, "stop the test cluster:", err)
			code = 1
		}
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, "start the test cluster:", err)
		return 1
	}
	return m.Run()
}

func start(ctx context.Context) (stop func() error, err error) {
	var stops []func() error
	stop = func() error {
		var errs []error
		for i := len(stops) - 1; i >= 0; i-- {
			errs = append(errs, stops[i]())
		}
		return errors.Join(errs...)
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return stop, err
	}
	bin := os.Getenv("KUBEBUILDER_ASSETS")
	if bin == "" {
		bin = filepath.Join(root, "bin")
	}
	ctrl.SetLogger(logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	if cluster.scheme, err = NewScheme(); err != nil {
		return stop, err
	}
	hooks := &envtest.WebhookInstallOptions{}
	if err := hooks.PrepWithoutInstalling(); err != nil {
		return stop, err
	}
	stops = append(stops, hooks.Cleanup)
	cluster.env = &envtest.Environment{BinaryAssetsDirectory: bin, ControlPlaneStartTimeout: startTimeout, ControlPlaneStopTimeout: time.Minute}
	apiServer := cluster.env.ControlPlane.GetAPIServer()
	apiServer.Configure().Disable("disable-admission-plugins").Set("service-cluster-ip-range", "10.96.0.0/16")
	if err := configureAuthorization(apiServer, hooks); err != nil {
		return stop, err
	}
	if err := reviewTokens(apiServer, hooks); err != nil {
		return stop, err
	}
	config, err := cluster.env.Start()
	if err != nil {
		return stop, fmt.Errorf("start etcd and kube-apiserver of %s (`make upstream` builds them): %w", bin, err)
	}
	stops = append(stops, cluster.env.Stop)
	config.QPS = -1
	if cluster.admin, err = client.New(config, client.Options{Scheme: cluster.scheme}); err != nil {
		return stop, err
	}
	stopKCM, err := startControllerManager(ctx, bin)
	if err != nil {
		return stop, err
	}
	stops = append(stops, stopKCM)

	cluster.hooks = hooks
	if err := controlplane.InstallChart(ctx, cluster.admin, bin, filepath.Join(root, "deploy/h8s"), "keystone.secretName=h8s-keystone,keystone.sync.enabled=true", hooks); err != nil {
		return stop, err
	}
	stopManager, err := startManager(ctx, config, hooks)
	if err != nil {
		return stop, err
	}
	stops = append(stops, stopManager)
	return stop, awaitPolicies(ctx)
}

// Files in the directory of the webhooks' certificate: what the API server shows them.
const (
	clientCA   = "client-ca.crt"
	clientCert = "client.crt"
	clientKey  = "client.key"
)

// clientName is the common name of that certificate.
const clientName = "front-proxy-client"

// configureAuthorization gives the API server the AuthorizationConfiguration and the
// AdmissionConfiguration that the documentation tells to give it, leading to this process: it starts
// before there is anybody who answers, as on a real cluster. Only it will be answered.
func configureAuthorization(apiServer *envtest.APIServer, hooks *envtest.WebhookInstallOptions) error {
	client, err := newAuthority()
	if err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(hooks.LocalServingCertDir, name) }
	for name, data := range map[string][]byte{clientCA: client.ca, clientCert: client.cert, clientKey: client.key} {
		if err := os.WriteFile(file(name), data, 0o600); err != nil {
			return err
		}
	}
	shows := clientcmdapi.AuthInfo{ClientCertificate: file(clientCert), ClientKey: file(clientKey)}
	if err := controlplane.ConfigureAuthorization(apiServer, hooks.LocalServingCertDir, hooks, shows); err != nil {
		return err
	}
	kubeconfig := clientcmdapi.NewConfig() // by the webhooks' host, and no current-context for others
	kubeconfig.AuthInfos[fmt.Sprintf("%s:%d", hooks.LocalServingHost, hooks.LocalServingPort)] = &shows
	if err := clientcmd.WriteToFile(*kubeconfig, file("admission.kubeconfig")); err != nil {
		return err
	}
	admission := file("admission.yaml")
	if err := os.WriteFile(admission, bytes.ReplaceAll(apiserver.Admission, []byte(apiserver.AdmissionKubeconfig), []byte(file("admission.kubeconfig"))), 0o600); err != nil {
		return err
	}
	apiServer.Configure().Set("admission-control-config-file", admission)
	return nil
}

// startControllerManager runs Kubernetes' own controllers: they aggregate the
// roles admin, edit and view, empty deleted namespaces, and make pods of Deployments.
func startControllerManager(ctx context.Context, bin string) (func() error, error) {
	user, err := cluster.env.AddUser(envtest.User{Name: "system:kube-controller-manager"}, nil)
	if err != nil {
		return nil, err
	}
	kubeconfig, err := user.KubeConfig()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "h8s-kcm-")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		return nil, err
	}
	signing, err := signingCA(dir)
	if err != nil {
		return nil, err
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "kube-controller-manager"),
		"--cluster-signing-cert-file="+signing+".crt", "--cluster-signing-key-file="+signing+".key",
		"--kubeconfig="+path, "--leader-elect=false", "--secure-port=0", "--use-service-account-credentials",
		"--controllers=clusterrole-aggregation-controller,namespace-controller,serviceaccount-controller,deployment-controller,replicaset-controller,endpointslice-controller,resourcequota-controller,garbage-collector-controller,serviceaccount-token-controller,certificatesigningrequest-signing-controller,persistentvolumeclaim-protection-controller",
		"--service-account-private-key-file="+filepath.Join(cluster.env.ControlPlane.GetAPIServer().CertDir, "sa-signer.key"))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := func() error {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return os.RemoveAll(dir)
	}
	err = await(ctx, startTimeout, func() error {
		var view unstructured.Unstructured
		view.SetAPIVersion("rbac.authorization.k8s.io/v1")
		view.SetKind("ClusterRole")
		if err := cluster.admin.Get(ctx, client.ObjectKey{Name: "admin"}, &view); err != nil {
			return err
		}
		if rules, _, _ := unstructured.NestedSlice(view.Object, "rules"); len(rules) == 0 {
			return errors.New("the ClusterRole admin has no rules yet")
		}
		return nil
	})
	if err != nil {
		_ = stop()
		return nil, fmt.Errorf("wait for kube-controller-manager: %w; its log:\n%s", err, log.String())
	}
	return stop, nil
}

func startManager(ctx context.Context, admin *rest.Config, hooks *envtest.WebhookInstallOptions) (func() error, error) {
	config := rest.CopyConfig(admin)
	config.Impersonate = rest.ImpersonationConfig{
		UserName: controllerUser, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + release, "system:authenticated"},
		Extra: map[string][]string{extraPodName: {"h8s-controller"}},
	}
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:        cluster.scheme,
		Cache:         CacheOptions(),
		Metrics:       metricsserver.Options{BindAddress: "0"},
		WebhookServer: NewWebhookServer(hooks.LocalServingHost, hooks.LocalServingPort, hooks.LocalServingCertDir, filepath.Join(hooks.LocalServingCertDir, clientCA), []string{clientName}),
	})
	if err != nil {
		return nil, err
	}
	if err := Setup(mgr, Options{ServiceCIDRs: []string{"10.96.0.0/16"}, PodCIDRs: []string{"10.244.0.0/16"}, InfrastructureCIDRs: []string{"198.18.0.0/24"}, Tokens: &tokens}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	return func() error {
		cancel()
		return <-done
	}, nil
}

// awaitPolicies returns when the API server enforces what was installed: it reads
// policies and webhooks from a cache.
func awaitPolicies(ctx context.Context) error {
	ns := namespaceOf("policies-loaded", "nobody-is-a-tenant", nil)
	ns.Labels[v1alpha1.LabelNetwork] = "none"
	if err := cluster.admin.Create(ctx, ns); err != nil {
		return err
	}
	for refusal, obj := range map[string]client.Object{
		"ValidatingAdmissionPolicy 'h8s-pod'":     pod(ns.Name, "probe", nil),
		"ValidatingAdmissionPolicy 'h8s-service'": &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: "probe"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}, ExternalIPs: []string{"1.2.3.4"}}},
		`"network.h8s.io" denied the request`:     networkOf("probe", "nobody-is-a-tenant", "10.0.0.0/16"),
	} {
		err := await(ctx, startTimeout, func() error {
			err := cluster.admin.Create(ctx, obj.DeepCopyObject().(client.Object), client.DryRunAll)
			if err == nil || !strings.Contains(err.Error(), refusal) {
				return fmt.Errorf("no refusal by %s yet: %w", refusal, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return cluster.admin.Delete(ctx, ns)
}

// await tries until the check passes. Checks are cheap and local; there is no state to watch that covers them all.
func await(ctx context.Context, limit time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gave up after %s: %w", limit, err)
		case <-ticker.C:
		}
	}
}

func eventually(t testing.TB, check func() error) {
	t.Helper()
	if err := await(t.Context(), patience, check); err != nil {
		t.Fatal(err)
	}
}

// as is a client with a certificate of the user, as a person would have.
func as(t *testing.T, user string, groups ...string) client.Client {
	t.Helper()
	u, err := cluster.env.AddUser(envtest.User{Name: user, Groups: groups}, nil)
	if err != nil {
		t.Fatal(err)
	}
	config := u.Config()
	config.QPS = -1
	c, err := client.New(config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// impersonate is a client that acts as a component.
func impersonate(t *testing.T, imp rest.ImpersonationConfig) client.Client {
	t.Helper()
	config := rest.CopyConfig(cluster.env.Config)
	config.Impersonate = imp
	c, err := client.New(config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func tenantOf(name, cidr string, members ...v1alpha1.Member) *v1alpha1.Tenant {
	return &v1alpha1.Tenant{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       v1alpha1.TenantSpec{Members: members, Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{v1alpha1.CIDR(cidr)}}},
	}
}

func member(kind, name string, role v1alpha1.Role) v1alpha1.Member {
	return v1alpha1.Member{Kind: kind, Name: name, Role: role}
}

func networkOf(name, tenant, cidr string) *v1alpha1.Network {
	return &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.NetworkSpec{Tenant: tenant, CIDRs: []v1alpha1.CIDR{v1alpha1.CIDR(cidr)}}}
}

func namespaceOf(name, tenant string, labels map[string]string) *corev1.Namespace {
	all := map[string]string{}
	if tenant != "" {
		all[v1alpha1.LabelTenant] = tenant
	}
	for k, v := range labels {
		all[k] = v
	}
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: all}}
}

func pod(namespace, name string, change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: "localhost/busybox:latest"}}},
	}
	if change != nil {
		change(p)
	}
	return p
}

// newTenant creates the tenant, waits until it is ready, and removes it when the test is over.
func newTenant(t *testing.T, tenant *v1alpha1.Tenant) {
	t.Helper()
	if err := cluster.admin.Create(t.Context(), tenant); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.IgnoreNotFound(cluster.admin.Delete(context.Background(), &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: tenant.Name}})); err != nil {
			t.Errorf("delete the Tenant: %v", err)
		}
	})
	eventually(t, func() error { return tenantReady(t.Context(), tenant.Name) })
}

func tenantReady(ctx context.Context, name string) error {
	var got v1alpha1.Tenant
	if err := cluster.admin.Get(ctx, client.ObjectKey{Name: name}, &got); err != nil {
		return err
	}
	for _, c := range got.Status.Conditions {
		if c.Type == v1alpha1.ConditionReady && c.Status == metav1.ConditionTrue && c.ObservedGeneration == got.Generation {
			return nil
		}
	}
	return fmt.Errorf("the Tenant %s is not ready: %+v", name, got.Status)
}

// newNamespace creates it as the client's user and waits until members may work in it.
func newNamespace(t *testing.T, c client.Client, ns *corev1.Namespace) {
	t.Helper()
	eventually(t, func() error { return c.Create(t.Context(), ns.DeepCopy()) })
	t.Cleanup(func() {
		_ = cluster.admin.Delete(context.Background(), ns.DeepCopy())
	})
	eventually(t, func() error {
		var sa corev1.ServiceAccount
		if err := cluster.admin.Get(t.Context(), client.ObjectKey{Namespace: ns.Name, Name: "default"}, &sa); err != nil {
			return err
		}
		var got corev1.Namespace
		if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: ns.Name}, &got); err != nil {
			return err
		}
		if err := tenantReady(t.Context(), got.Labels[v1alpha1.LabelTenant]); err != nil {
			return err
		}
		// The bindings are written, but the API server's authorizer learns of them by a watch.
		review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
			ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: ns.Name, Verb: "create", Resource: "pods"},
		}}
		if err := c.Create(t.Context(), review); err != nil {
			return err
		}
		if !review.Status.Allowed {
			return fmt.Errorf("the creator of the namespace %s may not create pods in it yet", ns.Name)
		}
		return nil
	})
}

// withToken is a client with a token of the ServiceAccount, as a pod would have.
func withToken(t *testing.T, sa *corev1.ServiceAccount) client.Client {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if err := cluster.admin.SubResource("token").Create(t.Context(), sa, request); err != nil {
		t.Fatal(err)
	}
	config := rest.AnonymousClientConfig(cluster.env.Config)
	config.BearerToken = request.Status.Token
	config.QPS = -1
	c, err := client.New(config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func userNamed(name string) envtest.User { return envtest.User{Name: name} }
