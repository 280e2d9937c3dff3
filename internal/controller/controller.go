// Package controller has the reconcilers of Tenants, Networks, namespaces and
// Users, and the admission webhooks. They translate objects into calls of the
// package tenancy, and its answers into objects and conditions.
package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/controller-runtime/pkg/webhook/authentication"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/deploy/apiserver"
	"h8s.io/hypernetes/internal/tenancy"
)

// conflictRetry is how soon a write is tried again that lost against another writer.
const conflictRetry = 100 * time.Millisecond

// countingRetry is how soon a Tenant is looked at again whose use of its quota is not known
// yet. A back-off would double with each try while a controller starts, long past the count.
const countingRetry = time.Second

// workers is how many objects of a kind are reconciled at once. They wait for the API
// server most of the time, one write after the other.
const workers = 8

// Options is what the controller must be told about its cluster.
type Options struct {
	// ServiceCIDRs and PodCIDRs are ranges that the cluster uses for itself, in
	// addition to those that ServiceCIDR and Node objects name.
	ServiceCIDRs, PodCIDRs []string
	// InfrastructureCIDRs are the cluster's other ranges.
	InfrastructureCIDRs []string
	// Tokens, if set, answers the API server's questions about tokens.
	Tokens TokenValidator
	// Projects, if set, makes Tenants of Keystone's projects.
	Projects *ProjectOptions
}

// NewScheme is the scheme of every client that the controller uses.
func NewScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register kinds: %w", err)
		}
	}
	return scheme, nil
}

// CacheOptions keep the caches small: of RBAC objects and ResourceQuotas only
// those that the controller made, of Pods what is needed to count them, of Services
// the metadata of those that kube-proxy serves.
func CacheOptions() cache.Options {
	service := &metav1.PartialObjectMetadata{}
	service.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Service"))
	notOurs, err := labels.NewRequirement(labelServiceProxyName, selection.NotEquals, []string{v1alpha1.ServiceProxyName})
	if err != nil {
		panic(err) // of constants
	}
	ours := cache.ByObject{Label: labels.SelectorFromSet(labels.Set{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy})}
	return cache.Options{
		DefaultTransform: cache.TransformStripManagedFields(),
		ByObject: map[client.Object]cache.ByObject{
			&rbacv1.RoleBinding{}:        ours,
			&rbacv1.ClusterRole{}:        ours,
			&rbacv1.ClusterRoleBinding{}: ours,
			service:                      {Label: labels.NewSelector().Add(*notOurs)},
			&corev1.ResourceQuota{}:      ours,
			&flowcontrolv1.FlowSchema{}:  ours,
			&certificatesv1.CertificateSigningRequest{}: {
				Field: fields.OneTermEqualSelector("spec.signerName", certificatesv1.KubeAPIServerClientSignerName),
			},
			&corev1.Pod{}: {Transform: func(obj any) (any, error) {
				if pod, ok := obj.(*corev1.Pod); ok {
					return &corev1.Pod{
						ObjectMeta: metav1.ObjectMeta{
							Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
							Annotations: map[string]string{v1alpha1.AnnotationNetworks: pod.Annotations[v1alpha1.AnnotationNetworks]},
						},
						Status: corev1.PodStatus{Phase: pod.Status.Phase},
					}, nil
				}
				return obj, nil
			}},
		},
	}
}

