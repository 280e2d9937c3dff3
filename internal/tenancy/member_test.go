package tenancy

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

func tenant(name string, members ...v1alpha1.Member) v1alpha1.Tenant {
	return v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.TenantSpec{Members: members}}
}

func member(kind, name string, role v1alpha1.Role) v1alpha1.Member {
	return v1alpha1.Member{Kind: kind, Name: name, Role: role}
}

func TestIs(t *testing.T) {
	for name, tt := range map[string]struct {
		who    Requester
		member v1alpha1.Member
		want   bool
	}{
		"user":                            {Requester{Name: "alice"}, member("User", "alice", "view"), true},
		"another user":                    {Requester{Name: "alice2"}, member("User", "alice", "view"), false},
		"group":                           {Requester{Name: "alice", Groups: []string{"a", "b"}}, member("Group", "b", "view"), true},
		"user named like the group":       {Requester{Name: "b"}, member("Group", "b", "view"), false},
		"group named like the user":       {Requester{Name: "x", Groups: []string{"alice"}}, member("User", "alice", "view"), false},
		"service account":                 {Requester{Name: "system:serviceaccount:ci:bot"}, member("ServiceAccount", "ci:bot", "view"), true},
		"service account elsewhere":       {Requester{Name: "system:serviceaccount:cd:bot"}, member("ServiceAccount", "ci:bot", "view"), false},
		"service account, no namespace":   {Requester{Name: "system:serviceaccount:bot"}, member("ServiceAccount", "bot", "view"), false},
		"service account, three parts":    {Requester{Name: "system:serviceaccount:a:b:c"}, member("ServiceAccount", "a:b:c", "view"), false},
		"user named like the account":     {Requester{Name: "ci:bot"}, member("ServiceAccount", "ci:bot", "view"), false},
		"a kind that nobody knows":        {Requester{Name: "alice"}, member("Robot", "alice", "view"), false},
		"nobody, and a member of no name": {Requester{}, member("ServiceAccount", "", "view"), false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := tt.who.Is(tt.member); got != tt.want {
				t.Errorf("Is = %t, want %t", got, tt.want)
			}
		})
	}
}

func TestChooseTenant(t *testing.T) {
	going := tenant("going", member("User", "gil", "owner"))
	going.DeletionTimestamp = &metav1.Time{}
	unpaid := tenant("unpaid", member("User", "sue", "owner"), member("User", "frank", "owner"), member("User", "vera", "view"))
	unpaid.Spec.Suspended, unpaid.Spec.SuspendedBecause = true, "the bill of May"
	quiet := tenant("quiet", member("User", "quinn", "owner"))
	quiet.Spec.Suspended = true
	tenants := []v1alpha1.Tenant{
		unpaid, quiet,
		tenant("free", member("User", "frank", "admin")),
		tenant("globex", member("User", "bob", "owner"), member("User", "carol", "admin"), member("User", "dora", "view")),
		tenant("acme", member("User", "alice", "owner"), member("User", "carol", "owner"), member("Group", "acme-admins", "admin"), member("User", "dora", "admin"), member("User", "eve", "edit")),
		going,
	}
	for name, tt := range map[string]struct {
		who    Requester
		wanted string
		want   string
		err    string
	}{
		"one":                              {Requester{Name: "alice"}, "", "acme", ""},
		"one, named":                       {Requester{Name: "alice"}, "acme", "acme", ""},
		"by group":                         {Requester{Name: "zoe", Groups: []string{"acme-admins"}}, "", "acme", ""},
		"user and group of one tenant":     {Requester{Name: "alice", Groups: []string{"acme-admins"}}, "", "acme", ""},
		"two":                              {Requester{Name: "carol"}, "", "", `"carol" may create namespaces in several Tenants (acme, globex): say which one with the label h8s.io/tenant`},
		"two, one named":                   {Requester{Name: "carol"}, "globex", "globex", ""},
		"two, only one with a role for it": {Requester{Name: "dora"}, "", "acme", ""},
		"named one without a role for it":  {Requester{Name: "dora"}, "globex", "", `not an owner or admin of a Tenant "globex"`},
		"a role that creates nothing":      {Requester{Name: "eve"}, "", "", "not an owner or admin of any Tenant"},
		"nobody":                           {Requester{Name: "mallory"}, "", "", "not an owner or admin of any Tenant"},
		"another's":                        {Requester{Name: "alice"}, "globex", "", `not an owner or admin of a Tenant "globex"`},
		"one that does not exist":          {Requester{Name: "alice"}, "nowhere", "", `not an owner or admin of a Tenant "nowhere"`},
		"being deleted":                    {Requester{Name: "gil"}, "", "", `"going" is being deleted`},
		"being deleted, named":             {Requester{Name: "gil"}, "going", "", `"going" is being deleted`},
		"another's that is being deleted":  {Requester{Name: "alice"}, "going", "", `not an owner or admin of a Tenant "going"`},
		"suspended":                        {Requester{Name: "sue"}, "", "", `the Tenant "unpaid" is suspended: the bill of May`},
		"suspended, named":                 {Requester{Name: "frank"}, "unpaid", "", `the Tenant "unpaid" is suspended: the bill of May`},
		"suspended, no reason given":       {Requester{Name: "quinn"}, "", "", `the Tenant "quiet" is suspended: ask an operator`},
		"one of two is suspended":          {Requester{Name: "frank"}, "", "free", ""},
		"another's that is suspended":      {Requester{Name: "alice"}, "unpaid", "", `not an owner or admin of a Tenant "unpaid"`},
		"a viewer of a suspended one":      {Requester{Name: "vera"}, "unpaid", "", `not an owner or admin of a Tenant "unpaid"`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ChooseTenant(tenants, tt.who, tt.wanted)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || got.Name != tt.want {
				t.Errorf("ChooseTenant = %v, %v; want %s", got, err, tt.want)
			}
		})
	}
}

