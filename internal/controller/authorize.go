package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	logf "sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

const (
	// authorizeDeadline bounds an answer. The caches answer in microseconds; this is for
	// a controller that has just started and has none yet. The API server waits 1s.
	authorizeDeadline = 500 * time.Millisecond
	// maxReview is more than a review of a user with thousands of groups has.
	maxReview = 1 << 20
	// extraPodName is in the extra of who has a token that is bound to a pod.
	extraPodName = "authentication.kubernetes.io/pod-name"
)

// authorizer lets members list and watch what carries the label of their tenant:
// namespaces, Networks and the Tenant itself. RBAC cannot say so, it knows names only.
//
// And it keeps ServiceAccounts out of a suspended tenant: its own where no pod holds the token,
// and other tenants' from its namespaces. The tenant's own RoleBindings stay, because its pods
// go on by them.
//
// It is a webhook authorizer (authorization.k8s.io/v1). Whatever else somebody may do, RBAC
// says, with or without it. Selectors come parsed, by KEP-4601; a selector that was not
// understood does not come at all.
type authorizer struct {
	// reader reads from the caches.
	reader client.Reader
}

// ServeHTTP implements http.Handler.
func (a *authorizer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), authorizeDeadline)
	defer cancel()
	var review authorizationv1.SubjectAccessReview
	if r.Method != http.MethodPost {
		http.Error(w, "send a SubjectAccessReview by POST", http.StatusMethodNotAllowed)
		return
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxReview)).Decode(&review); err != nil {
		http.Error(w, "not a SubjectAccessReview: "+err.Error(), http.StatusBadRequest)
		return
	}
	if review.APIVersion != authorizationv1.SchemeGroupVersion.String() || review.Kind != "SubjectAccessReview" {
		http.Error(w, fmt.Sprintf("send a SubjectAccessReview of %s, not %s of %s", authorizationv1.SchemeGroupVersion, review.Kind, review.APIVersion), http.StatusBadRequest)
		return
	}
	status, err := a.decide(ctx, &review.Spec)
	if err != nil {
		logf.FromContext(ctx).Error(err, "authorize", "user", review.Spec.User)
		status = authorizationv1.SubjectAccessReviewStatus{EvaluationError: "h8s-controller cannot tell, try again"}
	}
	review.Status = status
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(&review); err != nil {
		logf.FromContext(ctx).Error(err, "answer a SubjectAccessReview")
	}
}

// decide denies what suspension takes from ServiceAccounts, allows lists by label
// to members, and has no opinion else, but says how to ask.
func (a *authorizer) decide(ctx context.Context, spec *authorizationv1.SubjectAccessReviewSpec) (authorizationv1.SubjectAccessReviewStatus, error) {
	var none authorizationv1.SubjectAccessReviewStatus
	if denied, reason, err := a.suspended(ctx, spec); err != nil || denied {
		return authorizationv1.SubjectAccessReviewStatus{Denied: denied, Reason: reason}, err
	}
	if !selectable(spec.ResourceAttributes) {
		return none, nil
	}
	who := tenancy.Requester{Name: spec.User, Groups: spec.Groups}
	if disabled, err := a.disabled(ctx, who.Name); err != nil || disabled {
		return none, err
	}
	if selector := spec.ResourceAttributes.LabelSelector; selector != nil {
		allowed, err := tenancy.SelectsOnly(selector.Requirements, func(tenant string) (bool, error) { return a.isMember(ctx, who, tenant) })
		if err != nil {
			return none, err
		}
		if allowed {
			return authorizationv1.SubjectAccessReviewStatus{Allowed: true, Reason: "a member lists what is the tenant's"}, nil
		}
	}
	hint, err := a.hint(ctx, who)
	return authorizationv1.SubjectAccessReviewStatus{Reason: hint}, err
}

// suspended says whether the request is a ServiceAccount's that a suspension keeps out, and
// what it may be told. These are the suspended tenant's own where no pod holds the token,
// and other tenants' in its namespaces, in pods or not: who was a member may have bound them
// there. Those whose namespace is no tenant's are operators', and nothing is denied to them.
func (a *authorizer) suspended(ctx context.Context, spec *authorizationv1.SubjectAccessReviewSpec) (denied bool, reason string, err error) {
	namespace, _, ok := tenancy.SplitServiceAccountUser(spec.User)
	if !ok {
		return false, "", nil
	}
	own, err := a.tenantOf(ctx, namespace)
	if err != nil || own == nil {
		return false, "", err
	}
	if own.Spec.Suspended && !heldByPod(spec) {
		return true, tenancy.Suspension(own), nil
	}
	if spec.ResourceAttributes == nil || spec.ResourceAttributes.Namespace == "" {
		return false, "", nil
	}
	target, err := a.tenantOf(ctx, spec.ResourceAttributes.Namespace)
	if err != nil || target == nil || target.Name == own.Name {
		return false, "", err
	}
	return target.Spec.Suspended, "", nil // without a reason: it may be a stranger who asks
}