// Setup registers every reconciler and webhook with the manager.
func Setup(mgr ctrl.Manager, opts Options) error {
	fixed, err := fixedRanges(opts)
	if err != nil {
		return err
	}
	if err := indexFields(context.Background(), mgr.GetFieldIndexer()); err != nil {
		return err
	}
	infrastructure := infrastructure{reader: mgr.GetClient(), fixed: fixed}
	objects := objects{Client: mgr.GetClient(), live: mgr.GetAPIReader()}
	accounts, err := newAccounts(mgr.GetConfig(), mgr.GetClient())
	if err != nil {
		return err
	}
	for _, runnable := range []manager.Runnable{accounts, accounts.feeds, recalls{accounts}} {
		if err := mgr.Add(runnable); err != nil {
			return fmt.Errorf("add the quotas: %w", err)
		}
	}
	for name, setup := range map[string]func(ctrl.Manager) error{
		"tenant":    (&tenantReconciler{objects, accounts}).setup,
		"network":   (&networkReconciler{objects, infrastructure}).setup,
		"namespace": (&namespaceReconciler{objects, mgr.GetEventRecorder("h8s-controller")}).setup,
		"user":      (&userReconciler{objects}).setup,
		"renewal":   (&renewalReconciler{objects}).setup,
	} {
		if err := setup(mgr); err != nil {
			return fmt.Errorf("set up the %s reconciler: %w", name, err)
		}
	}
	if opts.Projects != nil {
		if err := mgr.Add(&projectSync{objects: objects, ProjectOptions: *opts.Projects, events: mgr.GetEventRecorder("h8s-controller")}); err != nil {
			return fmt.Errorf("add the synchronization with Keystone: %w", err)
		}
	}
	decoder := admission.NewDecoder(mgr.GetScheme())
	server := mgr.GetWebhookServer()
	server.Register("/mutate-namespace", &admission.Webhook{Handler: &namespaceWebhook{objects, decoder}})
	server.Register("/validate-namespace", &admission.Webhook{Handler: newQuotaWebhook(objects, decoder)})
	server.Register("/validate-usage", &admission.Webhook{Handler: &usageWebhook{accounts}})
	server.Register("/validate-network", &admission.Webhook{Handler: &networkWebhook{objects, infrastructure, decoder}})
	server.Register("/validate-user", &admission.Webhook{Handler: &userWebhook{objects, decoder}})
	server.Register(apiserver.AuthorizePath, &authorizer{mgr.GetClient()})
	if opts.Tokens != nil {
		server.Register(apiserver.TokenReviewPath, &authentication.Webhook{Handler: &tokenReviewWebhook{opts.Tokens}})
	}
	return nil
}

// objects reads from the cache, and from the API server where the cache would not do.
type objects struct {
	client.Client
	// live is for decisions that must not rest on a cache that is behind.
	live client.Reader
}

// write makes the object as wanted. Have is what the cache knows of it, nil if nothing.
func (o objects) write(ctx context.Context, want, have client.Object) error {
	if have == nil {
		err := o.Create(ctx, want)
		if !apierrors.IsAlreadyExists(err) {
			return err
		}
		// The cache is behind, or the object has lost the label by which the cache knows it.
		have = want.DeepCopyObject().(client.Object)
		if err := o.live.Get(ctx, client.ObjectKeyFromObject(want), have); err != nil {
			return err
		}
	}
	want.SetResourceVersion(have.GetResourceVersion())
	return o.Update(ctx, want)
}

// bringInStep makes the objects that are wanted, changes those that are not the same, and
// removes the others of those that there are.
func bringInStep[T any, P interface {
	*T
	client.Object
}](ctx context.Context, o objects, have, want []T, same func(have, want P) bool,
) error {
	surplus := map[string]P{}
	for i := range have {
		surplus[P(&have[i]).GetName()] = &have[i]
	}
	for i := range want {
		w := P(&want[i])
		var known client.Object
		if h, ok := surplus[w.GetName()]; ok {
			delete(surplus, w.GetName())
			if same(h, w) {
				continue
			}
			known = h
		}
		if err := o.write(ctx, w, known); err != nil {
			return fmt.Errorf("make %s: %w", w.GetName(), err)
		}
	}
	for name, h := range surplus {
		if err := o.remove(ctx, h); err != nil {
			return fmt.Errorf("delete %s: %w", name, err)
		}
	}
	return nil
}

// remove deletes this very object; one that is gone or going is fine.
func (o objects) remove(ctx context.Context, obj client.Object) error {
	if obj.GetDeletionTimestamp() != nil {
		return nil
	}
	uid := obj.GetUID()
	return client.IgnoreNotFound(o.Delete(ctx, obj, client.Preconditions{UID: &uid}))
}

