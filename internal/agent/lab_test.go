package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	cnitypes "github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/go-logr/logr"
	mdns "github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/cni"
	"h8s.io/hypernetes/internal/network"
)

// The tests run in namespaces of their own, for network, mounts and processes:
// whatever happens, nothing is left of the node that they play.
const insideVariable = "H8S_AGENT_TEST_INSIDE"

const (
	nodeName   = "n1"
	nodeIP     = "192.0.2.11"
	otherIP    = "192.0.2.12"
	clusterDNS = "10.96.0.10"
	// patience is no longer than the agent's sweepInterval, after which it finds out what no
	// event has told it.
	patience = sweepInterval
	// startTimeout is that of an API server, which others may start beside.
	startTimeout = 3 * time.Minute
)

var (
	apiConfig *rest.Config
	api       client.Client
	programs  string // where h8s-cni and h8s-node are
)

func TestMain(m *testing.M) {
	if os.Getenv(insideVariable) == "" {
		os.Exit(outside())
	}
	code, err := asNode(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "set up tests:", err)
		code = 1
	}
	os.Exit(code)
}

func outside() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig looks at the thread
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "start tests in namespaces of their own (root is needed):", err)
	return 1
}

func asNode(m *testing.M) (int, error) {
	logf.SetLogger(logr.Discard())
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		unix.Mount("", "/run", "", unix.MS_SHARED, ""),
		os.MkdirAll("/run/netns", 0o755),
	); err != nil {
		return 0, fmt.Errorf("mount: %w", err)
	}
	if err := underlay(); err != nil {
		return 0, fmt.Errorf("lay out the node: %w", err)
	}

	var err error
	if programs, err = os.MkdirTemp("", "h8s-agent-test-"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(programs)
	for _, name := range []string{"h8s-cni", "h8s-node"} {
		build := exec.Command("go", "build", "-buildvcs=false", "-o", programs+"/", "h8s.io/hypernetes/cmd/"+name)
		if out, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}

	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		if assets, err = filepath.Abs("../../bin"); err != nil {
			return 0, err
		}
	}
	environment := &envtest.Environment{
		BinaryAssetsDirectory: assets, ControlPlaneStartTimeout: startTimeout,
		CRDDirectoryPaths:     []string{"../../deploy/h8s/templates/crds"},
		ErrorIfCRDPathMissing: true,
	}
	server := environment.ControlPlane.GetAPIServer()
	server.Configure().Set("advertise-address", nodeIP).Set("bind-address", "0.0.0.0").Set("service-cluster-ip-range", "10.96.0.0/16")
	if apiConfig, err = environment.Start(); err != nil {
		return 0, fmt.Errorf("start API server: %w", err)
	}
	defer environment.Stop()

	scheme := apiruntime.NewScheme()
	if err := errors.Join(v1alpha1.AddToScheme(scheme), corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme)); err != nil {
		return 0, err
	}
	if api, err = client.New(apiConfig, client.Options{Scheme: scheme}); err != nil {
		return 0, err
	}
	for name, ip := range map[string]string{nodeName: nodeIP, "n2": otherIP} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		if err := api.Create(context.Background(), node); err != nil {
			return 0, err
		}
		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}
		if err := api.Status().Update(context.Background(), node); err != nil {
			return 0, err
		}
	}
	return m.Run(), nil
}

