package controller

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// labelServiceProxyName tells kube-proxy that another serves a Service.
const labelServiceProxyName = "service.kubernetes.io/service-proxy-name"

// namespaceReconciler keeps in each namespace of a tenant what binds it to the
// tenant: labels and RoleBindings.
type namespaceReconciler struct {
	objects
	events events.EventRecorder
}

func (r *namespaceReconciler) setup(mgr ctrl.Manager) error {
	inNamespace := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, obj client.Object) []reconcile.Request {
		return []reconcile.Request{request(obj.GetNamespace())}
	})
	return ctrl.NewControllerManagedBy(mgr).Named("namespace").
		For(&corev1.Namespace{}).
		Watches(&rbacv1.RoleBinding{}, inNamespace).
		// Those that kube-proxy serves: the cache has no others.
		WatchesMetadata(&corev1.Service{}, inNamespace).
		// What a namespace gets follows from the Tenant's spec.
		Watches(&v1alpha1.Tenant{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
			return r.namespacesOf(ctx, obj.GetName())
		}), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.User{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
			var requests []reconcile.Request
			for _, t := range r.tenantsOf(ctx, obj.GetName()) {
				requests = append(requests, r.namespacesOf(ctx, t)...)
			}
			return requests
		}), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		Complete(r)
}

func (r *namespaceReconciler) namespacesOf(ctx context.Context, tenant string) []reconcile.Request {
	var list corev1.NamespaceList
	if err := r.List(ctx, &list, client.MatchingLabels{v1alpha1.LabelTenant: tenant}, client.UnsafeDisableDeepCopy); err != nil {
		return nil
	}
	var requests []reconcile.Request
	for i := range list.Items {
		requests = append(requests, request(list.Items[i].Name))
	}
	return requests
}

// Reconcile implements reconcile.Reconciler.
func (r *namespaceReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var ns corev1.Namespace
	if err := r.Get(ctx, req.NamespacedName, &ns); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	return outcome(r.ensure(ctx, &ns))
}

func (r *namespaceReconciler) ensure(ctx context.Context, ns *corev1.Namespace) error {
	name := ns.Labels[v1alpha1.LabelTenant]
	if name == "" {
		return r.leave(ctx, ns)
	}
	var t v1alpha1.Tenant
	switch err := r.Get(ctx, client.ObjectKey{Name: name}, &t); {
	case apierrors.IsNotFound(err):
		r.warn(ns, "TenantNotFound", "the label %s names the Tenant %s, which does not exist: create it or correct the label", v1alpha1.LabelTenant, name)
		return r.ensureBindings(ctx, ns, nil)
	case err != nil:
		return fmt.Errorf("get the Tenant %s: %w", name, err)
	}
	disabled, err := r.disabled(ctx)
	if err != nil {
		return err
	}
	bindings := tenancy.RoleBindings(&t, ns.Name, disabled)
	if ns.DeletionTimestamp != nil || t.DeletionTimestamp != nil {
		// The deletion may wait for long, and RoleBindings go after pods: until then they say what the spec says.
		return r.ensureBindings(ctx, ns, bindings)
	}
	before := ns.DeepCopy()
	if tenancy.Complete(&ns.ObjectMeta, &t) {
		if err := r.Patch(ctx, ns, client.MergeFrom(before)); err != nil {
			return fmt.Errorf("label the namespace: %w", err)
		}
	}
	if err := r.ensureBindings(ctx, ns, bindings); err != nil {
		return err
	}
	if err := r.ensureServices(ctx, ns, true); err != nil {
		return err
	}
	if err := r.checkNetwork(ctx, ns, &t); err != nil {
		return err
	}
	return r.dropQuota(ctx, ns.Name)
}

// leave takes away what we made in a namespace that is no tenant's any more.
func (r *namespaceReconciler) leave(ctx context.Context, ns *corev1.Namespace) error {
	before := ns.DeepCopy()
	if tenancy.Strip(&ns.ObjectMeta) {
		if err := r.ensureServices(ctx, before, false); err != nil {
			return err
		}
		if err := r.Patch(ctx, ns, client.MergeFrom(before)); err != nil {
			return fmt.Errorf("remove labels: %w", err)
		}
	}
	if err := r.ensureBindings(ctx, ns, nil); err != nil {
		return err
	}
	return r.dropQuota(ctx, ns.Name)
}

