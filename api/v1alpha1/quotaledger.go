package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// QuotaLedger keeps the quota of the Tenant of the same name exact: it lists what
// was admitted and may not be seen yet by every controller. Controllers write it,
// nobody else should: while it is missing, what is being created is not counted.
//
// +kubebuilder:object:root=true
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:resource:scope=Cluster,shortName=ql
// +kubebuilder:printcolumn:name="Generation",type=integer,JSONPath=`.spec.tenantGeneration`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type QuotaLedger struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// Spec is one value to the API server: whose each of its fields is (managedFields) would
	// be worked out at each write, which are as many as the tenant's creations.
	// +structType=atomic
	Spec QuotaLedgerSpec `json:"spec,omitempty"`
}

// QuotaLedgerSpec is replaced as a whole, on condition that nobody has written it since it was read.
type QuotaLedgerSpec struct {
	// TenantGeneration is the generation of the Tenant that Hard was taken from.
	TenantGeneration int64 `json:"tenantGeneration,omitempty"`
	// Hard is the quota in force.
	Hard corev1.ResourceList `json:"hard,omitempty"`
	// Settled says how new the view of a controller must be that decides by this
	// ledger: a resourceVersion per resource. Up to there objects have no
	// reservation any more, because they can be seen.
	Settled map[string]string `json:"settled,omitempty"`
	// Reservations are of objects that were admitted and may not exist yet.
	// +listType=atomic
	Reservations []QuotaReservation `json:"reservations,omitempty"`
	// Holds are what controllers may grant without writing the ledger first.
	// +listType=atomic
	Holds []QuotaHold `json:"holds,omitempty"`
}

// QuotaHold is a part of the quota that counts as used, because one controller grants
// it to creations at once and enters them as reservations a moment later.
type QuotaHold struct {
	// Holder is the controller's process. Nobody else grants from the hold.
	Holder string `json:"holder"`
	// Resource that is created, as in "pods".
	Resource string `json:"resource"`
	// Usage is the most that was granted and is not entered.
	Usage corev1.ResourceList `json:"usage"`
	// Until when the hold counts. The holder stops early enough for all that it has
	// granted to be written, or given up, by then.
	Until metav1.Time `json:"until"`
	// TenantGeneration is the latest in which the Tenant is known to have had the quota by
	// which the hold was taken. If that is earlier than the ledger's, the hold is recalled.
	TenantGeneration int64 `json:"tenantGeneration,omitempty"`
	// Recalled asks the holder to enter what it has granted and give back the rest.
	Recalled bool `json:"recalled,omitempty"`
}

// QuotaReservation is what one object takes of the quota while it is being written.
type QuotaReservation struct {
	// UID of the object, which it has from admission on.
	UID types.UID `json:"uid"`
	// Resource of the object, as in "pods" and "deployments.apps".
	Resource string `json:"resource"`
	// Namespace and Name of the object.
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	// After is the resourceVersion that the object had before an update, empty for
	// a creation. Whoever sees a later one knows how the update has ended.
	After string `json:"after,omitempty"`
	// Usage is all that the object uses if it is written, not only what is added.
	Usage corev1.ResourceList `json:"usage"`
	// Until when the reservation counts if nothing is seen of it.
	Until metav1.Time `json:"until"`
}

// QuotaLedgerList is a list of QuotaLedgers.
//
// +kubebuilder:object:root=true
type QuotaLedgerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []QuotaLedger `json:"items"`
}
