package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// User is a person or machine that may log in. What a User may do stands on the
// Tenants that list it as a member.
//
// +kubebuilder:object:root=true
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:resource:scope=Cluster
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Display Name",type=string,JSONPath=`.spec.displayName`
// +kubebuilder:printcolumn:name="Disabled",type=boolean,JSONPath=`.spec.disabled`
// +kubebuilder:printcolumn:name="Tenants",type=string,JSONPath=`.status.tenants`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type User struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   UserSpec   `json:"spec,omitempty"`
	Status UserStatus `json:"status,omitempty"`
}

// UserSpec is what an operator says of a User.
type UserSpec struct {
	// DisplayName is for people to read.
	// +kubebuilder:validation:MaxLength=253
	DisplayName string `json:"displayName,omitempty"`
	// Disabled takes away every access that memberships give, at once, and the
	// renewal of the User's certificate. What comes by a group stays, but for lists by label.
	Disabled bool `json:"disabled,omitempty"`
}

// UserStatus is what the controller last saw.
type UserStatus struct {
	// ObservedGeneration is the generation of the spec that the conditions speak of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Tenants that list this User as a member, sorted.
	// +listType=set
	Tenants []string `json:"tenants,omitempty"`
	// Conditions: Ready.
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// UserList is a list of Users.
//
// +kubebuilder:object:root=true
type UserList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []User `json:"items"`
}
