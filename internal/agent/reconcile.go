package agent

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/dns"
	"h8s.io/hypernetes/internal/portal"
)

// verifyInterval is how often a portal is compared with the kernel although
// nothing that it follows from has changed.
const verifyInterval = 5 * time.Minute

// localNetwork is a Network that this node has to do with.
type localNetwork struct {
	// mu is held while the portal changes.
	mu sync.Mutex
	// dead says that the entry has left Agent.networks: look it up again.
	dead bool
	// id is the Network's number once its portal may exist.
	id int32
	// applied is what the portal was last made; nil: there is none of this run.
	applied  *portal.Spec
	verified time.Time

	names   *dns.Server
	records dns.Records
	// serving is the name server's run; nil: it does not run.
	serving *run
}

// run is a goroutine that ends when stop is called.
type run struct{ stop context.CancelFunc }

func (a *Agent) local(name string) *localNetwork {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.networks[name]
}

// lockLocal returns the Network's entry, locked; a new one if there is none.
func (a *Agent) lockLocal(name string) *localNetwork {
	for {
		a.mu.Lock()
		l := a.networks[name]
		if l == nil {
			l = &localNetwork{}
			a.networks[name] = l
		}
		a.mu.Unlock()
		l.mu.Lock()
		if !l.dead {
			return l
		}
		l.mu.Unlock()
	}
}

// forget drops the entry, which the caller has locked.
func (a *Agent) forget(name string, l *localNetwork) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.dead = true
	delete(a.networks, name)
}

// attached returns how many attachments the Network has on this node.
func (a *Agent) attached(name string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, at := range a.attachments {
		if at.Network == name {
			n++
		}
	}
	return max(n, a.ledger.InUse(name))
}

// reconcileNetwork makes portal, names and Blocks of one Network what they shall be.
func (a *Agent) reconcileNetwork(ctx context.Context, name string) error {
	if a.local(name) == nil {
		return nil
	}
	l := a.lockLocal(name)
	defer l.mu.Unlock()

	n := get[v1alpha1.Network](a.caches.networks, name)
	going := n == nil || n.DeletionTimestamp != nil
	if n == nil && a.attached(name) > 0 {
		// Its pods outlive it: somebody removed the finalizer. They keep what they have.
		return nil
	}

	grace := a.cfg.BlockGrace
	if going {
		grace = 0
	}
	for _, block := range a.ledger.Idle(name, grace) {
		a.ledger.Retire(name, block)
	}
	if len(a.ledger.Blocks(name)) == 0 && a.attached(name) == 0 {
		if err := a.removePortal(ctx, l); err != nil {
			return err
		}
	} else if err := a.ensurePortal(ctx, l, n); err != nil {
		return err
	}

	// No route leads to retired Blocks any more: others may have them.
	registry := a.registry()
	for _, block := range a.ledger.Retired(name) {
		if err := registry.release(ctx, name, block); err != nil {
			return err
		}
		a.ledger.Drop(name, block)
		a.log.Info("released Block", "network", name, "block", block)
	}
	switch {
	case len(a.ledger.Blocks(name)) == 0 && a.attached(name) == 0:
		a.forget(name, l)
	case len(a.ledger.Idle(name, 0)) > 0:
		a.queue.AddAfter(name, grace)
	}
	return nil
}

func (a *Agent) registry() *registry {
	return &registry{clients: a.clients, caches: a.caches, node: a.cfg.NodeName}
}

// ensurePortal needs l locked.
func (a *Agent) ensurePortal(ctx context.Context, l *localNetwork, n *v1alpha1.Network) error {
	cidr, err := networkCIDR(n)
	if err != nil {
		return err
	}
	a.setID(l, n.Status.ID) // before it exists, or a sweep could take it for a leftover
	s := a.snapshot(n, cidr)
	spec := s.spec()
	if l.applied == nil || !reflect.DeepEqual(*l.applied, spec) || time.Since(l.verified) > verifyInterval {
		if err := a.portals.Ensure(ctx, spec); err != nil {
			return fmt.Errorf("set up portal of Network %s: %w", n.Name, err)
		}
		if l.applied == nil {
			a.log.Info("portal is up", "network", n.Name, "id", spec.ID, "cidr", spec.CIDR, "blocks", spec.Blocks)
		}
		l.applied, l.verified = &spec, time.Now()
	}
	return a.ensureNames(l, n.Name, s) //nolint:contextcheck // the name server lives as long as the portal, not as long as this look at it
}

