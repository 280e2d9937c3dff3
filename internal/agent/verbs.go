package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/cni"
	"h8s.io/hypernetes/internal/network"
	"h8s.io/hypernetes/internal/portal"
)

// handle executes one CNI request.
func (a *Agent) handle(ctx context.Context, r cni.Request) (cni.Answer, error) {
	select {
	case <-a.recovered:
	default:
		return cni.Answer{}, cni.NewError(types.ErrTryAgainLater, "the node agent h8s-node is starting: %v", a.Ready())
	}
	switch r.Verb {
	case cni.Add:
		defer a.containers.lock(network.AttachmentKey(r.ContainerID, r.IfName))()
		return a.add(ctx, r)
	case cni.Del:
		defer a.containers.lock(network.AttachmentKey(r.ContainerID, r.IfName))()
		return a.del(ctx, r.ContainerID, r.IfName)
	case cni.Check:
		defer a.containers.lock(network.AttachmentKey(r.ContainerID, r.IfName))()
		return a.check(ctx, r)
	case cni.Status:
		return cni.Answer{}, nil
	case cni.GC:
		return cni.Answer{}, a.gc(ctx, r.ValidAttachments)
	}
	return cni.Answer{}, cni.NewError(types.ErrInvalidEnvironmentVariables, "unknown CNI verb %q", r.Verb)
}

func (a *Agent) add(ctx context.Context, r cni.Request) (cni.Answer, error) {
	n, err := a.networkOf(ctx, r.Pod)
	if err != nil {
		return cni.Answer{}, err
	}
	if n == nil {
		return cni.Answer{Delegate: true}, nil
	}
	cidr, err := a.admit(ctx, n)
	if err != nil {
		return cni.Answer{}, err
	}

	at, known := a.attachment(r.ContainerID, r.IfName)
	if known && at.Network != n.Name {
		return cni.Answer{}, cni.NewError(types.ErrTryAgainLater, "container %s is attached to Network %s already: its sandbox must be removed first", r.ContainerID, at.Network)
	}
	if !known {
		addr, err := a.ledger.Allocate(ctx, n.Name, cidr)
		if err != nil {
			return cni.Answer{}, cni.NewError(types.ErrTryAgainLater, "%v", err)
		}
		at = network.Attachment{
			ContainerID: r.ContainerID, IfName: r.IfName, Netns: r.Netns,
			Network: n.Name, NetworkID: n.Status.ID, CIDR: cidr, Address: addr,
			Namespace: r.Pod.Namespace, Pod: r.Pod.Name, PodUID: r.Pod.UID, Created: time.Now(),
		}
		// The record comes first: a crash from here on leaves a trace to clean up after.
		if err := a.store.Put(at); err != nil {
			a.ledger.Free(n.Name, addr)
			return cni.Answer{}, err
		}
		a.mu.Lock()
		a.attachments[at.Key()] = at
		a.mu.Unlock()
	}

	a.mu.Lock()
	delete(a.departed, at.Key())
	a.mu.Unlock()

	result, err := a.attach(ctx, n, at)
	if err != nil {
		// Detaching is what DEL does anyway; sooner is better for the address.
		if undo := a.detach(context.WithoutCancel(ctx), at); undo != nil {
			a.log.Warn("failed ADD is not undone yet; DEL or a sweep will", "container", r.ContainerID, "err", undo)
		}
		return cni.Answer{}, err
	}
	a.log.Info("attached", "pod", r.Pod.Namespace+"/"+r.Pod.Name, "network", n.Name, "address", at.Address)
	return cni.Answer{Interface: &cni.Interface{
		Address: at.Address, Gateway: result.Gateway, MAC: result.PodMAC.String(), MTU: result.MTU,
	}}, nil
}

