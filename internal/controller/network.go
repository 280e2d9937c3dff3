package controller

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// maxID is the largest VXLAN network identifier (RFC 7348 section 5).
const maxID = 1<<24 - 1

// countDelay gathers the changes of many pods into one new count.
const countDelay = time.Second

// reasonInfrastructure is the reason of the condition Conflict when the
// controller sets it. Node agents have their own reason, and their say stays.
const reasonInfrastructure = "InfrastructureConflict"

// networkReconciler numbers Networks, checks them against the cluster's own
// addresses, and lets them go when nobody holds addresses any more.
type networkReconciler struct {
	objects
	infrastructure infrastructure
}

func (r *networkReconciler) setup(mgr ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
		var list v1alpha1.NetworkList
		if err := r.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
			return nil
		}
		var requests []reconcile.Request
		for _, n := range list.Items {
			requests = append(requests, request(n.Name))
		}
		return requests
	})
	return ctrl.NewControllerManagedBy(mgr).Named("network").
		For(&v1alpha1.Network{}).
		Watches(&v1alpha1.Block{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, obj client.Object) []reconcile.Request {
			return []reconcile.Request{request(obj.(*v1alpha1.Block).Spec.Network)}
		})).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(requestLabelled(v1alpha1.LabelNetwork))).
		Watches(&v1alpha1.Tenant{}, handler.EnqueueRequestsFromMapFunc(r.networksOf), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&corev1.Node{}, all, builder.WithPredicates(nodeMoved())).
		Watches(&networkingv1.ServiceCIDR{}, all).
		Watches(&corev1.Pod{}, countPods(), builder.WithPredicates(podCounts())).
		// One worker: two would give two Networks the same number.
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Complete(r)
}

func (r *networkReconciler) networksOf(ctx context.Context, tenant client.Object) []reconcile.Request {
	var list v1alpha1.NetworkList
	if err := r.List(ctx, &list, client.MatchingFields{fieldTenant: tenant.GetName()}, client.UnsafeDisableDeepCopy); err != nil {
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, request(list.Items[i].Name))
	}
	return requests
}

// nodeMoved passes Nodes that come, go, or change their addresses, and no heartbeats.
func nodeMoved() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, after := e.ObjectOld.(*corev1.Node), e.ObjectNew.(*corev1.Node)
		return fmt.Sprint(before.Spec.PodCIDRs, before.Status.Addresses) != fmt.Sprint(after.Spec.PodCIDRs, after.Status.Addresses)
	}}
}

// podCounts passes what changes the number of pods on a Network.
func podCounts() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		return e.ObjectOld.(*corev1.Pod).Status.Phase != e.ObjectNew.(*corev1.Pod).Status.Phase
	}}
}

func countPods() handler.EventHandler {
	type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]
	later := func(obj client.Object, q queue) {
		if name := obj.GetAnnotations()[v1alpha1.AnnotationNetworks]; name != "" {
			q.AddAfter(request(name), countDelay)
		}
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) { later(e.Object, q) },
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) { later(e.ObjectNew, q) },
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q queue) { later(e.Object, q) },
	}
}

// Reconcile implements reconcile.Reconciler.
func (r *networkReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var n v1alpha1.Network
	if err := r.Get(ctx, req.NamespacedName, &n); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if n.DeletionTimestamp != nil {
		return outcome(r.finalize(ctx, &n))
	}
	return outcome(r.ensure(ctx, &n))
}

func (r *networkReconciler) ensure(ctx context.Context, n *v1alpha1.Network) error {
	if err := r.hold(ctx, n, n.Spec.Tenant); err != nil {
		return fmt.Errorf("add finalizer and label: %w", err)
	}
	before := n.DeepCopy()
	if n.Status.ID == 0 {
		var err error
		if n.Status.ID, err = r.freeID(ctx, n.UID); err != nil {
			return err
		}
	}
	if err := r.count(ctx, n); err != nil {
		return err
	}
	if _, err := r.reapBlocks(ctx, r.Client, n.Name); err != nil {
		return err
	}
	ready, err := r.ready(ctx, n)
	if err != nil {
		return err
	}
	n.Status.ObservedGeneration = n.Generation
	setConditions(&n.Status.Conditions, n.Generation, ready)
	if err := r.patchStatus(ctx, n, before); err != nil {
		return fmt.Errorf("write the status: %w", err)
	}
	return nil
}

// ready says whether pods may start on the Network, and sets the condition Conflict.
func (r *networkReconciler) ready(ctx context.Context, n *v1alpha1.Network) (condition, error) {
	taken, err := r.infrastructure.ranges(ctx)
	if err != nil {
		return condition{}, err
	}
	conflict := tenancy.CheckCIDRs(n.Spec.CIDRs, taken)
	if have := apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionConflict); conflict != nil {
		setConditions(&n.Status.Conditions, n.Generation, condition{v1alpha1.ConditionConflict, true, reasonInfrastructure, conflict.Error()})
	} else if have != nil && have.Reason == reasonInfrastructure {
		apimeta.RemoveStatusCondition(&n.Status.Conditions, v1alpha1.ConditionConflict)
	}
	no := func(reason, format string, args ...any) (condition, error) {
		return condition{v1alpha1.ConditionReady, false, reason, fmt.Sprintf(format, args...)}, nil
	}
	if conflict != nil {
		return no("Conflict", "%v", conflict)
	}
	var t v1alpha1.Tenant
	switch err := r.Get(ctx, client.ObjectKey{Name: n.Spec.Tenant}, &t); {
	case apierrors.IsNotFound(err):
		return no("TenantNotFound", "the Tenant %s does not exist: create it, or delete this Network", n.Spec.Tenant)
	case err != nil:
		return condition{}, fmt.Errorf("get the Tenant %s: %w", n.Spec.Tenant, err)
	}
	return condition{v1alpha1.ConditionReady, true, "Ready", "pods may start on this Network"}, nil
}

