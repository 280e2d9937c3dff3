package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestHyperCrowd starts as many virtual machines at once as a node of this size may have
// to bear, all of which must be Ready at the first attempt, and takes them away at once.
func TestHyperCrowd(t *testing.T) {
	const count = 30
	names := nodes(t)
	before := map[string]hostState{}
	for _, n := range names {
		var err error
		if before[n], err = newNodeState(n); err != nil {
			t.Fatal(err)
		}
	}
	tn := newTenant(t, "hypercrowd", "10.0.0.0/16")
	tn.useHyper(t)
	var manifests []string
	for i := range count {
		manifests = append(manifests, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: crowd-%d, labels: {app: crowd}}, spec: {runtimeClassName: hyper,
			terminationGracePeriodSeconds: 1, nodeSelector: {kubernetes.io/hostname: %s}, containers: [{name: c, image: "localhost/busybox:latest", imagePullPolicy: Never,
			resources: {limits: {memory: 64Mi}, requests: {cpu: 10m}}, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 2},
			command: [sh, -c, "cat /proc/sys/kernel/random/boot_id; exec nc -ll -p 8080 -e cat"]}]}}`, i, names[i%len(names)]))
	}
	begin := time.Now()
	tn.run(t, manifests...)
	within(t, 3*patience, func() error { // much at once for two processors
		out, err := try(tn.owner, "get", "pods", "-n", tn.ns, "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
		if n := strings.Count(out, "True"); err == nil && n != count {
			err = fmt.Errorf("%d of %d pods are Ready", n, count)
		}
		return err
	})
	ready := time.Since(begin)

	if out := kubectl(t, tn.owner, "get", "pods", "-n", tn.ns, "-o", "jsonpath={.items[*].status.containerStatuses[0].restartCount}"); strings.Trim(out, "0 ") != "" || len(strings.Fields(out)) != count {
		t.Errorf("restarts: %s", out)
	}
	events, err := try(tn.owner, "get", "events", "-n", tn.ns, "--field-selector=type=Warning", "-o", `jsonpath={range .items[*]}{.involvedObject.name}: {.reason}: {.message}{"\n"}{end}`)
	if err != nil {
		t.Error(err)
	}
	for event := range strings.Lines(events) {
		// A kubelet without processor time is late with its own caches, before a sandbox is asked for.
		if strings.Contains(event, "Failed") && !strings.Contains(event, "failed to sync") {
			t.Errorf("not all went well at the first attempt: %s", event)
		}
	}
	boots := strings.Fields(kubectl(t, tn.owner, "logs", "-n", tn.ns, "-l", "app=crowd", "--tail=1", "--max-log-requests", strconv.Itoa(count)))
	slices.Sort(boots)
	if n := len(slices.Compact(boots)); n != count {
		t.Errorf("%d kernels run, want %d", n, count)
	}
	machines, memory := 0, 0
	for _, n := range names {
		machines += len(processes(n, qemu))
		for _, p := range append(processes(n, qemu), processes(n, hyperShim)...) {
			memory += p.memory(t)
		}
	}
	if machines != count {
		t.Errorf("%d virtual machines run, want %d", machines, count)
	}
	t.Logf("%d virtual machines, started together, are Ready after %.0fs, each with %d MiB of the node's memory (PSS of QEMU and shim)", count, ready.Seconds(), memory/count>>10)

	begin = time.Now()
	kubectl(t, tn.owner, "delete", "pods", "--all", "-n", tn.ns, "--timeout=4m")
	// A node keeps a Network's portal for a while after its last pod, as long as there is the Network.
	kubectl(t, admin, "delete", "tenant", tn.name, "--timeout=4m")
	for _, n := range names {
		awaitNodeState(t, n, before[n])
	}
	t.Logf("gone after %.0fs", time.Since(begin).Seconds())
}

// memory is a process's share of the machine's memory, in KiB; nothing if it has ended.
func (p process) memory(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); f[0] == "Pss:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no share of the memory", p.pid)
	return 0
}