// underlay gives the node its link. Its other end is here too: the tests need no
// second node, only something that can carry packets.
func underlay() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "wire"}); err != nil {
		return err
	}
	for _, name := range []string{"wire", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "eth0" {
			addr, err := netlink.ParseAddr(nodeIP + "/24")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// lab is one node with its agent and container runtime.
type lab struct {
	t       *testing.T
	dir     string
	cfg     Config
	agent   *Agent
	stopped func()
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dir := t.TempDir()
	l := &lab{t: t, dir: dir, cfg: Config{
		NodeName: nodeName, ClusterDNS: netip.MustParseAddr(clusterDNS), ClusterDomain: "cluster.local",
		PodCIDRs:  []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")},
		CNIPlugin: filepath.Join(programs, "h8s-cni"), CNIBinDir: filepath.Join(dir, "bin"), CNIConfDir: filepath.Join(dir, "net.d"),
		Socket: filepath.Join(dir, "cni.sock"), StateDir: filepath.Join(dir, "state"), NetnsDir: "/run/netns",
		BlockGrace: time.Hour, VXLANPort: 4789,
	}}
	l.must(os.MkdirAll(l.cfg.CNIBinDir, 0o755))
	l.must(os.MkdirAll(l.cfg.CNIConfDir, 0o755))
	l.must(os.WriteFile(filepath.Join(l.cfg.CNIConfDir, "10-default.conflist"),
		[]byte(`{"cniVersion": "1.1.0", "name": "default", "plugins": [{"type": "fake"}]}`), 0o644))
	l.must(os.WriteFile(filepath.Join(l.cfg.CNIBinDir, "fake"), []byte(`#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID" >> `+dir+`/calls
if [ "$CNI_COMMAND" = ADD ]; then echo '{"cniVersion": "1.1.0", "ips": [{"address": "10.244.0.5/24"}]}'; fi
`), 0o755))
	l.start()
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// start runs the agent until stop.
func (l *lab) start() {
	l.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	log := slog.New(slog.NewTextHandler(testWriter{l.t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	a, err := New(ctx, l.cfg, apiConfig, log)
	l.must(err)
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	l.agent = a
	stopped := false
	l.stopped = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	}
	l.eventually("the agent is ready", func() error {
		select {
		case err := <-done:
			done <- nil
			l.t.Fatal("agent ended: ", err)
		default:
		}
		return a.Ready()
	})
}

func (l *lab) stop() { l.stopped() }

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// eventually polls until check succeeds.
func (l *lab) eventually(what string, check func() error) {
	l.t.Helper()
	eventually(l.t, what, check)
}

func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s: %v", patience, what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// create makes an object that is deleted with the test.
func (l *lab) create(obj client.Object) {
	l.t.Helper()
	l.must(api.Create(context.Background(), obj))
	l.t.Cleanup(func() {
		fresh := obj.DeepCopyObject().(client.Object)
		key := client.ObjectKeyFromObject(obj)
		if api.Get(context.Background(), key, fresh) != nil {
			return
		}
		if len(fresh.GetFinalizers()) > 0 {
			fresh.SetFinalizers(nil)
			_ = api.Update(context.Background(), fresh)
		}
		_ = api.Delete(context.Background(), obj, client.GracePeriodSeconds(0))
	})
}

// network makes a Network as the controller leaves it.
func (l *lab) network(name, cidr string, id int32) *v1alpha1.Network {
	l.t.Helper()
	n := &v1alpha1.Network{
		ObjectMeta: metav1.ObjectMeta{Name: name, Finalizers: []string{v1alpha1.Finalizer}},
		Spec:       v1alpha1.NetworkSpec{Tenant: name, CIDRs: []v1alpha1.CIDR{v1alpha1.CIDR(cidr)}},
	}
	l.create(n)
	n.Status.ID = id
	apimeta.SetStatusCondition(&n.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: "Ready"})
	l.must(api.Status().Update(context.Background(), n))
	l.t.Cleanup(func() {
		l.removeNetwork(name)
	})
	return n
}

// removeNetwork plays the controller: the finalizer goes when no Block is left.
func (l *lab) removeNetwork(name string) {
	l.t.Helper()
	n := &v1alpha1.Network{}
	if api.Get(context.Background(), client.ObjectKey{Name: name}, n) != nil {
		return
	}
	l.must(api.Delete(context.Background(), n))
	l.eventually("no Block of "+name+" is left", func() error {
		if left := l.blocks(name); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	l.must(api.Get(context.Background(), client.ObjectKey{Name: name}, n))
	n.Finalizers = nil
	l.must(api.Update(context.Background(), n))
}

func (l *lab) blocks(network string) []string {
	l.t.Helper()
	blocks := &v1alpha1.BlockList{}
	l.must(api.List(context.Background(), blocks))
	var out []string
	for _, b := range blocks.Items {
		if b.Spec.Network == network && b.Spec.Node == nodeName {
			out = append(out, b.Spec.CIDR)
		}
	}
	return out
}

// namespace makes one of a tenant, on the Network with its name; of no tenant if
// that is empty. Namespaces stay: only a controller can remove them.
func (l *lab) namespace(name, tenant string) {
	l.t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if tenant != "" {
		ns.Labels = map[string]string{v1alpha1.LabelTenant: tenant, v1alpha1.LabelNetwork: tenant}
	}
	l.must(api.Create(context.Background(), ns))
}

// pod is a pod of the API server and its network namespace.
type pod struct {
	lab             *lab
	namespace, name string
	uid             string
	container       string
	netns           string
	address         netip.Addr
}

// pod makes a pod as admission leaves it.
func (l *lab) pod(namespace, name, networks string) *pod {
	l.t.Helper()
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	if networks != "" {
		p.Annotations = map[string]string{v1alpha1.AnnotationNetworks: networks}
	}
	l.must(api.Create(context.Background(), p))
	out := &pod{lab: l, namespace: namespace, name: name, uid: string(p.UID), container: namespace + "-" + name, netns: "/run/netns/cni-" + namespace + "-" + name}
	l.t.Cleanup(out.remove)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	l.must(err)
	defer here.Close()
	ns, err := netns.NewNamed(filepath.Base(out.netns))
	l.must(err)
	ns.Close()
	lo, err := netlink.LinkByName("lo") // the runtime's part
	l.must(err)
	l.must(netlink.LinkSetUp(lo))
	l.must(netns.Set(here))
	return out
}

// remove is what kubelet does with a pod, in its order.
func (p *pod) remove() {
	if p.netns == "" {
		return
	}
	if _, err := p.cni("DEL"); err != nil {
		p.lab.t.Errorf("DEL of %s/%s: %v", p.namespace, p.name, err)
	}
	p.vanish()
}

// giveUp removes the network namespace's name without a DEL.
func (p *pod) giveUp() {
	p.lab.must(netns.DeleteNamed(filepath.Base(p.netns)))
	p.netns = ""
}

// vanish removes pod and network namespace without a DEL.
func (p *pod) vanish() {
	p.giveUp()
	p.lab.must(api.Delete(context.Background(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name}}, client.GracePeriodSeconds(0)))
}

// cni calls h8s-cni as the container runtime does.
func (p *pod) cni(verb string) (*types100.Result, error) {
	p.lab.t.Helper()
	list, err := cni.Conflist(p.lab.cfg.Socket, p.lab.cfg.CNIConfDir)
	p.lab.must(err)
	var conf struct {
		Plugins []map[string]any `json:"plugins"`
	}
	p.lab.must(json.Unmarshal(list, &conf))
	config := conf.Plugins[0]
	config["cniVersion"], config["name"], config["cacheDir"] = "1.1.0", "h8s", filepath.Join(p.lab.dir, "cache")
	stdin, err := json.Marshal(config)
	p.lab.must(err)

	cmd := exec.Command(filepath.Join(p.lab.cfg.CNIBinDir, "h8s-cni"))
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_PATH=" + p.lab.cfg.CNIBinDir, "PATH=" + os.Getenv("PATH"),
		"CNI_CONTAINERID=" + p.container, "CNI_NETNS=" + p.netns, "CNI_IFNAME=eth0",
		"CNI_ARGS=K8S_POD_NAMESPACE=" + p.namespace + ";K8S_POD_NAME=" + p.name + ";K8S_POD_UID=" + p.uid,
	}
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stdout
	if err := cmd.Run(); err != nil {
		e := new(cnitypes.Error)
		if json.Unmarshal(stdout.Bytes(), e) != nil {
			return nil, fmt.Errorf("%w: %s", err, stdout.Bytes())
		}
		return nil, e
	}
	if verb != "ADD" {
		return nil, nil
	}
	result := new(types100.Result)
	if err := json.Unmarshal(stdout.Bytes(), result); err != nil {
		return nil, err
	}
	return result, nil
}

// add attaches the pod and remembers its address.
func (p *pod) add() *pod {
	p.lab.t.Helper()
	result, err := p.cni("ADD")
	if err != nil {
		p.lab.t.Fatalf("ADD of %s/%s: %v", p.namespace, p.name, err)
	}
	addr, ok := netip.AddrFromSlice(result.IPs[0].Address.IP.To4())
	if !ok {
		p.lab.t.Fatalf("ADD: %v", result)
	}
	p.address = addr
	return p
}

// inside runs f in the pod's network namespace.
func (p *pod) inside(f func() error) error {
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		return err
	}
	defer here.Close()
	there, err := netns.GetFromPath(p.netns)
	if err != nil {
		return err
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return err
	}
	err = f()
	if netns.Set(here) == nil {
		runtime.UnlockOSThread() // else the thread dies with the goroutine
	}
	return err
}

// serve answers every TCP connection with the pod's name, then echoes.
func (p *pod) serve(port int) {
	p.lab.t.Helper()
	var listener net.Listener
	p.lab.must(p.inside(func() (err error) {
		listener, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}))
	p.lab.t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				fmt.Fprintf(conn, "%s/%s\n", p.namespace, p.name)
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
}

func (p *pod) dial(to string) (net.Conn, error) {
	var conn net.Conn
	err := p.inside(func() (err error) {
		conn, err = net.DialTimeout("tcp4", to, time.Second)
		return err
	})
	return conn, err
}

// answers waits until the server at to says so.
func (l *lab) answers(what string, dial func(string) (net.Conn, error), to, want string) {
	l.t.Helper()
	l.eventually(what, func() error {
		got, err := greeting(dial, to)
		if err == nil && got != want {
			l.t.Fatalf("%s: %q answers, want %q", what, got, want)
		}
		return err
	})
}

// greeting is what the server at to says.
func greeting(dial func(string) (net.Conn, error), to string) (string, error) {
	conn, err := dial(to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	return readLine(conn)
}

func readLine(conn net.Conn) (string, error) {
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	buf := make([]byte, 100)
	n, err := conn.Read(buf)
	return strings.TrimSpace(string(buf[:n])), err
}

func fromNode(to string) (net.Conn, error) { return net.DialTimeout("tcp4", to, time.Second) }

// lookUp asks the cluster DNS address from inside the pod.
func (p *pod) lookUp(name string) ([]string, int, error) {
	var reply *mdns.Msg
	err := p.inside(func() (err error) {
		query := new(mdns.Msg)
		query.SetQuestion(mdns.Fqdn(name), mdns.TypeA)
		reply, err = mdns.Exchange(query, clusterDNS+":53")
		return err
	})
	if err != nil {
		return nil, 0, err
	}
	var out []string
	for _, rr := range reply.Answer {
		if a, ok := rr.(*mdns.A); ok {
			out = append(out, a.A.String())
		}
	}
	return out, reply.Rcode, nil
}

// calls are the verbs that the default network was asked for.
func (l *lab) calls() string {
	data, err := os.ReadFile(filepath.Join(l.dir, "calls"))
	if err != nil && !os.IsNotExist(err) {
		l.t.Fatal(err)
	}
	return string(data)
}

// leftovers is what of the product is in kernel and files, once pods and
// Networks are gone.
func (l *lab) leftovers() []string {
	var out []string
	links, err := netlink.LinkList()
	l.must(err)
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Name, portalLinks) {
			out = append(out, link.Attrs().Name)
		}
	}
	for _, pattern := range []string{"/run/netns/h8s-*", filepath.Join(l.cfg.StateDir, "attachments", "*")} {
		files, err := filepath.Glob(pattern)
		l.must(err)
		out = append(out, files...)
	}
	return out
}

func (l *lab) expectNothingLeft() {
	l.t.Helper()
	l.eventually("nothing is left", func() error {
		if left := l.leftovers(); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
}

// service makes a Service of the portals' and its endpoints.
func (l *lab) service(namespace, name string, endpoints ...netip.Addr) *corev1.Service {
	l.t.Helper()
	labels := map[string]string{"service.kubernetes.io/service-proxy-name": v1alpha1.ServiceProxyName}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
	l.create(s)
	port, portName := int32(8080), "http"
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for _, e := range endpoints {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{e.String()}})
	}
	l.create(slice)
	return s
}

// kubeconfig writes one for a program that is not in this process.
func (l *lab) kubeconfig() string {
	l.t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{Server: apiConfig.Host, CertificateAuthorityData: apiConfig.CAData}
	config.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: apiConfig.CertData, ClientKeyData: apiConfig.KeyData, Token: apiConfig.BearerToken}
	config.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	config.CurrentContext = "x"
	path := filepath.Join(l.dir, "kubeconfig")
	l.must(clientcmd.WriteToFile(*config, path))
	return path
}

// records are the attachments on disk.
func (l *lab) records() []network.Attachment {
	l.t.Helper()
	store, err := network.OpenStore(filepath.Join(l.cfg.StateDir, "attachments"))
	l.must(err)
	records, err := store.Load()
	l.must(err)
	return records
}