// heldByPod says whether a pod that exists holds the token and asks for what is not another token.
// The API server itself says which pod a token is bound to and that this pod exists
// (KEP-1205); nobody who asks can. But whoever may make tokens can have one that is bound
// to a pod and never was in it, and the next by it: so it does not count for that. Pods
// do not miss it: kubelets get their tokens, as nodes.
func heldByPod(spec *authorizationv1.SubjectAccessReviewSpec) bool {
	r := spec.ResourceAttributes
	makesToken := r != nil && r.Resource == "serviceaccounts" && r.Subresource == "token"
	return len(spec.Extra[extraPodName]) > 0 && !makesToken
}

// tenantOf is the Tenant whose namespace it is; nil if it is none's.
// One that the label names and that does not exist has a name only.
func (a *authorizer) tenantOf(ctx context.Context, namespace string) (*v1alpha1.Tenant, error) {
	var ns corev1.Namespace
	if err := a.reader.Get(ctx, client.ObjectKey{Name: namespace}, &ns); err != nil {
		return nil, ignoreNotFound("the namespace", err)
	}
	name := ns.Labels[v1alpha1.LabelTenant]
	if name == "" {
		return nil, nil
	}
	t := &v1alpha1.Tenant{}
	if err := ignoreNotFound("the Tenant", a.reader.Get(ctx, client.ObjectKey{Name: name}, t)); err != nil {
		return nil, err
	}
	t.Name = name
	return t, nil
}

func ignoreNotFound(what string, err error) error {
	if err == nil || apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("get %s: %w", what, err)
}

// selectable says whether the request is for a list, or a watch of it, of which
// members may have their tenant's part.
func selectable(r *authorizationv1.ResourceAttributes) bool {
	if r == nil || r.Namespace != "" || r.Subresource != "" || r.Verb != "list" && r.Verb != "watch" {
		return false
	}
	switch r.Group {
	case "":
		return r.Resource == "namespaces"
	case v1alpha1.GroupVersion.Group:
		return r.Resource == "tenants" || r.Resource == "networks"
	}
	return false
}

// disabled: here, unlike in RBAC, it also takes what comes by a group.
func (a *authorizer) disabled(ctx context.Context, user string) (bool, error) {
	var u v1alpha1.User
	switch err := a.reader.Get(ctx, client.ObjectKey{Name: user}, &u); {
	case apierrors.IsNotFound(err):
		return false, nil // certificates and identity providers name people that no object describes
	case err != nil:
		return false, fmt.Errorf("get the User: %w", err)
	}
	return u.Spec.Disabled, nil
}

// isMember: a Tenant that does not exist has no members, so that the two cannot be told apart.
func (a *authorizer) isMember(ctx context.Context, who tenancy.Requester, tenant string) (bool, error) {
	var t v1alpha1.Tenant
	switch err := a.reader.Get(ctx, client.ObjectKey{Name: tenant}, &t); {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("get the Tenant: %w", err)
	}
	return who.IsMember(&t), nil
}

// hint says to a member which selectors are allowed, and of which tenants none is any
// more. It ends up in the API server's refusal.
func (a *authorizer) hint(ctx context.Context, who tenancy.Requester) (string, error) {
	tenants, err := tenantsWith(ctx, a.reader, who)
	if err != nil {
		return "", err
	}
	var own, hints []string
	for i := range tenants {
		switch t := &tenants[i]; {
		case who.IsMember(t):
			own = append(own, t.Name)
		case who.IsLockedOut(t):
			hints = append(hints, tenancy.Suspension(t))
		}
	}
	slices.Sort(own)
	slices.Sort(hints)
	switch len(own) {
	case 0:
	case 1:
		hints = append(hints, fmt.Sprintf("%s, with -l '%s=%s'", tenancy.MayList, v1alpha1.LabelTenant, own[0]))
	default:
		hints = append(hints, fmt.Sprintf("%s, with -l '%s in (%s)'", tenancy.MayList, v1alpha1.LabelTenant, strings.Join(own, ",")))
	}
	return strings.Join(hints, "; "), nil
}
