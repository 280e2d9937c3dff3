package login

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// Identity is who the cluster takes somebody for, and what follows from it.
type Identity struct {
	User   string              `json:"user"`
	Groups []string            `json:"groups,omitempty"`
	Extra  map[string][]string `json:"extra,omitempty"`
	// Tenants that list the user, or a group of the user's, sorted by name.
	Tenants []Membership `json:"tenants"`
	// Note is what the cluster says of tenants that are not among these, if it says
	// anything: that one is suspended, for example.
	Note string `json:"note,omitempty"`
}

// Membership is one tenant's view of the user.
type Membership struct {
	Tenant string `json:"tenant"`
	// Roles that the tenant's members list gives the user, the most powerful first.
	Roles      []v1alpha1.Role `json:"roles"`
	Namespaces []Access        `json:"namespaces,omitempty"`
}

// Access is what the user may do in a namespace.
type Access struct {
	Namespace string `json:"namespace"`
	// Read, Write and Do are resources, with their group, sorted: what the user may get
	// and not change, may create or change, and may only do otherwise.
	Read  []string `json:"read,omitempty"`
	Write []string `json:"write,omitempty"`
	Do    []string `json:"do,omitempty"`
	// Incomplete says that an authorizer could not tell all of its rules.
	Incomplete bool `json:"incomplete,omitempty"`
}

// WhoAmI asks the cluster. The client is the user's own, and its scheme knows
// Tenants, authentication and authorization.
func WhoAmI(ctx context.Context, c client.Client) (*Identity, error) {
	self := &authenticationv1.SelfSubjectReview{}
	if err := c.Create(ctx, self); err != nil {
		return nil, fmt.Errorf("ask the cluster who you are: %w", err)
	}
	info := self.Status.UserInfo
	id := &Identity{User: info.Username, Groups: info.Groups, Tenants: []Membership{}}
	if len(info.Extra) > 0 {
		id.Extra = map[string][]string{}
		for key, values := range info.Extra {
			id.Extra[key] = values
		}
	}
	// Rules of the whole cluster are told with those of any namespace.
	rules, err := rulesIn(ctx, c, "default")
	if err != nil {
		return nil, err
	}
	tenants, err := readableTenants(ctx, c, rules)
	if err != nil {
		return nil, err
	}
	who := tenancy.Requester{Name: info.Username, Groups: info.Groups}
	for i := range tenants {
		t := &tenants[i]
		m := Membership{Tenant: t.Name, Roles: who.Roles(t)}
		if len(m.Roles) == 0 {
			continue
		}
		for _, namespace := range t.Status.Namespaces {
			rules, err := rulesIn(ctx, c, namespace)
			if err != nil {
				return nil, err
			}
			m.Namespaces = append(m.Namespaces, access(namespace, rules))
		}
		id.Tenants = append(id.Tenants, m)
	}
	reason, err := refusal(ctx, c)
	if err != nil {
		return nil, err
	}
	note, _, _ := strings.Cut(reason, tenancy.MayList) // the others are in Tenants
	id.Note = strings.TrimSuffix(note, "; ")
	return id, nil
}

// refusal is the reason why one may not list all Tenants; empty for who may.
func refusal(ctx context.Context, c client.Client) (string, error) {
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{Group: v1alpha1.GroupVersion.Group, Version: v1alpha1.GroupVersion.Version, Resource: "tenants", Verb: "list"},
	}}
	if err := c.Create(ctx, review); err != nil {
		return "", fmt.Errorf("ask the cluster why you have no other tenants: %w", err)
	}
	if review.Status.Allowed {
		return "", nil
	}
	return review.Status.Reason, nil
}

func rulesIn(ctx context.Context, c client.Client, namespace string) (*authorizationv1.SubjectRulesReviewStatus, error) {
	review := &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}
	if err := c.Create(ctx, review); err != nil {
		return nil, fmt.Errorf("ask the cluster what you may do in namespace %q: %w", namespace, err)
	}
	return &review.Status, nil
}

// readableTenants are the Tenants that the rules let one read: members get theirs by
// name, operators all. A cluster without Hypernetes has none.
func readableTenants(ctx context.Context, c client.Client, rules *authorizationv1.SubjectRulesReviewStatus) ([]v1alpha1.Tenant, error) {
	var names []string
	for _, r := range rules.ResourceRules {
		if !covers(r.APIGroups, v1alpha1.GroupVersion.Group) || !covers(r.Resources, "tenants") || !covers(r.Verbs, "get") {
			continue
		}
		if len(r.ResourceNames) == 0 {
			var all v1alpha1.TenantList
			err := c.List(ctx, &all)
			if err == nil || !isMissing(err) {
				return all.Items, err
			}
			return nil, nil
		}
		names = append(names, r.ResourceNames...)
	}
	slices.Sort(names)
	var tenants []v1alpha1.Tenant
	for _, name := range slices.Compact(names) {
		var t v1alpha1.Tenant
		if err := c.Get(ctx, client.ObjectKey{Name: name}, &t); err != nil {
			if isMissing(err) || apierrors.IsForbidden(err) {
				continue // the tenant or the membership has gone since
			}
			return nil, fmt.Errorf("read the Tenant %q: %w", name, err)
		}
		tenants = append(tenants, t)
	}
	return tenants, nil
}

func isMissing(err error) bool { return apierrors.IsNotFound(err) || meta.IsNoMatchError(err) }

func covers(list []string, value string) bool {
	return slices.Contains(list, value) || slices.Contains(list, "*")
}

// access sorts the rules of a namespace. Reviews about oneself, which everybody may
// make, and rules for single objects are left out.
func access(namespace string, rules *authorizationv1.SubjectRulesReviewStatus) Access {
	verbs := map[string][]string{}
	for _, r := range rules.ResourceRules {
		if len(r.ResourceNames) > 0 {
			continue
		}
		for _, group := range r.APIGroups {
			if group == "authentication.k8s.io" || group == "authorization.k8s.io" || group == "certificates.k8s.io" {
				continue
			}
			for _, resource := range r.Resources {
				name := strings.TrimSuffix(resource+"."+group, ".")
				verbs[name] = append(verbs[name], r.Verbs...)
			}
		}
	}
	a := Access{Namespace: namespace, Incomplete: rules.Incomplete}
	for name, may := range verbs {
		switch {
		case slices.ContainsFunc(may, func(v string) bool {
			return v == "*" || v == "create" || v == "update" || v == "patch" || v == "delete"
		}):
			a.Write = append(a.Write, name)
		case slices.Contains(may, "get") || slices.Contains(may, "list"):
			a.Read = append(a.Read, name)
		default:
			a.Do = append(a.Do, name)
		}
	}
	for _, list := range [][]string{a.Read, a.Write, a.Do} {
		slices.SortFunc(list, cmp.Compare[string])
	}
	return a
}
