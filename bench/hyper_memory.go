package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// podMemoryTarget is in MB, for each idle pod.
	podMemoryTarget = 60
	// idleTime is how long pods have done nothing when their memory is read.
	idleTime = 15 * time.Second
)

func measureMachineMemory(ctx context.Context, l *lab, o options, p *progress) (rows []Row, err error) {
	m, err := l.openMachines(ctx, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	pods := map[string][]*corev1.Pod{}
	defer func() {
		p.say("memory: deleting the pods")
		var all []*corev1.Pod
		for _, of := range pods {
			all = append(all, of...)
		}
		err = errors.Join(err, m.deletePods(ctx, all...))
	}()
	var first, last float64
	for _, count := range slices.Compact([]int{1, min(10, o.pods), o.pods}) {
		p.say("memory: %d idle pods of each kind", count)
		for _, k := range runningKinds() {
			if pods[k.name], err = m.addPods(ctx, k, pods[k.name], count); err != nil {
				return rows, err
			}
		}
		if err := wait(ctx, idleTime); err != nil {
			return rows, err
		}
		sides, note, err := m.podMemory(ctx, pods)
		if err != nil {
			return rows, err
		}
		metric := fmt.Sprintf("PSS per pod, %d idle", count)
		ours := absolute("memory", metric, "MB", sides[kindClone], &Target{Value: podMemoryTarget})
		ours.Note = note
		rows = append(rows, ours)
		for _, peer := range []string{kindRunc, kindGVisor} {
			r, err := row("memory", metric, "MB", sides[kindClone], sides[peer], nil)
			if err != nil {
				return rows, err
			}
			rows = append(rows, r)
		}
		if count == 1 {
			first = ours.Ours.Median
		}
		last = ours.Ours.Median
	}
	if o.pods > 1 {
		falls, err := row("memory", fmt.Sprintf("PSS per pod, %d against 1", o.pods), "MB",
			newSide(kindClone, []float64{last}), newSide("alone", []float64{first}), &Target{Value: 1})
		if err != nil {
			return rows, err
		}
		rows = append(rows, falls)
	}
	return rows, nil
}

// addPods starts pods of a kind, all at once, until there are so many.
func (m *machineLab) addPods(ctx context.Context, k kind, have []*corev1.Pod, count int) ([]*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	group, groupCtx := errgroup.WithContext(ctx)
	for i := len(have); i < count; i++ {
		pod := newPod(defaultNamespace, podName(k.objectName("idle", 0), i), m.node.name, k.runtimeClass)
		have = append(have, pod)
		group.Go(func() error {
			_, err := m.startPod(groupCtx, pod)
			return err
		})
	}
	return have, group.Wait()
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// podMemory reads the memory of pods, by kind; the note says what a clone's consists of.
func (m *machineLab) podMemory(ctx context.Context, pods map[string][]*corev1.Pod) (map[string]Side, string, error) {
	list, err := m.cri.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, "", fmt.Errorf("list sandboxes: %w", err)
	}
	sandboxOf := map[string]string{}
	for _, s := range list.Items {
		sandboxOf[s.Metadata.Uid] = s.Id
	}
	all, err := readProcesses(m.cgroup(m.node))
	if err != nil {
		return nil, "", err
	}
	sides := map[string]Side{}
	parts := map[string]float64{} // of all clones, by program, in MB
	for kind, of := range pods {
		var samples []float64
		for _, pod := range of {
			sum := 0.0
			for _, proc := range all.ofPod(string(pod.UID), sandboxOf[string(pod.UID)]) {
				data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(proc.pid), "smaps_rollup"))
				if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
					continue // it has ended meanwhile, as runsc's own helpers do
				}
				if err != nil {
					return nil, "", fmt.Errorf("memory of pod %s: %w", pod.Name, err)
				}
				memory, err := parseRollup(string(data))
				if err != nil {
					return nil, "", fmt.Errorf("memory of pod %s: %w", pod.Name, err)
				}
				sum += memory.pss / 1024
				if kind == kindClone {
					parts[proc.program] += memory.pss / 1024
				}
			}
			if sum == 0 {
				return nil, "", fmt.Errorf("pod %s has no processes", pod.Name)
			}
			samples = append(samples, sum)
		}
		sides[kind] = newSide(kind, samples)
	}
	var consists []string
	for program, sum := range parts {
		consists = append(consists, fmt.Sprintf("%s %s MB", program, number(sum/float64(len(pods[kindClone])))))
	}
	slices.Sort(consists)
	return sides, "all processes of a pod, also pause and the container's for the peers; a clone's are " + strings.Join(consists, ", "), nil
}

// process is one of a node's.
type process struct {
	pid, parent int
	program     string
	args        []string
	cgroups     string
}

type processTable []process

// readProcesses reads those in or below a cgroup.
func readProcesses(cgroup string) (processTable, error) {
	var table processTable
	_, err := processes(cgroup, func(proc string) bool {
		stat, err := os.ReadFile(filepath.Join(proc, "stat"))
		if err != nil {
			return false // ended meanwhile
		}
		line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || len(line) == 0 {
			return false
		}
		cgroups, err := os.ReadFile(filepath.Join(proc, "cgroup"))
		if err != nil {
			return false
		}
		p := process{cgroups: string(cgroups)}
		for arg := range bytes.SplitSeq(bytes.TrimSuffix(line, []byte{0}), []byte{0}) {
			p.args = append(p.args, string(arg))
		}
		p.program = filepath.Base(p.args[0])
		p.pid, _ = strconv.Atoi(filepath.Base(proc))
		// The name, in parentheses, may have anything in it.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 1 {
			p.parent, _ = strconv.Atoi(fields[1])
		}
		table = append(table, p)
		return true
	})
	return table, err
}

// ofPod are the processes in a pod's cgroup, its shim, and all that descends from it.
func (t processTable) ofPod(uid, sandbox string) processTable {
	taken := map[int]bool{}
	for {
		before := len(taken)
		for _, p := range t {
			shim := strings.HasPrefix(p.program, "containerd-shim-") && sandbox != "" && slices.Contains(p.args, sandbox)
			if shim || taken[p.parent] || strings.Contains(p.cgroups, "/pod"+uid) {
				taken[p.pid] = true
			}
		}
		if len(taken) == before {
			break
		}
	}
	return slices.DeleteFunc(slices.Clone(t), func(p process) bool { return !taken[p.pid] })
}
