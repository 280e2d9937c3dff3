package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
	"h8s.io/hypernetes/internal/tenancy"
)

// reasonSuspended is the reason of a suspended Tenant's conditions.
const reasonSuspended = "Suspended"

// tenantReconciler makes what a Tenant has outside its namespaces, sums up what
// the other reconcilers have done, and takes everything away in the right order.
type tenantReconciler struct {
	objects
	accounts *accounts
}

func (r *tenantReconciler) setup(mgr ctrl.Manager) error {
	byLabel := handler.EnqueueRequestsFromMapFunc(requestLabelled(v1alpha1.LabelTenant))
	return ctrl.NewControllerManagedBy(mgr).Named("tenant").
		For(&v1alpha1.Tenant{}).
		Watches(&corev1.Namespace{}, byLabel).
		Watches(&rbacv1.RoleBinding{}, byLabel).
		Watches(&rbacv1.ClusterRole{}, byLabel).
		Watches(&rbacv1.ClusterRoleBinding{}, byLabel).
		WatchesRawSource(source.Channel(r.accounts.changed, &handler.EnqueueRequestForObject{})).
		Watches(&flowcontrolv1.FlowSchema{}, byLabel, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.Network{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, obj client.Object) []reconcile.Request {
			return []reconcile.Request{request(obj.(*v1alpha1.Network).Spec.Tenant)}
		})).
		Watches(&v1alpha1.User{}, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
			var requests []reconcile.Request
			for _, name := range r.tenantsOf(ctx, obj.GetName()) {
				requests = append(requests, request(name))
			}
			return requests
		}), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *tenantReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	var t v1alpha1.Tenant
	if err := r.Get(ctx, req.NamespacedName, &t); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if t.DeletionTimestamp != nil {
		return outcome(r.finalize(ctx, &t))
	}
	return outcome(r.ensure(ctx, &t))
}

func (r *tenantReconciler) ensure(ctx context.Context, t *v1alpha1.Tenant) error {
	if err := r.hold(ctx, t, t.Name); err != nil {
		return fmt.Errorf("add finalizer and label: %w", err)
	}
	before := t.DeepCopy()
	disabled, err := r.disabled(ctx)
	if err != nil {
		return err
	}
	var namespaces corev1.NamespaceList
	if err := r.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelTenant: t.Name}); err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	networkReady, err := r.ensureNetwork(ctx, t)
	if err != nil {
		return err
	}
	if err := r.ensureRoles(ctx, t, names(namespaces.Items, namespaceName), disabled); err != nil {
		return err
	}
	if err := r.ensureFlow(ctx, t, names(namespaces.Items, namespaceName), disabled); err != nil {
		return err
	}
	membersReady, err := r.membersReady(ctx, t, namespaces.Items, disabled)
	if err != nil {
		return err
	}
	quotaReady, counting := r.quotaReady(ctx, t, namespaces.Items)
	if counting != nil && !errors.Is(counting, errCounting) {
		return counting
	}

	if len(t.Status.Reservations) > 0 {
		// Asked of the API server, and after the Tenant was read: what exists now was created on its reservation.
		exist, err := r.namespaceUIDs(ctx, t.Name)
		if err != nil {
			return err
		}
		t.Status.Reservations = tenancy.Outstanding(t.Status.Reservations, exist, time.Now())
	}
	t.Status.ObservedGeneration = t.Generation
	t.Status.Network = tenancy.DefaultNetwork(t)
	t.Status.Namespaces = names(namespaces.Items, namespaceName)
	ready := condition{v1alpha1.ConditionReady, true, "Ready", "members, network and quota are in place"}
	if t.Spec.Suspended {
		ready.reason, ready.message = reasonSuspended, "the Tenant is suspended, as its spec wants; network and quota are in place"
	}
	for _, part := range []condition{membersReady, networkReady, quotaReady} {
		if !part.ok {
			ready = condition{v1alpha1.ConditionReady, false, part.reason, part.message}
			break
		}
	}
	setConditions(&t.Status.Conditions, t.Generation, membersReady, networkReady, quotaReady, ready)
	setSuspended(t, membersReady)
	if err := r.patchStatus(ctx, t, before); err != nil {
		return fmt.Errorf("write the status: %w", err)
	}
	return counting // tried again, but the rest does not wait for it
}

