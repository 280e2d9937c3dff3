package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// node is a containerd of its own, with this shim and the runsc of bin/, in mount and PID namespaces of its own: its
// /run is private and nothing it starts outlives it.
type node struct {
	bin     string // the programs of bin/
	dir     string // socket, state and container roots
	pid     int    // of the namespaces' first process, as this test sees it
	address string
}

// newNode starts a node on which the network namespace of pod is at /run/pod.
func newNode(t *testing.T, pod namespace) *node {
	t.Helper()
	bin, err := filepath.Abs("../../../bin")
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"containerd", "ctr", "runsc"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			t.Fatalf("%v: run `make upstream` first", err)
		}
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "containerd-shim-runsc-v1"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the shim: %v\n%s", err, out)
	}
	n := &node{bin: bin, dir: dir, address: filepath.Join(dir, "containerd.sock")}
	n.write(t, "containerd.toml", fmt.Sprintf(`
version = 3
root = %[1]q
state = %[2]q
oom_score = 0
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
address = %[3]q
[debug]
level = "warn"
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), n.address))
	n.write(t, "runsc.toml", "[runsc_config]\nplatform = \"systrap\"\nnetwork = \"sandbox\"\n")

	var log bytes.Buffer
	containerd := exec.Command("sh", "-ec", `
mount -t tmpfs tmpfs /run
touch /run/pod
mount --bind "$POD" /run/pod
mount -t proc proc /proc
containerd --config "$CONFIG" &
wait $!`)
	containerd.Env = append(os.Environ(), "POD="+pod.path, "CONFIG="+filepath.Join(dir, "containerd.toml"), "PATH="+dir+":"+bin+":"+os.Getenv("PATH"))
	containerd.Stdout, containerd.Stderr = &log, &log
	containerd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNS, Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL,
	}
	started := make(chan error)
	ended := make(chan struct{})
	go func() {
		runtime.LockOSThread() // as in newNamespace
		started <- containerd.Start()
		_ = containerd.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	n.pid = containerd.Process.Pid
	t.Cleanup(func() {
		_ = containerd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("containerd's log:\n%s", &log)
		}
	})
	eventually(t, "containerd listens", func() bool {
		_, err := n.ctr("version")
		return err == nil
	})
	return n
}

func (n *node) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ctr runs containerd's client on the node.
func (n *node) ctr(args ...string) (string, error) {
	enter := []string{"--target", strconv.Itoa(n.pid), "--mount", "--pid", filepath.Join(n.bin, "ctr"), "--address", n.address}
	cmd := exec.Command("nsenter", append(enter, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (n *node) mustCtr(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.ctr(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// path is where this test sees a path of the node.
func (n *node) path(path string) string { return fmt.Sprintf("/proc/%d/root%s", n.pid, path) }

// processes are the node's processes, by PID on the node, whose command line contains what.
func (n *node) processes(t *testing.T, what string) []int {
	t.Helper()
	files, err := filepath.Glob(n.path("/proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, file := range files {
		cmdline, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended meanwhile
		}
		if strings.Contains(string(cmdline), what) {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	return pids
}

func (n *node) oomScore(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(n.path(fmt.Sprintf("/proc/%d/oom_score_adj", pid)))
	if err != nil {
		t.Fatal(err)
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		t.Fatal(err)
	}
	return score
}

// rootfs makes a container's root with busybox and one large file in it.
func (n *node) rootfs(t *testing.T, id string, large []byte) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v: run `make deps` first", err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(n.dir, "rootfs", id)
	for name, data := range map[string][]byte{"bin/busybox": program, "www/large": large} {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestPod plays a pod of two containers, as containerd's CRI plugin would create it.
func TestPod(t *testing.T) {
	large := make([]byte, 8<<20)
	if _, err := rand.Read(large); err != nil {
		t.Fatal(err)
	}
	cgroup := fmt.Sprintf("/h8s-shim-test-%d/kubepods/pod-uid", os.Getpid())
	t.Cleanup(func() { removeCgroups(t, filepath.Dir(filepath.Dir(cgroup))) }) // runs last: after the node
	pod := newNamespace(t)
	n := newNode(t, pod)

	run := func(id, kind string, command ...string) {
		t.Helper()
		n.mustCtr(t, append([]string{
			"run", "--detach", "--runtime", "io.containerd.runsc.v1", "--runtime-config-path", filepath.Join(n.dir, "runsc.toml"),
			"--with-ns", "network:/run/pod", "--cgroup", cgroup + "/" + id,
			"--annotation", "io.kubernetes.cri.container-type=" + kind, "--annotation", "io.kubernetes.cri.sandbox-id=sandbox",
			"--rootfs", n.rootfs(t, id, large), id,
		}, command...)...)
	}
	end := func(id string) {
		t.Helper()
		n.mustCtr(t, "task", "delete", "--force", id) // kills it and waits for its end
		n.mustCtr(t, "container", "delete", id)
	}
	run("sandbox", "sandbox", "/bin/busybox", "sleep", "1d")
	run("app", "container", "/bin/busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www")

	t.Run("one shim serves both containers", func(t *testing.T) {
		var shims []int
		eventually(t, "one shim", func() bool { // a child of it has its name until it is another program
			shims = n.processes(t, "containerd-shim-runsc-v1")
			return len(shims) == 1
		})
		daemon := n.processes(t, "containerd\x00--config")
		if got, want := n.oomScore(t, shims[0]), n.oomScore(t, daemon[len(daemon)-1])+1; got != want {
			t.Errorf("the shim's OOM score is %d, want one more than containerd's: %d", got, want)
		}
	})
	t.Run("the sandbox is in the pod's cgroup", func(t *testing.T) {
		sandboxes := n.processes(t, "runsc-sandbox")
		if len(sandboxes) == 0 {
			t.Fatal("no sandbox")
		}
		membership, err := os.ReadFile(n.path(fmt.Sprintf("/proc/%d/cgroup", sandboxes[0])))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(strings.Fields(string(membership)), func(l string) bool { return strings.HasSuffix(l, cgroup) }) {
			t.Errorf("not in %s:\n%s", cgroup, membership)
		}
	})
	t.Run("exec runs inside gVisor", func(t *testing.T) {
		out := n.mustCtr(t, "task", "exec", "--exec-id", "dmesg", "app", "/bin/busybox", "dmesg")
		if !strings.Contains(out, "gVisor") {
			t.Errorf("the kernel's log does not name gVisor:\n%s", out)
		}
	})
	t.Run("loopback connections reach an application that is bound to loopback", func(t *testing.T) {
		client := &http.Client{Timeout: testTimeout, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(_ context.Context, _, address string) (net.Conn, error) { return pod.dial(address) },
		}}
		var body []byte
		eventually(t, "the application answers", func() bool {
			response, err := client.Get("http://127.0.0.1:8080/large")
			if err != nil {
				return false
			}
			defer response.Body.Close()
			body, err = io.ReadAll(response.Body)
			return err == nil && response.StatusCode == http.StatusOK
		})
		if !bytes.Equal(body, large) {
			t.Errorf("%d bytes arrived, not the %d that were sent", len(body), len(large))
		}
	})
	t.Run("a port nobody listens on is refused", func(t *testing.T) { pod.refused(t, "127.0.0.1:8081") })
	t.Run("nothing is left", func(t *testing.T) {
		end("app")
		eventually(t, "one shim is left", func() bool {
			shims := n.processes(t, "containerd-shim-runsc-v1")
			if len(shims) == 0 {
				t.Fatal("the pod's shim ended with one of its containers")
			}
			return len(shims) == 1
		})
		end("sandbox")
		eventually(t, "the shim ends", func() bool { return len(n.processes(t, "runsc")) == 0 })
		if tables := pod.tables(t); len(tables) > 0 {
			t.Errorf("nftables tables left in the pod's network namespace: %v", tables)
		}
		for _, dir := range []string{"/run/containerd/s", "/run/containerd/runsc/default"} {
			eventually(t, dir+" is empty", func() bool {
				entries, err := os.ReadDir(n.path(dir))
				if err != nil {
					t.Fatal(err)
				}
				// One empty network namespace for all gofers of a node stays.
				return !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() != "null-netns" })
			})
		}
	})
}

// removeCgroups removes the cgroups that kubelet would remove: the pod's and its parents.
func removeCgroups(t *testing.T, root string) {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup" + root, "/sys/fs/cgroup/*" + root} {
		roots, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range roots {
			var all []string
			_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					all = append(all, path)
				}
				return nil
			})
			slices.Reverse(all)
			for _, d := range all {
				if err := os.Remove(d); err != nil {
					t.Error(err)
				}
			}
		}
	}
}
