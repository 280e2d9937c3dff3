package cluster

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/portal"
)

// wanted is what the API server knows.
type wanted struct {
	agents   bool             // there is a DaemonSet of node agents
	networks map[int64]string // names by ID
	pods     map[types.UID]bool
	nodes    map[string]bool
	blocks   []v1alpha1.Block
}

// portalLeftovers describes what is in a running cluster although nothing that the
// API server knows accounts for it.
func (c *Config) portalLeftovers(ctx context.Context) ([]string, error) {
	// What is found first and then no longer wanted is a false alarm; what comes
	// after the look at the API server is none. So: the nodes first.
	var nodes []found
	for _, n := range c.Nodes {
		pid := nodePID(c.Name, n.Name)
		if pid == 0 {
			return nil, fmt.Errorf("node %s does not run", n.Name)
		}
		f, err := inspect(n.Name, pid)
		if err != nil {
			return nil, fmt.Errorf("inspect node %s: %w", n.Name, err)
		}
		nodes = append(nodes, f)
	}
	w, err := c.whatIsWanted(ctx)
	if err != nil {
		return nil, err
	}
	return w.leftovers(nodes), nil
}

func (c *Config) whatIsWanted(ctx context.Context) (*wanted, error) {
	api, err := c.objectClient()
	if err != nil {
		return nil, err
	}
	var (
		agents   appsv1.DaemonSetList
		networks v1alpha1.NetworkList
		blocks   v1alpha1.BlockList
		nodes    corev1.NodeList
		pods     corev1.PodList
	)
	for _, list := range []struct {
		name string
		of   client.ObjectList
		opts []client.ListOption
	}{
		{"DaemonSets", &agents, []client.ListOption{client.MatchingLabels{"app.kubernetes.io/name": "h8s"}}},
		{"Networks", &networks, nil},
		{"Blocks", &blocks, nil},
		{"Nodes", &nodes, nil},
		{"Pods", &pods, nil},
	} {
		// Without our kinds nothing of ours is wanted.
		if err := api.List(ctx, list.of, list.opts...); err != nil && !meta.IsNoMatchError(err) {
			return nil, fmt.Errorf("list %s: %w", list.name, err)
		}
	}
	w := &wanted{agents: len(agents.Items) > 0, networks: map[int64]string{}, pods: map[types.UID]bool{}, nodes: map[string]bool{}, blocks: blocks.Items}
	for _, n := range networks.Items {
		w.networks[int64(n.Status.ID)] = n.Name
	}
	for _, p := range pods.Items {
		w.pods[p.UID] = true
	}
	for _, n := range nodes.Items {
		w.nodes[n.Name] = true
	}
	return w, nil
}

// leftovers compares what was found with what is wanted.
func (w *wanted) leftovers(nodes []found) []string {
	var out []string
	report := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, f := range nodes {
		if !w.agents {
			for _, file := range f.installed {
				report("file %s on node %s is of no node agent", file, f.node)
			}
			if f.guarded {
				report("nftables table %s on node %s is of no node agent", ownTable, f.node)
			}
		}
		podLinks := map[string]bool{}
		for _, a := range f.attachments {
			podLinks[portal.HostIfName(a.ContainerID, a.IfName)] = true
			if !w.pods[types.UID(a.PodUID)] {
				report("address %s on node %s is held for pod %s/%s, which does not exist", a.Address, f.node, a.Namespace, a.Pod)
			}
		}
		for _, p := range f.portals {
			w.reportOwner(report, "network namespace", p.name, f.node)
			for _, link := range p.podLinks {
				if !podLinks[link] {
					report("link %s in %s on node %s is of no pod", link, p.name, f.node)
				}
			}
			for _, table := range p.tables {
				if table != ownTable {
					report("nftables table %s in %s on node %s is not of the portal", table, p.name, f.node)
				}
			}
		}
		for _, name := range f.uplinks {
			w.reportOwner(report, "link", name, f.node)
		}
		for _, r := range f.routes {
			network := w.networkOf(r.link)
			if !w.held(func(b v1alpha1.BlockSpec) bool {
				return b == v1alpha1.BlockSpec{Network: network, CIDR: r.cidr, Node: f.node}
			}) {
				report("route to %s by %s on node %s is of no Block", r.cidr, r.link, f.node)
			}
		}
	}
	known := map[string]bool{}
	for _, name := range w.networks {
		known[name] = true
	}
	for _, b := range w.blocks {
		if !w.nodes[b.Spec.Node] {
			report("Block %s is held by node %s, which does not exist", b.Name, b.Spec.Node)
		}
		if !known[b.Spec.Network] {
			report("Block %s is of Network %s, which does not exist", b.Name, b.Spec.Network)
		}
	}
	return out
}

// reportOwner reports a portal or uplink without a Network, or of one that has no
// address on the node: a Block comes before its portal and goes after it.
func (w *wanted) reportOwner(report func(string, ...any), kind, name, node string) {
	network := w.networkOf(name)
	if network == "" {
		report("%s %s on node %s is of no Network", kind, name, node)
	} else if !w.held(func(b v1alpha1.BlockSpec) bool { return b.Network == network && b.Node == node }) {
		report("%s %s on node %s is of Network %s, which has no Block there", kind, name, node, network)
	}
}

func (w *wanted) held(match func(v1alpha1.BlockSpec) bool) bool {
	return slices.ContainsFunc(w.blocks, func(b v1alpha1.Block) bool { return match(b.Spec) })
}

// networkOf is the name of the Network that a portal or an uplink is of; empty if there is none.
func (w *wanted) networkOf(portalOrUplink string) string {
	id, err := strconv.ParseInt(strings.TrimPrefix(strings.TrimPrefix(portalOrUplink, portalPrefix), uplinkPrefix), 10, 64)
	if err != nil {
		return ""
	}
	return w.networks[id]
}
