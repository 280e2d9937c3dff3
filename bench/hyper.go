package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/hyper/accel"
)

// hyperSuite measures pods that are virtual machines beside those that are not, all of
// them on the default network of one node.
const hyperSuite = "hyper"

// The kinds of pods that are compared.
const (
	kindClone  = "hyper clone"
	kindCold   = "hyper cold"
	kindRunc   = "runc"
	kindGVisor = "gvisor"
)

// kind is a way to run a pod.
type kind struct {
	name string
	// runtimeClass is empty for the node's own runtime.
	runtimeClass string
	// cold says that virtual machines boot.
	cold bool
}

// runningKinds are those that differ once the pod runs; how a machine started does not.
func runningKinds() []kind {
	return []kind{
		{name: kindRunc},
		{name: kindGVisor, runtimeClass: v1alpha1.SandboxGVisor},
		{name: kindClone, runtimeClass: v1alpha1.SandboxHyper},
	}
}

func startKinds() []kind {
	return append(runningKinds(), kind{name: kindCold, runtimeClass: v1alpha1.SandboxHyper, cold: true})
}

// machineLab is the node on which the suite hyper runs.
type machineLab struct {
	*lab
	node   node
	cri    cri.RuntimeServiceClient
	conn   *grpc.ClientConn
	config shimConfig
	// handlers are what the container runtime calls the runtimes, by RuntimeClass.
	handlers map[string]string
}

// openMachines begins a section of the suite; the caller closes it.
func (l *lab) openMachines(ctx context.Context, p *progress) (*machineLab, error) {
	if err := l.ensureFixture(ctx, p); err != nil {
		return nil, err
	}
	// The embedded cluster's default.
	m := &machineLab{lab: l, node: l.nodes[1], handlers: map[string]string{"": "runc"}}
	for _, k := range startKinds() {
		if k.runtimeClass == "" {
			continue
		}
		var class nodev1.RuntimeClass
		if err := l.Get(ctx, client.ObjectKey{Name: k.runtimeClass}, &class); err != nil {
			return nil, fmt.Errorf("the RuntimeClass %s: %w", k.runtimeClass, err)
		}
		m.handlers[k.runtimeClass] = class.Handler
	}
	m.config.path = filepath.Join(m.node.dir, "etc", "h8s", "hyper.yaml")
	var err error
	m.conn, err = grpc.NewClient("unix://"+filepath.Join(m.node.dir, "run", "containerd", "containerd.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd of node %s: %w", m.node.name, err)
	}
	m.cri = cri.NewRuntimeServiceClient(m.conn)
	return m, nil
}

func (m *machineLab) close() error { return m.conn.Close() }

// as runs a measurement with machines that start as the kind says.
func (m *machineLab) as(k kind, measure func(ctx context.Context, round int) (map[string]float64, error)) variant {
	if !k.cold {
		return variant{k.name, measure}
	}
	return variant{k.name, func(ctx context.Context, round int) (_ map[string]float64, err error) {
		restore, err := m.config.withoutTemplates()
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, restore()) }()
		return measure(ctx, round)
	}}
}

// shimConfig is the configuration of a node's shims, each of which reads it when its
// pod starts.
type shimConfig struct{ path string }

// withoutTemplates lets machines boot until restore is called; what else the file says
// stays.
func (c shimConfig) withoutTemplates() (restore func() error, err error) {
	before, err := os.ReadFile(c.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		restore = func() error { return os.Remove(c.path) }
	case err != nil:
		return nil, fmt.Errorf("configuration of the hyper runtime: %w", err)
	default:
		restore = func() error { return renameio.WriteFile(c.path, before, 0o644) }
	}
	config := map[string]any{}
	if err := yaml.Unmarshal(before, &config); err != nil {
		return nil, fmt.Errorf("configuration of the hyper runtime: %s: %w", c.path, err)
	}
	config["templates"] = false
	data, err := yaml.Marshal(config)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(c.path), 0o755); err != nil {
		return nil, err
	}
	return restore, renameio.WriteFile(c.path, data, 0o644)
}

// startPod creates a pod and waits until it is ready. The caller deletes it, also after
// an error.
func (l *lab) startPod(ctx context.Context, pod *corev1.Pod) (time.Duration, error) {
	ready, err := l.watchReady(ctx, pod)
	if err != nil {
		return 0, err
	}
	defer ready.stop()
	created := time.Now()
	if err := l.createPod(ctx, pod); err != nil {
		return 0, err
	}
	at, err := ready.wait(ctx)
	if err != nil {
		return 0, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return at.Sub(created), nil
}

// deletePods deletes pods, those that were never created too, and waits until they are gone.
func (l *lab) deletePods(ctx context.Context, pods ...*corev1.Pod) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	var errs []error
	for _, pod := range pods {
		errs = append(errs, client.IgnoreNotFound(l.Delete(ctx, pod)))
	}
	for _, pod := range pods {
		errs = append(errs, l.gone(ctx, pod))
	}
	return errors.Join(errs...)
}

// cloneAgainst compares clones with several peers.
func (r rounds) cloneAgainst(group string, peers []string, list ...wanted) ([]Row, error) {
	var rows []Row
	for _, peer := range peers {
		more, err := r.rows(group, kindClone, peer, list...)
		rows = append(rows, more...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// accelerator is what executes the guests of a node.
func (n node) accelerator() (accel.Choice, error) {
	choice, found, err := accel.Recorded(filepath.Join(n.dir, accel.DefaultDir))
	if err == nil && !found {
		err = fmt.Errorf("node %s does not know yet what executes its guests", n.name)
	}
	return choice, err
}

// addMachines adds what follows from several sections.
func (r *Report) addMachines(l *lab) error {
	choice, err := l.nodes[1].accelerator()
	if err != nil {
		return err
	}
	r.Accelerator = &choice
	if choice.Accelerator != accel.TCG {
		return nil
	}
	if row, ok := estimateKVM(r.Rows); ok {
		r.Rows = append(r.Rows, row)
	}
	return nil
}
