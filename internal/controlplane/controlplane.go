// Package controlplane runs a real control plane without nodes, for measurements: etcd,
// kube-apiserver and some of Kubernetes' own controllers of bin/, the objects of the
// chart, and h8s-controller as a process of its own. All of them listen on loopback.
package controlplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/deploy/apiserver"
)

const (
	namespace = "h8s-system"
	account   = "h8s-controller"
	// startTimeout and stopTimeout are for each of the processes.
	startTimeout = time.Minute
	stopTimeout  = 30 * time.Second
	pollInterval = 20 * time.Millisecond
)

// Options say what to run.
type Options struct {
	// Bin has the programs, Chart is the chart's directory.
	Bin, Chart string
	// KeystoneClouds, if set, is the clouds.yaml with the cloud h8s of the user who
	// validates Keystone's tokens. The answers count for ten seconds.
	KeystoneClouds string
}

// Plane is a control plane that runs. Its client may do everything, and is not
// limited in how many requests it sends.
type Plane struct {
	client.WithWatch
	// Config is the client's.
	Config *rest.Config
	// Controller is the process of h8s-controller, nil while there is none.
	Controller *Controller

	opts  Options
	env   *envtest.Environment
	hooks *envtest.WebhookInstallOptions
	dir   string
	stops []func() error
}

