package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// startTarget is how much longer than runc's a clone's pod may take to be ready.
	startTarget = 1.5
	// sandboxTarget is for RunPodSandbox of a clone whose guest TCG executes, in ms.
	sandboxTarget = 350
	// burst is how many pods are started at once.
	burst = 10

	sandboxGroup = "sandbox start"
	sandboxReady = "RunPodSandbox"
	firstStart   = "CreateContainer and StartContainer, the first in it"
)

// peersOfClone are in the order of the table.
func peersOfClone() []string { return []string{kindRunc, kindGVisor, kindCold} }

func measureMachineStart(ctx context.Context, l *lab, o options, p *progress) (_ []Row, err error) {
	p.say("start: %d pods of each kind, one after the other", o.starts)
	m, err := l.openMachines(ctx, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	var variants []variant
	for _, k := range startKinds() {
		variants = append(variants, m.as(k, l.start(k.name, m.node, defaultNamespace, k.runtimeClass).measure))
	}
	// The first pods unpack the image, make the template and fill caches.
	if _, err := interleave(ctx, 1, variants); err != nil {
		return nil, err
	}
	r, err := interleave(ctx, o.starts, variants)
	if err != nil {
		return nil, err
	}
	rows, err := r.rows("pod start", kindClone, kindRunc,
		wanted{"create → Ready", "s", "ready", &Target{Value: startTarget}},
		wanted{"create → first output", "s", "output", nil})
	if err != nil {
		return rows, err
	}
	more, err := r.cloneAgainst("pod start", peersOfClone()[1:], wanted{"create → Ready", "s", "ready", nil})
	rows = append(rows, more...)
	if err != nil {
		return rows, err
	}
	more, err = r.rows("pod start", kindCold, kindRunc, wanted{"create → Ready", "s", "ready", nil})
	return append(rows, more...), err
}

func measureBurst(ctx context.Context, l *lab, o options, p *progress) (_ []Row, err error) {
	p.say("burst: %d pods of each kind at once, %d rounds", burst, o.bursts)
	m, err := l.openMachines(ctx, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	var variants []variant
	for _, k := range startKinds() {
		variants = append(variants, m.as(k, m.burst(k)))
	}
	r, err := interleave(ctx, o.bursts, variants)
	if err != nil {
		return nil, err
	}
	group := fmt.Sprintf("%d pods at once", burst)
	rows, err := r.rows(group, kindClone, kindRunc,
		wanted{"create → all Ready", "s", "all", &Target{Value: startTarget}},
		wanted{"create → Ready, median pod", "s", "median", nil})
	if err != nil {
		return rows, err
	}
	more, err := r.cloneAgainst(group, peersOfClone()[1:], wanted{"create → all Ready", "s", "all", nil})
	return append(rows, more...), err
}

// burst creates pods at once, waits until all are ready, and deletes them.
func (m *machineLab) burst(k kind) func(context.Context, int) (map[string]float64, error) {
	return func(ctx context.Context, round int) (_ map[string]float64, err error) {
		ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
		defer cancel()
		pods := make([]*corev1.Pod, burst)
		for i := range pods {
			pods[i] = newPod(defaultNamespace, podName(k.objectName("burst", round), i), m.node.name, k.runtimeClass)
		}
		defer func() { err = errors.Join(err, m.deletePods(ctx, pods...)) }()
		times := make([]float64, burst)
		begin := time.Now()
		group, groupCtx := errgroup.WithContext(ctx)
		for i, pod := range pods {
			group.Go(func() error {
				took, err := m.startPod(groupCtx, pod)
				times[i] = took.Seconds()
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return nil, err
		}
		return map[string]float64{"all": time.Since(begin).Seconds(), "median": median(times)}, nil
	}
}

// objectName is a name for what a section makes in a round.
func (k kind) objectName(prefix string, round int) string {
	return fmt.Sprintf("%s-%s-%d", prefix, strings.ReplaceAll(k.name, " ", "-"), round)
}

func measureSandbox(ctx context.Context, l *lab, o options, p *progress) (_ []Row, err error) {
	p.say("sandbox: %d of each kind by the CRI, one after the other", o.starts)
	m, err := l.openMachines(ctx, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	s, err := m.newSandboxes(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.deletePods(ctx, s.pod)) }()
	// It ends sandboxes that it did not ask for. The node is not ready meanwhile, for less
	// time than its pods tolerate.
	resume, err := m.suspendKubelet()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, resume()) }()
	var variants []variant
	for _, k := range startKinds() {
		variants = append(variants, m.as(k, s.run(k)))
	}
	// The first one of a size makes its template.
	if _, err := interleave(ctx, 1, variants); err != nil {
		return nil, err
	}
	r, err := interleave(ctx, o.starts, variants)
	if err != nil {
		return nil, err
	}
	rows := []Row{absolute(sandboxGroup, sandboxReady, "ms", r.side(kindClone, "ready"), &Target{Value: sandboxTarget})}
	rows[0].Note = "what the kubelet waits for: network by CNI, shim and, for the peers, pause container included; " +
		"the target is for guests that TCG executes"
	more, err := r.cloneAgainst(sandboxGroup, peersOfClone(),
		wanted{sandboxReady, "ms", "ready", nil},
		wanted{firstStart, "ms", "container", nil})
	return append(rows, more...), err
}

// suspendKubelet stops the node's kubelet until resume is called.
func (m *machineLab) suspendKubelet() (resume func() error, err error) {
	pids, err := processes(m.cgroup(m.node), func(proc string) bool {
		comm, err := os.ReadFile(filepath.Join(proc, "comm"))
		return err == nil && strings.TrimSpace(string(comm)) == "kubelet"
	})
	if err != nil {
		return nil, err
	}
	if len(pids) != 1 || pids[0] <= 1 {
		return nil, fmt.Errorf("node %s runs %d kubelets, want one", m.node.name, len(pids))
	}
	if err := unix.Kill(pids[0], unix.SIGSTOP); err != nil {
		return nil, fmt.Errorf("suspend the kubelet: %w", err)
	}
	return func() error { return unix.Kill(pids[0], unix.SIGCONT) }, nil
}

// sandboxes are made in the name of a pod that the kubelet never starts itself.
type sandboxes struct {
	*machineLab
	pod     *corev1.Pod
	cgroup  string
	attempt uint32
}

func (m *machineLab) newSandboxes(ctx context.Context) (*sandboxes, error) {
	s := &sandboxes{machineLab: m, pod: waitForever(newPod(defaultNamespace, "sandbox", m.node.name, ""))}
	if err := m.createPod(ctx, s.pod); err != nil {
		return nil, err
	}
	s.cgroup = m.cgroup(m.node) + "kubepods/besteffort/pod" + string(s.pod.UID)
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	// The kubelet makes the pod's cgroup, and later removes it.
	err := poll(wait, 100*time.Millisecond, func() error {
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
			if found, err := filepath.Glob(root + s.cgroup); err != nil || len(found) > 0 {
				return err
			}
		}
		return fmt.Errorf("the kubelet has not made cgroup %s", s.cgroup)
	})
	if err != nil {
		return nil, errors.Join(err, m.deletePods(ctx, s.pod))
	}
	return s, nil
}

// run starts a sandbox and a container in it, and removes both.
func (s *sandboxes) run(k kind) func(context.Context, int) (map[string]float64, error) {
	return func(ctx context.Context, _ int) (_ map[string]float64, err error) {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		s.attempt++
		request := &cri.RunPodSandboxRequest{RuntimeHandler: s.handlers[k.runtimeClass], Config: &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{
				Name: s.pod.Name, Namespace: s.pod.Namespace, Uid: string(s.pod.UID), Attempt: s.attempt,
			},
			Hostname: fmt.Sprintf("%s-%d", s.pod.Name, s.attempt),
			Labels: map[string]string{
				"io.kubernetes.pod.name": s.pod.Name, "io.kubernetes.pod.namespace": s.pod.Namespace,
				"io.kubernetes.pod.uid": string(s.pod.UID),
			},
			Linux: &cri.LinuxPodSandboxConfig{CgroupParent: s.cgroup},
		}}
		begin := time.Now()
		r, err := s.cri.RunPodSandbox(ctx, request)
		took := time.Since(begin)
		if err != nil {
			return nil, fmt.Errorf("start a sandbox: %w", err)
		}
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			_, stopErr := s.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId})
			_, removeErr := s.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
			err = errors.Join(err, stopErr, removeErr)
		}()
		container, err := s.startContainer(ctx, r.PodSandboxId, request.Config)
		if err != nil {
			return nil, err
		}
		return map[string]float64{"ready": milliseconds(took), "container": milliseconds(container)}, nil
	}
}

// startContainer starts the one container of a sandbox, which goes with it.
func (s *sandboxes) startContainer(ctx context.Context, sandbox string, config *cri.PodSandboxConfig) (time.Duration, error) {
	begin := time.Now()
	c, err := s.cri.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: sandbox, SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: container, Attempt: s.attempt}, // names are unique in a pod
			Image:    &cri.ImageSpec{Image: image},
			Command:  []string{"/bin/sleep", "86400"},
			Linux: &cri.LinuxContainerConfig{
				Resources: &cri.LinuxContainerResources{}, SecurityContext: &cri.LinuxContainerSecurityContext{},
			},
		},
	})
	if err != nil {
		return 0, fmt.Errorf("create a container: %w", err)
	}
	if _, err := s.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return 0, fmt.Errorf("start a container: %w", err)
	}
	return time.Since(begin), nil
}