func TestTenantsOf(t *testing.T) {
	tenants := []v1alpha1.Tenant{tenant("b", member("User", "alice", "view")), tenant("a", member("User", "alice", "owner")), tenant("c", member("Group", "alice", "owner"))}
	if got := TenantsOf(tenants, "alice"); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("TenantsOf = %v", got)
	}
}

// A suspended Tenant has members in name only.
func TestSuspended(t *testing.T) {
	acme := tenant("acme", member("User", "olga", "owner"), member("Group", "team", "view"), member("ServiceAccount", "ci:bot", "edit"))
	for name, who := range map[string]Requester{
		"user": {Name: "olga"}, "group": {Name: "x", Groups: []string{"team"}}, "service account": {Name: "system:serviceaccount:ci:bot"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, suspended := range []bool{false, true} {
				acme.Spec.Suspended = suspended
				if who.IsMember(&acme) == suspended || (len(who.Roles(&acme)) == 0) != suspended || who.IsLockedOut(&acme) != suspended {
					t.Errorf("suspended %t: member %t, roles %v, locked out %t", suspended, who.IsMember(&acme), who.Roles(&acme), who.IsLockedOut(&acme))
				}
			}
		})
	}
	if b, c := RoleBindings(&acme, "shop", nil), ClusterRoleBindings(&acme, nil, nil); len(b)+len(c) > 0 {
		t.Errorf("bindings %v, %v", b, c)
	}
	acme.Spec.Suspended = false
	want := FlowSchemas(&acme, []string{"shop"}, nil)
	acme.Spec.Suspended = true
	if diff := cmp.Diff(want, FlowSchemas(&acme, []string{"shop"}, nil)); diff != "" {
		t.Error("its requests count as somebody else's:", diff)
	}
	if stranger := (Requester{Name: "mallory"}); stranger.IsLockedOut(&acme) {
		t.Error("one who was never a member is told")
	}
}

func TestSplitServiceAccountUser(t *testing.T) {
	for user, want := range map[string]string{
		"system:serviceaccount:shop:web": "shop/web", "system:serviceaccount:shop": "", "system:serviceaccount::web": "", "system:serviceaccount:a:b:c": "",
		"system:node:n1": "", "shop:web": "", "": "",
	} {
		namespace, account, ok := SplitServiceAccountUser(user)
		if got := namespace + "/" + account; ok != (want != "") || ok && got != want {
			t.Errorf("%q: %s, %t, want %q", user, got, ok, want)
		}
	}
}
