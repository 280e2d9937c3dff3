package agent

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/dns"
	"h8s.io/hypernetes/internal/portal"
)

var equateAddrs = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{}), cmpopts.EquateEmpty()}

func ptr[T any](v T) *T { return &v }

func addrPorts(s ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range s {
		out = append(out, netip.MustParseAddrPort(a))
	}
	return out
}

func service(change func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.50", Ports: []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}}},
	}
	if change != nil {
		change(s)
	}
	return s
}

// slice has a port http 8080/TCP and the endpoints, each "address[,condition…][@node]".
func slice(endpoints ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP)}},
	}
	for _, text := range endpoints {
		text, node, hasNode := strings.Cut(text, "@")
		words := strings.Split(text, ",")
		e := discoveryv1.Endpoint{Addresses: words[:1], TargetRef: &corev1.ObjectReference{Kind: "Pod"}}
		if hasNode {
			e.NodeName = &node
		}
		for _, word := range words[1:] {
			switch word {
			case "notready":
				e.Conditions.Ready = ptr(false)
			case "terminating":
				e.Conditions.Ready, e.Conditions.Terminating = ptr(false), ptr(true)
			case "serving":
				e.Conditions.Serving = ptr(true)
			}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

func base() snapshot {
	return snapshot{
		network: &v1alpha1.Network{
			ObjectMeta: metav1.ObjectMeta{Name: "acme"},
			Spec:       v1alpha1.NetworkSpec{Tenant: "acme", Egress: v1alpha1.Egress{APIServer: ptr(false)}},
			Status:     v1alpha1.NetworkStatus{ID: 7},
		},
		cidr: netip.MustParsePrefix("10.0.0.0/16"),
		node: "n1",
	}
}

func TestSpecServices(t *testing.T) {
	web := func(endpoints ...string) []portal.Service {
		return []portal.Service{{Name: "shop/web:http", ClusterIP: netip.MustParseAddr("10.96.0.50"), Protocol: "tcp", Port: 80, Endpoints: addrPorts(endpoints...)}}
	}
	tests := map[string]struct {
		service *corev1.Service
		slices  []*discoveryv1.EndpointSlice
		want    []portal.Service
	}{
		"ready endpoints of several slices, sorted": {
			service(nil),
			[]*discoveryv1.EndpointSlice{slice("10.0.0.9", "10.0.0.3"), slice("10.0.0.5")},
			web("10.0.0.3:8080", "10.0.0.5:8080", "10.0.0.9:8080"),
		},
		"an endpoint in two slices counts once": {
			service(nil), []*discoveryv1.EndpointSlice{slice("10.0.0.3"), slice("10.0.0.3")}, web("10.0.0.3:8080"),
		},
		"no endpoints": {service(nil), nil, web()},
		"those that are not ready get nothing": {
			service(nil), []*discoveryv1.EndpointSlice{slice("10.0.0.3,notready", "10.0.0.4")}, web("10.0.0.4:8080"),
		},
		"terminating ones that serve are the last resort": {
			service(nil), []*discoveryv1.EndpointSlice{slice("10.0.0.3,serving,terminating", "10.0.0.4,terminating", "10.0.0.5,notready")}, web("10.0.0.3:8080"),
		},
		"terminating ones are left alone while others are ready": {
			service(nil), []*discoveryv1.EndpointSlice{slice("10.0.0.3,serving,terminating", "10.0.0.4")}, web("10.0.0.4:8080"),
		},
		"addresses outside the Network are no way out": {
			service(nil),
			[]*discoveryv1.EndpointSlice{slice("10.1.0.1", "192.0.2.11", "127.0.0.1", "169.254.169.254", "10.96.0.1", "::1", "nonsense", "10.0.0.4")},
			web("10.0.0.4:8080"),
		},
		"another address family's slice": {
			service(nil), []*discoveryv1.EndpointSlice{func() *discoveryv1.EndpointSlice {
				s := slice("10.0.0.4")
				s.AddressType = discoveryv1.AddressTypeIPv6
				return s
			}()}, web(),
		},
		"another Service's slice": {
			service(nil), []*discoveryv1.EndpointSlice{func() *discoveryv1.EndpointSlice {
				s := slice("10.0.0.4")
				s.Labels[discoveryv1.LabelServiceName] = "other"
				return s
			}()}, web(),
		},
		"another namespace's slice": {
			service(nil), []*discoveryv1.EndpointSlice{func() *discoveryv1.EndpointSlice {
				s := slice("10.0.0.4")
				s.Namespace = "blog"
				return s
			}()}, web(),
		},
		"traffic policy Local": {
			service(func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal) }),
			[]*discoveryv1.EndpointSlice{slice("10.0.0.3@n1", "10.0.0.4@n2", "10.0.0.5")},
			web("10.0.0.3:8080"),
		},
		"headless Services have no portal": {
			service(func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone }), []*discoveryv1.EndpointSlice{slice("10.0.0.3")}, nil,
		},
		"ExternalName has no portal": {
			service(func(s *corev1.Service) {
				s.Spec.Type, s.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.org"
			}), nil, nil,
		},
		"session affinity with the default timeout": {
			service(func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }), nil,
			[]portal.Service{{Name: "shop/web:http", ClusterIP: netip.MustParseAddr("10.96.0.50"), Protocol: "tcp", Port: 80, AffinityTimeout: 3 * time.Hour}},
		},
		"session affinity with its own timeout": {
			service(func(s *corev1.Service) {
				s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
				s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(60))}}
			}), nil,
			[]portal.Service{{Name: "shop/web:http", ClusterIP: netip.MustParseAddr("10.96.0.50"), Protocol: "tcp", Port: 80, AffinityTimeout: time.Minute}},
		},
		"several ports, one number with two protocols": {
			service(func(s *corev1.Service) {
				s.Spec.Ports = []corev1.ServicePort{{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}, {Name: "dns-tcp", Protocol: corev1.ProtocolTCP, Port: 53}}
			}),
			[]*discoveryv1.EndpointSlice{func() *discoveryv1.EndpointSlice {
				s := slice("10.0.0.3")
				s.Ports = []discoveryv1.EndpointPort{
					{Name: ptr("dns"), Port: ptr(int32(5353)), Protocol: ptr(corev1.ProtocolUDP)},
					{Name: ptr("dns-tcp"), Port: ptr(int32(5354)), Protocol: ptr(corev1.ProtocolTCP)},
					{Name: ptr("dns"), Port: ptr(int32(99)), Protocol: ptr(corev1.ProtocolTCP)},
					{Name: ptr("dns"), Protocol: ptr(corev1.ProtocolUDP)},
				}
				return s
			}()},
			[]portal.Service{
				{Name: "shop/web:dns", ClusterIP: netip.MustParseAddr("10.96.0.50"), Protocol: "udp", Port: 53, Endpoints: addrPorts("10.0.0.3:5353")},
				{Name: "shop/web:dns-tcp", ClusterIP: netip.MustParseAddr("10.96.0.50"), Protocol: "tcp", Port: 53, Endpoints: addrPorts("10.0.0.3:5354")},
			},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s := base()
			s.services, s.slices = []*corev1.Service{tc.service}, tc.slices
			if diff := cmp.Diff(tc.want, s.spec().Services, equateAddrs); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSpecRemoteBlocks(t *testing.T) {
	block := func(node, cidr string) *v1alpha1.Block {
		return &v1alpha1.Block{Spec: v1alpha1.BlockSpec{Network: "acme", Node: node, CIDR: cidr}}
	}
	s := base()
	s.held = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28")}
	s.nodeIPs = map[string]netip.Addr{"n1": netip.MustParseAddr("192.0.2.11"), "n2": netip.MustParseAddr("192.0.2.12")}
	s.blocks = []*v1alpha1.Block{
		block("n1", "10.0.0.0/28"),
		block("n1", "10.0.0.64/28"), // being released
		block("n2", "10.0.0.32/28"),
		block("n2", "10.0.0.16/28"),
		block("n2", "10.1.0.0/28"),  // outside the Network
		block("n2", "10.0.0.0/8"),   // larger than the Network
		block("n2", "10.0.0.0/28"),  // cannot be: it is held here
		block("n3", "10.0.0.48/28"), // a node that is not known
		block("n2", "nonsense"),
	}
	want := []portal.RemoteBlock{
		{CIDR: netip.MustParsePrefix("10.0.0.16/28"), NodeIP: netip.MustParseAddr("192.0.2.12")},
		{CIDR: netip.MustParsePrefix("10.0.0.32/28"), NodeIP: netip.MustParseAddr("192.0.2.12")},
	}
	if diff := cmp.Diff(want, s.spec().Remote, equateAddrs); diff != "" {
		t.Error(diff)
	}
}

func kubernetesService() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes"},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Name: "https", Protocol: corev1.ProtocolTCP, Port: 443}}},
	}
}

