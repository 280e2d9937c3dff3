package agent

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/dns"
	"h8s.io/hypernetes/internal/portal"
)

// snapshot is all that one Network's portal and names follow from, on one node,
// at one time.
type snapshot struct {
	network *v1alpha1.Network
	cidr    netip.Prefix
	node    string
	// held are the Blocks of this node; blocks are those of all nodes.
	held   []netip.Prefix
	blocks []*v1alpha1.Block
	// nodeIPs are the underlay addresses of nodes, by name.
	nodeIPs      map[string]netip.Addr
	serviceCIDRs []netip.Prefix
	// services and slices are those of the Network's namespaces.
	services []*corev1.Service
	slices   []*discoveryv1.EndpointSlice
	// kubernetes is the Service kubernetes.default, and apiServers its endpoints.
	kubernetes *corev1.Service
	apiServers []netip.AddrPort
	// pods are the addresses given out on this node, by namespace.
	pods []dns.Pod
}

// spec is what the portal shall be.
func (s snapshot) spec() portal.Spec {
	spec := portal.Spec{
		ID:           s.network.Status.ID,
		CIDR:         s.cidr,
		Blocks:       s.held,
		ServiceCIDRs: s.serviceCIDRs,
		Egress:       portal.Egress{Internet: allowed(s.network.Spec.Egress.Internet)},
	}
	for _, b := range s.blocks {
		cidr, err := netip.ParsePrefix(b.Spec.CIDR)
		ip, known := s.nodeIPs[b.Spec.Node]
		if err != nil || !known || b.Spec.Node == s.node || !inside(s.cidr, cidr) || slices.Contains(s.held, cidr) {
			continue
		}
		spec.Remote = append(spec.Remote, portal.RemoteBlock{CIDR: cidr, NodeIP: ip})
	}
	slices.SortFunc(spec.Remote, func(a, b portal.RemoteBlock) int { return a.CIDR.Compare(b.CIDR) })

	byService := s.slicesByService()
	for _, service := range s.services {
		spec.Services = append(spec.Services, s.servicePorts(service, byService[service.Namespace+"/"+service.Name])...)
	}
	if allowed(s.network.Spec.Egress.APIServer) {
		spec.Egress.APIServer = true
		spec.Egress.APIServers = s.apiServers
		spec.Services = append(spec.Services, s.kubernetesPorts()...)
	}
	return spec
}

func allowed(b *bool) bool { return b == nil || *b }

func inside(outer, inner netip.Prefix) bool {
	return inner.IsValid() && outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

func (s snapshot) slicesByService() map[string][]*discoveryv1.EndpointSlice {
	out := map[string][]*discoveryv1.EndpointSlice{}
	for _, slice := range s.slices {
		if name := slice.Labels[discoveryv1.LabelServiceName]; name != "" && slice.AddressType == discoveryv1.AddressTypeIPv4 {
			key := slice.Namespace + "/" + name
			out[key] = append(out[key], slice)
		}
	}
	return out
}

// clusterIP returns the Service's IPv4 address; headless Services and those of
// type ExternalName have none.
func clusterIP(service *corev1.Service) (netip.Addr, bool) {
	if service.Spec.Type == corev1.ServiceTypeExternalName {
		return netip.Addr{}, false
	}
	for _, ip := range append([]string{service.Spec.ClusterIP}, service.Spec.ClusterIPs...) {
		if addr, err := netip.ParseAddr(ip); err == nil && addr.Is4() {
			return addr, true
		}
	}
	return netip.Addr{}, false
}

func (s snapshot) servicePorts(service *corev1.Service, endpoints []*discoveryv1.EndpointSlice) []portal.Service {
	ip, ok := clusterIP(service)
	if !ok {
		return nil
	}
	var out []portal.Service
	for _, port := range service.Spec.Ports {
		out = append(out, portal.Service{
			Name:            service.Namespace + "/" + service.Name + ":" + port.Name,
			ClusterIP:       ip,
			Protocol:        strings.ToLower(string(protocol(port.Protocol))),
			Port:            uint16(port.Port),
			Endpoints:       s.endpoints(service, port, endpoints),
			AffinityTimeout: affinityTimeout(service),
		})
	}
	return out
}

func protocol(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}

func affinityTimeout(service *corev1.Service) time.Duration {
	if service.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
		return 0
	}
	if c := service.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		return time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
	}
	return time.Duration(corev1.DefaultClientIPServiceAffinitySeconds) * time.Second
}

