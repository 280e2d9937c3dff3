package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Tenant is the unit of trust: people, namespaces, networks, sandboxes and quota
// that belong together and are closed to everyone else's.
//
// +kubebuilder:object:root=true
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:resource:scope=Cluster,shortName=tn
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Suspended",type=string,JSONPath=`.status.conditions[?(@.type=="Suspended")].status`
// +kubebuilder:printcolumn:name="Network",type=string,JSONPath=`.status.network`
// +kubebuilder:printcolumn:name="Namespaces",type=string,JSONPath=`.status.namespaces`
// +kubebuilder:printcolumn:name="Sandbox",type=string,JSONPath=`.spec.sandbox.default`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40",message="a Tenant's name may have 40 characters at most: other names are made from it"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="a Tenant's name must be a DNS label (letters, digits and '-'): it is used as a label value and in names"
type Tenant struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   TenantSpec   `json:"spec"`
	Status TenantStatus `json:"status,omitempty"`
}

// TenantSpec is what an operator wants of a Tenant.
type TenantSpec struct {
	// Members are the people and machines of the tenant and what each may do in
	// all its namespaces. One who is not listed may do nothing.
	// +listType=map
	// +listMapKey=kind
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=500
	Members []Member `json:"members,omitempty"`

	// Network is the tenant's default Network: either CIDRs, for one that is
	// made with the Tenant's name and deleted with it, or the name of an
	// existing one that the tenant owns.
	// +kubebuilder:validation:XValidation:rule="has(self.cidrs) != has(self.name)",message="set either network.cidrs (a Network is made) or network.name (an existing Network is used), not both"
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a Tenant's default network is immutable: make another Network, or another Tenant"
	Network TenantNetwork `json:"network"`

	// Sandbox says which RuntimeClasses the tenant's pods may use.
	// +kubebuilder:default={default: gvisor, allowed: {gvisor}}
	// +kubebuilder:validation:XValidation:rule="self.default in self.allowed",message="sandbox.default must be one of sandbox.allowed"
	Sandbox TenantSandbox `json:"sandbox,omitempty"`

	// Quota bounds what the tenant may have across all its namespaces.
	Quota TenantQuota `json:"quota,omitempty"`

	// Suspended takes away every access that memberships give, as if the tenant had
	// no members, and refuses tokens of its ServiceAccounts that no pod holds. Its
	// workloads, volumes and networks stay as they are, and pods keep their own tokens.
	Suspended bool `json:"suspended,omitempty"`
	// SuspendedBecause tells the members why. It says nothing while the Tenant is not suspended.
	// +kubebuilder:validation:MaxLength=253
	SuspendedBecause string `json:"suspendedBecause,omitempty"`
}

// Member is one subject and its role in the Tenant.
//
// +kubebuilder:validation:XValidation:rule="self.kind != 'ServiceAccount' || self.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?:[a-z0-9]([-.a-z0-9]*[a-z0-9])?$')",message="the name of a ServiceAccount must be written namespace:name"
type Member struct {
	// Kind of the subject.
	// +kubebuilder:validation:Enum=User;Group;ServiceAccount
	Kind string `json:"kind"`
	// Name of the user or group as the API server authenticates it; for a
	// ServiceAccount "namespace:name".
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('system:')",message="names that start with 'system:' belong to Kubernetes and cannot be members of a Tenant"
	// +kubebuilder:validation:XValidation:rule="self != '*'",message="'*' stands for everybody in Kubernetes' flow control and cannot be a member of a Tenant: list a group"
	Name string `json:"name"`
	// Role of the member in every namespace of the tenant. An owner or admin
	// may also create and delete namespaces.
	// +kubebuilder:validation:Enum=owner;admin;edit;view
	Role Role `json:"role"`
}

// Role is what a member may do.
type Role string

// The roles. Each maps onto an aggregated ClusterRole of Kubernetes.
const (
	RoleOwner Role = "owner"
	RoleAdmin Role = "admin"
	RoleEdit  Role = "edit"
	RoleView  Role = "view"
)

// TenantNetwork names or describes the tenant's default Network.
type TenantNetwork struct {
	// CIDRs of the Network to make.
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1
	CIDRs []CIDR `json:"cidrs,omitempty"`
	// Name of an existing Network.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=40
	Name string `json:"name,omitempty"`
}

// TenantSandbox says what stands between the tenant's processes and the host kernel.
type TenantSandbox struct {
	// Default is the RuntimeClass of a pod that names none.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:default=gvisor
	Default string `json:"default,omitempty"`
	// Allowed are the RuntimeClasses that a pod may name.
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:default={gvisor}
	Allowed []string `json:"allowed,omitempty"`
}

// TenantQuota bounds the tenant. Nil or absent means no bound.
type TenantQuota struct {
	// Namespaces is how many namespaces the tenant may have.
	// +kubebuilder:validation:Minimum=0
	Namespaces *int32 `json:"namespaces,omitempty"`
	// Networks is how many Networks the tenant may have.
	// +kubebuilder:validation:Minimum=0
	Networks *int32 `json:"networks,omitempty"`
	// Hard has the resource names and meaning of a ResourceQuota's hard, as a
	// total of all namespaces of the tenant.
	// +kubebuilder:validation:MaxProperties=64
	Hard corev1.ResourceList `json:"hard,omitempty"`
}

// TenantStatus is what the controller last saw.
type TenantStatus struct {
	// ObservedGeneration is the generation of the spec that the conditions speak of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Network is the name of the default Network.
	Network string `json:"network,omitempty"`
	// Namespaces of the tenant, sorted.
	// +listType=set
	Namespaces []string `json:"namespaces,omitempty"`
	// Reservations are places in quota.namespaces of namespaces whose creation
	// was admitted and that did not exist yet when this was written.
	// +listType=map
	// +listMapKey=uid
	Reservations []Reservation `json:"reservations,omitempty"`
	// Quota is what quota.hard allows and how much of it is used.
	Quota *TenantQuotaStatus `json:"quota,omitempty"`
	// Conditions: Ready, MembersReady, NetworkReady, QuotaReady; Suspended while
	// access is taken away; Deleting while the Tenant goes away. Ready says that the
	// spec is in force, and so is True of a Tenant that is suspended as the spec wants.
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// TenantQuotaStatus is brought up to date every few seconds. Admission does not
// decide by it, but by what is the case.
type TenantQuotaStatus struct {
	// Hard is the quota in force.
	Hard corev1.ResourceList `json:"hard,omitempty"`
	// Used is what the tenant's objects use of it.
	Used corev1.ResourceList `json:"used,omitempty"`
}

// Reservation is a place in the quota that one namespace takes while it is being created.
type Reservation struct {
	// UID of the namespace, which it has from admission on.
	UID types.UID `json:"uid"`
	// Namespace is its name.
	Namespace string `json:"namespace"`
	// Until when the reservation counts if the namespace does not appear.
	Until metav1.Time `json:"until"`
}

// TenantList is a list of Tenants.
//
// +kubebuilder:object:root=true
type TenantList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Tenant `json:"items"`
}
