package tenancy

import (
	"cmp"
	"slices"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

// ClusterRoles that a Tenant's roles stand for. The first three are Kubernetes'
// own aggregated ones; the chart installs the others.
const (
	roleAdmin          = "admin"
	roleEdit           = "edit"
	roleView           = "view"
	roleNamespaceOwner = "h8s:namespace-owner"
	rolePodDebugger    = "h8s:pod-debugger"
	roleTenantCreator  = "h8s:tenant-creator"
)

// BindingPrefix begins the name of every RoleBinding that the controller keeps
// in a tenant's namespace.
const BindingPrefix = "h8s:"

// QuotaName is the name of the ResourceQuota in each of the tenant's namespaces.
const QuotaName = "h8s"

// MemberRoleName is the name of the ClusterRole, and of its binding, by which
// the tenant's members read their own Tenant and its Networks.
func MemberRoleName(tenant string) string { return "h8s:tenant:" + tenant }

// CreatorBindingName is the name of the binding by which the tenant's owners and
// admins create namespaces.
func CreatorBindingName(tenant string) string { return "h8s:tenant:" + tenant + ":creator" }

// ObjectLabels are the labels of every object that is made for the tenant.
func ObjectLabels(tenant string) map[string]string {
	return map[string]string{v1alpha1.LabelTenant: tenant, v1alpha1.LabelManagedBy: v1alpha1.ManagedBy}
}

// RoleBindings are the bindings that a namespace of the tenant must have, sorted
// by name; one without subjects is left out.
func RoleBindings(t *v1alpha1.Tenant, namespace string, disabled Disabled) []rbacv1.RoleBinding {
	var bindings []rbacv1.RoleBinding
	for _, b := range []struct {
		name, role string
		of         []v1alpha1.Role
	}{
		{BindingPrefix + "admin", roleAdmin, []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin}},
		{BindingPrefix + "edit", roleEdit, []v1alpha1.Role{v1alpha1.RoleEdit}},
		{roleNamespaceOwner, roleNamespaceOwner, []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin}},
		{rolePodDebugger, rolePodDebugger, []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit}},
		{BindingPrefix + "view", roleView, []v1alpha1.Role{v1alpha1.RoleView}},
	} {
		subjects := subjects(Members(t), disabled, b.of...)
		if len(subjects) == 0 {
			continue
		}
		bindings = append(bindings, rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: b.name, Namespace: namespace, Labels: ObjectLabels(t.Name)},
			RoleRef:    clusterRole(b.role),
			Subjects:   subjects,
		})
	}
	return bindings
}

// ClusterRoles are made for the tenant: what its members may outside its namespaces,
// and what lets those of them renew their certificates who are active Users. Without such a
// User there is no second one: a rule without names would mean all of them.
func ClusterRoles(tenant string, networks, namespaces, users []string) []rbacv1.ClusterRole {
	roles := []rbacv1.ClusterRole{MemberRole(tenant, networks, namespaces)}
	if len(users) > 0 {
		roles = append(roles, RenewalRole(tenant, users))
	}
	return roles
}

// MemberRole lets the tenant's members read their own Tenant, the named Networks
// and the named namespaces, and no others: its rules carry resource names. In a
// namespace the members may get it anyway; watching it, too, is what `kubectl
// delete namespace` and `kubectl wait` do.
func MemberRole(tenant string, networks, namespaces []string) rbacv1.ClusterRole {
	role := rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: MemberRoleName(tenant), Labels: ObjectLabels(tenant)}}
	for _, of := range []struct {
		group, resource string
		names           []string
	}{
		{v1alpha1.GroupVersion.Group, "tenants", []string{tenant}},
		{v1alpha1.GroupVersion.Group, "networks", networks},
		{"", "namespaces", namespaces},
	} {
		if len(of.names) == 0 { // the rule would mean all of them
			continue
		}
		role.Rules = append(role.Rules, rbacv1.PolicyRule{
			APIGroups: []string{of.group}, Resources: []string{of.resource},
			ResourceNames: slices.Sorted(slices.Values(of.names)), Verbs: []string{"get", "list", "watch"},
		})
	}
	return role
}

// ClusterRoleBindings are what the tenant's members have outside their
// namespaces: all may read their own Tenant, owners and admins may create namespaces,
// and the active Users among them renew their certificates: also while the Tenant is
// suspended, or they would need an operator each once it is no more.
// A binding without subjects is left out.
func ClusterRoleBindings(t *v1alpha1.Tenant, disabled Disabled, users []string) []rbacv1.ClusterRoleBinding {
	var renewing []rbacv1.Subject
	for _, name := range slices.Sorted(slices.Values(users)) {
		renewing = append(renewing, userSubject(name))
	}
	var bindings []rbacv1.ClusterRoleBinding
	for _, b := range []struct {
		name, role string
		subjects   []rbacv1.Subject
	}{
		{MemberRoleName(t.Name), MemberRoleName(t.Name), subjects(Members(t), disabled, v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleView)},
		{CreatorBindingName(t.Name), roleTenantCreator, subjects(Members(t), disabled, v1alpha1.RoleOwner, v1alpha1.RoleAdmin)},
		{RenewalName(t.Name), RenewalName(t.Name), renewing},
	} {
		if len(b.subjects) == 0 {
			continue
		}
		bindings = append(bindings, rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: b.name, Labels: ObjectLabels(t.Name)},
			RoleRef:    clusterRole(b.role),
			Subjects:   b.subjects,
		})
	}
	return bindings
}

// subjects are those of the members with one of the roles, sorted, so that equal
// memberships make equal objects.
func subjects(members []v1alpha1.Member, disabled Disabled, roles ...v1alpha1.Role) []rbacv1.Subject {
	var out []rbacv1.Subject
	for _, m := range members {
		if !slices.Contains(roles, m.Role) {
			continue
		}
		switch m.Kind {
		case KindUser:
			if !disabled[m.Name] {
				out = append(out, userSubject(m.Name))
			}
		case KindGroup:
			out = append(out, rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: m.Name})
		case KindServiceAccount:
			if namespace, name, ok := splitServiceAccount(m.Name); ok {
				out = append(out, rbacv1.Subject{Kind: rbacv1.ServiceAccountKind, Namespace: namespace, Name: name})
			}
		}
	}
	slices.SortFunc(out, func(a, b rbacv1.Subject) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return slices.Compact(out)
}

func userSubject(name string) rbacv1.Subject {
	return rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}
}

func clusterRole(name string) rbacv1.RoleRef {
	return rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name}
}
