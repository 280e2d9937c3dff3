// Package agent is the node agent: it turns what the API server says about
// Networks, Blocks, Services and pods into portals, addresses and names on one
// node, and answers the container runtime's CNI requests.
//
// Everything is level-triggered: an event only says which Network to look at
// again. Nothing is removed before every cache has had its first full load.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/cni"
	"h8s.io/hypernetes/internal/dns"
	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/network"
	"h8s.io/hypernetes/internal/portal"
)

const (
	// apiTimeout bounds one call of the API server.
	apiTimeout = 10 * time.Second
	// reconcileTimeout bounds one look at one Network.
	reconcileTimeout = 60 * time.Second
	// settle lets events that come together be handled together.
	settle = 20 * time.Millisecond
	// sweepInterval is how often what no event tells of is looked for.
	sweepInterval = 30 * time.Second
	workers       = 2
)

// Config is what one node agent is told. Every field but Underlay, NodeIP,
// CNIPlugin, Resolvers and the last two lists of CIDRs is needed.
type Config struct {
	NodeName string
	// NodeIP is found in the Node object if it is not set.
	NodeIP        netip.Addr
	Underlay      string
	VXLANPort     int
	ClusterDNS    netip.Addr
	ClusterDomain string
	// ServiceCIDRs and PodCIDRs are added to those that the API server knows.
	ServiceCIDRs, PodCIDRs []netip.Prefix
	// InfrastructureCIDRs are the cluster's other ranges: no pod of a tenant
	// reaches them, and no Network may overlap with them.
	InfrastructureCIDRs []netip.Prefix
	// DeniedCIDRs are not the cluster's, so that a Network may have the same
	// addresses; but no pod of a tenant gets out to them.
	DeniedCIDRs []netip.Prefix
	// Resolvers answer for names outside the cluster, as host or host:port. They
	// may change; it is called concurrently.
	Resolvers func() []string
	// CNIPlugin is the program h8s-cni that is copied to CNIBinDir; empty: it is there.
	CNIPlugin, CNIBinDir, CNIConfDir string
	Socket, StateDir, NetnsDir       string
	// HyperDir is where the shim of virtual machines says what executes them.
	HyperDir string
	// BlockGrace is how long a Block without pods is kept.
	BlockGrace time.Duration
}

// Agent is the node agent of one node.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	clients clients
	caches  *caches
	portals *portal.Manager
	forward dns.Forwarder
	ledger  *network.Ledger
	store   *network.Store
	queue   workqueue.TypedRateLimitingInterface[string]

	// recovered is closed when what an earlier run left has been taken over.
	recovered chan struct{}
	// installed is closed when the container runtime asks this agent.
	installed chan struct{}

	containers keyedMutex

	mu          sync.Mutex
	attachments map[string]network.Attachment
	// departed are attachments without a link, whose addresses are not free yet.
	departed map[string]network.Attachment
	networks map[string]*localNetwork

	// guard is touched by the reconciler of guardKey alone, after recovery.
	guard *portal.Guard
}

// New returns an Agent for the network namespace of the calling thread. It asks
// the API server for the Node if NodeIP is not set, until ctx is done.
func New(ctx context.Context, cfg Config, config *rest.Config, log *slog.Logger) (*Agent, error) {
	if cfg.Resolvers == nil {
		cfg.Resolvers = func() []string { return nil }
	}
	clients, err := newClients(config)
	if err != nil {
		return nil, err
	}
	if !cfg.NodeIP.IsValid() {
		if cfg.NodeIP, err = lookUpNodeIP(ctx, clients, cfg.NodeName, log); err != nil {
			return nil, err
		}
	}
	portals, err := portal.NewManager(portal.NodeConfig{
		NodeIP: cfg.NodeIP, Underlay: cfg.Underlay, ClusterDNS: cfg.ClusterDNS, NetnsDir: cfg.NetnsDir, VXLANPort: cfg.VXLANPort,
	}, log)
	if err != nil {
		return nil, fmt.Errorf("prepare portals: %w", err)
	}
	caches, err := newCaches(clients, cfg.NodeName)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: log, clients: clients, caches: caches, portals: portals,
		forward:   dns.NewForwarder(cfg.Resolvers),
		recovered: make(chan struct{}), installed: make(chan struct{}),
		attachments: map[string]network.Attachment{},
		departed:    map[string]network.Attachment{},
		networks:    map[string]*localNetwork{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](
			100*time.Millisecond, 30*time.Second)),
	}
	a.ledger = network.NewLedger(&registry{clients: clients, caches: caches, node: cfg.NodeName}, time.Now)
	return a, nil
}

