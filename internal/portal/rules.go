package portal

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sigs.k8s.io/knftables"
)

const table = "h8s"

// Names of the links inside a portal, as the rules see them. Nothing but a pod's link begins with podLinkPrefix.
const (
	uplinkName    = "uplink"
	overlayName   = "vx"
	podLinkPrefix = "p"
	podLinks      = `"p*"`
)

// unroutable are destinations that are never the internet: this network, loopback, link-local with its metadata
// services, multicast, reserved.
const unroutable = "{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }"

// ruleset is the whole content of a table.
type ruleset struct {
	chains   []*knftables.Chain
	sets     []*knftables.Set
	maps     []*knftables.Map
	elements []*knftables.Element
	rules    []*knftables.Rule
}

func (r *ruleset) base(name string, typ knftables.BaseChainType, hook knftables.BaseChainHook, priority knftables.BaseChainPriority, policy knftables.BaseChainPolicy) {
	r.chains = append(r.chains, &knftables.Chain{Name: name, Type: &typ, Hook: &hook, Priority: &priority, Policy: &policy})
}

func (r *ruleset) chain(name string) { r.chains = append(r.chains, &knftables.Chain{Name: name}) }

func (r *ruleset) rule(chain string, parts ...any) {
	r.rules = append(r.rules, &knftables.Rule{Chain: chain, Rule: knftables.Concat(parts...)})
}

func (r *ruleset) set(name, typ string, flags ...knftables.SetFlag) {
	r.sets = append(r.sets, &knftables.Set{Name: name, Type: typ, Flags: flags})
}

func (r *ruleset) member(set string, key ...string) {
	r.elements = append(r.elements, &knftables.Element{Set: set, Key: key})
}

// dynamic says whether a set is filled by packets rather than by us.
func dynamic(s *knftables.Set) bool { return slices.Contains(s.Flags, knftables.DynamicFlag) }

