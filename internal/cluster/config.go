package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"

	"github.com/google/renameio/v2"

	"h8s.io/hypernetes/internal/identity"
)

// StateRoot is the directory that holds one state directory per cluster.
const StateRoot = "/var/lib/h8s"

// What every embedded cluster has in common. A cluster's own addresses are in
// its Config.
const (
	// DefaultName of a cluster.
	DefaultName = "default"
	// DefaultNodes is how many nodes a cluster has.
	DefaultNodes = 2
	// Domain that the cluster's DNS names end in.
	Domain = "cluster.local"

	serviceCIDR  = "10.96.0.0/16"
	firstService = "10.96.0.1"
	dnsService   = "10.96.0.10"
	podCIDR      = "10.244.0.0/16"
	maxNodes     = 50
	maxName      = 20
	apiPort      = 6443
)

var nameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// ValidateName says what is wrong with a cluster's name, if anything: it becomes
// part of file, link and cgroup names.
func ValidateName(name string) error {
	if len(name) > maxName {
		return fmt.Errorf("cluster name %q has %d characters, and may have %d: choose a shorter --name", name, len(name), maxName)
	}
	if !nameRE.MatchString(name) {
		return fmt.Errorf("cluster name %q is not a DNS label: use lower-case letters, digits and '-', with a letter or digit at both ends", name)
	}
	return nil
}

// Node is one node of a cluster.
type Node struct {
	Name    string       `json:"name"`
	Address netip.Addr   `json:"address"`
	PodCIDR netip.Prefix `json:"podCIDR"`
}

// Config is what a cluster consists of. It is written once, when the cluster is
// made, and does not change.
type Config struct {
	Name string `json:"name"`
	// Subnet of the bridge; its first address is the machine's.
	Subnet netip.Prefix `json:"subnet"`
	Nodes  []Node       `json:"nodes"`
	// BinDir holds the upstream programs.
	BinDir string `json:"binDir"`
	// Resolvers (address:port) that the nodes' DNS queries go to; those of the
	// machine's /etc/resolv.conf if empty.
	Resolvers []string `json:"resolvers,omitempty"`
	// GuardedWebhooks says that the API server shows a certificate to the controller, which
	// answers nobody else. Clusters of earlier versions have none to show.
	GuardedWebhooks bool `json:"guardedWebhooks,omitempty"`
	// OIDC is the identity provider whose people may log in, if there is one.
	OIDC *OIDC `json:"oidc,omitempty"`
	// Keystone says whether there is one, whose users may log in.
	Keystone bool `json:"keystone,omitempty"`
	// KeystonePrefix begins the names of its users and groups; identity.DefaultPrefix if
	// empty.
	KeystonePrefix identity.Prefix `json:"keystonePrefix,omitempty"`
}

// newConfig lays out a cluster of the given number of nodes in subnet.
func newConfig(name string, nodes int, subnet netip.Prefix, binDir string, resolvers []string) (*Config, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	if nodes < 1 || nodes > maxNodes {
		return nil, fmt.Errorf("%d nodes: a cluster has at least one node and at most %d", nodes, maxNodes)
	}
	for _, r := range resolvers {
		if _, err := netip.ParseAddrPort(r); err != nil {
			return nil, fmt.Errorf("resolver %q is not address:port, such as 192.0.2.53:53", r)
		}
	}
	c := &Config{Name: name, Subnet: subnet, BinDir: binDir, Resolvers: resolvers}
	net4, pods := subnet.Addr().As4(), netip.MustParsePrefix(podCIDR).Addr().As4()
	for i := 1; i <= nodes; i++ {
		pods[2], net4[3] = byte(i), byte(10+i)
		c.Nodes = append(c.Nodes, Node{
			Name:    fmt.Sprintf("n%d", i),
			Address: netip.AddrFrom4(net4),
			PodCIDR: netip.PrefixFrom(netip.AddrFrom4(pods), 24),
		})
	}
	return c, nil
}

// gateway is the machine's own address on the bridge.
func (c *Config) gateway() netip.Addr { return c.Subnet.Addr().Next() }

// apiServer is the URL at which everybody reaches the API server.
func (c *Config) apiServer() string {
	return fmt.Sprintf("https://%s:%d", c.Nodes[0].Address, apiPort)
}

func (c *Config) node(name string) (Node, error) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return Node{}, fmt.Errorf("cluster %q has no node %q", c.Name, name)
}

func (c *Config) state() stateDir { return stateDir(filepath.Join(StateRoot, c.Name)) }

// stateDir is the directory that holds all files of one cluster.
type stateDir string

func (d stateDir) path(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

func (d stateDir) pki() string             { return d.path("pki") }
func (d stateDir) configFile() string      { return d.path("cluster.json") }
func (d stateDir) readyFile() string       { return d.path("ready") }
func (d stateDir) supervisorLock() string  { return d.path("supervisor.lock") }
func (d stateDir) supervisorLog() string   { return d.path("log", "supervisor.log") }
func (d stateDir) adminKubeconfig() string { return d.path("admin.kubeconfig") }

func (d stateDir) node(name string, elem ...string) string {
	return d.path(append([]string{"nodes", name}, elem...)...)
}

// programLog is where node init writes what a node's program prints.
func (d stateDir) programLog(node, program string) string {
	return d.node(node, "log", program+".log")
}

// errNoCluster means that there is no cluster of that name.
var errNoCluster = errors.New("no such cluster")

// loadConfig reads the Config of an existing cluster; errNoCluster if there is none.
func loadConfig(name string) (*Config, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(stateDir(filepath.Join(StateRoot, name)).configFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q; `h8s up --name %s` makes it", errNoCluster, name, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read the cluster's configuration: %w", err)
	}
	var c Config
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("configuration of cluster %q is damaged, `h8s down --name %s` removes it: %w", name, name, err)
	}
	return &c, nil
}

func (c *Config) save() error {
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(c.state().configFile(), append(data, '\n'), 0o644)
}

// writeFile replaces a file in one step, so that nobody reads half of it.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return renameio.WriteFile(path, data, mode, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
}
