package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	memoryTenant = "bench-memory"
	agentProgram = "h8s-node"
	// settleTime is how long a step's garbage has to go away by itself: Go's runtime
	// collects that of an idle process every two minutes.
	settleTime = 150 * time.Second
)

// memory is what a process has, in KB.
type memory struct {
	// rss counts pages that are shared with others in full, pss by its share; anon
	// is what no file backs: heap and stacks.
	rss, pss, anon float64
}

// parseRollup reads the fields of /proc/<pid>/smaps_rollup.
func parseRollup(data string) (memory, error) {
	var m memory
	for field, value := range map[string]*float64{"Rss:": &m.rss, "Pss:": &m.pss, "Anonymous:": &m.anon} {
		_, after, ok := strings.Cut(data, "\n"+field)
		columns := strings.Fields(after)
		if !ok || len(columns) < 2 || columns[1] != "kB" {
			return memory{}, fmt.Errorf("smaps_rollup has no %s in kB", field)
		}
		v, err := strconv.ParseFloat(columns[0], 64)
		if err != nil {
			return memory{}, fmt.Errorf("smaps_rollup: %s %w", field, err)
		}
		*value = v
	}
	return m, nil
}

// agentMemory reads the memory of a node's agent for as long as it takes to settle,
// and returns the reading with the least that no file backs: what is above it was
// garbage.
func (l *lab) agentMemory(ctx context.Context, n node) (memory, error) {
	pids, err := processes(l.cgroup(n), isMain(agentProgram))
	if err != nil {
		return memory{}, err
	}
	if len(pids) != 1 {
		return memory{}, fmt.Errorf("node %s runs %d processes named %s, want one", n.name, len(pids), agentProgram)
	}
	settled, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	tick := time.NewTicker(2 * time.Second)
	defer tick.Stop()
	least := memory{anon: math.Inf(1)}
	for {
		data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pids[0]), "smaps_rollup"))
		if err != nil {
			return memory{}, fmt.Errorf("read the agent's memory: %w", err)
		}
		m, err := parseRollup(string(data))
		if err != nil {
			return memory{}, err
		}
		if m.anon < least.anon {
			least = m
		}
		select {
		case <-tick.C:
		case <-settled.Done():
			return least, context.Cause(ctx)
		}
	}
}

// restartAgent gives a node a new agent, which has no history.
func (l *lab) restartAgent(ctx context.Context, n node) error {
	agents := func() ([]corev1.Pod, error) {
		var pods corev1.PodList
		err := l.List(ctx, &pods, client.MatchingLabels{
			"app.kubernetes.io/name": "h8s", "app.kubernetes.io/component": "node",
		}, client.MatchingFields{"spec.nodeName": n.name})
		return pods.Items, err
	}
	old, err := agents()
	if err != nil {
		return fmt.Errorf("find the agent of node %s: %w", n.name, err)
	}
	if len(old) != 1 {
		return fmt.Errorf("node %s has %d agents, want one", n.name, len(old))
	}
	if err := l.Delete(ctx, &old[0]); err != nil {
		return fmt.Errorf("restart the agent of node %s: %w", n.name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	return poll(ctx, 200*time.Millisecond, func() error {
		pods, err := agents()
		if err != nil {
			return err
		}
		for _, pod := range pods {
			if pod.UID != old[0].UID && isReady(&pod) {
				return nil
			}
		}
		return fmt.Errorf("the new agent of node %s is not ready", n.name)
	})
}

func measureMemory(ctx context.Context, l *lab, _ options, p *progress) (rows []Row, err error) {
	if l.fixture != nil {
		if err := l.fixture.remove(ctx, p); err != nil {
			return nil, err
		}
	}
	n := l.nodes[1]
	p.say("memory: a new agent on node %s", n.name)
	if err := l.restartAgent(ctx, n); err != nil {
		return nil, err
	}
	driver, err := startCNI(ctx, n)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, driver.stop(), l.removeMemory(ctx, p)) }()

	networks, counts := 0, []int{0, 10, 100}
	var measured []memory
	for _, count := range counts {
		p.say("memory: %d Networks", count)
		if count > networks {
			if err := l.addNetworks(ctx, driver, n, networks, count); err != nil {
				return rows, err
			}
			networks = count
		}
		m, err := l.agentMemory(ctx, n)
		if err != nil {
			return rows, err
		}
		measured = append(measured, m)
		rows = append(rows, Row{
			Group: "node agent", Metric: fmt.Sprintf("memory, %d Networks (PSS)", count), Unit: "MB",
			Ours: newSide(agentProgram, []float64{m.pss / 1024}),
			Note: fmt.Sprintf("RSS %.1f MB, anonymous %.1f MB", m.rss/1024, m.anon/1024),
		})
	}
	p.say("memory: a new agent that finds %d Networks", networks)
	if err := l.restartAgent(ctx, n); err != nil {
		return rows, err
	}
	restarted, err := l.agentMemory(ctx, n)
	if err != nil {
		return rows, err
	}
	// A new agent keeps for long what it needed to load its caches: it has less of
	// that once it has worked. So the growth is that from some Networks to many.
	some, many := len(measured)-2, len(measured)-1
	target := &Target{Value: 200}
	kb := (measured[many].anon - measured[some].anon) / float64(counts[many]-counts[some])
	verdict := "missed"
	if target.met(kb) {
		verdict = "met"
	}
	return append(rows,
		Row{
			Group: "node agent", Metric: fmt.Sprintf("memory, %d Networks, agent restarted (PSS)", networks), Unit: "MB",
			Ours: newSide(agentProgram, []float64{restarted.pss / 1024}),
		},
		Row{
			Group: "node agent", Metric: "memory per idle Network", Unit: "KB",
			Ours: newSide(agentProgram, []float64{kb}), Target: target, Verdict: verdict,
			Note: fmt.Sprintf("growth of anonymous memory (heap with its garbage, stacks) from %d to %d Networks, each with a portal, a name server and one pod", counts[some], counts[many]),
		},
	), nil
}

