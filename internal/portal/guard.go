package portal

import (
	"net/netip"
	"strconv"

	"sigs.k8s.io/knftables"
)

// nodeUplinks matches the node's ends of all uplinks.
const nodeUplinks = `"` + uplinkPrefix + `*"`

// guardRules renders the table of the node's own namespace. It depends on nothing but its arguments.
func guardRules(g Guard, nodeIP netip.Addr, underlay string, vxlanPort int) *ruleset {
	r := &ruleset{}

	// After conntrack, before kube-proxy's DNAT: node ports and Service addresses are closed like any other.
	r.base("prerouting", knftables.FilterType, knftables.PreroutingHook, knftables.ManglePriority, knftables.AcceptPolicy)
	r.rule("prerouting", "meta nfproto ipv4 udp dport", vxlanPort, "jump vxlan")
	r.rule("prerouting", "iifname", nodeUplinks, "jump from-portal")

	// Whoever can send VXLAN to a node can speak for any pod: only nodes may, on the underlay, to this node.
	r.chain("vxlan")
	r.rule("vxlan", `iifname != "`+underlay+`" drop`)
	r.rule("vxlan", "ip saddr != @nodes drop")
	r.rule("vxlan", "fib daddr type != local drop")

	r.chain("from-portal")
	r.rule("from-portal", "meta nfproto ipv6 drop")
	r.rule("from-portal", "ct state established,related accept")
	r.rule("from-portal", "ct state invalid drop")
	r.rule("from-portal", "fib saddr . iif oif missing drop")
	r.rule("from-portal", "ip daddr . tcp dport @api-servers accept")
	r.rule("from-portal", "fib daddr type != unicast drop")
	r.rule("from-portal", "ip daddr @nodes drop")
	r.rule("from-portal", "ip daddr @infrastructure drop")
	r.rule("from-portal", "ip daddr", unroutable, "drop")

	// Somebody else's DNAT (a load balancer's address, say) must not open what prerouting closed.
	for _, c := range []struct {
		name string
		hook knftables.BaseChainHook
	}{{"input", knftables.InputHook}, {"forward", knftables.ForwardHook}} {
		r.base(c.name, knftables.FilterType, c.hook, knftables.FilterPriority, knftables.AcceptPolicy)
		r.rule(c.name, "iifname", nodeUplinks, "ct direction original ct status dnat drop")
	}
	// Into portals goes what the host itself sends; it does not pass here. The rest must be an answer.
	r.rule("forward", "oifname", nodeUplinks, "ct state != { established, related } drop")

	r.base("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, knftables.AcceptPolicy)
	r.rule("postrouting", "iifname", nodeUplinks, "masquerade fully-random")

	r.set("nodes", "ipv4_addr")
	nodes := map[netip.Addr]bool{nodeIP: true}
	for _, ip := range g.NodeIPs {
		if ip.Is4() {
			nodes[ip] = true
		}
	}
	for _, ip := range sortedKeys(nodes) {
		r.member("nodes", ip.String())
	}
	r.set("infrastructure", "ipv4_addr", knftables.IntervalFlag)
	for _, p := range disjoint(g.Infrastructure) {
		r.member("infrastructure", p.String())
	}
	r.set("api-servers", "ipv4_addr . inet_service")
	for _, s := range addrPorts(g.APIServers) {
		r.member("api-servers", s.Addr().String(), strconv.Itoa(int(s.Port())))
	}
	return r
}