// ensureNetwork makes the default Network and says how it is.
func (r *tenantReconciler) ensureNetwork(ctx context.Context, t *v1alpha1.Tenant) (condition, error) {
	name := tenancy.DefaultNetwork(t)
	no := func(reason, format string, args ...any) (condition, error) {
		return condition{v1alpha1.ConditionNetworkReady, false, reason, fmt.Sprintf(format, args...)}, nil
	}
	var n v1alpha1.Network
	err := r.Get(ctx, client.ObjectKey{Name: name}, &n)
	switch {
	case apierrors.IsNotFound(err) && t.Spec.Network.Name != "":
		return no("NetworkNotFound", "the Network %s does not exist: create it with spec.tenant %s", name, t.Name)
	case apierrors.IsNotFound(err):
		n = v1alpha1.Network{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: tenancy.ObjectLabels(t.Name)},
			Spec:       v1alpha1.NetworkSpec{Tenant: t.Name, CIDRs: t.Spec.Network.CIDRs},
		}
		if err := r.Create(ctx, &n); err != nil && !apierrors.IsAlreadyExists(err) {
			return condition{}, fmt.Errorf("create the Network %s: %w", name, err)
		}
		return no("NetworkPending", "the Network %s is being made", name)
	case err != nil:
		return condition{}, fmt.Errorf("get the Network %s: %w", name, err)
	case n.Spec.Tenant != t.Name:
		return no("NetworkOfAnotherTenant", "the Network %s belongs to the Tenant %s: give this Tenant another name, or name an existing Network of its own", name, n.Spec.Tenant)
	case len(t.Spec.Network.CIDRs) > 0 && !slices.Equal(n.Spec.CIDRs, t.Spec.Network.CIDRs):
		return no("NetworkDiffers", "the Network %s exists already with the CIDRs %v instead of %v: delete it, or make the Tenant with network.name", name, n.Spec.CIDRs, t.Spec.Network.CIDRs)
	}
	if c := apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionReady); c == nil {
		return no("NetworkPending", "the Network %s is being made", name)
	} else if c.Status != metav1.ConditionTrue {
		return no(c.Reason, "the Network %s is not ready: %s", name, c.Message)
	}
	return condition{v1alpha1.ConditionNetworkReady, true, "NetworkReady", fmt.Sprintf("the Network %s is ready", name)}, nil
}

// ensureRoles keeps the ClusterRoles and the ClusterRoleBindings of the tenant.
func (r *tenantReconciler) ensureRoles(ctx context.Context, t *v1alpha1.Tenant, namespaces []string, disabled tenancy.Disabled) error {
	var networks v1alpha1.NetworkList
	if err := r.List(ctx, &networks, client.MatchingFields{fieldTenant: t.Name}, client.UnsafeDisableDeepCopy); err != nil {
		return fmt.Errorf("list Networks: %w", err)
	}
	users, err := r.activeUsers(ctx, t)
	if err != nil {
		return err
	}
	var roles rbacv1.ClusterRoleList
	if err := r.List(ctx, &roles, client.MatchingLabels(tenancy.ObjectLabels(t.Name))); err != nil {
		return fmt.Errorf("list ClusterRoles: %w", err)
	}
	own := names(networks.Items, func(n *v1alpha1.Network) string { return n.Name })
	if err := bringInStep(ctx, r.objects, roles.Items, tenancy.ClusterRoles(t.Name, own, namespaces, users), func(have, want *rbacv1.ClusterRole) bool {
		return reflect.DeepEqual(have.Rules, want.Rules)
	}); err != nil {
		return fmt.Errorf("ClusterRoles: %w", err)
	}
	var bindings rbacv1.ClusterRoleBindingList
	if err := r.List(ctx, &bindings, client.MatchingLabels(tenancy.ObjectLabels(t.Name))); err != nil {
		return fmt.Errorf("list ClusterRoleBindings: %w", err)
	}
	if err := bringInStep(ctx, r.objects, bindings.Items, tenancy.ClusterRoleBindings(t, disabled, users), func(have, want *rbacv1.ClusterRoleBinding) bool {
		return reflect.DeepEqual(have.Subjects, want.Subjects) && have.RoleRef == want.RoleRef
	}); err != nil {
		return fmt.Errorf("ClusterRoleBindings: %w", err)
	}
	return nil
}

// activeUsers are the names of those members that are Users and not disabled. One that no
// object describes has its name from somewhere else, and no certificate of ours.
func (r *tenantReconciler) activeUsers(ctx context.Context, t *v1alpha1.Tenant) ([]string, error) {
	var users []string
	for _, m := range t.Spec.Members {
		if m.Kind != tenancy.KindUser || slices.Contains(users, m.Name) {
			continue
		}
		var u v1alpha1.User
		switch err := r.Get(ctx, client.ObjectKey{Name: m.Name}, &u); {
		case apierrors.IsNotFound(err):
		case err != nil:
			return nil, fmt.Errorf("get the User %s: %w", m.Name, err)
		case !u.Spec.Disabled && u.DeletionTimestamp == nil:
			users = append(users, m.Name)
		}
	}
	return users, nil
}

