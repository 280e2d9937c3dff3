package tenancy

import (
	"slices"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	// PriorityLevel is the PriorityLevelConfiguration, of the chart, for the requests
	// of all tenants.
	PriorityLevel = "h8s-tenants"
	// flowPrecedence: after Kubernetes' own components (up to 900), before what it
	// has for other ServiceAccounts and people (from 9000 on).
	flowPrecedence = 5000
)

// FlowSchemaName is the name of the FlowSchema of the tenant's requests.
func FlowSchemaName(tenant string) string { return "h8s-tenant-" + tenant }

// FlowSchema makes the requests of the tenant's people and of its ServiceAccounts
// one flow (API Priority and Fairness, KEP-1040), nil if there is nobody. It does
// not tell users apart: a tenant makes as many ServiceAccounts as it likes, and
// would get as many shares. Who is in several tenants counts in the first by name.
func FlowSchema(t *v1alpha1.Tenant, namespaces []string, disabled Disabled) *flowcontrolv1.FlowSchema {
	var who []flowcontrolv1.Subject
	for _, s := range subjects(t, disabled, v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleView) {
		switch s.Kind {
		case rbacv1.UserKind:
			who = append(who, flowcontrolv1.Subject{Kind: flowcontrolv1.SubjectKindUser, User: &flowcontrolv1.UserSubject{Name: s.Name}})
		case rbacv1.GroupKind:
			who = append(who, group(s.Name))
		case rbacv1.ServiceAccountKind:
			who = append(who, flowcontrolv1.Subject{Kind: flowcontrolv1.SubjectKindServiceAccount, ServiceAccount: &flowcontrolv1.ServiceAccountSubject{Namespace: s.Namespace, Name: s.Name}})
		}
	}
	for _, ns := range slices.Sorted(slices.Values(namespaces)) {
		who = append(who, group("system:serviceaccounts:"+ns))
	}
	if len(who) == 0 {
		return nil
	}
	all := []string{flowcontrolv1.ResourceAll}
	return &flowcontrolv1.FlowSchema{
		ObjectMeta: metav1.ObjectMeta{Name: FlowSchemaName(t.Name), Labels: ObjectLabels(t.Name)},
		Spec: flowcontrolv1.FlowSchemaSpec{
			PriorityLevelConfiguration: flowcontrolv1.PriorityLevelConfigurationReference{Name: PriorityLevel},
			MatchingPrecedence:         flowPrecedence,
			Rules: []flowcontrolv1.PolicyRulesWithSubjects{{
				Subjects:         who,
				ResourceRules:    []flowcontrolv1.ResourcePolicyRule{{Verbs: all, APIGroups: all, Resources: all, ClusterScope: true, Namespaces: all}},
				NonResourceRules: []flowcontrolv1.NonResourcePolicyRule{{Verbs: all, NonResourceURLs: all}},
			}},
		},
	}
}

func group(name string) flowcontrolv1.Subject {
	return flowcontrolv1.Subject{Kind: flowcontrolv1.SubjectKindGroup, Group: &flowcontrolv1.GroupSubject{Name: name}}
}