func lookUpNodeIP(ctx context.Context, c clients, name string, log *slog.Logger) (netip.Addr, error) {
	for {
		ip, err := func() (netip.Addr, error) {
			ctx, cancel := context.WithTimeout(ctx, apiTimeout)
			defer cancel()
			node, err := c.core.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return netip.Addr{}, err
			}
			ip, ok := internalIP(node)
			if !ok {
				return netip.Addr{}, errors.New("it has no IPv4 address of type InternalIP: set --node-ip")
			}
			return ip, nil
		}()
		if err == nil {
			return ip, nil
		}
		log.Warn("node address not known yet", "node", name, "err", err)
		select {
		case <-ctx.Done():
			return netip.Addr{}, fmt.Errorf("look up address of node %s: %w", name, err)
		case <-time.After(2 * time.Second):
		}
	}
}

// internalIP is the address on the underlay.
func internalIP(node *corev1.Node) (netip.Addr, bool) {
	for _, a := range node.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if ip, err := netip.ParseAddr(a.Address); err == nil && ip.Is4() {
			return ip, true
		}
	}
	return netip.Addr{}, false
}

// Run works until ctx is done, or something is wrong that a restart may cure.
// Portals, links, rules and files stay as they are when it returns: established
// connections live on, and the next run takes over.
func (a *Agent) Run(ctx context.Context) error {
	unlock, err := lock(ctx, a.cfg.StateDir, a.log)
	if err != nil {
		return err
	}
	defer unlock()
	if a.store, err = network.OpenStore(filepath.Join(a.cfg.StateDir, "attachments")); err != nil {
		return err
	}
	// Before the caches are loaded, answers say that the agent is starting.
	listener, err := cni.Listen(a.cfg.Socket)
	if err != nil {
		return err
	}
	defer a.portals.Close()
	defer a.stopNames()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return cni.Serve(ctx, listener, a.handle, a.log) })
	if err := a.watch(); err != nil {
		return err
	}
	a.caches.start(ctx)
	group.Go(func() error {
		defer a.queue.ShutDown()
		err := a.caches.wait(ctx, func(missing []string) {
			a.log.Warn("waiting for the API server's first full answer", "resources", missing)
		})
		if err != nil {
			return nil // ctx is done
		}
		if err := a.recover(ctx); err != nil {
			return err
		}
		close(a.recovered)
		if err := a.install(ctx); err != nil {
			return err
		}
		close(a.installed)
		a.log.Info("ready", "node", a.cfg.NodeName, "address", a.cfg.NodeIP)
		a.sweepLoop(ctx)
		return nil
	})
	for range workers {
		group.Go(func() error {
			select {
			case <-ctx.Done():
				return nil
			case <-a.recovered:
			}
			for a.processNext(ctx) {
			}
			return nil
		})
	}
	err = group.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Ready tells what the agent waits for; nil when it serves pods.
func (a *Agent) Ready() error {
	select {
	case <-a.installed:
		return nil
	default:
	}
	select {
	case <-a.recovered:
		return errors.New("the CNI plugin is not installed yet")
	default:
		return errors.New("not all of the API server's objects are loaded yet")
	}
}

