package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	fieldManager   = "h8s-node"
	reasonConflict = "NodeConflict"
	reasonResolved = "Resolved"
	// portalLinks are the node's ends of the portals' uplinks; routes through
	// them are this product's own.
	portalLinks = "h8su"
)

// use is a range that the node or the cluster needs for itself.
type use struct {
	prefix netip.Prefix
	what   string
}

// conflict says why a Network with that CIDR cannot be on this node, nil if it can.
func conflict(name string, cidr netip.Prefix, node string, uses []use) error {
	for _, u := range uses {
		if u.prefix.Overlaps(cidr) {
			return fmt.Errorf("Network %s (%s) overlaps with %s, %s, on node %s: its pods cannot run there; use a Network with another CIDR", name, cidr, u.prefix, u.what, node)
		}
	}
	return nil
}

// uses returns all ranges that no Network may overlap with on this node.
func (a *Agent) uses() ([]use, error) {
	uses := []use{
		{netip.MustParsePrefix("127.0.0.0/8"), "the loopback range"},
		{netip.MustParsePrefix("169.254.0.0/16"), "the link-local range"},
		{netip.MustParsePrefix("224.0.0.0/3"), "the multicast and reserved range"},
		{netip.MustParsePrefix("0.0.0.0/8"), "the reserved range"},
	}
	ranges, nodeIPs := a.infrastructure()
	for _, p := range ranges {
		uses = append(uses, use{p, "a range of the cluster's own"})
	}
	for _, ip := range nodeIPs {
		uses = append(uses, use{netip.PrefixFrom(ip, ip.BitLen()), "the address of a node"})
	}
	for _, r := range a.cfg.Resolvers() {
		if ip, ok := resolverAddr(r); ok {
			uses = append(uses, use{netip.PrefixFrom(ip, ip.BitLen()), "a name server"})
		}
	}
	local, err := kernelUses()
	return append(uses, local...), err
}

func resolverAddr(resolver string) (netip.Addr, bool) {
	if ip, err := netip.ParseAddr(resolver); err == nil {
		return ip, true
	}
	if ap, err := netip.ParseAddrPort(resolver); err == nil {
		return ap.Addr(), true
	}
	return netip.Addr{}, false
}

// kernelUses returns the addresses of the node's links and its routes other than
// default routes and those to portals.
func kernelUses() ([]use, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the node's links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var uses []use
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, addr := range addrs {
		name := names[addr.LinkIndex]
		if ip, ok := netip.AddrFromSlice(addr.IP.To4()); ok && !strings.HasPrefix(name, portalLinks) {
			uses = append(uses, use{netip.PrefixFrom(ip, 32), "an address (link " + name + ")"})
		}
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list the node's routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || strings.HasPrefix(names[r.LinkIndex], portalLinks) {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		bits, _ := r.Dst.Mask.Size()
		if !ok || bits == 0 {
			continue
		}
		uses = append(uses, use{netip.PrefixFrom(ip, bits), "a route (link " + names[r.LinkIndex] + ")"})
	}
	return uses, nil
}

// checkConflict returns why the Network cannot be on this node, and keeps its
// condition in step. Only the node that reported a conflict withdraws it.
func (a *Agent) checkConflict(ctx context.Context, n *v1alpha1.Network, cidr netip.Prefix) error {
	uses, err := a.uses()
	if err != nil {
		return err
	}
	found := conflict(n.Name, cidr, a.cfg.NodeName, uses)
	if err := a.reportConflict(ctx, n, found); err != nil {
		a.log.Error("condition could not be written", "network", n.Name, "condition", v1alpha1.ConditionConflict, "err", err)
	}
	return found
}

func (a *Agent) reportConflict(ctx context.Context, n *v1alpha1.Network, found error) error {
	signature := "node " + a.cfg.NodeName + ":"
	current := apimeta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionConflict)
	reported := current != nil && current.Status == metav1.ConditionTrue
	mine := reported && strings.HasPrefix(current.Message, signature)
	want := metav1.Condition{
		Type: v1alpha1.ConditionConflict, ObservedGeneration: n.Generation, LastTransitionTime: metav1.Now(),
	}
	switch {
	case found == nil && !mine:
		return nil
	case found == nil:
		want.Status, want.Reason, want.Message = metav1.ConditionFalse, reasonResolved, signature+" no conflict any more"
	default:
		want.Status, want.Reason, want.Message = metav1.ConditionTrue, reasonConflict, signature+" "+found.Error()
		if reported && (!mine || current.Message == want.Message) {
			return nil
		}
	}
	return a.applyConflict(ctx, n.Name, want)
}

// applyConflict is a server-side apply of one condition: the list is a map by
// type, so the controller's own conditions stay as they are.
func (a *Agent) applyConflict(ctx context.Context, name string, condition metav1.Condition) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	data, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(),
		"kind":       "Network",
		"metadata":   map[string]any{"name": name},
		"status":     map[string]any{"conditions": []metav1.Condition{condition}},
	})
	if err != nil {
		return err
	}
	return a.clients.h8s.Patch(types.ApplyPatchType).Resource("networks").Name(name).SubResource("status").
		Param("fieldManager", fieldManager).Param("force", "true").Body(data).Do(ctx).Error()
}