// admit says whether pods of the Network may be on this node, and returns its CIDR.
func (a *Agent) admit(ctx context.Context, n *v1alpha1.Network) (netip.Prefix, error) {
	cidr, err := networkCIDR(n)
	if err != nil {
		return cidr, cni.NewError(types.ErrInvalidNetworkConfig, "%v", err)
	}
	l := a.lockLocal(n.Name)
	defer l.mu.Unlock()
	if l.applied != nil {
		return cidr, nil
	}
	if err := a.checkConflict(ctx, n, cidr); err != nil {
		if len(a.ledger.Blocks(n.Name)) == 0 && a.attached(n.Name) == 0 && l.id == 0 {
			a.forget(n.Name, l)
		}
		return cidr, cni.NewError(types.ErrTryAgainLater, "%v", err)
	}
	return cidr, nil
}

// attach makes sure that the portal knows the address's Block, and attaches.
func (a *Agent) attach(ctx context.Context, n *v1alpha1.Network, at network.Attachment) (portal.Result, error) {
	ensure := func(afresh bool) error {
		l := a.lockLocal(n.Name)
		defer l.mu.Unlock()
		if afresh {
			l.applied = nil
		}
		if l.applied != nil && slices.ContainsFunc(l.applied.Blocks, func(b netip.Prefix) bool { return b.Contains(at.Address) }) {
			return nil
		}
		return a.ensurePortal(ctx, l, n)
	}
	if err := ensure(false); err != nil {
		return portal.Result{}, err
	}
	result, err := a.portals.Attach(ctx, n.Status.ID, portalAttachment(at))
	if errors.Is(err, portal.ErrNoPortal) {
		if err := ensure(true); err != nil {
			return portal.Result{}, err
		}
		result, err = a.portals.Attach(ctx, n.Status.ID, portalAttachment(at))
	}
	if err != nil {
		return portal.Result{}, fmt.Errorf("attach pod %s/%s to Network %s: %w", at.Namespace, at.Pod, n.Name, err)
	}
	// The pod's own name; also, should the Network have begun to go away, it is looked at again.
	a.enqueue(n.Name)
	return result, nil
}

func portalAttachment(at network.Attachment) portal.Attachment {
	return portal.Attachment{ContainerID: at.ContainerID, IfName: at.IfName, Netns: hostPath(at.Netns), Address: at.Address}
}

func (a *Agent) attachment(containerID, ifName string) (network.Attachment, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at, ok := a.attachments[network.AttachmentKey(containerID, ifName)]
	return at, ok
}

func (a *Agent) del(ctx context.Context, containerID, ifName string) (cni.Answer, error) {
	at, ok := a.attachment(containerID, ifName)
	if !ok {
		return cni.Answer{Delegate: true}, nil
	}
	return cni.Answer{}, a.detach(ctx, at)
}

// detach undoes attach, whatever of it there is. The caller does not wait until
// the address is free: to end its connections, the kernel looks through those of
// the whole machine. Should the agent die before, the sweep of the next one finds
// the record.
func (a *Agent) detach(ctx context.Context, at network.Attachment) error {
	if err := a.portals.Detach(ctx, at.NetworkID, portalAttachment(at)); err != nil {
		return fmt.Errorf("detach pod %s/%s from Network %s: %w", at.Namespace, at.Pod, at.Network, err)
	}
	a.mu.Lock()
	a.departed[at.Key()] = at
	a.mu.Unlock()
	a.queue.Add(departedKey)
	return nil
}

// freeDeparted frees the addresses of what was detached.
func (a *Agent) freeDeparted(ctx context.Context) error {
	a.mu.Lock()
	departed := slices.Collect(maps.Values(a.departed))
	a.mu.Unlock()
	var errs []error
	for _, at := range departed {
		errs = append(errs, a.free(ctx, at))
	}
	return errors.Join(errs...)
}