// portalRules renders the table inside a portal. It depends on nothing but its arguments.
func portalRules(spec Spec, clusterDNS netip.Addr) *ruleset {
	r := &ruleset{}

	// A packet may enter by a link only if the answer to it would leave by that link: pods have exact routes, so
	// they cannot send from an address that is not theirs; other nodes can send only from their own Blocks.
	r.base("antispoof", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority, knftables.AcceptPolicy)
	r.rule("antispoof", "meta nfproto ipv6 drop")
	r.rule("antispoof", `iifname != "lo" fib saddr . iif oif missing drop`)

	r.base("prerouting", knftables.NATType, knftables.PreroutingHook, knftables.DNATPriority, knftables.AcceptPolicy)
	r.maps = append(r.maps, &knftables.Map{Name: "services", Type: "ipv4_addr . inet_proto . inet_service : verdict"})
	r.rule("prerouting", "iifname", podLinks, "ip daddr . meta l4proto . th dport vmap @services")

	r.base("input", knftables.FilterType, knftables.InputHook, knftables.FilterPriority, knftables.DropPolicy)
	r.rule("input", "iifname", podLinks, "ip daddr", clusterDNS, "udp dport 53 accept")
	r.rule("input", "iifname", podLinks, "ip daddr", clusterDNS, "tcp dport 53 accept")
	r.rule("input", "iifname", podLinks, "ip daddr", podGateway, "icmp type echo-request accept")
	r.rule("input", "iifname", podLinks, "ip daddr @service-addresses jump refuse")

	r.base("forward", knftables.FilterType, knftables.ForwardHook, knftables.FilterPriority, knftables.DropPolicy)
	r.rule("forward", "ct state established,related accept")
	r.rule("forward", "ct state invalid drop")
	// The node's own processes, kubelet first of all.
	r.rule("forward", "iifname", uplinkName, "ip saddr", nodeUplinkAddr, "oifname", podLinks, "accept")
	r.rule("forward", "iifname", podLinks, "oifname", podLinks, "accept")
	r.rule("forward", "iifname", podLinks, "oifname", overlayName, "accept")
	r.rule("forward", "iifname", overlayName, "oifname", podLinks, "accept")
	r.rule("forward", "iifname", podLinks, "oifname", uplinkName, "goto egress")

	r.chain("egress")
	r.set("api-servers", "ipv4_addr . inet_service")
	if spec.Egress.APIServer {
		for _, s := range addrPorts(spec.Egress.APIServers) {
			r.member("api-servers", s.Addr().String(), strconv.Itoa(int(s.Port())))
		}
	}
	r.rule("egress", "ip daddr . tcp dport @api-servers accept")
	// What is left for a Service address here has no endpoint, or is no Service of this Network.
	r.rule("egress", "ip daddr @service-addresses jump refuse")
	r.rule("egress", "ip daddr", unroutable, "drop")
	if spec.Egress.Internet {
		// The node's guard drops what is infrastructure.
		r.rule("egress", "accept")
	} else {
		r.rule("egress", "reject with icmpx type admin-prohibited")
	}

	r.chain("refuse")
	r.rule("refuse", "meta l4proto tcp reject with tcp reset")
	r.rule("refuse", "reject with icmpx type port-unreachable")

	// A pod that reaches itself through a Service must see another source, or it would answer itself directly.
	r.base("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, knftables.AcceptPolicy)
	r.set("hairpin", "ipv4_addr . ipv4_addr")
	r.rule("postrouting", "ip saddr . ip daddr @hairpin masquerade")

	r.set("service-addresses", "ipv4_addr", knftables.IntervalFlag)
	addresses := slices.Clone(spec.ServiceCIDRs)
	hairpins := map[netip.Addr]bool{}
	for _, s := range services(spec.Services) {
		addresses = append(addresses, netip.PrefixFrom(s.ClusterIP, 32))
		if len(s.Endpoints) == 0 {
			continue
		}
		r.service(s)
		for _, ep := range s.Endpoints {
			if slices.ContainsFunc(spec.Blocks, func(b netip.Prefix) bool { return b.Contains(ep.Addr()) }) {
				hairpins[ep.Addr()] = true
			}
		}
	}
	for _, p := range disjoint(addresses) {
		r.member("service-addresses", p.String())
	}
	for _, a := range sortedKeys(hairpins) {
		r.member("hairpin", a.String(), a.String())
	}
	return r
}

// service adds one Service port that has endpoints.
func (r *ruleset) service(s Service) {
	key := fmt.Sprintf("%s/%s/%d", s.Protocol, s.ClusterIP, s.Port)
	chain := "svc/" + key
	r.chain(chain)
	r.elements = append(r.elements, &knftables.Element{
		Map: "services", Key: []string{s.ClusterIP.String(), s.Protocol, strconv.Itoa(int(s.Port))}, Value: []string{"goto " + chain},
	})
	first := len(r.rules)
	choice := make([]string, len(s.Endpoints))
	if s.AffinityTimeout == 0 {
		// The endpoint comes straight from a map: one lookup, however many there are.
		for i, ep := range s.Endpoints {
			choice[i] = fmt.Sprintf("%d : %s . %d", i, ep.Addr(), ep.Port())
		}
		r.rule(chain, "meta l4proto", s.Protocol, "dnat ip to numgen random mod", len(choice), "map {", strings.Join(choice, ", "), "}")
	} else {
		// Each endpoint remembers its clients. A client found in a set goes where it went before.
		timeout := fmt.Sprintf("%ds", max(1, int(s.AffinityTimeout.Seconds())))
		for i, ep := range s.Endpoints {
			name := fmt.Sprintf("%s/%s/%d", key, ep.Addr(), ep.Port())
			endpoint, clients := "ep/"+name, "aff/"+name
			r.chain(endpoint)
			r.set(clients, "ipv4_addr", knftables.DynamicFlag, knftables.TimeoutFlag)
			r.rule(endpoint, "update", "@"+clients, "{ ip saddr timeout", timeout, "}")
			r.rule(endpoint, "meta l4proto", s.Protocol, "dnat ip to", ep.String())
			r.rule(chain, "ip saddr", "@"+clients, "goto", endpoint)
			choice[i] = fmt.Sprintf("%d : goto %s", i, endpoint)
		}
		r.rule(chain, "numgen random mod", len(choice), "vmap {", strings.Join(choice, ", "), "}")
	}
	if s.Name != "" {
		comment := s.Name[:min(len(s.Name), knftables.CommentLengthMax)]
		r.rules[first].Comment = &comment
	}
}

// services returns what can be programmed: IPv4, protocols in lower case, one entry per address, protocol and port,
// everything in a stable order.
func services(in []Service) []Service {
	key := func(a, b Service) int {
		return cmp.Or(a.ClusterIP.Compare(b.ClusterIP), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	}
	var out []Service
	for _, s := range in {
		s.Protocol = strings.ToLower(s.Protocol)
		if !s.ClusterIP.Is4() || s.Port == 0 || !slices.Contains([]string{"tcp", "udp", "sctp"}, s.Protocol) {
			continue
		}
		s.Endpoints = addrPorts(s.Endpoints)
		out = append(out, s)
	}
	slices.SortStableFunc(out, key)
	return slices.CompactFunc(out, func(a, b Service) bool { return key(a, b) == 0 })
}

// addrPorts returns the IPv4 ones, sorted, each once.
func addrPorts(in []netip.AddrPort) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range in {
		if a.Addr().Is4() && a.Port() != 0 {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// disjoint returns the IPv4 prefixes sorted and without those that lie in another: interval sets refuse overlaps.
func disjoint(in []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range in {
		if p.IsValid() && p.Addr().Is4() {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits()) })
	n := 0
	for _, p := range out {
		if n == 0 || !out[n-1].Overlaps(p) {
			out[n] = p
			n++
		}
	}
	return out[:n]
}

func sortedKeys(m map[netip.Addr]bool) []netip.Addr {
	out := make([]netip.Addr, 0, len(m))
	for a := range m {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}
