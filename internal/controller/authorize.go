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
)

// authorizer lets members list and watch what carries the label of their tenant:
// namespaces, Networks and the Tenant itself. RBAC cannot say so, it knows names only.
//
// It is a webhook authorizer (authorization.k8s.io/v1) and has an opinion only where
// it allows. Whatever else somebody may do, RBAC says, with or without it. Selectors
// come parsed, by KEP-4601; a selector that was not understood does not come at all.
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

// decide has no opinion unless it allows, and says then how to ask.
func (a *authorizer) decide(ctx context.Context, spec *authorizationv1.SubjectAccessReviewSpec) (authorizationv1.SubjectAccessReviewStatus, error) {
	var none authorizationv1.SubjectAccessReviewStatus
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

// hint says to a member which selectors are allowed. It ends up in the API server's refusal.
func (a *authorizer) hint(ctx context.Context, who tenancy.Requester) (string, error) {
	var list v1alpha1.TenantList
	if err := a.reader.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return "", fmt.Errorf("list Tenants: %w", err)
	}
	var own []string
	for i := range list.Items {
		if who.IsMember(&list.Items[i]) {
			own = append(own, list.Items[i].Name)
		}
	}
	if len(own) == 0 {
		return "", nil
	}
	slices.Sort(own)
	selector := v1alpha1.LabelTenant + "=" + own[0]
	if len(own) > 1 {
		selector = fmt.Sprintf("%s in (%s)", v1alpha1.LabelTenant, strings.Join(own, ","))
	}
	return fmt.Sprintf("those of your tenants you may list, with -l '%s'", selector), nil
}