// lock keeps two agents, as during an upgrade, from using one state directory.
func lock(ctx context.Context, dir string, log *slog.Logger) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	for told := false; ; told = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock state directory: %w", err)
		}
		if !told {
			log.Warn("waiting for another agent on this node to end", "lock", f.Name())
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// install makes the container runtime ask this agent, and lets tenants' pods be
// scheduled here.
func (a *Agent) install(ctx context.Context) error {
	if a.cfg.CNIPlugin != "" {
		if err := cni.InstallPlugin(a.cfg.CNIPlugin, a.cfg.CNIBinDir); err != nil {
			return err
		}
	}
	if err := cni.InstallConflist(a.cfg.CNIConfDir, a.cfg.Socket); err != nil {
		return err
	}
	a.labelNode(ctx)
	return nil
}

// labelNode is repeated by the sweep: until it succeeds, and because it may not be known
// yet what executes virtual machines here.
func (a *Agent) labelNode(ctx context.Context) {
	labels := map[string]string{v1alpha1.LabelNodeReady: "true"}
	switch choice, found, err := accel.Recorded(a.cfg.HyperDir); {
	case err != nil:
		a.log.Warn("the node's label does not say what executes virtual machines", "label", v1alpha1.LabelHyper, "err", err)
	case found:
		labels[v1alpha1.LabelHyper] = choice.Accelerator
	}
	if n := get[corev1.Node](a.caches.nodes, a.cfg.NodeName); n != nil {
		maps.DeleteFunc(labels, func(key, value string) bool { return n.Labels[key] == value })
	}
	if len(labels) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels}})
	if err == nil {
		_, err = a.clients.core.CoreV1().Nodes().Patch(ctx, a.cfg.NodeName, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil {
		a.log.Error("tenants' pods are not scheduled here before the node is labelled; it is tried again", "labels", labels, "err", err)
	}
}

// These stand in the queue for what concerns all Networks: the guard's rules, and
// attachments that have departed. No Network has such a name.
const (
	guardKey    = ""
	departedKey = "departed/"
)

// watch translates events into keys of the queue.
func (a *Agent) watch() error {
	namespaceKeys := func(obj any) []string { keys, _ := namespaceNetwork(obj); return keys }
	guard := func(any) []string { return []string{guardKey} }
	ofNamespace := func(obj any) []string {
		m, ok := obj.(metav1.Object)
		if !ok {
			return nil
		}
		if m.GetNamespace() == metav1.NamespaceDefault && (m.GetName() == "kubernetes" || m.GetLabels()[discoveryv1.LabelServiceName] == "kubernetes") {
			return []string{guardKey}
		}
		if ns := get[corev1.Namespace](a.caches.namespaces, m.GetNamespace()); ns != nil {
			return namespaceKeys(ns)
		}
		return nil
	}
	name := func(obj any) []string { return []string{obj.(metav1.Object).GetName()} }
	blocks := func(obj any) []string { keys, _ := blockNetwork(obj); return keys }

	for _, w := range []struct {
		informer cache.SharedIndexInformer
		keys     func(any) []string
	}{
		{a.caches.nodes, guard},
		{a.caches.serviceCIDRs, guard},
		{a.caches.namespaces, namespaceKeys},
		{a.caches.services, ofNamespace},
		{a.caches.endpointSlices, ofNamespace},
		{a.caches.networks, name},
		{a.caches.blocks, blocks},
	} {
		enqueue := func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			for _, key := range w.keys(obj) {
				a.enqueue(key)
			}
		}
		_, err := w.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    enqueue,
			UpdateFunc: func(before, after any) { enqueue(before); enqueue(after) },
			DeleteFunc: enqueue,
		})
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
	}
	return nil
}

// enqueue asks for a look at a Network, if this node has to do with it.
func (a *Agent) enqueue(key string) {
	if key == guardKey || a.local(key) != nil {
		a.queue.AddAfter(key, settle)
	}
}

func (a *Agent) enqueueAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name := range a.networks {
		a.queue.Add(name)
	}
}

func (a *Agent) processNext(ctx context.Context) bool {
	key, shutdown := a.queue.Get()
	if shutdown {
		return false
	}
	defer a.queue.Done(key)
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	var err error
	switch key {
	case guardKey:
		err = a.reconcileGuard(ctx)
	case departedKey:
		err = a.freeDeparted(ctx)
	default:
		err = a.reconcileNetwork(ctx, key)
	}
	if err != nil && ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded) {
		a.log.Error("reconcile failed, will be tried again", "network", key, "err", err)
		a.queue.AddRateLimited(key)
		return true
	}
	a.queue.Forget(key)
	return true
}

// keyedMutex serialises what is done for one container: its DEL may come while
// an ADD that the runtime has given up is still under way.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*keyLock
}

type keyLock struct {
	sync.Mutex
	users int
}

func (k *keyedMutex) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*keyLock{}
	}
	l := k.locks[key]
	if l == nil {
		l = &keyLock{}
		k.locks[key] = l
	}
	l.users++
	k.mu.Unlock()
	l.Lock()
	return func() {
		l.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.locks, key)
		}
	}
}
