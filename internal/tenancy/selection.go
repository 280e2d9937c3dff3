package tenancy

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

// IsMember says whether the requester has a membership of the tenant in force, in any role.
func (r Requester) IsMember(t *v1alpha1.Tenant) bool {
	return slices.ContainsFunc(Members(t), r.Is)
}

// IsLockedOut says whether the requester would be a member, were the tenant not suspended.
func (r Requester) IsLockedOut(t *v1alpha1.Tenant) bool {
	return t.Spec.Suspended && slices.ContainsFunc(t.Spec.Members, r.Is)
}

// SelectsOnly says whether a selection that meets all the requirements (KEP-4601,
// field labelSelector) has only objects labelled with tenants that mine accepts.
//
// One requirement is enough: each of the others makes the selection smaller. It
// must be of the operator In, and mine must accept every value: NotIn, Exists and
// DoesNotExist say nothing of whose the objects are. An error of mine ends it.
func SelectsOnly(requirements []metav1.LabelSelectorRequirement, mine func(tenant string) (bool, error)) (bool, error) {
	for _, r := range requirements {
		if r.Key != v1alpha1.LabelTenant || r.Operator != metav1.LabelSelectorOpIn || len(r.Values) == 0 {
			continue
		}
		all := true
		for _, tenant := range r.Values {
			ok, err := mine(tenant)
			if err != nil {
				return false, err
			}
			if all = ok; !all {
				break
			}
		}
		if all {
			return true, nil
		}
	}
	return false, nil
}