// membersReady says whether the namespace reconciler has bound the members in
// every namespace, and nobody else.
func (r *tenantReconciler) membersReady(ctx context.Context, t *v1alpha1.Tenant, namespaces []corev1.Namespace, disabled tenancy.Disabled) (condition, error) {
	var waiting []string
	for i := range namespaces {
		ns := &namespaces[i]
		missing, surplus, err := r.bindingChanges(ctx, ns, tenancy.RoleBindings(t, ns.Name, disabled))
		if err != nil {
			return condition{}, err
		}
		if len(missing)+len(surplus) > 0 {
			waiting = append(waiting, ns.Name)
		}
	}
	if len(waiting) > 0 {
		return condition{v1alpha1.ConditionMembersReady, false, "Binding", "RoleBindings are being brought in step in the namespaces " + some(waiting)}, nil
	}
	if t.Spec.Suspended {
		return condition{v1alpha1.ConditionMembersReady, true, reasonSuspended, fmt.Sprintf("none of %d members is bound: the Tenant is suspended", len(t.Spec.Members))}, nil
	}
	return condition{v1alpha1.ConditionMembersReady, true, "MembersBound", fmt.Sprintf("%d members are bound in %d namespaces", len(t.Spec.Members), len(namespaces))}, nil
}

// setSuspended says of a suspended Tenant whether access has gone, and what stays.
func setSuspended(t *v1alpha1.Tenant, membersReady condition) {
	if !t.Spec.Suspended {
		apimeta.RemoveStatusCondition(&t.Status.Conditions, v1alpha1.ConditionSuspended)
		return
	}
	c := condition{v1alpha1.ConditionSuspended, membersReady.ok, "Suspending", "access is being taken away: " + membersReady.message}
	if c.ok {
		c.reason = reasonSuspended
		c.message = "no member has access, and tokens of the tenant's ServiceAccounts are refused where no pod holds them; pods go on with theirs, volumes, Networks and quota stay; set spec.suspended to false to give it back"
		if why := t.Spec.SuspendedBecause; why != "" {
			c.message = why + ": " + c.message
		}
	}
	setConditions(&t.Status.Conditions, t.Generation, c)
}

// quotaReady puts the quota into force and says whether the tenant keeps within it. If
// that is not known yet it says so, and fails with errCounting as well.
func (r *tenantReconciler) quotaReady(ctx context.Context, t *v1alpha1.Tenant, namespaces []corev1.Namespace) (condition, error) {
	no := func(reason, format string, args ...any) (condition, error) {
		return condition{v1alpha1.ConditionQuotaReady, false, reason, fmt.Sprintf(format, args...)}, nil
	}
	hard := t.Spec.Quota.Hard
	if len(hard) == 0 {
		t.Status.Quota = nil
	} else {
		status, err := r.accounts.enforce(ctx, t)
		switch {
		case errors.Is(err, errCounting) && t.Status.Quota != nil && t.Status.ObservedGeneration == t.Generation:
			status = t.Status.Quota // as it was when this controller started
		case errors.Is(err, errCounting):
			t.Status.Quota = nil
			counting, _ := no("Counting", "%v", err)
			return counting, err
		case err != nil:
			return condition{}, err
		}
		t.Status.Quota = status
		if err := quota.Check(hard); err != nil {
			return no("Unknown", "%v; the rest of the quota is in force", err)
		}
		if over := quota.Over(hard, status.Used); len(over) > 0 {
			return no("OverQuota", "the tenant uses %s: delete some, or raise spec.quota.hard", strings.Join(over, ", "))
		}
	}
	if limit := t.Spec.Quota.Namespaces; limit != nil && len(namespaces) > int(*limit) {
		return no("OverQuota", "the tenant has %d namespaces and may have %d: delete some, or raise spec.quota.namespaces", len(namespaces), *limit)
	}
	return condition{v1alpha1.ConditionQuotaReady, true, "QuotaInForce", "the quota is in force"}, nil
}

