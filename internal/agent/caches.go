package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"h8s.io/hypernetes/api/v1alpha1"
)

// Index names.
const (
	byNamespace = "namespace"
	byNetwork   = "network"
	byUID       = "uid"
)

// annotationMirror on a static pod's image in the API server is the UID by which
// kubelet and the container runtime know the pod.
const annotationMirror = corev1.MirrorPodAnnotationKey

// clients reach the API server.
type clients struct {
	core kubernetes.Interface
	h8s  rest.Interface
}

func newClients(config *rest.Config) (clients, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = 50, 100

	coreConfig := rest.CopyConfig(config)
	coreConfig.ContentType = runtime.ContentTypeProtobuf
	core, err := kubernetes.NewForConfig(coreConfig)
	if err != nil {
		return clients{}, fmt.Errorf("make Kubernetes client: %w", err)
	}

	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return clients{}, fmt.Errorf("make client of %s: %w", v1alpha1.GroupVersion, err)
	}
	config.GroupVersion = &v1alpha1.GroupVersion
	config.APIPath = "/apis"
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	h8s, err := rest.RESTClientFor(config)
	if err != nil {
		return clients{}, fmt.Errorf("make client of %s: %w", v1alpha1.GroupVersion, err)
	}
	return clients{core: core, h8s: h8s}, nil
}

// caches are what the agent knows of the cluster without asking. Objects are cut
// down to what is used, since there is one agent per node.
type caches struct {
	nodes, namespaces, pods, services, endpointSlices, serviceCIDRs, networks, blocks cache.SharedIndexInformer
}

func newCaches(c clients, node string) (*caches, error) {
	core, discovery, networking := c.core.CoreV1().RESTClient(), c.core.DiscoveryV1().RESTClient(), c.core.NetworkingV1().RESTClient()
	all := fields.Everything()
	var errs []error
	informer := func(client rest.Interface, resource string, selector fields.Selector, object runtime.Object, trim func(any), indexers cache.Indexers) cache.SharedIndexInformer {
		lw := cache.NewListWatchFromClient(client, resource, metav1.NamespaceAll, selector)
		i := cache.NewSharedIndexInformer(lw, object, 0, indexers)
		err := i.SetTransform(func(obj any) (any, error) {
			if m, ok := obj.(metav1.ObjectMetaAccessor); ok {
				trimMeta(m.GetObjectMeta())
			}
			trim(obj)
			return obj, nil
		})
		if err != nil {
			errs = append(errs, err)
		}
		return i
	}
	namespaceIndex := cache.Indexers{byNamespace: cache.MetaNamespaceIndexFunc}
	caches := &caches{
		nodes:      informer(core, "nodes", all, &corev1.Node{}, trimNode, nil),
		namespaces: informer(core, "namespaces", all, &corev1.Namespace{}, trimNamespace, cache.Indexers{byNetwork: namespaceNetwork}),
		pods: informer(core, "pods", fields.OneTermEqualSelector("spec.nodeName", node), &corev1.Pod{}, trimPod, cache.Indexers{
			byUID: podUIDs,
		}),
		services:       informer(core, "services", all, &corev1.Service{}, trimService, namespaceIndex),
		endpointSlices: informer(discovery, "endpointslices", all, &discoveryv1.EndpointSlice{}, trimEndpointSlice, namespaceIndex),
		serviceCIDRs:   informer(networking, "servicecidrs", all, &networkingv1.ServiceCIDR{}, func(any) {}, nil),
		networks:       informer(c.h8s, "networks", all, &v1alpha1.Network{}, trimNetwork, nil),
		blocks:         informer(c.h8s, "blocks", all, &v1alpha1.Block{}, func(any) {}, cache.Indexers{byNetwork: blockNetwork}),
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("make informers: %w", errs[0])
	}
	return caches, nil
}

func (c *caches) all() map[string]cache.SharedIndexInformer {
	return map[string]cache.SharedIndexInformer{
		"nodes": c.nodes, "namespaces": c.namespaces, "pods": c.pods, "services": c.services,
		"endpointslices": c.endpointSlices, "servicecidrs": c.serviceCIDRs, "networks": c.networks, "blocks": c.blocks,
	}
}

// start runs the informers until ctx is done.
func (c *caches) start(ctx context.Context) {
	for _, informer := range c.all() {
		go informer.RunWithContext(ctx)
	}
}

