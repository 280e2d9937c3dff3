package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// qemu and hyperShim are what runs on a node for each pod that is a virtual machine.
const (
	qemu      = "qemu-system-x86_64"
	hyperShim = "containerd-shim-hyper-v1"
)

// useHyper makes virtual machines of a tenant's pods.
func (tn tenant) useHyper(t testing.TB) {
	t.Helper()
	kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"sandbox":{"default":"hyper","allowed":["gvisor","hyper"]}}}`)
	eventually(t, func() error {
		out, err := try(admin, "get", "namespace", tn.ns, "-o", `jsonpath={.metadata.labels.h8s\.io/sandbox}`)
		if err != nil || out != "hyper" {
			return fmt.Errorf("the sandbox of namespace %s is %q, %w", tn.ns, out, err)
		}
		// Admission reads namespaces from a cache.
		_, err = tryInput(tn.owner, ticker("probe", "none", "", small), "create", "-n", tn.ns, "--dry-run=server", "-f", "-")
		return err
	})
}

// ticker is a pod that is a virtual machine: it listens on 8080, prints the ID of its
// kernel's boot and then numbers, two in a second, and takes a second to end. What the
// others leave open stands in spec and container, each line in YAML's flow style
// with a comma at its end.
func ticker(name, node, spec, container string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %[1]s, labels: {app: %[1]s}}, spec: {runtimeClassName: hyper,
		terminationGracePeriodSeconds: 5, nodeSelector: {kubernetes.io/hostname: %[2]s}, %[3]s
		containers: [{name: c, image: "localhost/busybox:latest", imagePullPolicy: Never, %[4]s
		readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1, timeoutSeconds: 5},
		command: [sh, -c, 'trap "echo ending; sleep 1; exit 0" TERM; nc -ll -p 8080 -e cat & cat /proc/sys/kernel/random/boot_id; i=0; while :; do i=$((i+1)); echo $i; sleep 0.5; done']}]}}`,
		name, node, spec, container)
}

// small is the size of most pods here.
const small = "resources: {limits: {memory: 64Mi}, requests: {cpu: 10m}},"

// vm is the virtual machine of a pod.
type vm struct{ qemu, shim process }

// vm returns a pod's virtual machine, of which there must be one.
func (tn tenant) vm(t testing.TB, node, pod string) vm {
	t.Helper()
	m, err := findVM(node, tn.uid(t, pod))
	if err != nil {
		t.Fatalf("pod %s: %v", pod, err)
	}
	return m
}

func (tn tenant) uid(t testing.TB, pod string) string {
	t.Helper()
	return kubectl(t, admin, "get", "pod", pod, "-n", tn.ns, "-o", "jsonpath={.metadata.uid}")
}

// findVM finds a pod's virtual machine by the pod's cgroup.
func findVM(node, uid string) (vm, error) {
	found := slices.DeleteFunc(processes(node, qemu), func(p process) bool {
		groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.pid))
		return err != nil || !strings.Contains(string(groups), "/pod"+uid+"/")
	})
	if len(found) != 1 {
		return vm{}, fmt.Errorf("%d QEMUs are in the cgroup of pod %s on %s", len(found), uid, node)
	}
	parent, err := found[0].parent()
	if err != nil {
		return vm{}, err
	}
	for _, shim := range processes(node, hyperShim) {
		if shim.pid == parent.pid {
			return vm{qemu: found[0], shim: shim}, nil
		}
	}
	return vm{}, fmt.Errorf("QEMU %d is no child of a shim", found[0].pid)
}

// identity tells one life of a pod's container from another: its virtual machine, its
// kernel's boot, and how often it was started again.
func (tn tenant) identity(t testing.TB, node, pod string) string {
	t.Helper()
	tn.waitReady(t, pod) // a busy machine answers late, and is the same
	boot, _, err := tn.printed(pod)
	if err != nil {
		t.Fatal(err)
	}
	restarts, err := restartsAndReady(tn, pod)
	if err != nil {
		t.Fatal(err)
	}
	restarts, _, _ = strings.Cut(restarts, " ")
	return fmt.Sprintf("QEMU %d, boot %s, restarts %s", tn.vm(t, node, pod).qemu.pid, boot, restarts)
}

// printed is what a ticker has printed: the ID of the boot, and how many numbers, all of
// them, in order.
func (tn tenant) printed(pod string) (boot string, numbers int, err error) {
	out, err := try(tn.owner, "logs", "-n", tn.ns, pod)
	if err != nil {
		return "", 0, err
	}
	boot, rest, _ := strings.Cut(out, "\n")
	if !bootID.MatchString(boot) {
		return "", 0, fmt.Errorf("the log of pod %s begins with %q", pod, boot)
	}
	lines := strings.Fields(rest)
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			return "", 0, fmt.Errorf("line %d of the log of pod %s is %q", i+1, pod, line)
		}
	}
	return boot, len(lines), nil
}

var bootID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// nodeFile is a file of a node, as the machine sees it.
func nodeFile(node, path string) string {
	return filepath.Join("/var/lib/h8s", cluster.cluster, "nodes", node, path)
}

