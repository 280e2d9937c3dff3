// Package portal is one Network on one node: a network namespace that is router, service load balancer and
// firewall of that Network's pods on that node, and the rules by which the node protects itself from it.
//
// The package knows nothing of Kubernetes. Its caller hands over the whole desired state (Guard, Spec) as often as
// it likes; the package compares it with the kernel and repairs what differs.
package portal

import (
	"errors"
	"net"
	"net/netip"
	"time"
)

// NodeConfig is what every portal of a node shares. It is fixed for the life of a Manager.
type NodeConfig struct {
	// NodeIP is the node's IPv4 address on the underlay: source of all VXLAN traffic.
	NodeIP netip.Addr
	// Underlay is the link that holds NodeIP; empty: it is found by NodeIP.
	Underlay string
	// ClusterDNS is the address of the name server inside every portal; see Manager.Listen.
	ClusterDNS netip.Addr
	// NetnsDir is where portals are bound as h8s-<id>; default /run/netns.
	NetnsDir string
	// VXLANPort is the UDP port of the overlay; default 4789. All nodes must agree.
	VXLANPort int
}

// Guard is what the node must know to protect itself from portals, and portals from everything else.
type Guard struct {
	// NodeIPs are the underlay addresses of all nodes, this one included. Only they may send VXLAN.
	NodeIPs []netip.Addr
	// Infrastructure are the ranges that no tenant may reach: pod CIDRs of the default network, Service CIDRs, the
	// underlay, and whatever else the operator keeps from tenants.
	Infrastructure []netip.Prefix
	// APIServers are the endpoints of the API server: the one exception.
	APIServers []netip.AddrPort
}

// Spec is the whole desired state of one portal except its pods, which come and go by Attach and Detach.
// Hypernetes Networks are IPv4: prefixes and addresses of another family in CIDR, Blocks and Remote are refused,
// Services and endpoints of another family are left out.
type Spec struct {
	// ID is the Network's number: name of the namespace and VNI of the overlay; 1 to 2^24-1.
	ID int32
	// CIDR is the Network's range.
	CIDR netip.Prefix
	// Blocks are the slices of CIDR that this node holds.
	Blocks []netip.Prefix
	// Remote are the slices that other nodes hold.
	Remote []RemoteBlock
	// Services are those of the Network's namespaces, one entry per port.
	Services []Service
	// ServiceCIDRs are the cluster's Service ranges. What goes there and is no Service of this Network is rejected.
	ServiceCIDRs []netip.Prefix
	// Egress is what pods may reach beyond the Network.
	Egress Egress
}

// RemoteBlock is a Block held by another node.
type RemoteBlock struct {
	CIDR   netip.Prefix
	NodeIP netip.Addr
}

// Egress is what pods may reach beyond their Network.
type Egress struct {
	// Internet lets traffic out to everything but infrastructure, masqueraded as the node.
	Internet bool
	// APIServer lets TCP connections out to APIServers.
	APIServer  bool
	APIServers []netip.AddrPort
}

// Service is one port of one Service.
type Service struct {
	// Name is namespace/name:port, for diagnostics only.
	Name      string
	ClusterIP netip.Addr
	// Protocol is tcp, udp or sctp, in any case.
	Protocol string
	Port     uint16
	// Endpoints that may get traffic now; none: connections are refused.
	Endpoints []netip.AddrPort
	// AffinityTimeout is for how long a client sticks to its endpoint; 0: it does not.
	AffinityTimeout time.Duration
}

// Attachment is one interface of one pod.
type Attachment struct {
	// ContainerID and IfName identify it, as they do in CNI.
	ContainerID, IfName string
	// Netns is the path of the pod's network namespace.
	Netns string
	// Address is the pod's; it must lie in a Block that this node holds.
	Address netip.Addr
}

// Result is what Attach made.
type Result struct {
	// HostIfName is the name of the link inside the portal.
	HostIfName string
	// PodMAC is the hardware address of the pod's interface.
	PodMAC net.HardwareAddr
	// Gateway is the pod's next hop for everything.
	Gateway netip.Addr
	// MTU of the pod's interface.
	MTU int
}

var (
	// ErrNoPortal says that this Manager has not ensured the portal: the caller should Ensure it and try again.
	ErrNoPortal = errors.New("the network's portal is not set up on this node yet")
	// ErrNoGuard says that EnsureGuard has not succeeded yet; no portal is opened before it has.
	ErrNoGuard = errors.New("the node's guard rules are not in place yet")
)