// addNetworks makes Networks from to to, each with a namespace, a pod, and a portal
// on the node with that pod attached.
func (l *lab) addNetworks(ctx context.Context, driver *cniClient, n node, from, to int) error {
	// A Network serves namespaces of its tenant.
	if err := l.ensure(ctx, &v1alpha1.Tenant{
		ObjectMeta: metav1.ObjectMeta{Name: memoryTenant},
		Spec: v1alpha1.TenantSpec{
			Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{"10.201.0.0/16"}},
			Sandbox: v1alpha1.TenantSandbox{Default: v1alpha1.SandboxGVisor, Allowed: []string{v1alpha1.SandboxGVisor}},
		},
	}); err != nil {
		return err
	}
	for i := from; i < to; i++ {
		name := memoryName(i)
		if err := l.ensure(ctx, &v1alpha1.Network{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: v1alpha1.NetworkSpec{
				Tenant: memoryTenant, CIDRs: []v1alpha1.CIDR{"10.201.0.0/16"}, Provider: v1alpha1.ProviderVXLAN,
			},
		}); err != nil {
			return err
		}
		if err := l.ensure(ctx, namespace(name, map[string]string{
			v1alpha1.LabelTenant: memoryTenant, v1alpha1.LabelNetwork: name,
		})); err != nil {
			return err
		}
	}
	for i := from; i < to; i++ {
		pod := waitForever(newPod(memoryName(i), "pod", n.name, ""))
		if err := l.createPod(ctx, pod); err != nil {
			return err
		}
		if err := l.waitPod(ctx, pod, "scheduled", isScheduled); err != nil {
			return err
		}
		if err := attach(ctx, driver, pod); err != nil {
			return err
		}
	}
	return nil
}

// attach adds a pod to its Network; it is tried again until the Network is ready
// on the node, as kubelet does.
func attach(ctx context.Context, driver *cniClient, pod *corev1.Pod) error {
	id := "bench-memory-" + pod.Namespace
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return poll(ctx, 500*time.Millisecond, func() error {
		_, err := driver.do(call{Verb: "ADD", ContainerID: id, Args: identity(pod, id), Conflist: asJSON(h8sConf)})
		if err != nil {
			_, delErr := driver.do(call{Verb: "DEL", ContainerID: id})
			err = errors.Join(err, delErr)
		}
		return err
	})
}

func memoryName(i int) string { return fmt.Sprintf("bench-memory-%03d", i) }

// removeMemory takes the Networks away again; with the run's own cluster they go
// together with it.
func (l *lab) removeMemory(ctx context.Context, p *progress) error {
	if l.own {
		return nil
	}
	p.say("removing tenant %q with its namespaces, which takes some minutes", memoryTenant)
	// Kubernetes takes seconds for each namespace, at any load.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
	defer cancel()
	tenant := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: memoryTenant}}
	if err := l.Delete(ctx, tenant); err != nil {
		return client.IgnoreNotFound(err)
	}
	return l.gone(ctx, tenant)
}
