//go:build hyper

// Package hyper tests pods that are virtual machines through containerd's CRI, as the
// kubelet would use it, without a Kubernetes cluster.
package hyper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/vm"
)

// testTimeout bounds each wait; it is far more than any of them takes.
const testTimeout = 3 * time.Minute

// node is a containerd with network, mounts and directories of its own.
type node struct {
	t          testing.TB
	dir        string
	containerd *exec.Cmd
	exited     chan struct{}
	net        netns.NsHandle
	conn       *grpc.ClientConn
	runtime    cri.RuntimeServiceClient
	cgroup     string
}

func bin(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("../../bin", name))
	must(t, err)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make build", err)
	}
	return path
}

// accelerator is what executes guests here. Where KVM is emulated, to find that out takes a quarter of a
// minute, and each of our nodes would begin with it, as would each other guest that one boots.
var accelerator = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "h8s-probe-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	hyper, err := filepath.Abs("../../bin/hyper")
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	ok, _, err := vm.ProbeKVM(ctx, filepath.Join(hyper, "vmlinuz"), filepath.Join(hyper, "initrd.img"), dir, vm.Users{File: filepath.Join(dir, "users")})
	if err != nil || !ok {
		return "tcg", err
	}
	return "kvm", nil
})

func newNode(t testing.TB) *node {
	t.Helper()
	// Short, for the sockets in it.
	dir, err := os.MkdirTemp("/tmp", "hy")
	must(t, err)
	n := &node{t: t, dir: dir, cgroup: fmt.Sprintf("/h8s-test-%d", os.Getpid())}
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.MkdirAll(n.path("cni"), 0o755))
	n.write("cni/10-pods.conflist", `{"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "mtu": 1400, "ipam": {
		"type": "host-local", "dataDir": "`+n.path("ipam")+`", "ranges": [[{"subnet": "10.77.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}`)
	accel, err := accelerator()
	must(t, err)
	n.write("hyper.yaml", "accel: "+accel+"\ncacheDir: "+n.path("cache")+"\nrunDir: "+n.path("vm")+"\nkubeletDir: "+n.path("kubelet")+
		"\ndirectVolumeDir: "+n.path("direct-volumes")+"\n")
	n.write("containerd.toml", strings.NewReplacer("$DIR", dir, "$BIN", filepath.Dir(bin(t, "containerd"))).Replace(`version = 3
root = "$DIR/root"
state = "$DIR/state"
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
  address = "$DIR/containerd.sock"
[ttrpc]
  address = "$DIR/containerd.sock.ttrpc"
[debug]
  level = "debug"
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = "$DIR/s"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  enable_selinux = false
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["$BIN/cni"]
    conf_dir = "$DIR/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "hyper"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.hyper]
      runtime_type = "io.containerd.hyper.v1"
      sandboxer = "shim"
      disable_pause_image_pull = true
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.hyper.options]
        ConfigPath = "$DIR/hyper.yaml"
`))
	// As on a node, where it is in /run: what is written there must not wait for a disk.
	must(t, os.MkdirAll(n.path("state"), 0o700))
	must(t, syscall.Mount("tmpfs", n.path("state"), "tmpfs", 0, ""))
	t.Cleanup(func() { _ = syscall.Unmount(n.path("state"), syscall.MNT_DETACH) })
	n.start()
	t.Cleanup(n.stop)
	n.command("ctr", "-a", n.path("containerd.sock"), "-n", "k8s.io", "images", "import", "../../bin/images/busybox.tar")
	return n
}

func (n *node) path(elements ...string) string {
	return filepath.Join(append([]string{n.dir}, elements...)...)
}

func (n *node) write(name, text string) string {
	n.t.Helper()
	must(n.t, os.MkdirAll(filepath.Dir(n.path(name)), 0o755))
	must(n.t, os.WriteFile(n.path(name), []byte(text), 0o644))
	return n.path(name)
}

