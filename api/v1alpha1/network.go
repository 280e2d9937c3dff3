package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// CIDR is a range of addresses in canonical form, such as 10.0.0.0/16.
//
// +kubebuilder:validation:MaxLength=43
// +kubebuilder:validation:XValidation:rule="isCIDR(self)",message="not a CIDR: write it as address/length, such as 10.0.0.0/16"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self).ip().family() == 4",message="IPv6 is not supported yet: use an IPv4 CIDR such as 10.0.0.0/16"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self).masked() == cidr(self)",message="not canonical: bits are set behind the prefix length; 10.0.1.0/16, for one, must be written 10.0.0.0/16"
// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || cidr(self).ip().family() != 4 || (cidr(self).prefixLength() >= 8 && cidr(self).prefixLength() <= 26)",message="wrong size: an IPv4 Network must be between /8 and /26"
type CIDR string

// Provider is what implements a Network.
type Provider string

// The providers.
const (
	ProviderVXLAN Provider = "vxlan"
)

// Network is an isolated address space that serves the namespaces of one
// tenant. Two Networks may use the same CIDR.
//
// +kubebuilder:object:root=true
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:resource:scope=Cluster,shortName=net
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Tenant",type=string,JSONPath=`.spec.tenant`
// +kubebuilder:printcolumn:name="CIDRs",type=string,JSONPath=`.spec.cidrs`
// +kubebuilder:printcolumn:name="Provider",type=string,JSONPath=`.spec.provider`
// +kubebuilder:printcolumn:name="ID",type=integer,JSONPath=`.status.id`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Pods",type=integer,JSONPath=`.status.pods`
// +kubebuilder:printcolumn:name="Reason",type=string,priority=1,JSONPath=`.status.conditions[?(@.type=="Ready")].message`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:selectablefield:JSONPath=`.spec.tenant`
// +kubebuilder:selectablefield:JSONPath=`.status.id`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 40",message="a Network's name may have 40 characters at most: other names are made from it"
// +kubebuilder:validation:XValidation:rule="self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="a Network's name must be a DNS label (letters, digits and '-'): it is used as a label value and in names"
type Network struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   NetworkSpec   `json:"spec"`
	Status NetworkStatus `json:"status,omitempty"`
}

// NetworkSpec is what an operator wants of a Network.
type NetworkSpec struct {
	// Tenant that owns the Network.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=40
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="tenant is immutable: make another Network"
	Tenant string `json:"tenant"`
	// CIDRs of the Network, one per address family at most.
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=1
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="cidrs are immutable: make another Network"
	CIDRs []CIDR `json:"cidrs"`
	// Provider that implements the Network.
	// +kubebuilder:validation:Enum=vxlan
	// +kubebuilder:default=vxlan
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="provider is immutable: make another Network"
	Provider Provider `json:"provider,omitempty"`
	// Egress says what the Network's pods may reach outside of it.
	// +kubebuilder:default={internet: true, apiServer: true}
	Egress Egress `json:"egress,omitempty"`
}

// Egress says what pods may reach outside their Network.
type Egress struct {
	// Internet allows addresses that are no part of the cluster, masqueraded.
	// +kubebuilder:default=true
	Internet *bool `json:"internet,omitempty"`
	// APIServer allows the Kubernetes API server, through the Service
	// kubernetes.default.
	// +kubebuilder:default=true
	APIServer *bool `json:"apiServer,omitempty"`
}

// NetworkStatus is what the controller last saw.
type NetworkStatus struct {
	// ObservedGeneration is the generation of the spec that the conditions speak of.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ID is the number of the Network on the wire (a VXLAN network identifier,
	// RFC 7348 section 5) and on every node. Unique, set once; 0 means not set.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=16777215
	ID int32 `json:"id,omitempty"`
	// Namespaces that the Network serves, sorted.
	// +listType=set
	Namespaces []string `json:"namespaces,omitempty"`
	// Pods on the Network.
	Pods int32 `json:"pods,omitempty"`
	// Blocks that nodes hold.
	Blocks int32 `json:"blocks,omitempty"`
	// Conditions: Ready, Conflict; Deleting while the Network goes away.
	// +listType=map
	// +listMapKey=type
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// NetworkList is a list of Networks.
//
// +kubebuilder:object:root=true
type NetworkList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Network `json:"items"`
}

// Block is a slice of a Network's CIDR that one node holds and gives addresses
// from. Node agents write Blocks; a person only reads them. Its name is made
// from network and cidr (acme-10-0-3-16), so that creating one is an atomic claim.
//
// +kubebuilder:object:root=true
// +kubebuilder:metadata:annotations="helm.sh/resource-policy=keep"
// +kubebuilder:resource:scope=Cluster
// +kubebuilder:printcolumn:name="Network",type=string,JSONPath=`.spec.network`
// +kubebuilder:printcolumn:name="CIDR",type=string,JSONPath=`.spec.cidr`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.spec.node`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:selectablefield:JSONPath=`.spec.node`
// +kubebuilder:selectablefield:JSONPath=`.spec.network`
// +kubebuilder:validation:XValidation:rule="self.spec == oldSelf.spec",message="a Block is immutable: delete it and claim another"
type Block struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec BlockSpec `json:"spec"`
}

// BlockSpec says who holds which addresses.
type BlockSpec struct {
	// Network that the addresses belong to.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=40
	Network string `json:"network"`
	// CIDR of the Block.
	// +kubebuilder:validation:MaxLength=43
	// +kubebuilder:validation:XValidation:rule="isCIDR(self) && cidr(self).masked() == cidr(self)",message="not a canonical CIDR"
	CIDR string `json:"cidr"`
	// Node that holds the Block.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Node string `json:"node"`
}

// BlockList is a list of Blocks.
//
// +kubebuilder:object:root=true
type BlockList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Block `json:"items"`
}
