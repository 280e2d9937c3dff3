package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
)

// ownCluster is the name of the cluster that a run makes for itself.
const ownCluster = "bench"

// stateRoot is where `h8s up` keeps one directory per cluster, and in it one per
// node, with the node's /tmp, /var and /run.
const stateRoot = "/var/lib/h8s"

// lab is the cluster in which everything is measured, seen as its operator.
type lab struct {
	client.WithWatch

	name, bin, version string
	nodes              []node
	// own says that the cluster was made for this run.
	own, keep bool
	// fixture is what was made in it for the measurements, nil if nothing was.
	fixture *fixture
	// crowd is there instead of nodes, in the suite that needs none.
	crowd *crowd
	// curves are what was measured so far and can be plotted.
	curves []Curve
}

// node is one node of an embedded cluster: a set of namespaces on this machine.
type node struct {
	name    string
	address netip.Addr
	// pid is of the node's init.
	pid int
	// netns is the path of the node's network namespace.
	netns string
	// dir holds the node's files.
	dir string
}

// openLab makes the run's own cluster, or opens the one that was named.
func openLab(ctx context.Context, o options, p *progress) (*lab, error) {
	l := &lab{name: o.cluster, bin: o.bin, own: o.cluster == "", keep: o.keep}
	if l.own {
		l.name = ownCluster
		p.say("making cluster %q", l.name)
		// What an earlier run left when it was killed.
		if err := l.h8s(ctx, "down", "--name", l.name); err != nil {
			return nil, err
		}
		if err := l.h8s(ctx, "up", "--name", l.name, "--nodes", "2"); err != nil {
			return nil, l.abandon(ctx, p, err)
		}
	}
	if err := l.connect(ctx); err != nil {
		return nil, l.abandon(ctx, p, err)
	}
	return l, nil
}

// abandon removes what was made before err.
func (l *lab) abandon(ctx context.Context, p *progress, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
	defer cancel()
	return errors.Join(err, l.close(ctx, p))
}

// close removes what the run made.
func (l *lab) close(ctx context.Context, p *progress) error {
	switch {
	case l.crowd != nil:
		p.say("stopping the control plane")
		return l.crowd.close()
	case l.own && l.keep:
		p.say("cluster %q stays up", l.name)
		return nil
	case l.own:
		p.say("removing cluster %q", l.name)
		return l.h8s(ctx, "down", "--name", l.name)
	case l.fixture != nil:
		return l.fixture.remove(ctx, p)
	}
	return nil
}

// h8s runs our CLI; what it prints is shown only if it fails.
func (l *lab) h8s(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, filepath.Join(l.bin, "h8s"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("h8s %s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

func (l *lab) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var err error
	if l.version, err = l.programVersion(ctx); err != nil {
		return err
	}
	kubeconfig, err := exec.CommandContext(ctx, filepath.Join(l.bin, "h8s"), "kubeconfig", "--name", l.name).Output()
	if err != nil {
		return fmt.Errorf("h8s kubeconfig --name %s: %w (is it up?)", l.name, err)
	}
	config, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		return fmt.Errorf("read kubeconfig of cluster %q: %w", l.name, err)
	}
	config.QPS, config.Burst = 200, 400
	ctrllog.SetLogger(logr.Discard())
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return err
	}
	if l.WithWatch, err = client.NewWithWatch(config, client.Options{Scheme: scheme}); err != nil {
		return fmt.Errorf("connect to cluster %q: %w", l.name, err)
	}
	return l.findNodes(ctx)
}

// programVersion is that of our programs.
func (l *lab) programVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(l.bin, "h8s"), "version").Output()
	if err != nil {
		return "", fmt.Errorf("h8s version: %w", err)
	}
	version, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return version, nil
}

func (l *lab) findNodes(ctx context.Context) error {
	var list corev1.NodeList
	if err := l.List(ctx, &list); err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	for _, item := range list.Items {
		n := node{name: item.Name, dir: filepath.Join(stateRoot, l.name, "nodes", item.Name)}
		for _, a := range item.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				n.address, _ = netip.ParseAddr(a.Address)
			}
		}
		pids, err := processes(l.cgroup(n), isInit)
		if err != nil {
			return err
		}
		if len(pids) != 1 || !n.address.Is4() {
			return fmt.Errorf("node %s: found %d init processes in cgroup %s and address %q: is %q a cluster of `h8s up`?",
				n.name, len(pids), l.cgroup(n), n.address, l.name)
		}
		n.pid, n.netns = pids[0], fmt.Sprintf("/proc/%d/ns/net", pids[0])
		l.nodes = append(l.nodes, n)
	}
	if len(l.nodes) < 2 {
		return fmt.Errorf("cluster %q has %d nodes, the measurements need two", l.name, len(l.nodes))
	}
	slices.SortFunc(l.nodes, func(a, b node) int { return strings.Compare(a.name, b.name) })
	return nil
}

// cgroup holds everything that runs on a node.
func (l *lab) cgroup(n node) string { return "/h8s-" + l.name + "/" + n.name + "/" }

// processes are those in or below a cgroup, named by a part of its path, that
// match.
func processes(cgroup string, match func(proc string) bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		proc := filepath.Join("/proc", e.Name())
		data, err := os.ReadFile(filepath.Join(proc, "cgroup"))
		if err != nil || !strings.Contains(string(data), cgroup) {
			continue // ended meanwhile, or somebody else's
		}
		if match(proc) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// isInit says whether a process is PID 1 of a PID namespace directly below ours.
func isInit(proc string) bool {
	ids := namespacePIDs(proc)
	return len(ids) == 2 && ids[1] == "1"
}

// isMain says whether a process is the first one of a container, and has the name.
// What it forks has the same name until it executes something else.
func isMain(name string) func(proc string) bool {
	return func(proc string) bool {
		comm, err := os.ReadFile(filepath.Join(proc, "comm"))
		ids := namespacePIDs(proc)
		return err == nil && strings.TrimSpace(string(comm)) == name && len(ids) > 0 && ids[len(ids)-1] == "1"
	}
}

// namespacePIDs are the IDs of a process from our PID namespace inwards.
func namespacePIDs(proc string) []string {
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		return nil // ended meanwhile
	}
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			return strings.Fields(ids)
		}
	}
	return nil
}