// hold adds our finalizer and the label of the tenant, by which its members find the object.
func (o objects) hold(ctx context.Context, obj client.Object, tenant string) error {
	before := obj.DeepCopyObject().(client.Object)
	added := controllerutil.AddFinalizer(obj, v1alpha1.Finalizer)
	if !added && obj.GetLabels()[v1alpha1.LabelTenant] == tenant {
		return nil
	}
	all := maps.Clone(obj.GetLabels())
	if all == nil {
		all = map[string]string{}
	}
	all[v1alpha1.LabelTenant] = tenant
	obj.SetLabels(all)
	return o.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
}

// release removes our finalizer.
func (o objects) release(ctx context.Context, obj client.Object) error {
	before := obj.DeepCopyObject().(client.Object)
	if !controllerutil.RemoveFinalizer(obj, v1alpha1.Finalizer) {
		return nil
	}
	return client.IgnoreNotFound(o.Patch(ctx, obj, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})))
}

// patchStatus writes the status if it differs from before's. It fails with a
// conflict if another has written the object since: conditions are a list, and a
// patch replaces it whole, node agents' conditions included.
func (o objects) patchStatus(ctx context.Context, obj, before client.Object) error {
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	if data, err := client.MergeFrom(before).Data(obj); err == nil && string(data) == "{}" {
		return nil
	}
	return client.IgnoreNotFound(o.Status().Patch(ctx, obj, patch))
}

func (o objects) disabled(ctx context.Context) (tenancy.Disabled, error) {
	var users v1alpha1.UserList
	if err := o.List(ctx, &users, client.MatchingFields{fieldDisabled: "true"}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list Users: %w", err)
	}
	return tenancy.NewDisabled(users.Items), nil
}

// tenantsOf are the Tenants that list the User, for a watch: it cannot fail, and
// the cache is read from memory.
func (o objects) tenantsOf(ctx context.Context, user string) []string {
	tenants, _ := o.memberships(ctx, user)
	return tenants
}

// memberships are the names of the Tenants that list the User, sorted.
func (o objects) memberships(ctx context.Context, user string) ([]string, error) {
	tenants, err := tenantsWith(ctx, o.Client, tenancy.Requester{Name: user})
	return tenancy.TenantsOf(tenants, user), err
}

// outcome turns a lost race between writers, and a count that is not done, into another
// try, and leaves other errors.
func outcome(err error) (reconcile.Result, error) {
	switch {
	case apierrors.IsConflict(err):
		return reconcile.Result{RequeueAfter: conflictRetry}, nil
	case errors.Is(err, errCounting):
		return reconcile.Result{RequeueAfter: countingRetry}, nil
	}
	return reconcile.Result{}, err
}

// condition is one answer about an object: true, or false with what to do about it.
type condition struct {
	kind    string
	ok      bool
	reason  string
	message string
}

func setConditions(conditions *[]metav1.Condition, generation int64, all ...condition) {
	for _, c := range all {
		status := metav1.ConditionFalse
		if c.ok {
			status = metav1.ConditionTrue
		}
		apimeta.SetStatusCondition(conditions, metav1.Condition{Type: c.kind, Status: status, ObservedGeneration: generation, Reason: c.reason, Message: c.message})
	}
}

// some lists a few of the names: messages are for people.
func some(names []string) string {
	slices.Sort(names)
	const show = 5
	if more := len(names) - show; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:show], ", "), more)
	}
	return strings.Join(names, ", ")
}

func request(name string) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Name: name}}
}

// requestLabelled asks for the object that the label names.
func requestLabelled(label string) func(context.Context, client.Object) []reconcile.Request {
	return func(_ context.Context, obj client.Object) []reconcile.Request {
		if name := obj.GetLabels()[label]; name != "" {
			return []reconcile.Request{request(name)}
		}
		return nil
	}
}

func names[T any](items []T, name func(*T) string) []string {
	out := make([]string, 0, len(items))
	for i := range items {
		out = append(out, name(&items[i]))
	}
	slices.Sort(out)
	return out
}

func namespaceName(n *corev1.Namespace) string { return n.Name }
