// Package v1alpha1 holds the kinds of the API group h8s.io: Tenant, User,
// Network, Block and QuotaLedger. All are cluster-scoped. The package has types, markers and
// names, and no logic.
//
// +kubebuilder:object:generate=true
// +groupName=h8s.io
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of every kind in this package.
var GroupVersion = schema.GroupVersion{Group: "h8s.io", Version: "v1alpha1"}

// AddToScheme registers the kinds of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion,
		&Tenant{}, &TenantList{},
		&User{}, &UserList{},
		&Network{}, &NetworkList{},
		&Block{}, &BlockList{},
		&QuotaLedger{}, &QuotaLedgerList{},
	)
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
