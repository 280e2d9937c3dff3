// Package tenancy is what a Tenant means: who is a member and may do what, what a
// namespace of the tenant must carry, which address ranges are taken. Its functions
// are pure; the package controller beside it brings the objects and writes the results.
package tenancy

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"h8s.io/hypernetes/api/v1alpha1"
)

// Kinds of members.
const (
	KindUser           = "User"
	KindGroup          = "Group"
	KindServiceAccount = "ServiceAccount"
)

const serviceAccountPrefix = "system:serviceaccount:"

// Requester is who makes a request, as the API server has authenticated it.
type Requester struct {
	Name   string
	Groups []string
}

// Is says whether the requester is the member's subject.
func (r Requester) Is(m v1alpha1.Member) bool {
	switch m.Kind {
	case KindUser:
		return r.Name == m.Name
	case KindGroup:
		return slices.Contains(r.Groups, m.Name)
	case KindServiceAccount:
		_, _, ok := splitServiceAccount(m.Name)
		return ok && r.Name == serviceAccountPrefix+m.Name
	}
	return false
}

// Members are those whose membership is in force: all, or nobody while the Tenant is
// suspended.
func Members(t *v1alpha1.Tenant) []v1alpha1.Member {
	if t.Spec.Suspended {
		return nil
	}
	return t.Spec.Members
}

// Suspension is what a member is told of a suspended Tenant.
func Suspension(t *v1alpha1.Tenant) string {
	if t.Spec.SuspendedBecause == "" {
		return fmt.Sprintf("the Tenant %q is suspended: ask an operator", t.Name)
	}
	return fmt.Sprintf("the Tenant %q is suspended: %s", t.Name, t.Spec.SuspendedBecause)
}

// MayList begins the last of what a member is told who asks for a list of everybody's.
const MayList = "those of your tenants you may list"

// mayCreateNamespaces says whether the requester has, by any membership, a role
// that creates namespaces, were the Tenant not suspended.
func (r Requester) mayCreateNamespaces(t *v1alpha1.Tenant) bool {
	return slices.ContainsFunc(t.Spec.Members, func(m v1alpha1.Member) bool {
		return r.Is(m) && createsNamespaces(m.Role)
	})
}

// ChooseTenant says in which of the tenants the requester makes a namespace.
// Wanted is the tenant that the request names, or empty. Tenants that are being
// deleted or are suspended take no new namespaces. The error is a sentence for the requester; it
// does not tell which other tenants exist.
func ChooseTenant(tenants []v1alpha1.Tenant, who Requester, wanted string) (*v1alpha1.Tenant, error) {
	var candidates []*v1alpha1.Tenant
	closed := map[string]error{} // why, by name
	for i := range tenants {
		t := &tenants[i]
		switch {
		case !who.mayCreateNamespaces(t):
		case t.DeletionTimestamp != nil:
			closed[t.Name] = fmt.Errorf("the Tenant %q is being deleted and takes no new namespaces", t.Name)
		case t.Spec.Suspended:
			closed[t.Name] = errors.New(Suspension(t))
		default:
			candidates = append(candidates, t)
		}
	}
	if wanted != "" {
		for _, t := range candidates {
			if t.Name == wanted {
				return t, nil
			}
		}
		if refusal, ok := closed[wanted]; ok {
			return nil, refusal
		}
		return nil, fmt.Errorf("%q is not an owner or admin of a Tenant %q: correct the label %s, or ask an operator to be listed in that Tenant's spec.members", who.Name, wanted, v1alpha1.LabelTenant)
	}
	switch {
	case len(candidates) == 1:
		return candidates[0], nil
	case len(candidates) > 1:
		names := make([]string, len(candidates))
		for i, t := range candidates {
			names[i] = t.Name
		}
		slices.Sort(names)
		return nil, fmt.Errorf("%q may create namespaces in several Tenants (%s): say which one with the label %s", who.Name, strings.Join(names, ", "), v1alpha1.LabelTenant)
	case len(closed) > 0:
		return nil, closed[slices.Min(slices.Collect(maps.Keys(closed)))]
	default:
		return nil, fmt.Errorf("%q is not an owner or admin of any Tenant, so the namespace would belong to nobody: ask an operator to be listed in a Tenant's spec.members", who.Name)
	}
}

// TenantsOf are the names of the tenants that list the user by name, sorted.
// Groups are not considered: only the API server knows who is in one.
func TenantsOf(tenants []v1alpha1.Tenant, user string) []string {
	var names []string
	for _, t := range tenants {
		if slices.ContainsFunc(t.Spec.Members, func(m v1alpha1.Member) bool { return m.Kind == KindUser && m.Name == user }) {
			names = append(names, t.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Disabled is the set of names of Users that an operator has disabled.
//
// A member of kind User counts unless a User of that name is disabled; a User
// object need not exist, for certificates and identity providers name people
// that no object describes. What a disabled User has through a group stays: RBAC
// cannot take it away, so the identity provider has to.
type Disabled map[string]bool

// NewDisabled collects the disabled ones.
func NewDisabled(users []v1alpha1.User) Disabled {
	d := Disabled{}
	for _, u := range users {
		if u.Spec.Disabled {
			d[u.Name] = true
		}
	}
	return d
}

func createsNamespaces(r v1alpha1.Role) bool {
	return r == v1alpha1.RoleOwner || r == v1alpha1.RoleAdmin
}

func splitServiceAccount(name string) (namespace, account string, ok bool) {
	namespace, account, ok = strings.Cut(name, ":")
	return namespace, account, ok && namespace != "" && account != "" && !strings.Contains(account, ":")
}

// SplitServiceAccountUser splits the name by which the API server knows a ServiceAccount
// as a user; ok is false for anybody else's.
func SplitServiceAccountUser(user string) (namespace, account string, ok bool) {
	name, ok := strings.CutPrefix(user, serviceAccountPrefix)
	if !ok {
		return "", "", false
	}
	return splitServiceAccount(name)
}

// Roles are what the tenant's members list gives the requester, by name, by group or as
// ServiceAccount, the most powerful first; none while the Tenant is suspended.
func (r Requester) Roles(t *v1alpha1.Tenant) []v1alpha1.Role {
	var roles []v1alpha1.Role
	for _, role := range []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleView} {
		if slices.ContainsFunc(Members(t), func(m v1alpha1.Member) bool { return m.Role == role && r.Is(m) }) {
			roles = append(roles, role)
		}
	}
	return roles
}
