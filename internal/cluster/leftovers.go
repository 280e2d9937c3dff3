package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/network"
)

// uplinkPrefix begins the names of the node's ends of portals' uplinks.
const uplinkPrefix = "h8su"

// errNoProduct means that Hypernetes is not installed in a cluster.
var errNoProduct = errors.New("hypernetes is not installed")

// found is what a node has that belongs to some Network or pod.
type found struct {
	node        string
	portals     []string // file names in /run/netns
	uplinks     []string // links h8su*
	routes      []blockRoute
	attachments []network.Attachment
}

// blockRoute is a node's route to a Block through a Network's uplink.
type blockRoute struct{ cidr, link string }

// wanted is what the API server knows.
type wanted struct {
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
		f, err := c.inspectNode(n)
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

func (c *Config) inspectNode(n Node) (found, error) {
	f := found{node: n.Name}
	names, err := filepath.Glob(c.state().node(n.Name, "run", "netns", "h8s-*"))
	if err != nil {
		return f, err
	}
	for _, name := range names {
		f.portals = append(f.portals, filepath.Base(name))
	}
	if f.uplinks, f.routes, err = nodeUplinks(nodePID(c.Name, n.Name)); err != nil {
		return f, err
	}
	records, err := filepath.Glob(c.state().node(n.Name, "var", "lib", "h8s", "attachments", "*.json"))
	if err != nil {
		return f, err
	}
	for _, record := range records {
		data, err := os.ReadFile(record)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return f, err
		}
		var a network.Attachment
		if err := json.Unmarshal(data, &a); err != nil {
			return f, fmt.Errorf("attachment %s is damaged: %w", record, err)
		}
		f.attachments = append(f.attachments, a)
	}
	return f, nil
}

// nodeUplinks are the node's ends of its portals' uplinks, and the routes to Blocks through them.
func nodeUplinks(pid int) (names []string, routes []blockRoute, err error) {
	if pid == 0 {
		return nil, nil, errors.New("it does not run")
	}
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, nil, fmt.Errorf("open its network namespace: %w", err)
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("reach into its network namespace: %w", err)
	}
	defer handle.Close()
	links, err := handle.LinkList()
	if err != nil {
		return nil, nil, fmt.Errorf("list its links: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		if !strings.HasPrefix(name, uplinkPrefix) {
			continue
		}
		names = append(names, name)
		through, err := handle.RouteList(l, netlink.FAMILY_V4)
		if err != nil {
			return nil, nil, fmt.Errorf("list its routes by %s: %w", name, err)
		}
		for _, r := range through {
			if r.Dst != nil && !r.Dst.IP.IsLinkLocalUnicast() {
				routes = append(routes, blockRoute{r.Dst.String(), name})
			}
		}
	}
	return names, routes, nil
}

func (c *Config) whatIsWanted(ctx context.Context) (*wanted, error) {
	client, err := c.objectClient()
	if err != nil {
		return nil, err
	}
	var networks v1alpha1.NetworkList
	if err := client.List(ctx, &networks); meta.IsNoMatchError(err) {
		return nil, errNoProduct
	} else if err != nil {
		return nil, fmt.Errorf("list Networks: %w", err)
	}
	var blocks v1alpha1.BlockList
	if err := client.List(ctx, &blocks); err != nil {
		return nil, fmt.Errorf("list Blocks: %w", err)
	}
	var nodes corev1.NodeList
	if err := client.List(ctx, &nodes); err != nil {
		return nil, fmt.Errorf("list Nodes: %w", err)
	}
	var pods corev1.PodList
	if err := client.List(ctx, &pods); err != nil {
		return nil, fmt.Errorf("list Pods: %w", err)
	}
	w := &wanted{networks: map[int64]string{}, pods: map[types.UID]bool{}, nodes: map[string]bool{}, blocks: blocks.Items}
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
	for _, f := range nodes {
		for kind, names := range map[string][]string{"network namespace": f.portals, "link": f.uplinks} {
			for _, name := range names {
				if w.networkOf(name) == "" {
					out = append(out, fmt.Sprintf("%s %s on node %s is of no Network", kind, name, f.node))
				}
			}
		}
		for _, r := range f.routes {
			network := w.networkOf(r.link)
			if !slices.ContainsFunc(w.blocks, func(b v1alpha1.Block) bool {
				return b.Spec == v1alpha1.BlockSpec{Network: network, CIDR: r.cidr, Node: f.node}
			}) {
				out = append(out, fmt.Sprintf("route to %s by %s on node %s is of no Block", r.cidr, r.link, f.node))
			}
		}
		for _, a := range f.attachments {
			if !w.pods[types.UID(a.PodUID)] {
				out = append(out, fmt.Sprintf("address %s on node %s is held for pod %s/%s, which does not exist", a.Address, f.node, a.Namespace, a.Pod))
			}
		}
	}
	for _, b := range w.blocks {
		if !w.nodes[b.Spec.Node] {
			out = append(out, fmt.Sprintf("Block %s is held by node %s, which does not exist", b.Name, b.Spec.Node))
		}
	}
	return out
}

// networkOf is the name of the Network that a portal or an uplink is of; empty if there is none.
func (w *wanted) networkOf(portalOrUplink string) string {
	id, err := strconv.ParseInt(strings.TrimPrefix(strings.TrimPrefix(portalOrUplink, "h8s-"), uplinkPrefix), 10, 64)
	if err != nil {
		return ""
	}
	return w.networks[id]
}