// Start starts everything and returns when the controller is ready. The caller
// closes the Plane.
func Start(ctx context.Context, opts Options) (_ *Plane, err error) {
	p := &Plane{opts: opts, hooks: &envtest.WebhookInstallOptions{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	if p.opts.Bin, err = filepath.Abs(opts.Bin); err != nil {
		return nil, err
	}
	if p.dir, err = os.MkdirTemp("", "h8s-controlplane-"); err != nil {
		return nil, err
	}
	p.stops = append(p.stops, func() error { return os.RemoveAll(p.dir) })
	if err := p.hooks.PrepWithoutInstalling(); err != nil {
		return nil, fmt.Errorf("make the certificate of the webhooks: %w", err)
	}
	p.stops = append(p.stops, p.hooks.Cleanup)
	for _, step := range []func(context.Context) error{p.startAPIServer, p.startKubernetesControllers, p.installChart, p.writeKubeconfig, p.EnsureController} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// Close stops everything and removes its files.
func (p *Plane) Close() error {
	err := p.StopController()
	for i := len(p.stops) - 1; i >= 0; i-- {
		err = errors.Join(err, p.stops[i]())
	}
	return err
}

// startAPIServer also starts etcd. Its requests in flight are limited as those of
// the embedded cluster.
func (p *Plane) startAPIServer(ctx context.Context) error {
	p.env = &envtest.Environment{BinaryAssetsDirectory: p.opts.Bin, ControlPlaneStartTimeout: 2 * time.Minute, ControlPlaneStopTimeout: time.Minute}
	server := p.env.ControlPlane.GetAPIServer()
	if err := ConfigureAuthorization(server, p.dir, p.hooks, clientcmdapi.AuthInfo{}); err != nil {
		return err
	}
	server.Configure().
		Disable("disable-admission-plugins").
		Set("service-cluster-ip-range", "10.96.0.0/16").
		Set("max-requests-inflight", strconv.Itoa(50*runtime.NumCPU())).
		Set("max-mutating-requests-inflight", strconv.Itoa(25*runtime.NumCPU()))
	var err error
	if p.Config, err = p.env.Start(); err != nil {
		return fmt.Errorf("start etcd and kube-apiserver of %s (`make upstream` builds them): %w", p.opts.Bin, err)
	}
	p.stops = append(p.stops, p.env.Stop)
	p.Config.QPS = -1
	scheme := k8sruntime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return err
	}
	if p.WithWatch, err = client.NewWithWatch(p.Config, client.Options{Scheme: scheme}); err != nil {
		return fmt.Errorf("connect to the API server: %w", err)
	}
	return ctx.Err()
}

// ConfigureAuthorization gives the API server the AuthorizationConfiguration that a cluster
// has, with its files in dir. Its webhooks are at the address in hooks, where the API
// server shows what it is given; they need not answer yet.
func ConfigureAuthorization(server *envtest.APIServer, dir string, hooks *envtest.WebhookInstallOptions, shows clientcmdapi.AuthInfo) error {
	kubeconfig, authorization := filepath.Join(dir, "webhooks.kubeconfig"), filepath.Join(dir, "authorization.yaml")
	config := clientcmdapi.NewConfig()
	config.Clusters["h8s"] = &clientcmdapi.Cluster{Server: webhookURL(hooks, apiserver.AuthorizePath), CertificateAuthorityData: hooks.LocalServingCAData}
	config.AuthInfos["h8s"] = &shows
	config.Contexts["h8s"] = &clientcmdapi.Context{Cluster: "h8s", AuthInfo: "h8s"}
	config.CurrentContext = "h8s"
	if err := clientcmd.WriteToFile(*config, kubeconfig); err != nil {
		return err
	}
	if err := os.WriteFile(authorization, bytes.ReplaceAll(apiserver.Authorization, []byte(apiserver.WebhooksKubeconfig), []byte(kubeconfig)), 0o600); err != nil {
		return err
	}
	server.Configure().Disable("authorization-mode").Set("authorization-config", authorization)
	return nil
}

func webhookURL(hooks *envtest.WebhookInstallOptions, path string) string {
	return fmt.Sprintf("https://%s:%d%s", hooks.LocalServingHost, hooks.LocalServingPort, path)
}

// startKubernetesControllers runs those that tenants need without nodes: they aggregate
// roles, empty deleted namespaces, make ServiceAccounts, count ResourceQuotas and
// delete what has lost its owner. Their requests are not limited, or deletions would
// measure that limit.
func (p *Plane) startKubernetesControllers(ctx context.Context) error {
	user, err := p.env.AddUser(envtest.User{Name: "system:kube-controller-manager"}, nil)
	if err != nil {
		return err
	}
	kubeconfig, err := user.KubeConfig()
	if err != nil {
		return err
	}
	path := filepath.Join(p.dir, "kube-controller-manager.kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		return err
	}
	process, err := p.run("kube-controller-manager", nil,
		"--kubeconfig="+path, "--leader-elect=false", "--secure-port=0", "--use-service-account-credentials", "--kube-api-qps=2000", "--kube-api-burst=4000",
		"--controllers=clusterrole-aggregation-controller,namespace-controller,serviceaccount-controller,resourcequota-controller,garbage-collector-controller")
	if err != nil {
		return err
	}
	p.stops = append(p.stops, process.stop)
	return p.await(ctx, process, "kube-controller-manager", func(ctx context.Context) error {
		var sa corev1.ServiceAccount
		return p.Get(ctx, client.ObjectKey{Namespace: metav1.NamespaceDefault, Name: "default"}, &sa)
	})
}

func (p *Plane) installChart(ctx context.Context) error {
	return InstallChart(ctx, p, p.opts.Bin, p.opts.Chart, "", p.hooks)
}

// InstallChart applies what Helm, of bin, renders of the chart with the values, as its
// --set has them, but for what runs on nodes. The API server will call the address in
// hooks, and not the chart's Service.
func InstallChart(ctx context.Context, c client.Client, bin, chart, values string, hooks *envtest.WebhookInstallOptions) error {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "helm"), "template", "h8s", chart, "--namespace", namespace, "--kube-version", "1.36.3", "--set", values)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	rendered, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("helm template: %w\n%s", err, stderr.String())
	}
	if err := c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
		return err
	}
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(rendered), 4096)
	for {
		var obj unstructured.Unstructured
		if err := decoder.Decode(&obj.Object); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("parse what helm rendered: %w", err)
		}
		switch obj.GetKind() {
		case "", "Deployment", "DaemonSet": // there are no nodes
			continue
		case "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration":
			if err := redirect(&obj, hooks); err != nil {
				return err
			}
		}
		if err := c.Create(ctx, &obj); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create %s %s: %w", obj.GetKind(), obj.GetName(), err)
		}
	}
}

