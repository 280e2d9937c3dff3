package controller

import (
	"fmt"
	"slices"
	"testing"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/login"
)

func TestWhoAmI(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("who-acme", "10.0.0.0/16", member("User", "who-alice", v1alpha1.RoleOwner), member("Group", "who-readers", v1alpha1.RoleView)))
	newTenant(t, tenantOf("who-globex", "10.0.0.0/16", member("User", "who-alice", v1alpha1.RoleView)))
	newTenant(t, tenantOf("who-other", "10.0.0.0/16", member("User", "who-bob", v1alpha1.RoleOwner)))
	alice := as(t, "who-alice")
	newNamespace(t, alice, namespaceOf("who-shop", "who-acme", nil))

	for name, test := range map[string]struct {
		user   string
		groups []string
		want   string // tenants and roles
		write  bool   // pods in who-shop
	}{
		"a member of two tenants": {"who-alice", nil, "[who-acme [owner] who-globex [view]]", true},
		"a member by a group":     {"who-carol", []string{"who-readers"}, "[who-acme [view]]", false},
		"both":                    {"who-alice", []string{"who-readers"}, "[who-acme [owner view] who-globex [view]]", true},
		"nobody":                  {"who-dave", nil, "[]", false},
	} {
		t.Run(name, func(t *testing.T) {
			c := as(t, test.user, test.groups...)
			eventually(t, func() error { // the authorizer learns of bindings by a watch
				id, err := login.WhoAmI(ctx, c)
				if err != nil {
					t.Fatal(err)
				}
				if id.User != test.user || !slices.Contains(id.Groups, "system:authenticated") {
					t.Errorf("%s in %v", id.User, id.Groups)
				}
				if id.Note != "" {
					t.Errorf("it notes %q", id.Note)
				}
				got, shops := []any{}, 0
				for _, m := range id.Tenants {
					got = append(got, m.Tenant, m.Roles)
					for _, n := range m.Namespaces {
						if n.Namespace != "who-shop" {
							continue
						}
						shops++
						if write := slices.Contains(n.Write, "pods"); write != test.write || !write && !slices.Contains(n.Read, "pods") {
							return fmt.Errorf("pods of who-shop: writes %v, reads %v", n.Write, n.Read)
						}
						if slices.Contains(n.Read, "secrets") {
							t.Error("a viewer reads secrets")
						}
					}
				}
				if fmt.Sprint(got) != test.want || shops != min(1, len(id.Tenants)) {
					return fmt.Errorf("tenants %v, want %s; %d times the namespace", got, test.want, shops)
				}
				return nil
			})
		})
	}

	id, err := login.WhoAmI(ctx, cluster.admin)
	if err != nil {
		t.Fatal(err)
	}
	if len(id.Tenants) != 0 {
		t.Errorf("an operator who is no member has tenants: %v", id.Tenants)
	}
}