// endpoints returns where connections to a port may go: the ready endpoints, or
// if there is none those that still serve while they terminate; the ones on this
// node only, if the Service wants that.
//
// An address counts only if it lies in the Network: a Service is no way out,
// whoever wrote the EndpointSlice. (The role that a Tenant's people have only
// reads them, but an operator may give more.)
func (s snapshot) endpoints(service *corev1.Service, port corev1.ServicePort, endpoints []*discoveryv1.EndpointSlice) []netip.AddrPort {
	local := service.Spec.InternalTrafficPolicy != nil && *service.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	ready, terminating := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
	for _, slice := range endpoints {
		for _, number := range slicePorts(slice, port.Name, protocol(port.Protocol)) {
			for _, e := range slice.Endpoints {
				if local && (e.NodeName == nil || *e.NodeName != s.node) {
					continue
				}
				for _, address := range e.Addresses {
					addr, err := netip.ParseAddr(address)
					if err != nil || !s.cidr.Contains(addr) {
						continue
					}
					switch to := netip.AddrPortFrom(addr, number); {
					case isReady(e):
						ready[to] = true
					case is(e.Conditions.Serving) && is(e.Conditions.Terminating):
						terminating[to] = true
					}
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = terminating
	}
	var out []netip.AddrPort
	for to := range ready {
		out = append(out, to)
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}

// isReady follows the API: a condition that is not set counts as true.
func isReady(e discoveryv1.Endpoint) bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }

func is(b *bool) bool { return b != nil && *b }

// slicePorts returns the numbers that a slice has for a Service's port.
func slicePorts(slice *discoveryv1.EndpointSlice, name string, proto corev1.Protocol) []uint16 {
	var out []uint16
	for _, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 || value(p.Name) != name || protocol(corev1.Protocol(value((*string)(p.Protocol)))) != proto {
			continue
		}
		out = append(out, uint16(*p.Port))
	}
	return out
}

func value(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// kubernetesPorts are those of the Service kubernetes.default: the one Service
// that leads out of the Network.
func (s snapshot) kubernetesPorts() []portal.Service {
	if s.kubernetes == nil {
		return nil
	}
	ip, ok := clusterIP(s.kubernetes)
	if !ok {
		return nil
	}
	var out []portal.Service
	for _, port := range s.kubernetes.Spec.Ports {
		out = append(out, portal.Service{
			Name:      "default/kubernetes:" + port.Name,
			ClusterIP: ip,
			Protocol:  strings.ToLower(string(protocol(port.Protocol))),
			Port:      uint16(port.Port),
			Endpoints: s.apiServers,
		})
	}
	return out
}

// records are the Network's names.
func (s snapshot) records() dns.Records {
	records := dns.Records{Reverse: append([]netip.Prefix{s.cidr}, s.serviceCIDRs...)}
	services := s.services
	if s.kubernetes != nil && allowed(s.network.Spec.Egress.APIServer) {
		services = append(slices.Clone(services), s.kubernetes)
	}
	byService := s.slicesByService()
	for _, service := range services {
		record := dns.Service{Namespace: service.Namespace, Name: service.Name}
		ip, hasIP := clusterIP(service)
		switch {
		case service.Spec.Type == corev1.ServiceTypeExternalName:
			record.ExternalName = service.Spec.ExternalName
		case hasIP:
			record.ClusterIPs = []netip.Addr{ip}
			for _, p := range service.Spec.Ports {
				record.Ports = append(record.Ports, dns.Port{Name: p.Name, Protocol: string(protocol(p.Protocol)), Number: uint16(p.Port)})
			}
		case service.Spec.ClusterIP == corev1.ClusterIPNone:
			record.Headless = true
			records.Endpoints = append(records.Endpoints, headless(service, byService[service.Namespace+"/"+service.Name])...)
		default:
			continue // its address is not allocated yet
		}
		records.Services = append(records.Services, record)
	}
	records.Pods = s.podRecords()
	return records
}

func headless(service *corev1.Service, endpoints []*discoveryv1.EndpointSlice) []dns.Endpoint {
	var out []dns.Endpoint
	for _, slice := range endpoints {
		var ports []dns.Port
		for _, p := range slice.Ports {
			if p.Port != nil {
				ports = append(ports, dns.Port{Name: value(p.Name), Protocol: string(protocol(corev1.Protocol(value((*string)(p.Protocol))))), Number: uint16(*p.Port)})
			}
		}
		for _, e := range slice.Endpoints {
			for _, address := range e.Addresses {
				addr, err := netip.ParseAddr(address)
				if err != nil {
					continue
				}
				out = append(out, dns.Endpoint{
					Namespace: service.Namespace, Service: service.Name,
					Address: addr, Hostname: value(e.Hostname), Ports: ports, Ready: isReady(e),
				})
			}
		}
	}
	return out
}

// podRecords are the pods that are known: this node's, and all that stand behind a Service.
func (s snapshot) podRecords() []dns.Pod {
	known := map[dns.Pod]bool{}
	for _, p := range s.pods {
		known[p] = true
	}
	for _, slice := range s.slices {
		for _, e := range slice.Endpoints {
			if e.TargetRef == nil || e.TargetRef.Kind != "Pod" {
				continue
			}
			for _, address := range e.Addresses {
				if addr, err := netip.ParseAddr(address); err == nil && s.cidr.Contains(addr) {
					known[dns.Pod{Namespace: slice.Namespace, Address: addr}] = true
				}
			}
		}
	}
	out := make([]dns.Pod, 0, len(known))
	for p := range known {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b dns.Pod) int {
		if c := a.Address.Compare(b.Address); c != 0 {
			return c
		}
		return strings.Compare(a.Namespace, b.Namespace)
	})
	return out
}
