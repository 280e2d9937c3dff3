package cluster

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Status is what can be said about a cluster.
type Status struct {
	Name string `json:"name"`
	// Running says that its supervisor lives.
	Running bool `json:"running"`
	// Ready says that the API server answers and every node is Ready.
	Ready bool `json:"ready"`
	// Complete says that `h8s up` came to its end.
	Complete   bool         `json:"complete"`
	Product    bool         `json:"product"`
	Server     string       `json:"server"`
	Subnet     string       `json:"subnet"`
	Gateway    string       `json:"gateway"`
	StateDir   string       `json:"stateDir"`
	Kubeconfig string       `json:"kubeconfig"`
	Nodes      []NodeStatus `json:"nodes"`
	// Problem says why the cluster is not Ready.
	Problem string `json:"problem,omitempty"`
}

// NodeStatus is what can be said about a node.
type NodeStatus struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	PodCIDR string `json:"podCIDR"`
	// Ready is the node's condition, as the API server knows it.
	Ready bool `json:"ready"`
	// PID of the node's init, in the machine's PID namespace: the way into its
	// namespaces. 0 if it does not run.
	PID int `json:"pid"`
	// Root is the directory that holds the node's own /etc, /opt, /run, /tmp and
	// /var, and its logs in log.
	Root string `json:"root"`
}

// GetStatus looks at a cluster.
func GetStatus(ctx context.Context, name string) (*Status, error) {
	c, err := loadConfig(name)
	if err != nil {
		return nil, err
	}
	m, complete := c.readInstalled()
	s := &Status{
		Name:       c.Name,
		Complete:   complete,
		Product:    m.Product,
		Server:     c.apiServer(),
		Subnet:     c.Subnet.String(),
		Gateway:    c.gateway().String(),
		StateDir:   string(c.state()),
		Kubeconfig: c.state().adminKubeconfig(),
	}
	for _, n := range c.Nodes {
		s.Nodes = append(s.Nodes, NodeStatus{
			Name: n.Name, Address: n.Address.String(), PodCIDR: n.PodCIDR.String(),
			PID: nodePID(c.Name, n.Name), Root: c.state().node(n.Name),
		})
	}
	if s.Running, err = c.running(); err != nil {
		return nil, err
	}
	if !s.Running {
		s.Problem = "not running: `h8s up --name " + c.Name + "` starts it again"
		return s, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := c.fillNodes(ctx, s); err != nil {
		s.Problem = err.Error()
	}
	return s, nil
}

// fillNodes adds what the API server knows.
func (c *Config) fillNodes(ctx context.Context, s *Status) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, node := range list.Items {
		for i := range s.Nodes {
			if s.Nodes[i].Name == node.Name {
				s.Nodes[i].Ready = nodeReady(&node) == nil
			}
		}
	}
	if err := c.allReady(list.Items); err != nil {
		return err
	}
	s.Ready = true
	return nil
}

// nodePID finds a node's init: of the processes in the node's cgroup the one that
// is PID 1 one PID namespace further in. Sandboxes have a PID 1 further in still.
func nodePID(cluster, node string) int {
	pids, err := cgroupProcesses(nodeCgroup(cluster, node) + "/system")
	if err != nil {
		return 0
	}
	depth := len(namespacedPIDs(os.Getpid()))
	for _, pid := range pids {
		if nsPIDs := namespacedPIDs(pid); len(nsPIDs) == depth+1 && nsPIDs[depth] == "1" {
			return pid
		}
	}
	return 0
}

// namespacedPIDs are a process's PIDs from the outermost PID namespace inwards.
func namespacedPIDs(pid int) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			return strings.Fields(rest)
		}
	}
	return nil
}
