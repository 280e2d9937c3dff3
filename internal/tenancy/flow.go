package tenancy

import (
	"slices"

	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

// flowPrecedence: after Kubernetes' own components (up to 900), before what it has
// for other ServiceAccounts and people (from 9000 on).
const flowPrecedence = 5000

// flows are the levels, of the chart, for the requests of all tenants. What only gets
// one object has a level of its own: it would wait until a list or a write is over, and
// those take ten times as long. Lists and writes share one, and with it few seats:
// together they would take all processors from the gets.
//
// The API server looks at one FlowSchema after the other, by precedence, at each
// request. So those of gets come first, all tenants' of them, or it would look at those
// of the rest in vain. (The prefix and the level are called after lists, which were once
// alone there.)
var flows = []struct { //nolint:gochecknoglobals // a table
	prefix, level string
	precedence    int32
	verbs         []string
	// urls says that requests for no resource are of this level.
	urls bool
}{
	{"h8s-tenant-", "h8s-tenants", flowPrecedence - 1, []string{"get"}, true},
	{"h8s-lists-", "h8s-tenants-lists", flowPrecedence, []string{flowcontrolv1.VerbAll}, false},
}

// FlowSchemaNames are the names of the FlowSchemas of the tenant's requests.
func FlowSchemaNames(tenant string) []string {
	var names []string
	for _, f := range flows {
		names = append(names, f.prefix+tenant)
	}
	return names
}

// FlowSchemas make the requests of the tenant's people and of its ServiceAccounts
// one flow in each level (API Priority and Fairness, KEP-1040); none if there is
// nobody. They do not tell users apart: a tenant makes as many ServiceAccounts as
// it likes, and would get as many shares. Who is in several tenants counts in the
// first by name. A suspended tenant keeps its flow: what is refused to its people
// takes the tenant's share, not everybody's.
func FlowSchemas(t *v1alpha1.Tenant, namespaces []string, disabled Disabled) []flowcontrolv1.FlowSchema {
	var who []flowcontrolv1.Subject
	for _, s := range subjects(t.Spec.Members, disabled, v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleView) {
		if s.Name == flowcontrolv1.NameAll {
			continue // a wildcard here, a mere name for RBAC; earlier versions took such members
		}
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
	var schemas []flowcontrolv1.FlowSchema
	for _, f := range flows {
		rules := flowcontrolv1.PolicyRulesWithSubjects{
			Subjects:      who,
			ResourceRules: []flowcontrolv1.ResourcePolicyRule{{Verbs: f.verbs, APIGroups: all, Resources: all, ClusterScope: true, Namespaces: all}},
		}
		if f.urls {
			rules.NonResourceRules = []flowcontrolv1.NonResourcePolicyRule{{Verbs: all, NonResourceURLs: all}}
		}
		schemas = append(schemas, flowcontrolv1.FlowSchema{
			ObjectMeta: metav1.ObjectMeta{Name: f.prefix + t.Name, Labels: ObjectLabels(t.Name)},
			Spec: flowcontrolv1.FlowSchemaSpec{
				PriorityLevelConfiguration: flowcontrolv1.PriorityLevelConfigurationReference{Name: f.level},
				MatchingPrecedence:         f.precedence,
				Rules:                      []flowcontrolv1.PolicyRulesWithSubjects{rules},
			},
		})
	}
	return schemas
}

func group(name string) flowcontrolv1.Subject {
	return flowcontrolv1.Subject{Kind: flowcontrolv1.SubjectKindGroup, Group: &flowcontrolv1.GroupSubject{Name: name}}
}
