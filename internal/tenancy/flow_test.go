package tenancy

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"h8s.io/hypernetes/api/v1alpha1"
)

// A FlowSchema's subject called "*" is everybody, so no member becomes one.
func TestFlowSchemasOfMembers(t *testing.T) {
	for name, tt := range map[string]struct {
		members []v1alpha1.Member
		want    []string
	}{
		"nobody":    {nil, nil},
		"people":    {[]v1alpha1.Member{{Kind: KindUser, Name: "alice", Role: v1alpha1.RoleOwner}, {Kind: KindGroup, Name: "team", Role: v1alpha1.RoleView}}, []string{"team", "alice"}},
		"everybody": {[]v1alpha1.Member{{Kind: KindUser, Name: "*", Role: v1alpha1.RoleOwner}, {Kind: KindGroup, Name: "*", Role: v1alpha1.RoleOwner}}, nil},
		"among others": {[]v1alpha1.Member{
			{Kind: KindUser, Name: "*", Role: v1alpha1.RoleOwner}, {Kind: KindUser, Name: "alice", Role: v1alpha1.RoleOwner}, {Kind: KindServiceAccount, Name: "ci:*", Role: v1alpha1.RoleOwner},
		}, []string{"alice"}},
	} {
		t.Run(name, func(t *testing.T) {
			tenant := &v1alpha1.Tenant{Spec: v1alpha1.TenantSpec{Members: tt.members}}
			schemas := FlowSchemas(tenant, nil, nil)
			var got []string
			for _, s := range schemas {
				got = nil // each level has the same
				for _, who := range s.Spec.Rules[0].Subjects {
					switch {
					case who.User != nil:
						got = append(got, who.User.Name)
					case who.Group != nil:
						got = append(got, who.Group.Name)
					case who.ServiceAccount != nil:
						got = append(got, who.ServiceAccount.Name)
					}
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("- want, + got:\n%s", diff)
			}
		})
	}
}