func (n *node) command(name string, args ...string) string {
	n.t.Helper()
	out, err := exec.Command(bin(n.t, name), args...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// start starts containerd, in the node's namespaces if there are any yet.
func (n *node) start() {
	n.t.Helper()
	log, err := os.OpenFile(n.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(n.t, err)
	defer log.Close()
	cmd := exec.Command(bin(n.t, "containerd"), "--config", n.path("containerd.toml"))
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(bin(n.t, "containerd"))+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	n.exited = make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread; and it is never unlocked
		started <- func() error {
			if n.net == 0 {
				var err error
				if n.net, err = netns.New(); err != nil {
					return err
				}
			} else if err := netns.Set(n.net); err != nil {
				return err
			}
			return cmd.Start()
		}()
		_ = cmd.Wait()
		close(n.exited)
	}()
	must(n.t, <-started)
	n.containerd = cmd
	nl, err := netlink.NewHandleAt(n.net)
	must(n.t, err)
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	must(n.t, err)
	must(n.t, nl.LinkSetUp(lo))

	n.conn, err = grpc.NewClient("unix://"+n.path("containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(n.t, err)
	n.runtime = cri.NewRuntimeServiceClient(n.conn)
	n.eventually("the CRI is ready", func() bool {
		r, err := n.runtime.Status(n.t.Context(), &cri.StatusRequest{})
		if err != nil {
			return false
		}
		for _, c := range r.Status.Conditions {
			if !c.Status && c.Type == "RuntimeReady" {
				return false
			}
		}
		return true
	})
}

// kill ends containerd alone, without notice.
func (n *node) kill() {
	_ = n.conn.Close()
	_ = n.containerd.Process.Kill()
	<-n.exited
}

func (n *node) stop() {
	if n.t.Failed() {
		text, _ := os.ReadFile(n.path("log"))
		var kept [][]byte
		for _, line := range bytes.Split(text, []byte("\n")) {
			if bytes.Contains(line, []byte("level=debug")) || bytes.Contains(line, []byte("loading plugin")) {
				continue
			}
			kept = append(kept, line)
		}
		n.t.Logf("containerd's log:\n%s", bytes.Join(kept[max(0, len(kept)-80):], []byte("\n")))
	}
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	if r, err := n.runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); err == nil {
		for _, s := range r.Items {
			_, _ = n.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s.Id})
		}
	}
	n.kill()
	_ = n.net.Close()
	for _, pid := range n.processes() {
		n.t.Errorf("process %d is left: %s", pid, cmdline(pid))
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	// What containerd has mounted.
	out, _ := exec.Command("sh", "-c", "grep ' "+n.dir+"' /proc/self/mountinfo | cut -d' ' -f5 | sort -r").Output()
	for _, target := range strings.Fields(string(out)) {
		_ = syscall.Unmount(target, syscall.MNT_DETACH)
	}
	for _, dir := range n.cgroups() {
		_ = os.Remove(dir)
	}
}

func (n *node) cgroups() []string {
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/*" + n.cgroup, "/sys/fs/cgroup" + n.cgroup} {
		for _, below := range []string{"/*", ""} {
			dirs, _ := filepath.Glob(pattern + below)
			for _, d := range dirs {
				if info, err := os.Stat(d); err == nil && info.IsDir() {
					all = append(all, d)
				}
			}
		}
	}
	return all
}

// limitMemory lets a cgroup have so many bytes more than it has.
func (n *node) limitMemory(cgroup string, more int) {
	n.t.Helper()
	for _, files := range [][2]string{{"memory/%s/memory.usage_in_bytes", "memory/%s/memory.limit_in_bytes"}, {"%s/memory.current", "%s/memory.max"}} {
		used, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", fmt.Sprintf(files[0], cgroup)))
		if os.IsNotExist(err) {
			continue
		}
		must(n.t, err)
		bytes, err := strconv.Atoi(strings.TrimSpace(string(used)))
		must(n.t, err)
		must(n.t, os.WriteFile(filepath.Join("/sys/fs/cgroup", fmt.Sprintf(files[1], cgroup)), []byte(strconv.Itoa(bytes+more)), 0))
		return
	}
	n.t.Fatalf("no memory cgroup %s", cgroup)
}

// processes are the shims and QEMUs of this node: they work in its directories.
func (n *node) processes() []int {
	all, _ := filepath.Glob("/proc/[0-9]*")
	var found []int
	for _, p := range all {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid <= 1 {
			continue
		}
		cwd, _ := os.Readlink(p + "/cwd")
		program, _ := os.Readlink(p + "/exe")
		if strings.HasPrefix(cwd, n.dir+"/") && (strings.HasPrefix(filepath.Base(program), "containerd-shim-hyper") ||
			strings.HasPrefix(filepath.Base(program), "qemu-system")) {
			found = append(found, pid)
		}
	}
	return found
}

func cmdline(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.ReplaceAll(string(text), "\x00", " ")
}

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	n.eventuallyNil(func() error {
		if !ok() {
			return errors.New(what)
		}
		return nil
	})
}

// eventuallyNil waits until nothing is wrong any more.
func (n *node) eventuallyNil(wrong func() error) {
	n.t.Helper()
	for deadline := time.Now().Add(testTimeout); ; time.Sleep(50 * time.Millisecond) {
		err := wrong()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("still after %s: %v", testTimeout, err)
		}
	}
}

// inNet runs f in a network namespace.
func inNet(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func dialIn(ns netns.NsHandle, address string) (conn net.Conn, err error) {
	err = inNet(ns, func() error {
		conn, err = net.DialTimeout("tcp4", address, 10*time.Second)
		return err
	})
	return conn, err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
