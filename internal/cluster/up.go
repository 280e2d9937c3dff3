package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"h8s.io/hypernetes/internal/hyper/install"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/keystone"
)

// UpOptions say what `h8s up` makes.
type UpOptions struct {
	Name string
	// Nodes of the cluster; 0 means two, or as many as it has.
	Nodes int
	// BinDir holds the upstream programs, images and helm.
	BinDir string
	// Resolvers (address:port) for the nodes' DNS; the machine's own if empty.
	Resolvers []string
	// OIDC is the identity provider of a new cluster, nil for none.
	OIDC *OIDC
	// Product says whether to install Hypernetes; without, it is plain Kubernetes.
	Product bool
	// Keystone says whether a new cluster has one, whose users may log in.
	Keystone bool
	// KeystonePrefix begins the names of its users and groups; identity.DefaultPrefix if
	// empty.
	KeystonePrefix string
	// Demo says whether to make two tenants to try things with.
	Demo bool
	// Out is where progress goes; Terminal says that it is one.
	Out      io.Writer
	Terminal bool
}

// Up makes a cluster, or completes one that was left halfway, and returns when it
// can be used. In a complete cluster it brings images and product up to date with
// the files that they come from; it changes nothing if they are.
func Up(ctx context.Context, o UpOptions) error {
	if err := ValidateName(o.Name); err != nil {
		return err
	}
	if err := o.validateNames(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("`h8s up` makes namespaces, links and cgroups: run it as root")
	}
	unlock, err := lockCluster(o.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if o.Keystone && !o.Product {
		return errors.New("--keystone needs Hypernetes, which --no-product leaves out: it is the controller that validates tokens")
	}
	c, err := loadConfig(o.Name)
	switch {
	case errors.Is(err, errNoCluster):
		if c, err = createConfig(ctx, o); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	was, completed := c.readInstalled()
	if err := c.honours(o, was); err != nil {
		return err
	}
	now, err := c.installable(o.Product)
	if err != nil {
		return err
	}
	running, err := c.running()
	if err != nil {
		return err
	}
	if running && completed {
		c.noteReplaced(o.Out, was.replaced(now))
		now.Programs = was.Programs
	}
	var outdated []string
	if completed {
		outdated = was.outdated(now)
	}
	if running && completed && len(outdated) == 0 && (was.Product || !o.Product) && (was.Demo || !o.Demo) && c.answers(ctx) {
		fmt.Fprintf(o.Out, "cluster %q is already up\n", c.Name)
		return nil
	}
	fmt.Fprintf(o.Out, "cluster %q: %d nodes, Kubernetes at %s\n", c.Name, len(c.Nodes), c.apiServer())
	if len(outdated) > 0 {
		fmt.Fprintf(o.Out, "changed since they were installed: %s\n", strings.Join(outdated, ", "))
	}
	if err := c.joinUp(ctx); err != nil {
		return err
	}
	b := &bringUp{Config: c, opts: o, upgrade: was.Product, images: now.Images}
	if err := runSteps(ctx, o.Out, o.Terminal, b.steps()); err != nil {
		return fmt.Errorf("%w\nlogs: %s; `h8s up` tries again, `h8s down` removes what was made", err, c.state())
	}
	now.Demo = was.Demo || o.Demo && o.Product
	if err := c.writeInstalled(now); err != nil {
		return err
	}
	b.summary()
	return nil
}

// validateNames says what is wrong with how people of identity providers are named, if
// anything: nobody's name may be another's.
func (o UpOptions) validateNames() error {
	prefix := identity.Prefix(identity.DefaultPrefix)
	if o.KeystonePrefix != "" {
		if !o.Keystone {
			return errors.New("--keystone-prefix is of the names that Keystone gives: say --keystone, too, or leave it out")
		}
		var err error
		if prefix, err = identity.ParsePrefix(o.KeystonePrefix); err != nil {
			return fmt.Errorf("--keystone-prefix: %w", err)
		}
	}
	if o.OIDC == nil {
		return nil
	}
	return o.OIDC.Validate(prefix)
}

// honours says which of the options contradict what an existing cluster is.
func (c *Config) honours(o UpOptions, was installed) error {
	binDir, err := resolvePath(o.BinDir)
	if err != nil {
		return err
	}
	refuse := func(is, wish string) error {
		return fmt.Errorf("cluster %q %s and that cannot change: %s, or `h8s down --name %s` first, or choose another --name", c.Name, is, wish, c.Name)
	}
	switch {
	case o.Nodes != 0 && o.Nodes != len(c.Nodes):
		return refuse(fmt.Sprintf("has %d nodes", len(c.Nodes)), fmt.Sprintf("say --nodes %d", len(c.Nodes)))
	case len(o.Resolvers) > 0 && !slices.Equal(o.Resolvers, c.Resolvers):
		is := "uses the machine's resolvers"
		if len(c.Resolvers) > 0 {
			is = "uses the resolvers " + strings.Join(c.Resolvers, ", ")
		}
		return refuse(is, "leave --resolver out")
	case o.OIDC != nil && (c.OIDC == nil || *o.OIDC != *c.OIDC):
		return refuse("has another identity provider, or none,", "leave the --oidc- flags out")
	case binDir != c.BinDir:
		return refuse(fmt.Sprintf("runs the programs in %s, not those in %s,", c.BinDir, binDir), "say --bin-dir "+c.BinDir)
	case o.Keystone && !c.Keystone:
		return refuse("has no Keystone", "leave --keystone out")
	case o.KeystonePrefix != "" && identity.Prefix(o.KeystonePrefix) != c.keystonePrefix():
		return refuse(fmt.Sprintf("has a Keystone whose names begin with %s", c.keystonePrefix()), "leave --keystone-prefix out")
	case c.Keystone && !o.Product:
		return refuse("has a Keystone", "leave --no-product out")
	case was.Product && !o.Product:
		return refuse("has Hypernetes", "leave --no-product out")
	}
	return nil
}

// resolvePath gives every directory one name.
func resolvePath(path string) (string, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(absolute)
}

// noteReplaced says that programs run on which a build has replaced: to start them
// again would end every pod, and that is not `h8s up`'s to decide.
func (c *Config) noteReplaced(out io.Writer, programs []string) {
	if len(programs) > 0 {
		fmt.Fprintf(out, "note: cluster %q still runs older builds of %s: `h8s down --name %s` first to start with the new ones\n",
			c.Name, strings.Join(programs, ", "), c.Name)
	}
}

// joinUp puts this process into a cgroup of the cluster, and with it what it
// starts (helm, ctr): should it be killed, `h8s down` finds those, and the next
// `h8s up` ends them here.
func (c *Config) joinUp(ctx context.Context) error {
	cgroup := clusterCgroup(c.Name) + "/up"
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := killCgroup(ctx, cgroup); err != nil {
		return fmt.Errorf("end what an interrupted `h8s up` left running: %w", err)
	}
	if err := ensureCgroup(cgroup); err != nil {
		return err
	}
	return joinCgroup(cgroup, os.Getpid())
}

// subnetsLock is the name of the lock under which a cluster chooses its subnet: the
// name of no cluster.
const subnetsLock = ".subnets"

// lockCluster keeps two commands from changing one cluster at a time.
func lockCluster(name string) (unlock func(), err error) {
	if err := os.MkdirAll(StateRoot, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", StateRoot, err)
	}
	path := filepath.Join(StateRoot, name+".lock")
	f, held, err := lockFile(path)
	if err != nil {
		return nil, fmt.Errorf("lock cluster %q: %w", name, err)
	}
	if held {
		return nil, fmt.Errorf("another `h8s up` or `h8s down` is at work on cluster %q: wait for it to end", name)
	}
	return func() {
		_ = os.Remove(path)
		f.Close()
	}, nil
}

// createConfig decides on the addresses of a new cluster. Under a lock of all
// clusters, so that two of them never choose the same.
func createConfig(ctx context.Context, o UpOptions) (*Config, error) {
	binDir, err := resolvePath(o.BinDir)
	if err != nil {
		return nil, err
	}
	if err := checkPrograms(binDir); err != nil {
		return nil, err
	}
	if o.Keystone {
		if err := keystone.Installed(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var unlock func()
	err = poll(ctx, 20*time.Millisecond, func() error {
		unlock, err = lockCluster(subnetsLock)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("wait for another `h8s up` to choose its addresses: %w", err)
	}
	defer unlock()
	used, err := usedSubnets()
	if err != nil {
		return nil, fmt.Errorf("find a free subnet: %w", err)
	}
	subnet, err := chooseSubnet(used)
	if err != nil {
		return nil, err
	}
	nodes := o.Nodes
	if nodes == 0 {
		nodes = DefaultNodes
	}
	c, err := newConfig(o.Name, nodes, subnet, binDir, o.Resolvers)
	if err != nil {
		return nil, err
	}
	c.OIDC = o.OIDC
	c.GuardedWebhooks = true
	c.Keystone, c.KeystonePrefix = o.Keystone, identity.Prefix(o.KeystonePrefix)
	if err := c.save(); err != nil {
		return nil, fmt.Errorf("save the cluster's configuration: %w", err)
	}
	return c, nil
}

// checkPrograms says which of the programs that a cluster needs are missing.
func checkPrograms(binDir string) error {
	var missing []string
	for _, p := range append([]string{
		"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy",
		"containerd", "containerd-shim-runc-v2", "ctr", "runc",
		"cni/ptp", "cni/host-local", "cni/loopback", "cni/portmap",
	}, install.Files()...) {
		if _, err := os.Stat(filepath.Join(binDir, p)); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("programs are missing in %s: %v: build them with `make build`, or pass --bin-dir", binDir, missing)
	}
	return nil
}

// answers says whether the API server answers and every node is Ready, or soon is.
func (c *Config) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	client, err := c.client()
	return err == nil && poll(ctx, 100*time.Millisecond, func() error { return c.nodesReady(ctx, client) }) == nil
}

// restConfig is the administrator's way into the cluster.
func (c *Config) restConfig() (*rest.Config, error) {
	conf, err := clientcmd.BuildConfigFromFlags("", c.state().adminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read the administrator's kubeconfig: %w", err)
	}
	conf.Timeout = 30 * time.Second
	return conf, nil
}

func (c *Config) client() (kubernetes.Interface, error) {
	conf, err := c.restConfig()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(conf)
}

// bringUp is one run of `h8s up`.
type bringUp struct {
	*Config
	opts UpOptions
	// upgrade says that the product is there already.
	upgrade bool
	// images are the IDs of the images to load, by name.
	images map[string]string
	// started is when this run started the supervisor; zero if it did not.
	started time.Time
}

func (b *bringUp) steps() []step {
	logs := func(program string) []string { return b.nodeLogs(b.Nodes[0].Name, program) }
	steps := []step{
		{"start network", []string{b.state().supervisorLog()}, b.startNetwork},
		{"start control plane", logs("kube-apiserver"), b.startControlPlane},
		{"start nodes", logs("kubelet"), b.startNodes},
		{"load images", logs("containerd"), b.loadImages},
		{"start controllers", logs("kube-controller-manager"), b.startControllers},
	}
	if b.Keystone {
		log := []string{b.state().path("keystone", "keystone.log")}
		steps = append([]step{{"prepare keystone", log, b.prepareKeystone}}, steps...)
		steps = append(steps, step{"start keystone", log, b.startKeystone})
	}
	if b.opts.Product {
		install := "install hypernetes"
		if b.upgrade {
			install = "upgrade hypernetes"
		}
		steps = append(steps, step{install, []string{b.state().path("log", "helm.log")}, b.installChart})
		if b.opts.Demo {
			steps = append(steps, step{"make demo tenants", []string{b.demoLog()}, b.makeDemo})
		}
	}
	return steps
}

// nodeLogs are the logs to look into when something is wrong with a node's program.
// A node that does not boot has the log of its init and no other.
func (b *bringUp) nodeLogs(node, program string) []string {
	return []string{b.state().programLog(node, program), b.state().programLog(node, "init"), b.state().supervisorLog()}
}

// startNetwork makes keys and certificates and starts the supervisor, which does
// the rest.
func (b *bringUp) startNetwork(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	p, err := ensurePKI(b.state().pki(), b.Config, time.Now())
	if err != nil {
		return err
	}
	if err := os.Chmod(b.state().pki(), 0o700); err != nil {
		return err
	}
	admin, err := p.kubeconfigFor(b.Config, "admin")
	if err != nil {
		return err
	}
	if err := writeFile(b.state().adminKubeconfig(), admin, 0o600); err != nil {
		return err
	}
	running, err := b.running()
	if err != nil {
		return err
	}
	if running {
		return nil
	}
	if err := checkDNSPort(ctx, b.gateway()); err != nil {
		return fmt.Errorf("%w: %s", err, dnsPortFix)
	}
	b.started = time.Now()
	return startSupervisor(ctx, b.Config)
}

// await polls until f succeeds, as long as there is hope: while the supervisor
// runs, and for three minutes at most.
func (b *bringUp) await(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	return poll(ctx, 100*time.Millisecond, func() error {
		running, err := b.running()
		if err == nil && !running {
			cancel()
			return fmt.Errorf("the supervisor has ended: %s says why", b.state().supervisorLog())
		}
		return errors.Join(err, f(ctx))
	})
}

func (b *bringUp) startControlPlane(ctx context.Context) error {
	client, err := b.client()
	if err != nil {
		return err
	}
	err = b.await(ctx, func(ctx context.Context) error {
		_, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("the API server at %s does not get ready: %w", b.apiServer(), err)
	}
	return b.allowKubeletCalls(ctx, client)
}

// allowKubeletCalls lets the API server call kubelets (logs, exec, port-forward).
// All else that the programs may do is among the roles that Kubernetes makes itself.
func (b *bringUp) allowKubeletCalls(ctx context.Context, client kubernetes.Interface) error {
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "h8s:" + kubeletClientUser},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:kubelet-api-admin"},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: kubeletClientUser}},
	}
	_, err := client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("allow the API server to call kubelets: %w", err)
	}
	return nil
}

func (b *bringUp) startNodes(ctx context.Context) error {
	client, err := b.client()
	if err != nil {
		return err
	}
	for i, n := range b.Nodes {
		patch, err := json.Marshal(nodePatch(n, i == 0))
		if err != nil {
			return err
		}
		// The Node object is there once its kubelet has registered.
		err = b.await(ctx, func(ctx context.Context) error {
			_, err := client.CoreV1().Nodes().Patch(ctx, n.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
			return err
		})
		if err != nil {
			return withLog(fmt.Errorf("node %s does not register: %w", n.Name, err), b.nodeLogs(n.Name, "kubelet")...)
		}
	}
	for _, n := range b.Nodes {
		if err := b.await(ctx, func(ctx context.Context) error { return b.nodeAlive(ctx, client, n.Name) }); err != nil {
			return withLog(err, b.nodeLogs(n.Name, "kubelet")...)
		}
	}
	return nil
}

// startControllers waits for a sign of kube-controller-manager: the ServiceAccount
// without which no pod can be created.
func (b *bringUp) startControllers(ctx context.Context) error {
	client, err := b.client()
	if err != nil {
		return err
	}
	return b.await(ctx, func(ctx context.Context) error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

// nodeAlive says why a node is not Ready, or that it has not been heard of since
// the supervisor started: what a cluster that starts again knows of its nodes is of
// the life before.
func (b *bringUp) nodeAlive(ctx context.Context, client kubernetes.Interface, name string) error {
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if err := nodeReady(node); err != nil {
		return err
	}
	if !node.CreationTimestamp.Time.Before(b.started.Truncate(time.Second)) {
		return nil // registered in this life
	}
	lease, err := client.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look up the lease of node %s: %w", name, err)
	}
	if lease.Spec.RenewTime == nil || lease.Spec.RenewTime.Time.Before(b.started) {
		return fmt.Errorf("node %s has not reported yet", name)
	}
	return nil
}

// nodePatch is what a kubelet may not say about its own node.
func nodePatch(n Node, controlPlane bool) map[string]any {
	cidr := n.PodCIDR.String()
	patch := map[string]any{"spec": map[string]any{"podCIDR": cidr, "podCIDRs": []string{cidr}}}
	if controlPlane {
		patch["metadata"] = map[string]any{"labels": map[string]string{"node-role.kubernetes.io/control-plane": ""}}
	}
	return patch
}

// nodesReady says which of the cluster's nodes is not Ready, if any.
func (c *Config) nodesReady(ctx context.Context, client kubernetes.Interface) error {
	_, err := c.readyNodes(ctx, client)
	return err
}

// readyNodes are the nodes, all of the cluster's Ready among them.
func (c *Config) readyNodes(ctx context.Context, client kubernetes.Interface) ([]corev1.Node, error) {
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	return list.Items, c.allReady(list.Items)
}

func (c *Config) allReady(nodes []corev1.Node) error {
	byName := map[string]*corev1.Node{}
	for i := range nodes {
		byName[nodes[i].Name] = &nodes[i]
	}
	for _, n := range c.Nodes {
		node := byName[n.Name]
		if node == nil {
			return fmt.Errorf("node %s has not registered yet", n.Name)
		}
		if err := nodeReady(node); err != nil {
			return err
		}
	}
	return nil
}

// nodeReady says why a node is not Ready, if it is not.
func nodeReady(node *corev1.Node) error {
	for _, cond := range node.Status.Conditions {
		if cond.Type != corev1.NodeReady {
			continue
		}
		if cond.Status == corev1.ConditionTrue {
			return nil
		}
		return fmt.Errorf("node %s is not ready: %s", node.Name, cond.Message)
	}
	return fmt.Errorf("node %s has not reported yet", node.Name)
}