// redirect makes the API server call the address in hooks instead of the chart's Service.
func redirect(obj *unstructured.Unstructured, hooks *envtest.WebhookInstallOptions) error {
	list, _, err := unstructured.NestedSlice(obj.Object, "webhooks")
	if err != nil {
		return err
	}
	for _, item := range list {
		hook := item.(map[string]any)
		path, _, err := unstructured.NestedString(hook, "clientConfig", "service", "path")
		if err != nil {
			return err
		}
		config := admissionregistrationv1.WebhookClientConfig{URL: ptr.To(webhookURL(hooks, path)), CABundle: hooks.LocalServingCAData}
		if hook["clientConfig"], err = k8sruntime.DefaultUnstructuredConverter.ToUnstructured(&config); err != nil {
			return err
		}
	}
	return unstructured.SetNestedSlice(obj.Object, list, "webhooks")
}

// ConfigOf is a client's configuration with a certificate of the user, as a person would have it.
func (p *Plane) ConfigOf(user string) (*rest.Config, error) {
	u, err := p.env.AddUser(envtest.User{Name: user}, nil)
	if err != nil {
		return nil, fmt.Errorf("make a certificate of %s: %w", user, err)
	}
	config := u.Config()
	config.QPS = -1
	return config, nil
}

// process is a child, and what it has written.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	log   string
}

// run starts a program of bin. What it writes goes to a file of that name.
func (p *Plane) run(name string, env []string, args ...string) (*process, error) {
	log, err := os.OpenFile(filepath.Join(p.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(p.opts.Bin, name), args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is ours to handle
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	child := &process{cmd, make(chan struct{}), log.Name()}
	go func() {
		_ = cmd.Wait()
		close(child.ended)
	}()
	return child, nil
}

func (c *process) hasEnded() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// stop ends the process in order, and returns when it is gone.
func (c *process) stop() error {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.ended:
		return nil
	case <-time.After(stopTimeout):
		_ = c.cmd.Process.Kill()
		<-c.ended
		return fmt.Errorf("%s did not end within %s: killed", c.cmd.Path, stopTimeout)
	}
}

// await returns when the check passes. It gives up when the process ends.
func (p *Plane) await(ctx context.Context, c *process, what string, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var last error
	err := wait.PollUntilContextCancel(ctx, pollInterval, true, func(ctx context.Context) (bool, error) {
		if c.hasEnded() {
			return false, errors.New("it has ended")
		}
		last = check(ctx)
		return last == nil, nil
	})
	if err != nil {
		log, _ := os.ReadFile(c.log)
		return fmt.Errorf("wait for %s: %w: %w; its log ends with\n%s", what, err, last, tail(string(log), 20))
	}
	return nil
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// controllerKubeconfig is the file that writeKubeconfig writes.
func (p *Plane) controllerKubeconfig() string { return filepath.Join(p.dir, account+".kubeconfig") }

// writeKubeconfig writes that of the chart's ServiceAccount: the controller has the
// rights that the chart gives it, and no others. A pod, which no node runs, holds the
// token: else the API server would ask the controller about each of its own requests.
func (p *Plane) writeKubeconfig(ctx context.Context) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: account},
		Spec:       corev1.PodSpec{ServiceAccountName: account, Containers: []corev1.Container{{Name: "controller", Image: account}}},
	}
	if err := p.Create(ctx, pod); err != nil {
		return fmt.Errorf("make the pod %s: %w", account, err)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: ptr.To(int64((24 * time.Hour).Seconds())),
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: account}}
	if err := p.SubResource("token").Create(ctx, sa, request); err != nil {
		return fmt.Errorf("make a token of the ServiceAccount %s: %w", account, err)
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: p.Config.Host, CertificateAuthorityData: p.Config.CAData}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: request.Status.Token}
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	return clientcmd.WriteToFile(*config, p.controllerKubeconfig())
}
