package tenancy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	"pgregory.net/rapid"

	"h8s.io/hypernetes/api/v1alpha1"
)

// brief writes a binding as "name -> role: subjects".
func brief(name string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) string {
	var who []string
	for _, s := range subjects {
		who = append(who, strings.Join(slices.DeleteFunc([]string{s.Kind, s.Namespace, s.Name}, func(p string) bool { return p == "" }), "/"))
	}
	return fmt.Sprintf("%s -> %s: %s", name, ref.Name, strings.Join(who, " "))
}

func TestRoleBindings(t *testing.T) {
	for name, tt := range map[string]struct {
		members  []v1alpha1.Member
		disabled Disabled
		want     []string // in a namespace
		cluster  []string // outside
	}{
		"nobody": {},
		"every role and kind": {
			members: []v1alpha1.Member{
				member("User", "olga", "owner"), member("Group", "admins", "admin"), member("ServiceAccount", "ci:bot", "edit"), member("User", "vera", "view"),
			},
			want: []string{
				"h8s:admin -> admin: Group/admins User/olga",
				"h8s:edit -> edit: ServiceAccount/ci/bot",
				"h8s:namespace-owner -> h8s:namespace-owner: Group/admins User/olga",
				"h8s:pod-debugger -> h8s:pod-debugger: Group/admins ServiceAccount/ci/bot User/olga",
				"h8s:view -> view: User/vera",
			},
			cluster: []string{
				"h8s:tenant:acme -> h8s:tenant:acme: Group/admins ServiceAccount/ci/bot User/olga User/vera",
				"h8s:tenant:acme:creator -> h8s:tenant-creator: Group/admins User/olga",
			},
		},
		"disabled": {
			members:  []v1alpha1.Member{member("User", "olga", "owner"), member("User", "vera", "view"), member("Group", "vera", "view")},
			disabled: Disabled{"olga": true, "vera": true},
			want:     []string{"h8s:view -> view: Group/vera"},
			cluster:  []string{"h8s:tenant:acme -> h8s:tenant:acme: Group/vera"},
		},
		"a ServiceAccount without a namespace is nobody": {members: []v1alpha1.Member{member("ServiceAccount", "bot", "owner")}},
	} {
		t.Run(name, func(t *testing.T) {
			acme := tenant("acme", tt.members...)
			var got, cluster []string
			for _, b := range RoleBindings(&acme, "shop", tt.disabled) {
				got = append(got, brief(b.Name, b.RoleRef, b.Subjects))
				if b.Namespace != "shop" || b.Labels[v1alpha1.LabelManagedBy] != v1alpha1.ManagedBy || b.Labels[v1alpha1.LabelTenant] != "acme" {
					t.Errorf("metadata of %s: %v", b.Name, b.ObjectMeta)
				}
			}
			for _, b := range ClusterRoleBindings(&acme, tt.disabled, nil) {
				cluster = append(cluster, brief(b.Name, b.RoleRef, b.Subjects))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error("in a namespace:", diff)
			}
			if diff := cmp.Diff(tt.cluster, cluster); diff != "" {
				t.Error("outside:", diff)
			}
		})
	}
}

// Whatever the members are, only they are bound, and their order does not matter.
func TestRoleBindingsProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		one := rapid.Custom(func(t *rapid.T) v1alpha1.Member {
			kind := rapid.SampledFrom([]string{"User", "Group", "ServiceAccount"}).Draw(t, "kind")
			name := rapid.SampledFrom([]string{"a", "b", "c:d", "e:f", "g"}).Draw(t, "name")
			return member(kind, name, rapid.SampledFrom([]v1alpha1.Role{"owner", "admin", "edit", "view"}).Draw(t, "role"))
		})
		members := rapid.SliceOfN(one, 0, 12).Draw(t, "members")
		off := NewDisabled(nil)
		if rapid.Bool().Draw(t, "disable a") {
			off["a"] = true
		}
		acme := tenant("acme", members...)
		shuffled := tenant("acme", rapid.Permutation(members).Draw(t, "shuffled")...)
		got := RoleBindings(&acme, "shop", off)
		if diff := cmp.Diff(got, RoleBindings(&shuffled, "shop", off)); diff != "" {
			t.Fatal("order matters:", diff)
		}
		for _, b := range got {
			for _, s := range b.Subjects {
				name := s.Name
				if s.Namespace != "" {
					name = s.Namespace + ":" + s.Name
				}
				if !slices.ContainsFunc(members, func(m v1alpha1.Member) bool { return m.Kind == s.Kind && m.Name == name }) || s.Kind == "User" && off[name] {
					t.Fatalf("%s binds %+v", b.Name, s)
				}
			}
		}
	})
}

// A tenant without an active User has no role for renewals: without names it would be for
// everybody's requests. A suspended one has.
func TestRenewalRole(t *testing.T) {
	for name, tt := range map[string]struct {
		users    []string
		names    []string // of requests
		bindings []string
	}{
		"nobody": {},
		"sorted": {
			[]string{"vera", "olga"},
			[]string{"h8s:user:olga", "h8s:user:vera"},
			[]string{"h8s:tenant:acme:renewal -> h8s:tenant:acme:renewal: User/olga User/vera"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			acme := tenant("acme", member("User", "olga", "owner"), member("User", "vera", "view"), member("User", "of-elsewhere", "view"))
			acme.Spec.Suspended = true
			var names, bindings []string
			for _, role := range ClusterRoles("acme", nil, nil, tt.users) {
				for _, rule := range role.Rules {
					if rule.Resources[0] != "certificatesigningrequests" {
						continue
					}
					names = append(names, rule.ResourceNames...)
					if create := slices.Equal(rule.Verbs, []string{"create", "renew"}); !create && len(rule.ResourceNames) == 0 {
						t.Errorf("%v of everybody's requests", rule.Verbs)
					}
				}
			}
			for _, b := range ClusterRoleBindings(&acme, nil, tt.users) {
				bindings = append(bindings, brief(b.Name, b.RoleRef, b.Subjects))
			}
			if diff := cmp.Diff(tt.names, names); diff != "" {
				t.Error("requests:", diff)
			}
			if diff := cmp.Diff(tt.bindings, bindings); diff != "" {
				t.Error("bindings:", diff)
			}
		})
	}
}

func TestMemberRole(t *testing.T) {
	for name, tt := range map[string]struct {
		networks, namespaces []string
		want                 map[string][]string
	}{
		"a rule without names would mean all": {nil, nil, map[string][]string{"tenants": {"acme"}}},
		"sorted": {
			[]string{"b", "acme"},
			[]string{"shop", "blog"},
			map[string][]string{"tenants": {"acme"}, "networks": {"acme", "b"}, "namespaces": {"blog", "shop"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			got := map[string][]string{}
			for _, r := range MemberRole("acme", tt.networks, tt.namespaces).Rules {
				got[r.Resources[0]] = r.ResourceNames
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