// count brings the numbers of the status up to date.
func (r *networkReconciler) count(ctx context.Context, n *v1alpha1.Network) error {
	var namespaces corev1.NamespaceList
	if err := r.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelNetwork: n.Name}); err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	n.Status.Namespaces = names(namespaces.Items, namespaceName)
	n.Status.Pods = 0
	for _, ns := range namespaces.Items {
		var pods corev1.PodList
		if err := r.List(ctx, &pods, client.InNamespace(ns.Name), client.UnsafeDisableDeepCopy); err != nil {
			return fmt.Errorf("list pods of %s: %w", ns.Name, err)
		}
		for _, p := range pods.Items {
			finished := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
			if p.Annotations[v1alpha1.AnnotationNetworks] == n.Name && !finished {
				n.Status.Pods++
			}
		}
	}
	blocks, err := r.blocks(ctx, r.Client, n.Name)
	if err != nil {
		return err
	}
	n.Status.Blocks = int32(len(blocks)) //nolint:gosec // a Network has fewer than 2^24 addresses
	return nil
}

func (r *networkReconciler) blocks(ctx context.Context, from client.Reader, network string) ([]v1alpha1.Block, error) {
	var list v1alpha1.BlockList
	if err := from.List(ctx, &list, client.MatchingFields{fieldNetwork: network}); err != nil {
		return nil, fmt.Errorf("list Blocks: %w", err)
	}
	return list.Items, nil
}

// reapBlocks deletes the Blocks of nodes that no longer exist, and returns the others.
// That a node is gone is asked of the API server.
func (r *networkReconciler) reapBlocks(ctx context.Context, from client.Reader, network string) ([]v1alpha1.Block, error) {
	blocks, err := r.blocks(ctx, from, network)
	if err != nil {
		return nil, err
	}
	exists := map[string]bool{}
	var held []v1alpha1.Block
	for i := range blocks {
		node := blocks[i].Spec.Node
		known, asked := exists[node]
		if !asked {
			err := r.Get(ctx, client.ObjectKey{Name: node}, &corev1.Node{})
			if apierrors.IsNotFound(err) {
				err = r.live.Get(ctx, client.ObjectKey{Name: node}, &corev1.Node{})
			}
			if client.IgnoreNotFound(err) != nil {
				return nil, fmt.Errorf("get the Node %s: %w", node, err)
			}
			known = err == nil
			exists[node] = known
		}
		if known {
			held = append(held, blocks[i])
			continue
		}
		if err := r.remove(ctx, &blocks[i]); err != nil {
			return nil, fmt.Errorf("delete the Block %s of a node that is gone: %w", blocks[i].Name, err)
		}
	}
	return held, nil
}

// finalize waits until no namespace uses the Network and no node holds a Block of it.
func (r *networkReconciler) finalize(ctx context.Context, n *v1alpha1.Network) error {
	var namespaces corev1.NamespaceList
	if err := r.live.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelNetwork: n.Name}); err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	held, err := r.reapBlocks(ctx, r.live, n.Name)
	if err != nil {
		return err
	}
	var reason, message string
	switch {
	case len(namespaces.Items) > 0:
		reason, message = "WaitingForNamespaces", "waits for the namespaces "+some(names(namespaces.Items, namespaceName))+": delete them"
	case len(held) > 0:
		reason, message = "WaitingForBlocks", "waits for node agents to give back the Blocks "+some(names(held, func(b *v1alpha1.Block) string { return b.Name + " on " + b.Spec.Node }))
	default:
		return r.release(ctx, n)
	}
	before := n.DeepCopy()
	if err := r.count(ctx, n); err != nil {
		return err
	}
	n.Status.ObservedGeneration = n.Generation
	setConditions(&n.Status.Conditions, n.Generation,
		condition{v1alpha1.ConditionDeleting, true, reason, message},
		condition{v1alpha1.ConditionReady, false, "Deleting", "the Network is being deleted: " + message})
	return r.patchStatus(ctx, n, before)
}

// freeID is a number that no other Network has. It asks the API server: the cache may
// not know the last one given. What another controller does that believes itself the
// leader, the lease is against.
func (r *networkReconciler) freeID(ctx context.Context, uid types.UID) (int32, error) {
	taken := map[int32]bool{}
	for {
		id, err := chooseID(uid, taken)
		if err != nil {
			return 0, err
		}
		var list v1alpha1.NetworkList
		if err := r.live.List(ctx, &list, client.MatchingFields{fieldID: strconv.Itoa(int(id))}, client.Limit(1)); err != nil {
			return 0, fmt.Errorf("look for a Network with the number %d: %w", id, err)
		}
		if len(list.Items) == 0 {
			return id, nil
		}
		taken[id] = true
	}
}

// chooseID picks a number that no other Network has. It starts at a hash of the
// UID, so that the number of a Network that has just gone, which a slow node may
// still have links of, is hardly ever given again.
func chooseID(uid types.UID, taken map[int32]bool) (int32, error) {
	if len(taken) >= maxID {
		return 0, errors.New("every number from 1 to 16777215 is taken by a Network: delete some")
	}
	h := fnv.New64a()
	h.Write([]byte(uid))
	id := int32(h.Sum64()%maxID) + 1 //nolint:gosec // smaller than 2^24
	for taken[id] {
		id = id%maxID + 1
	}
	return id, nil
}