// free gives the address back when neither kernel nor store know it.
func (a *Agent) free(ctx context.Context, at network.Attachment) error {
	defer a.containers.lock(at.Key())()
	a.mu.Lock()
	_, departed := a.departed[at.Key()]
	a.mu.Unlock()
	if !departed {
		return nil // an ADD has taken it back
	}
	if err := a.portals.EndConnections(ctx, at.NetworkID, at.Address); err != nil {
		return fmt.Errorf("end the connections of pod %s/%s: %w", at.Namespace, at.Pod, err)
	}
	if err := a.store.Delete(at.ContainerID, at.IfName); err != nil {
		return err
	}
	a.mu.Lock()
	delete(a.departed, at.Key())
	delete(a.attachments, at.Key())
	// A record that recovery could not reserve has another owner of its address.
	shared := false
	for _, other := range a.attachments {
		shared = shared || other.Network == at.Network && other.Address == at.Address
	}
	a.mu.Unlock()
	if !shared {
		a.ledger.Free(at.Network, at.Address)
	}
	a.enqueue(at.Network)
	return nil
}

func (a *Agent) check(ctx context.Context, r cni.Request) (cni.Answer, error) {
	at, ok := a.attachment(r.ContainerID, r.IfName)
	if !ok {
		return cni.Answer{Delegate: true}, nil
	}
	return cni.Answer{}, a.portals.Check(ctx, at.NetworkID, portalAttachment(at))
}

// gc detaches everything that the runtime does not list.
func (a *Agent) gc(ctx context.Context, valid []types.GCAttachment) error {
	keep := map[string]bool{}
	for _, v := range valid {
		keep[network.AttachmentKey(v.ContainerID, v.IfName)] = true
	}
	var errs []error
	for _, at := range a.allAttachments() {
		if keep[at.Key()] {
			continue
		}
		errs = append(errs, a.reap(ctx, at))
	}
	return errors.Join(errs...)
}

func (a *Agent) allAttachments() []network.Attachment {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]network.Attachment, 0, len(a.attachments))
	for _, at := range a.attachments {
		out = append(out, at)
	}
	return out
}

func (a *Agent) reap(ctx context.Context, at network.Attachment) error {
	defer a.containers.lock(at.Key())()
	if now, ok := a.attachment(at.ContainerID, at.IfName); !ok || now != at {
		return nil
	}
	a.log.Info("reaping attachment", "container", at.ContainerID, "pod", at.Namespace+"/"+at.Pod, "network", at.Network, "address", at.Address)
	return a.detach(ctx, at)
}

// networkOf returns the Network that a pod joins, nil if it is no tenant's.
//
// Pod and namespace must agree: the pod says what it was admitted for, the
// namespace what holds now. Where the caches know nothing the API server is
// asked, and where there is any doubt the answer is an error: a tenant's pod must
// never land on the default network.
func (a *Agent) networkOf(ctx context.Context, id cni.Pod) (*v1alpha1.Network, error) {
	if id.Namespace == "" || id.Name == "" {
		return nil, cni.NewError(types.ErrInvalidEnvironmentVariables, "the container runtime does not say which pod this is (CNI_ARGS has no K8S_POD_NAMESPACE and K8S_POD_NAME)")
	}
	admitted, found, err := a.admittedFor(ctx, id)
	if err != nil {
		return nil, err
	}
	// A cached namespace may be older than the pod.
	ns := get[corev1.Namespace](a.caches.namespaces, id.Namespace)
	if !found || ns == nil || ns.Labels[v1alpha1.LabelNetwork] != admitted {
		if ns, err = a.getNamespace(ctx, id.Namespace); err != nil {
			return nil, err
		}
	}
	tenant, name := ns.Labels[v1alpha1.LabelTenant], ns.Labels[v1alpha1.LabelNetwork]
	switch {
	case tenant == "" && name == "" && admitted == "":
		return nil, nil
	case tenant == "":
		return nil, cni.NewError(types.ErrTryAgainLater, "pod %s/%s was admitted for Network %q, but its namespace belongs to no tenant: delete the pod", id.Namespace, id.Name, admitted)
	case name == "":
		return nil, cni.NewError(types.ErrTryAgainLater, "namespace %s of tenant %s has no Network yet (label %s)", id.Namespace, tenant, v1alpha1.LabelNetwork)
	case !found:
		return nil, cni.NewError(types.ErrTryAgainLater, "pod %s/%s does not exist in the API server", id.Namespace, id.Name)
	case admitted != name:
		return nil, cni.NewError(types.ErrTryAgainLater, "pod %s/%s was admitted for Network %q, but its namespace is on Network %q: delete the pod, a new one will join the right Network", id.Namespace, id.Name, admitted, name)
	}
	return a.usableNetwork(ctx, name, tenant)
}

