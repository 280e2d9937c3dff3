package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/install"
)

// CheckStatus is the outcome of one check.
type CheckStatus string

// The outcomes, from good to bad.
const (
	CheckOK   CheckStatus = "ok"
	CheckWarn CheckStatus = "warn"
	CheckFail CheckStatus = "fail"
)

// Check is one thing that the doctor looked at.
type Check struct {
	Name   string      `json:"name"`
	Status CheckStatus `json:"status"`
	// Detail says what was found.
	Detail string `json:"detail,omitempty"`
	// Fix says what to do about it.
	Fix string `json:"fix,omitempty"`
}

func passed(name, detail string) Check { return Check{Name: name, Status: CheckOK, Detail: detail} }

// Diagnose examines this machine, what clusters left behind on it, and what is
// left behind inside those that run. It changes nothing.
func Diagnose(ctx context.Context, binDir string) []Check {
	if os.Geteuid() != 0 {
		return []Check{{"root", CheckFail, "not root", "run `h8s doctor` as root: the checks make a scratch network namespace"}}
	}
	checks := []Check{passed("root", "")}
	checks = append(checks, diagnoseMachine(ctx, binDir)...)
	checks = append(checks, diagnoseLeftovers()...)
	for _, name := range clusterNames() {
		c, err := loadConfig(name)
		if err != nil {
			checks = append(checks, Check{"cluster " + name, CheckFail, err.Error(), "`h8s down --name " + name + "`"})
			continue
		}
		clusterCtx, cancel := context.WithTimeout(ctx, 15*time.Second)
		checks = append(checks, c.diagnose(clusterCtx)...)
		cancel()
	}
	return checks
}