func (r *namespaceReconciler) ensureBindings(ctx context.Context, ns *corev1.Namespace, want []rbacv1.RoleBinding) error {
	missing, surplus, err := r.bindingChanges(ctx, ns, want)
	if err != nil {
		return err
	}
	// Access is taken before access is given.
	for name, b := range surplus {
		if err := r.remove(ctx, b); err != nil {
			return fmt.Errorf("delete the RoleBinding %s: %w", name, err)
		}
	}
	for i := range missing {
		var known client.Object
		if missing[i].ResourceVersion != "" {
			known = missing[i].DeepCopy()
		}
		if err := r.write(ctx, &missing[i], known); err != nil {
			return fmt.Errorf("make the RoleBinding %s: %w", missing[i].Name, err)
		}
	}
	return nil
}

// ensureServices gives the Services that were there before the namespace became
// a tenant's to the portals, and those of one that leaves back to kube-proxy.
// Admission does so for Services that are written while it is a tenant's.
func (r *namespaceReconciler) ensureServices(ctx context.Context, ns *corev1.Namespace, tenants bool) error {
	// The cache has those that are not the portals', and tells when there is another.
	from, options := client.Reader(r.Client), []client.ListOption{client.InNamespace(ns.Name)}
	if !tenants {
		from, options = r.live, append(options, client.MatchingLabels{labelServiceProxyName: v1alpha1.ServiceProxyName})
	}
	var list metav1.PartialObjectMetadataList
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ServiceList"))
	if err := from.List(ctx, &list, options...); err != nil {
		return fmt.Errorf("list Services of %s: %w", ns.Name, err)
	}
	for i := range list.Items {
		service := &list.Items[i]
		service.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Service"))
		before := service.DeepCopy()
		delete(service.Labels, labelServiceProxyName)
		if tenants {
			metav1.SetMetaDataLabel(&service.ObjectMeta, labelServiceProxyName, v1alpha1.ServiceProxyName)
		}
		err := r.Patch(ctx, service, client.MergeFrom(before))
		switch {
		case apierrors.IsNotFound(err):
		case tenants && (apierrors.IsInvalid(err) || apierrors.IsForbidden(err)): // trying again would not help
			r.warn(ns, "ServiceRefused", "the Service %s is served by kube-proxy, outside the tenant's Network: %v", service.Name, err)
		case err != nil:
			return fmt.Errorf("label the Service %s: %w", service.Name, err)
		case !tenants && service.Labels[labelServiceProxyName] != "":
			return fmt.Errorf("take the label %s off the Service %s: admission does not know yet that the namespace has left its tenant", labelServiceProxyName, service.Name)
		}
	}
	return nil
}

// dropQuota removes the ResourceQuota that earlier versions made in each namespace:
// a tenant's quota is a total now.
func (r *namespaceReconciler) dropQuota(ctx context.Context, namespace string) error {
	var have corev1.ResourceQuota
	err := r.Get(ctx, client.ObjectKey{Namespace: namespace, Name: tenancy.QuotaName}, &have)
	if err == nil {
		err = r.remove(ctx, &have)
	}
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("remove the ResourceQuota %s: %w", tenancy.QuotaName, err)
	}
	return nil
}

// checkNetwork warns of a Network that an operator named wrongly. Its pods do not
// start: node agents compare the owners.
func (r *namespaceReconciler) checkNetwork(ctx context.Context, ns *corev1.Namespace, t *v1alpha1.Tenant) error {
	name := ns.Labels[v1alpha1.LabelNetwork]
	if name == tenancy.DefaultNetwork(t) {
		return nil // the Tenant's condition NetworkReady tells
	}
	var n v1alpha1.Network
	found := &n
	if err := r.Get(ctx, client.ObjectKey{Name: name}, &n); apierrors.IsNotFound(err) {
		found = nil
	} else if err != nil {
		return fmt.Errorf("get the Network %s: %w", name, err)
	}
	if err := tenancy.CheckNetwork(t, name, found); err != nil {
		r.warn(ns, "NetworkInvalid", "%v", err)
	}
	return nil
}

func (r *namespaceReconciler) warn(ns *corev1.Namespace, reason, format string, args ...any) {
	r.events.Eventf(ns, nil, corev1.EventTypeWarning, reason, "Reconcile", format, args...)
}