// wait returns when every cache has had its first full load. progress is told
// now and then what is missing.
func (c *caches) wait(ctx context.Context, progress func(missing []string)) error {
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	next := time.Now().Add(5 * time.Second)
	for {
		var missing []string
		for name, informer := range c.all() {
			if !informer.HasSynced() {
				missing = append(missing, name)
			}
		}
		if len(missing) == 0 {
			return nil
		}
		if time.Now().After(next) {
			slices.Sort(missing)
			progress(missing)
			next = time.Now().Add(30 * time.Second)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

func trimMeta(m metav1.Object) {
	m.SetManagedFields(nil)
	m.SetFinalizers(nil)
	m.SetOwnerReferences(nil)
	m.SetLabels(keep(m.GetLabels(), v1alpha1.LabelTenant, v1alpha1.LabelNetwork, v1alpha1.LabelNodeReady, v1alpha1.LabelHyper, discoveryv1.LabelServiceName))
	m.SetAnnotations(keep(m.GetAnnotations(), v1alpha1.AnnotationNetworks, annotationMirror))
}

func keep(m map[string]string, keys ...string) map[string]string {
	var out map[string]string
	for _, k := range keys {
		if v, ok := m[k]; ok {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

func trimNode(obj any) {
	if n, ok := obj.(*corev1.Node); ok {
		n.Spec = corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR, PodCIDRs: n.Spec.PodCIDRs}
		n.Status = corev1.NodeStatus{Addresses: n.Status.Addresses}
	}
}

func trimNamespace(obj any) {
	if n, ok := obj.(*corev1.Namespace); ok {
		n.Spec, n.Status = corev1.NamespaceSpec{}, corev1.NamespaceStatus{}
	}
}

func trimPod(obj any) {
	if p, ok := obj.(*corev1.Pod); ok {
		p.Spec, p.Status = corev1.PodSpec{}, corev1.PodStatus{}
	}
}

func trimService(obj any) {
	s, ok := obj.(*corev1.Service)
	if !ok {
		return
	}
	s.Spec = corev1.ServiceSpec{
		Type: s.Spec.Type, ClusterIP: s.Spec.ClusterIP, ClusterIPs: s.Spec.ClusterIPs, ExternalName: s.Spec.ExternalName,
		Ports: s.Spec.Ports, SessionAffinity: s.Spec.SessionAffinity, SessionAffinityConfig: s.Spec.SessionAffinityConfig,
		InternalTrafficPolicy: s.Spec.InternalTrafficPolicy,
	}
	s.Status = corev1.ServiceStatus{}
}

func trimEndpointSlice(obj any) {
	s, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return
	}
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		e.Zone, e.Hints, e.DeprecatedTopology = nil, nil, nil
		if e.TargetRef != nil {
			e.TargetRef = &corev1.ObjectReference{Kind: e.TargetRef.Kind}
		}
	}
}

func trimNetwork(obj any) {
	if n, ok := obj.(*v1alpha1.Network); ok {
		n.Status.Namespaces = nil
	}
}

func namespaceNetwork(obj any) ([]string, error) {
	if n, ok := obj.(*corev1.Namespace); ok && n.Labels[v1alpha1.LabelNetwork] != "" {
		return []string{n.Labels[v1alpha1.LabelNetwork]}, nil
	}
	return nil, nil
}

func blockNetwork(obj any) ([]string, error) {
	if b, ok := obj.(*v1alpha1.Block); ok {
		return []string{b.Spec.Network}, nil
	}
	return nil, nil
}

func podUIDs(obj any) ([]string, error) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return nil, nil
	}
	uids := []string{string(p.UID)}
	if mirrored := p.Annotations[annotationMirror]; mirrored != "" {
		uids = append(uids, mirrored)
	}
	return uids, nil
}

// get returns the object with that key, nil if there is none.
func get[T any](informer cache.SharedIndexInformer, key string) *T {
	obj, ok, err := informer.GetStore().GetByKey(key)
	if err != nil || !ok {
		return nil
	}
	typed, _ := obj.(*T)
	return typed
}

// list returns all objects, in the order of their keys.
func list[T any](informer cache.SharedIndexInformer) []*T {
	return typed[T](informer.GetStore().List())
}

// indexed returns the objects that an index has under value, in the order of their keys.
func indexed[T any](informer cache.SharedIndexInformer, index, value string) []*T {
	objects, err := informer.GetIndexer().ByIndex(index, value)
	if err != nil {
		return nil
	}
	return typed[T](objects)
}

func typed[T any](objects []any) []*T {
	key := func(obj any) string { k, _ := cache.MetaNamespaceKeyFunc(obj); return k }
	slices.SortFunc(objects, func(a, b any) int { return strings.Compare(key(a), key(b)) })
	out := make([]*T, 0, len(objects))
	for _, obj := range objects {
		if t, ok := obj.(*T); ok {
			out = append(out, t)
		}
	}
	return out
}
