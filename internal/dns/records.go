// Package dns answers the queries of one Network's pods as the Kubernetes DNS specification 1.1 says, from an
// immutable Zone that its owner swaps. Names of other Networks do not exist in it.
package dns

import "net/netip"

// Service is one Service of the Network.
type Service struct {
	Namespace, Name string
	// ClusterIPs are the Service's addresses; none for a headless Service.
	ClusterIPs []netip.Addr
	// ExternalName is the target of a Service of type ExternalName; the rest but the name is ignored then.
	ExternalName string
	// Ports of a Service with ClusterIPs; a headless Service has those of its Endpoints.
	Ports []Port
	// Headless Services answer with their Endpoints.
	Headless bool
}

// Port is a named or unnamed port.
type Port struct {
	Name string
	// Protocol is tcp, udp or sctp, in any case.
	Protocol string
	Number   uint16
}

// Endpoint is one address behind a headless Service.
type Endpoint struct {
	// Namespace and Service name the Service it belongs to.
	Namespace, Service string
	Address            netip.Addr
	// Hostname gives the endpoint a name of its own; empty: the address with dashes.
	Hostname string
	Ports    []Port
	// Ready endpoints are answered. The caller sets it for Services that publish addresses that are not ready.
	Ready bool
}

// Pod is a pod of the Network: it gets the name <address with dashes>.<namespace>.pod.<domain>.
type Pod struct {
	Namespace string
	Address   netip.Addr
}

// Records is what a Zone is made of.
type Records struct {
	Services  []Service
	Endpoints []Endpoint
	Pods      []Pod
	// Reverse are the ranges for which this server alone answers reverse lookups: the Network's CIDR and the
	// Service CIDRs. What has no name there does not exist.
	Reverse []netip.Prefix
}
