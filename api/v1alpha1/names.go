package v1alpha1

// Labels and annotations. Only operators and the product's own components may
// set those on a tenant's objects; admission policies see to it.
const (
	// LabelTenant on a Namespace names the Tenant that owns it.
	LabelTenant = "h8s.io/tenant"
	// LabelNetwork on a Namespace names the Network that its pods join.
	LabelNetwork = "h8s.io/network"
	// LabelSandbox on a Namespace is the RuntimeClass that a pod gets if it
	// names none. Admission reads it from namespaceObject.
	LabelSandbox = "h8s.io/sandbox"
	// AnnotationSandboxes on a Namespace lists the RuntimeClasses that its pods
	// may name, separated by commas.
	AnnotationSandboxes = "h8s.io/sandboxes"
	// AnnotationNetworks on a Pod names the Network it was admitted for. The
	// node agent refuses a pod whose annotation and namespace disagree.
	AnnotationNetworks = "h8s.io/networks"
	// AnnotationTenant on a Pod names the Tenant it was admitted for. Pods that are
	// virtual machines share memory within a Tenant only.
	AnnotationTenant = "h8s.io/tenant"
	// AnnotationCreator on a Namespace is the user who made it.
	AnnotationCreator = "h8s.io/creator"
	// LabelNodeReady on a Node is "true" once its container runtime asks the node
	// agent about every pod. Admission makes every tenant's pod select it: on a
	// node that is still being set up, it would land on the default network.
	LabelNodeReady = "h8s.io/node-ready"
	// LabelHyper on a Node says what executes the virtual machines of its pods, kvm or
	// tcg, once that is known.
	LabelHyper = "h8s.io/hyper"
	// LabelProject on a Tenant is the id of the project of Keystone's whose people are
	// its members, and AnnotationProject that project's name: DOMAIN/PROJECT.
	LabelProject      = "h8s.io/keystone-project-id"
	AnnotationProject = "h8s.io/keystone-project"
	// LabelManagedBy marks objects that the controller made for a Tenant.
	LabelManagedBy = "app.kubernetes.io/managed-by"
	// ManagedBy is the value of LabelManagedBy.
	ManagedBy = "h8s-controller"
	// ServiceProxyName is the value of the well-known label
	// service.kubernetes.io/service-proxy-name on a tenant's Services and
	// EndpointSlices: it tells kube-proxy that the portals serve them.
	ServiceProxyName = "h8s.io"
	// Finalizer holds an object back until what was made for it is gone.
	Finalizer = "h8s.io/finalizer"
)

// Condition types.
const (
	ConditionReady        = "Ready"
	ConditionMembersReady = "MembersReady"
	ConditionNetworkReady = "NetworkReady"
	ConditionQuotaReady   = "QuotaReady"
	// ConditionConflict on a Network is True while its CIDRs overlap with
	// something that a node or the cluster needs for itself.
	ConditionConflict = "Conflict"
	// ConditionSuspended on a Tenant is there while spec.suspended is set: True once
	// no member has access any more, False while it is being taken away.
	ConditionSuspended = "Suspended"
	// ConditionDeleting says what a deletion waits for.
	ConditionDeleting = "Deleting"
)

// SandboxGVisor and SandboxHyper are RuntimeClass names that the chart installs.
const (
	SandboxGVisor = "gvisor"
	SandboxHyper  = "hyper"
)