// admittedFor returns the Network in the pod's annotation, and whether the pod exists.
func (a *Agent) admittedFor(ctx context.Context, id cni.Pod) (name string, found bool, err error) {
	for _, p := range indexed[corev1.Pod](a.caches.pods, byUID, id.UID) {
		if id.UID != "" && p.Namespace == id.Namespace && p.Name == id.Name {
			return p.Annotations[v1alpha1.AnnotationNetworks], true, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	p, err := a.clients.core.CoreV1().Pods(id.Namespace).Get(ctx, id.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		// Perhaps a static pod that the API server has not heard of yet: its
		// namespace decides, and a tenant's has none.
		return "", false, nil
	case err != nil:
		return "", false, cni.NewError(types.ErrTryAgainLater, "look up pod %s/%s: %v", id.Namespace, id.Name, err)
	case id.UID != "" && string(p.UID) != id.UID && p.Annotations[annotationMirror] != id.UID:
		return "", false, cni.NewError(types.ErrTryAgainLater, "pod %s/%s with UID %s does not exist any more", id.Namespace, id.Name, id.UID)
	}
	return p.Annotations[v1alpha1.AnnotationNetworks], true, nil
}

func (a *Agent) getNamespace(ctx context.Context, name string) (*corev1.Namespace, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	ns, err := a.clients.core.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, cni.NewError(types.ErrTryAgainLater, "look up namespace %s: %v", name, err)
	}
	return ns, nil
}

// usableNetwork returns the Network if a pod of the tenant may join it now.
func (a *Agent) usableNetwork(ctx context.Context, name, tenant string) (*v1alpha1.Network, error) {
	n := get[v1alpha1.Network](a.caches.networks, name)
	if n == nil || unusable(n, tenant) != "" {
		// The cache may be behind what let the pod in.
		fresh := &v1alpha1.Network{}
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		err := a.clients.h8s.Get().Resource("networks").Name(name).Do(ctx).Into(fresh)
		switch {
		case apierrors.IsNotFound(err):
			return nil, cni.NewError(types.ErrTryAgainLater, "Network %s of tenant %s does not exist: make it, or give the namespace another", name, tenant)
		case err != nil:
			return nil, cni.NewError(types.ErrTryAgainLater, "look up Network %s: %v", name, err)
		}
		n = fresh
	}
	if why := unusable(n, tenant); why != "" {
		return nil, cni.NewError(types.ErrTryAgainLater, "Network %s is not ready: %s", name, why)
	}
	return n, nil
}

// unusable says why no pod of the tenant may join the Network; empty: it may.
func unusable(n *v1alpha1.Network, tenant string) string {
	ready := apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionReady)
	switch {
	case n.Spec.Tenant != tenant:
		return "it belongs to another tenant than the namespace"
	case n.DeletionTimestamp != nil:
		return "it is being deleted"
	case n.Spec.Provider != "" && n.Spec.Provider != v1alpha1.ProviderVXLAN:
		return fmt.Sprintf("this node does not know the provider %s", n.Spec.Provider)
	case n.Status.ID <= 0 || ready == nil:
		return "the controller has not set it up yet"
	case ready.Status != metav1.ConditionTrue:
		return ready.Message
	}
	return ""
}