// finalize takes away what was made for the tenant: namespaces, then Networks,
// then RBAC. Each call goes as far as it can; the watches bring the next one.
// It asks the API server, not the cache: nothing may be left behind.
func (r *tenantReconciler) finalize(ctx context.Context, t *v1alpha1.Tenant) error {
	var namespaces corev1.NamespaceList
	if err := r.live.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelTenant: t.Name}); err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	for i := range namespaces.Items {
		if err := r.remove(ctx, &namespaces.Items[i]); err != nil {
			return fmt.Errorf("delete the namespace %s: %w", namespaces.Items[i].Name, err)
		}
	}
	if len(namespaces.Items) > 0 {
		if err := r.ensureMemberships(ctx, t, names(namespaces.Items, namespaceName)); err != nil {
			return err
		}
		return r.waitFor(ctx, t, "Namespaces", "waits for the namespaces "+some(names(namespaces.Items, namespaceName))+" to go")
	}

	var networks v1alpha1.NetworkList
	if err := r.live.List(ctx, &networks, client.MatchingFields{fieldTenant: t.Name}); err != nil {
		return fmt.Errorf("list Networks: %w", err)
	}
	own := networks.Items
	for i := range own {
		if err := r.remove(ctx, &own[i]); err != nil {
			return fmt.Errorf("delete the Network %s: %w", own[i].Name, err)
		}
	}
	if len(own) > 0 {
		if err := r.ensureMemberships(ctx, t, nil); err != nil {
			return err
		}
		return r.waitFor(ctx, t, "Networks", "waits for the Networks "+some(names(own, func(n *v1alpha1.Network) string { return n.Name }))+" to go; their own conditions say what each waits for")
	}

	named := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Name: name} }
	for _, obj := range []client.Object{
		&rbacv1.ClusterRoleBinding{ObjectMeta: named(tenancy.MemberRoleName(t.Name))},
		&rbacv1.ClusterRoleBinding{ObjectMeta: named(tenancy.CreatorBindingName(t.Name))},
		&rbacv1.ClusterRoleBinding{ObjectMeta: named(tenancy.RenewalName(t.Name))},
		&rbacv1.ClusterRole{ObjectMeta: named(tenancy.MemberRoleName(t.Name))},
		&rbacv1.ClusterRole{ObjectMeta: named(tenancy.RenewalName(t.Name))},
		&v1alpha1.QuotaLedger{ObjectMeta: named(t.Name)},
	} {
		if err := client.IgnoreNotFound(r.Delete(ctx, obj)); err != nil {
			return fmt.Errorf("delete %s: %w", obj.GetName(), err)
		}
	}
	if err := r.removeFlow(ctx, t.Name); err != nil {
		return err
	}
	return r.release(ctx, t)
}

// ensureMemberships: who is removed, disabled or suspended while a deletion waits sees
// no more of it. What there is in namespaces, the namespace reconciler takes away.
func (r *tenantReconciler) ensureMemberships(ctx context.Context, t *v1alpha1.Tenant, namespaces []string) error {
	disabled, err := r.disabled(ctx)
	if err != nil {
		return err
	}
	return r.ensureRoles(ctx, t, namespaces, disabled)
}

func (r *tenantReconciler) waitFor(ctx context.Context, t *v1alpha1.Tenant, what, message string) error {
	before := t.DeepCopy()
	t.Status.ObservedGeneration = t.Generation
	setConditions(&t.Status.Conditions, t.Generation,
		condition{v1alpha1.ConditionDeleting, true, "WaitingFor" + what, message},
		condition{v1alpha1.ConditionReady, false, "Deleting", "the Tenant is being deleted: " + message})
	return r.patchStatus(ctx, t, before)
}

// bindingChanges compares the RoleBindings that we keep in a namespace with those
// that should be there. Missing are also those that differ, and nothing else in a namespace that
// is being deleted: Kubernetes makes nothing there, and deletes RoleBindings when all pods have
// gone. Surplus are the objects that must go.
func (o objects) bindingChanges(ctx context.Context, ns *corev1.Namespace, want []rbacv1.RoleBinding) (missing []rbacv1.RoleBinding, surplus map[string]*rbacv1.RoleBinding, err error) {
	var list rbacv1.RoleBindingList
	if err := o.List(ctx, &list, client.InNamespace(ns.Name), client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy}); err != nil {
		return nil, nil, fmt.Errorf("list RoleBindings of %s: %w", ns.Name, err)
	}
	surplus = map[string]*rbacv1.RoleBinding{}
	for i := range list.Items {
		surplus[list.Items[i].Name] = &list.Items[i]
	}
	for _, w := range want {
		if have, ok := surplus[w.Name]; ok {
			same := reflect.DeepEqual(have.Subjects, w.Subjects) && maps.Equal(have.Labels, w.Labels)
			if have.RoleRef != w.RoleRef {
				continue // cannot be changed: it stays surplus, and is made anew once it is gone
			}
			delete(surplus, w.Name)
			if same {
				continue
			}
			w.ResourceVersion = have.ResourceVersion
		} else if ns.DeletionTimestamp != nil {
			continue
		}
		missing = append(missing, w)
	}
	return missing, surplus, nil
}