func TestEgress(t *testing.T) {
	tests := map[string]struct {
		egress v1alpha1.Egress
		want   portal.Egress
		api    bool
	}{
		"by default":    {v1alpha1.Egress{}, portal.Egress{Internet: true, APIServer: true, APIServers: addrPorts("192.0.2.11:6443")}, true},
		"nothing":       {v1alpha1.Egress{Internet: ptr(false), APIServer: ptr(false)}, portal.Egress{}, false},
		"only internet": {v1alpha1.Egress{APIServer: ptr(false)}, portal.Egress{Internet: true}, false},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			s := base()
			s.network.Spec.Egress = tc.egress
			s.kubernetes, s.apiServers = kubernetesService(), addrPorts("192.0.2.11:6443")
			spec := s.spec()
			if diff := cmp.Diff(tc.want, spec.Egress, equateAddrs); diff != "" {
				t.Error(diff)
			}
			var services []portal.Service
			var names []dns.Service
			if tc.api {
				services = []portal.Service{{Name: "default/kubernetes:https", ClusterIP: netip.MustParseAddr("10.96.0.1"), Protocol: "tcp", Port: 443, Endpoints: addrPorts("192.0.2.11:6443")}}
				names = []dns.Service{{Namespace: "default", Name: "kubernetes", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Ports: []dns.Port{{Name: "https", Protocol: "TCP", Number: 443}}}}
			}
			if diff := cmp.Diff(services, spec.Services, equateAddrs); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(names, s.records().Services, equateAddrs); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRecords(t *testing.T) {
	s := base()
	s.serviceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
	headlessSlice := slice("10.0.0.3", "10.0.0.4,notready", "198.51.100.7")
	headlessSlice.Labels[discoveryv1.LabelServiceName] = "db"
	headlessSlice.Endpoints[0].Hostname = ptr("db-0")
	headlessSlice.Endpoints[2].TargetRef = nil
	s.services = []*corev1.Service{
		service(nil),
		service(func(s *corev1.Service) { s.Name, s.Spec.ClusterIP = "db", corev1.ClusterIPNone }),
		service(func(s *corev1.Service) {
			s.Name, s.Spec.Type, s.Spec.ExternalName, s.Spec.ClusterIP = "docs", corev1.ServiceTypeExternalName, "example.org", ""
		}),
		service(func(s *corev1.Service) { s.Name, s.Spec.ClusterIP = "unborn", "" }),
	}
	s.slices = []*discoveryv1.EndpointSlice{slice("10.0.0.3"), headlessSlice}
	s.pods = []dns.Pod{{Namespace: "shop", Address: netip.MustParseAddr("10.0.0.2")}, {Namespace: "shop", Address: netip.MustParseAddr("10.0.0.3")}}

	http := []dns.Port{{Name: "http", Protocol: "TCP", Number: 8080}}
	addr := netip.MustParseAddr
	want := dns.Records{
		Services: []dns.Service{
			{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{addr("10.96.0.50")}, Ports: []dns.Port{{Name: "http", Protocol: "TCP", Number: 80}}},
			{Namespace: "shop", Name: "db", Headless: true},
			{Namespace: "shop", Name: "docs", ExternalName: "example.org"},
		},
		Endpoints: []dns.Endpoint{
			{Namespace: "shop", Service: "db", Address: addr("10.0.0.3"), Hostname: "db-0", Ports: http, Ready: true},
			{Namespace: "shop", Service: "db", Address: addr("10.0.0.4"), Ports: http},
			{Namespace: "shop", Service: "db", Address: addr("198.51.100.7"), Ports: http, Ready: true},
		},
		Pods:    []dns.Pod{{Namespace: "shop", Address: addr("10.0.0.2")}, {Namespace: "shop", Address: addr("10.0.0.3")}, {Namespace: "shop", Address: addr("10.0.0.4")}},
		Reverse: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("10.96.0.0/16")},
	}
	if diff := cmp.Diff(want, s.records(), equateAddrs); diff != "" {
		t.Error(diff)
	}
}

func TestConflict(t *testing.T) {
	uses := []use{
		{netip.MustParsePrefix("10.96.0.0/16"), "the range of Services"},
		{netip.MustParsePrefix("192.0.2.11/32"), "the address of a node"},
	}
	tests := map[string]struct {
		cidr string
		want string // empty: none
	}{
		"apart":             {"10.0.0.0/16", ""},
		"equal":             {"10.96.0.0/16", "Network acme (10.96.0.0/16) overlaps with 10.96.0.0/16, the range of Services, on node n1: its pods cannot run there; use a Network with another CIDR"},
		"inside":            {"10.96.3.0/24", "overlaps with 10.96.0.0/16"},
		"around":            {"10.0.0.0/8", "overlaps with 10.96.0.0/16"},
		"a single address":  {"192.0.2.0/26", "overlaps with 192.0.2.11/32"},
		"right beside that": {"192.0.2.64/26", ""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			err := conflict("acme", netip.MustParsePrefix(tc.cidr), "n1", uses)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestTrim(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web", UID: "u1", ManagedFields: []metav1.ManagedFieldsEntry{{}},
			Labels:      map[string]string{"app": "web"},
			Annotations: map[string]string{v1alpha1.AnnotationNetworks: "acme", annotationMirror: "u2", "other": "x"},
		},
		Spec: corev1.PodSpec{NodeName: "n1"},
	}
	trimMeta(pod)
	trimPod(pod)
	want := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: "web", UID: "u1",
		Annotations: map[string]string{v1alpha1.AnnotationNetworks: "acme", annotationMirror: "u2"},
	}}
	if diff := cmp.Diff(want, pod); diff != "" {
		t.Error(diff)
	}
	if uids, _ := podUIDs(pod); strings.Join(uids, " ") != "u1 u2" {
		t.Errorf("UIDs: %v", uids)
	}
}