// clusterNames are the clusters that have a state directory.
func clusterNames() []string {
	files, err := filepath.Glob(filepath.Join(StateRoot, "*", "cluster.json"))
	if err != nil {
		return nil
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names
}

// diagnoseLeftovers looks for what clusters that have no state directory any more
// have in the machine's own namespaces.
func diagnoseLeftovers() []Check {
	const fix = "`h8s down --name %s`"
	known := clusterNames()
	gone := func(name string) bool { return !slices.Contains(known, name) }
	var checks []Check

	links, err := clusterLinks()
	check := passed("leftover links", "")
	if err != nil {
		check = Check{check.Name, CheckFail, err.Error(), ""}
	}
	for name, links := range links {
		if gone(name) {
			check = Check{check.Name, CheckFail, fmt.Sprintf("%d links of cluster %s, which does not exist", len(links), name), fmt.Sprintf(fix, name)}
		}
	}
	checks = append(checks, check)

	check = passed("leftover cgroups", "")
	names, err := cgroupClusters()
	if err != nil {
		check = Check{check.Name, CheckFail, err.Error(), ""}
	}
	for _, name := range names {
		if !gone(name) {
			continue
		}
		pids, err := cgroupProcesses(clusterCgroup(name))
		if err != nil {
			continue // going away just now
		}
		check = Check{check.Name, CheckFail, fmt.Sprintf("cgroups and %d processes of cluster %s, which does not exist", len(pids), name), fmt.Sprintf(fix, name)}
	}
	checks = append(checks, check)

	check = passed("leftover mounts", "")
	mounts, err := readMounts()
	if err != nil {
		check = Check{check.Name, CheckFail, err.Error(), ""}
	}
	for _, m := range mounts {
		if rel, ok := strings.CutPrefix(m.target, StateRoot+"/"); ok {
			name, _, _ := strings.Cut(rel, "/")
			check = Check{check.Name, CheckFail, m.target + " is mounted, and no cluster mounts anything in the machine's own namespace", fmt.Sprintf(fix, name)}
		}
	}
	checks = append(checks, check)

	return append(checks, diagnoseAgentLeftovers(os.Getpid(), StateRoot))
}

// diagnoseAgentLeftovers looks for what a node agent made on the machine of the
// process pid. As long as one runs there it is its own to tend; who knows what it
// is good for is the API server, which this machine's doctor does not ask.
func diagnoseAgentLeftovers(pid int, state string) Check {
	const name = "leftovers of a node agent"
	f, err := inspect("this machine", pid)
	if err != nil {
		return Check{name, CheckFail, err.Error(), ""}
	}
	left := f.names()
	if len(left) == 0 {
		return passed(name, "")
	}
	runs, err := agentRuns(state)
	switch {
	case err != nil:
		return Check{name, CheckFail, err.Error(), ""}
	case runs:
		return passed(name, "this machine is a node of Hypernetes, and its agent runs")
	}
	return Check{
		name, CheckFail, strings.Join(left, "; ") + "; and no agent runs",
		"nothing, if the agent is being restarted; if Hypernetes has left the cluster, `h8s-node uninstall`, as docs/operations.md says",
	}
}

// agentRuns says whether a node agent has its state directory locked.
func agentRuns(state string) (bool, error) { return isLocked(filepath.Join(state, "lock")) }

// cgroupClusters are the names of clusters that have cgroups.
func cgroupClusters() ([]string, error) {
	v1, v2, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for _, root := range append(v1, v2...) {
		// What a cluster has below its cgroup tells it from others of such a name.
		for _, pattern := range []string{"supervisor", "up", "n*/system"} {
			dirs, err := filepath.Glob(filepath.Join(root, clusterCgroup("*"), pattern))
			if err != nil {
				return nil, err
			}
			for _, dir := range dirs {
				rel, _ := filepath.Rel(root, dir)
				top, _, _ := strings.Cut(rel, "/")
				found[strings.TrimPrefix("/"+top, clusterCgroup(""))] = true
			}
		}
	}
	var names []string
	for name := range found {
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// diagnose examines one cluster.
func (c *Config) diagnose(ctx context.Context) []Check {
	name := "cluster " + c.Name
	running, err := c.running()
	if err != nil {
		return []Check{{name, CheckFail, err.Error(), ""}}
	}
	if !running {
		return []Check{{name, CheckWarn, "not running", fmt.Sprintf("`h8s up --name %s` starts it again, `h8s down --name %s` removes it", c.Name, c.Name)}}
	}
	var nodes []corev1.Node
	client, err := c.client()
	if err == nil {
		nodes, err = c.readyNodes(ctx, client)
	}
	var checks []Check
	if err != nil {
		checks = append(checks, Check{name, CheckFail, err.Error(), "read the logs in " + c.state().path("nodes")})
	} else {
		checks = append(checks, passed(name, fmt.Sprintf("%d nodes ready", len(c.Nodes))), c.diagnoseTaints(nodes))
	}
	checks = append(checks, c.diagnoseAccelerators())
	leftovers, lookErr := c.portalLeftovers(ctx)
	switch {
	case lookErr != nil && err != nil: // one is the cause of the other
	case lookErr != nil:
		checks = append(checks, Check{name + " networks", CheckFail, lookErr.Error(), ""})
	case len(leftovers) > 0:
		checks = append(checks, Check{
			name + " networks", CheckFail, strings.Join(leftovers, "; "),
			"nothing, if it was deleted a moment ago; else look into the log of the node's agent: kubectl -n " + productNamespace + " logs -l app.kubernetes.io/component=node",
		})
	default:
		checks = append(checks, passed(name+" networks", "no leftover portals, links, routes, nftables tables, Blocks or addresses"))
	}
	machines := passed(name+" virtual machines", "no leftover processes, directories, cgroups or half-written files")
	switch left, err := c.machineLeftovers(); {
	case err != nil:
		machines.Status, machines.Detail = CheckFail, err.Error()
	case len(left) > 0:
		machines.Status, machines.Detail = CheckFail, strings.Join(left, "; ")
		machines.Fix = "nothing, if its pod ended a moment ago; else nobody uses it: end the processes, remove the directories, cgroups and files"
	}
	return append(checks, machines)
}

// diagnoseTaints says which nodes are Ready and take no new pods all the same: pods that wait
// for one say less.
func (c *Config) diagnoseTaints(nodes []corev1.Node) Check {
	name := "cluster " + c.Name + " taints"
	if closed := closedNodes(nodes); len(closed) > 0 {
		return Check{name, CheckWarn, strings.Join(closed, "; "), "a node that is short of something takes pods again seconds after it is not: give it some; `kubectl uncordon NODE` if somebody closed it"}
	}
	return passed(name, "every node takes pods")
}

// closedNodes are those with taints that keep pods away, and which.
func closedNodes(nodes []corev1.Node) []string {
	var closed []string
	for _, n := range nodes {
		var taints []string
		for _, t := range n.Spec.Taints {
			if t.Effect != corev1.TaintEffectPreferNoSchedule {
				taints = append(taints, t.Key)
			}
		}
		if len(taints) > 0 {
			closed = append(closed, fmt.Sprintf("node %s takes no pods (%s)", n.Name, strings.Join(taints, ", ")))
		}
	}
	return closed
}

// diagnoseAccelerators says what executes the virtual machines of each node.
func (c *Config) diagnoseAccelerators() Check {
	name := "cluster " + c.Name + " accelerators"
	var found []string
	for _, n := range c.Nodes {
		choice, ok, err := accel.Recorded(c.state().node(n.Name, accel.DefaultDir))
		switch {
		case err != nil:
			return Check{name, CheckFail, n.Name + ": " + err.Error(), ""}
		case !ok:
			return Check{name, CheckWarn, n.Name + " does not know yet what executes them", "wait a moment; else look into " + c.state().node(n.Name, "log", install.Shim+".log")}
		}
		found = append(found, fmt.Sprintf("%s: %s (%s)", n.Name, choice.Accelerator, choice.Reason))
	}
	return passed(name, strings.Join(found, "; "))
}