// ensureNames needs l locked.
func (a *Agent) ensureNames(l *localNetwork, name string, s snapshot) error {
	records := s.records()
	if l.names == nil {
		l.names = dns.NewServer(a.cfg.ClusterDomain, a.forward)
		l.names.SetZone(dns.NewZone(a.cfg.ClusterDomain, records))
		l.records = records
	} else if !reflect.DeepEqual(records, l.records) {
		l.names.SetZone(dns.NewZone(a.cfg.ClusterDomain, records))
		l.records = records
	}
	if l.serving != nil {
		return nil
	}
	pc, listener, err := a.portals.Listen(l.id)
	if err != nil {
		return fmt.Errorf("listen for name queries of Network %s: %w", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	this := &run{stop: cancel}
	l.serving = this
	names := l.names
	go func() {
		err := names.Serve(ctx, pc, listener)
		stopped := ctx.Err() != nil
		cancel()
		if stopped {
			return
		}
		a.log.Error("name server ended, will be started again", "network", name, "err", err)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.serving == this {
			l.serving = nil
			a.queue.AddRateLimited(name)
		}
	}()
	return nil
}

// stopNames ends all name servers.
func (a *Agent) stopNames() {
	a.mu.Lock()
	networks := slices.Collect(maps.Values(a.networks))
	a.mu.Unlock()
	for _, l := range networks {
		l.mu.Lock()
		l.stopNames()
		l.mu.Unlock()
	}
}

// stopNames needs l locked.
func (l *localNetwork) stopNames() {
	if l.serving != nil {
		l.serving.stop()
		l.serving = nil
	}
}

// removePortal needs l locked.
func (a *Agent) removePortal(ctx context.Context, l *localNetwork) error {
	l.stopNames()
	l.applied = nil
	if l.id == 0 {
		return nil
	}
	if err := a.portals.Remove(ctx, l.id); err != nil {
		return fmt.Errorf("remove portal %d: %w", l.id, err)
	}
	a.setID(l, 0)
	return nil
}

// setID needs l locked; a sweep reads the id without.
func (a *Agent) setID(l *localNetwork, id int32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.id = id
}

func networkCIDR(n *v1alpha1.Network) (netip.Prefix, error) {
	if len(n.Spec.CIDRs) == 0 {
		return netip.Prefix{}, fmt.Errorf("Network %s has no CIDR: set spec.cidrs", n.Name)
	}
	cidr, err := netip.ParsePrefix(string(n.Spec.CIDRs[0]))
	if err != nil || !cidr.Addr().Is4() || cidr != cidr.Masked() {
		return netip.Prefix{}, fmt.Errorf("Network %s: %q is not an IPv4 CIDR: make another Network", n.Name, n.Spec.CIDRs[0])
	}
	return cidr, nil
}

// snapshot collects what the Network's portal and names follow from.
func (a *Agent) snapshot(n *v1alpha1.Network, cidr netip.Prefix) snapshot {
	s := snapshot{
		network: n, cidr: cidr, node: a.cfg.NodeName,
		held:         a.ledger.Blocks(n.Name),
		blocks:       indexed[v1alpha1.Block](a.caches.blocks, byNetwork, n.Name),
		nodeIPs:      map[string]netip.Addr{},
		serviceCIDRs: a.serviceCIDRs(),
		kubernetes:   get[corev1.Service](a.caches.services, metav1.NamespaceDefault+"/kubernetes"),
		apiServers:   a.apiServers(),
	}
	for _, node := range list[corev1.Node](a.caches.nodes) {
		if ip, ok := internalIP(node); ok {
			s.nodeIPs[node.Name] = ip
		}
	}
	for _, ns := range indexed[corev1.Namespace](a.caches.namespaces, byNetwork, n.Name) {
		if ns.Labels[v1alpha1.LabelTenant] != n.Spec.Tenant {
			continue
		}
		s.services = append(s.services, indexed[corev1.Service](a.caches.services, byNamespace, ns.Name)...)
		s.slices = append(s.slices, indexed[discoveryv1.EndpointSlice](a.caches.endpointSlices, byNamespace, ns.Name)...)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, at := range a.attachments {
		if at.Network == n.Name {
			s.pods = append(s.pods, dns.Pod{Namespace: at.Namespace, Address: at.Address})
		}
	}
	return s
}

// reconcileGuard makes the node's own rules what they shall be. All portals
// depend on what it knows.
func (a *Agent) reconcileGuard(ctx context.Context) error {
	guard := a.desiredGuard()
	changed := a.guard == nil || !reflect.DeepEqual(*a.guard, guard)
	if err := a.portals.EnsureGuard(ctx, guard); err != nil {
		return fmt.Errorf("set up the node's guard rules: %w", err)
	}
	if changed {
		a.guard = &guard
		infrastructure, _ := a.infrastructure()
		a.ledger.Avoid(infrastructure)
		a.enqueueAll()
	}
	return nil
}

func (a *Agent) desiredGuard() portal.Guard {
	infrastructure, nodeIPs := a.infrastructure()
	infrastructure = append(infrastructure, a.cfg.DeniedCIDRs...)
	slices.SortFunc(infrastructure, netip.Prefix.Compare)
	return portal.Guard{
		NodeIPs:        nodeIPs,
		Infrastructure: slices.Compact(infrastructure),
		APIServers:     a.apiServers(),
	}
}

// infrastructure is what the cluster needs for itself: ranges, and the nodes' addresses on the underlay; sorted.
func (a *Agent) infrastructure() (ranges []netip.Prefix, nodeIPs []netip.Addr) {
	nodeIPs = []netip.Addr{a.cfg.NodeIP}
	ranges = slices.Concat(a.serviceCIDRs(), a.cfg.PodCIDRs, a.cfg.InfrastructureCIDRs)
	for _, node := range list[corev1.Node](a.caches.nodes) {
		for _, address := range node.Status.Addresses {
			ip, err := netip.ParseAddr(address.Address)
			if err != nil || !ip.Is4() {
				continue
			}
			if address.Type == corev1.NodeInternalIP {
				nodeIPs = append(nodeIPs, ip)
			} else {
				ranges = append(ranges, netip.PrefixFrom(ip, 32))
			}
		}
		for _, s := range append([]string{node.Spec.PodCIDR}, node.Spec.PodCIDRs...) {
			if cidr, err := netip.ParsePrefix(s); err == nil {
				ranges = append(ranges, cidr.Masked())
			}
		}
	}
	slices.SortFunc(nodeIPs, netip.Addr.Compare)
	slices.SortFunc(ranges, netip.Prefix.Compare)
	return slices.Compact(ranges), slices.Compact(nodeIPs)
}

// serviceCIDRs are those of the flags and those that the API server knows, sorted.
func (a *Agent) serviceCIDRs() []netip.Prefix {
	out := slices.Clone(a.cfg.ServiceCIDRs)
	for _, s := range list[networkingv1.ServiceCIDR](a.caches.serviceCIDRs) {
		for _, c := range s.Spec.CIDRs {
			if cidr, err := netip.ParsePrefix(c); err == nil && cidr.Addr().Is4() {
				out = append(out, cidr.Masked())
			}
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// apiServers are the endpoints of the Service kubernetes.default, sorted.
func (a *Agent) apiServers() []netip.AddrPort {
	var out []netip.AddrPort
	for _, slice := range indexed[discoveryv1.EndpointSlice](a.caches.endpointSlices, byNamespace, metav1.NamespaceDefault) {
		if slice.Labels[discoveryv1.LabelServiceName] != "kubernetes" {
			continue
		}
		for _, port := range slicePorts(slice, "https", corev1.ProtocolTCP) {
			for _, e := range slice.Endpoints {
				for _, address := range e.Addresses {
					if ip, err := netip.ParseAddr(address); err == nil && ip.Is4() && isReady(e) {
						out = append(out, netip.AddrPortFrom(ip, port))
					}
				}
			}
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