// podCgroups are where pods' cgroups are: in each hierarchy of version 1, or in version 2's.
func podCgroups(node string) []string {
	var found []string
	for _, hierarchy := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, _ := filepath.Glob(filepath.Join(hierarchy, "h8s-"+cluster.cluster, node, "kubepods"))
		found = append(found, dirs...)
	}
	return found
}

// newNodeState is all that a pod has on its node: compare two with leftovers.
func newNodeState(node string) (hostState, error) {
	s := hostState{}
	for _, program := range []string{qemu, hyperShim, "mkfs.erofs"} {
		for _, p := range processes(node, program) {
			s[fmt.Sprintf("process %d: %s", p.pid, strings.Join(p.args, " "))] = ""
		}
	}
	for _, root := range podCgroups(node) {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				// Those of the classes of service are the kubelet's, and stay.
				if base := filepath.Base(path); base != "besteffort" && base != "burstable" {
					s["cgroup "+path] = ""
				}
			}
			return ignoreGone(err)
		})
		if err != nil {
			return nil, err
		}
	}
	for _, pattern := range []string{
		"run/h8s/hyper/????????????????????", "run/netns/*", "run/containerd/s/*", "run/containerd/*/k8s.io/*", "run/containerd/io.containerd.grpc.v1.cri/*/*",
		"var/lib/containerd/*/k8s.io/*", "var/lib/containerd/io.containerd.grpc.v1.cri/*/*", "var/lib/kubelet/pods/*", "var/lib/h8s/hyper/*/*.partial", "var/lib/h8s/hyper/templates/*/.*[!k]",
	} {
		files, err := filepath.Glob(nodeFile(node, pattern))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			s["file "+f] = ""
		}
	}
	out, err := tryNode(node, `findmnt -rno TARGET | sed 's/^/mount /'; ip -br link | sed 's/^/link /; s/[@ ].*//'; losetup --noheadings --list --output NAME,BACK-FILE | sed 's/^/loop device /'
		for n in /run/netns/*; do for l in $(nsenter --net=$n ip -br link | cut -d' ' -f1); do echo link in $n: $l; done; done`)
	for line := range strings.Lines(out) {
		s[strings.TrimSpace(line)] = ""
	}
	return s, err
}

// awaitNodeState waits until a node has nothing that it had not before, but for what
// containers of living pods have: the cluster's own may have been started again.
func awaitNodeState(t testing.TB, node string, before hostState) {
	t.Helper()
	if err := poll(patience, func() error {
		after, err := newNodeState(node)
		if err != nil {
			return err
		}
		out, err := try(admin, "get", "pods", "-A", "-o", "jsonpath={.items[*].status..containerID}")
		if err != nil {
			return err
		}
		living := strings.Fields(strings.ReplaceAll(out, "containerd://", ""))
		left := slices.DeleteFunc(leftovers(before, after), func(what string) bool {
			return slices.ContainsFunc(living, func(id string) bool { return strings.Contains(what, id) })
		})
		if len(left) > 0 {
			return fmt.Errorf("left on node %s:\n%s", node, strings.Join(left, "\n"))
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// memoryGroup is a cgroup as far as memory is concerned.
type memoryGroup struct{ limit, usage, stat string }

// podsMemory is the memory cgroup of all pods of a node, or of the one with this UID.
func podsMemory(t testing.TB, node, uid string) memoryGroup {
	t.Helper()
	for _, root := range podCgroups(node) {
		dirs := []string{root}
		if uid != "" {
			dirs, _ = filepath.Glob(filepath.Join(root, "*", "pod"+uid))
			guaranteed, _ := filepath.Glob(filepath.Join(root, "pod"+uid))
			dirs = append(dirs, guaranteed...)
		}
		for _, dir := range dirs {
			for limit, usage := range map[string]string{"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"} {
				if _, err := os.Stat(filepath.Join(dir, limit)); err == nil {
					return memoryGroup{filepath.Join(dir, limit), filepath.Join(dir, usage), filepath.Join(dir, "memory.stat")}
				}
			}
		}
	}
	t.Fatalf("no memory cgroup of %s pods on node %s", uid, node)
	return memoryGroup{}
}

var unreclaimable = regexp.MustCompile(`(?m)^(total_rss|total_shmem|anon|shmem) (\d+)$`)

// leave lets a cgroup grow by so many bytes and no more, and gives back what undoes it.
func (g memoryGroup) leave(t testing.TB, bytes int) (undo func()) {
	t.Helper()
	before, err1 := os.ReadFile(g.limit)
	stat, err2 := os.ReadFile(g.stat)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	for _, m := range unreclaimable.FindAllSubmatch(stat, -1) {
		n, err := strconv.Atoi(string(m[2]))
		if err != nil {
			t.Fatal(err)
		}
		bytes += n
	}
	set := func(limit string) {
		if err := os.WriteFile(g.limit, []byte(limit), 0); err != nil {
			t.Fatalf("memory limit %s: %v", limit, err)
		}
	}
	set(strconv.Itoa(bytes))
	return once(func() { set(strings.TrimSpace(string(before))) })
}
