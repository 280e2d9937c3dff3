//go:build hyper

package hyper

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pod is a sandbox, made as the kubelet makes it.
type pod struct {
	*node
	config *cri.PodSandboxConfig
	id     string
}

func (n *node) podConfig(name string) *cri.PodSandboxConfig {
	uid := name + "-uid"
	must(n.t, os.MkdirAll(n.path("kubelet", "pods", uid), 0o755))
	must(n.t, os.MkdirAll(n.path("logs", name), 0o755))
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "default", Uid: uid},
		Hostname:     name,
		LogDirectory: n.path("logs", name),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.9.8.7"}, Searches: []string{"svc.cluster.local"}, Options: []string{"ndots:5"}},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: n.cgroup + "/" + uid,
			Sysctls:      map[string]string{"net.core.somaxconn": "1234"},
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
				Pid: cri.NamespaceMode_CONTAINER,
			}},
		},
	}
}

func (n *node) run(config *cri.PodSandboxConfig) *pod {
	n.t.Helper()
	r, err := n.runtime.RunPodSandbox(n.t.Context(), &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "hyper"})
	must(n.t, err)
	return &pod{node: n, config: config, id: r.PodSandboxId}
}

func (p *pod) containerConfig(name string, command ...string) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: "localhost/busybox:latest"},
		Command:  command,
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
			Capabilities:     &cri.Capability{},
		}},
	}
}

func (p *pod) create(config *cri.ContainerConfig) string {
	p.t.Helper()
	r, err := p.runtime.CreateContainer(p.t.Context(), &cri.CreateContainerRequest{PodSandboxId: p.id, Config: config, SandboxConfig: p.config})
	must(p.t, err)
	return r.ContainerId
}

func (p *pod) startContainer(config *cri.ContainerConfig) string {
	p.t.Helper()
	id := p.create(config)
	_, err := p.runtime.StartContainer(p.t.Context(), &cri.StartContainerRequest{ContainerId: id})
	must(p.t, err)
	return id
}

func (p *pod) exec(container string, command ...string) string {
	p.t.Helper()
	r, err := p.runtime.ExecSync(p.t.Context(), &cri.ExecSyncRequest{ContainerId: container, Cmd: command, Timeout: 60})
	must(p.t, err)
	if r.ExitCode != 0 {
		p.t.Fatalf("%v: exit code %d, %s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

func (p *pod) status(container string) *cri.ContainerStatus {
	p.t.Helper()
	r, err := p.runtime.ContainerStatus(p.t.Context(), &cri.ContainerStatusRequest{ContainerId: container})
	must(p.t, err)
	return r.Status
}

func (p *pod) log(name string) string {
	text, _ := os.ReadFile(p.path("logs", p.config.Metadata.Name, name+".log"))
	return string(text)
}

func (p *pod) remove() {
	p.t.Helper()
	start := time.Now()
	_, err := p.runtime.StopPodSandbox(p.t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
	must(p.t, err)
	_, err = p.runtime.RemovePodSandbox(p.t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
	must(p.t, err)
	p.t.Logf("removed in %s", time.Since(start).Round(time.Millisecond))
}

// nothingLeft tells what pods that are gone have left on the node.
func (n *node) nothingLeft() {
	n.t.Helper()
	n.eventually("processes end", func() bool { return len(n.processes()) == 0 })
	n.eventuallyNil(func() error {
		var errs []error
		for what, dir := range map[string]string{
			"machines": n.path("vm"), "sockets": n.path("s"),
			"sandbox bundles":   n.path("state/io.containerd.sandbox.controller.v1.shim/k8s.io"),
			"container bundles": n.path("state/io.containerd.runtime.v2.task/k8s.io"),
		} {
			entries, err := os.ReadDir(dir)
			if err != nil && !os.IsNotExist(err) {
				errs = append(errs, err)
			}
			for _, e := range entries {
				// A machine has a directory; the files beside are the node's, and stay.
				if what != "machines" || e.IsDir() {
					errs = append(errs, fmt.Errorf("%s: %s is left", what, e.Name()))
				}
			}
		}
		for _, dir := range n.cgroups() {
			if strings.Contains(dir, "/h8s-test-") && strings.Contains(dir[strings.Index(dir, n.cgroup)+len(n.cgroup):], "/h8s-") {
				errs = append(errs, fmt.Errorf("the cgroup %s is left", dir))
			}
		}
		return errors.Join(errs...)
	})
}

func TestPod(t *testing.T) {
	n := newNode(t)
	begin := time.Now()
	p := n.run(n.podConfig("first"))
	t.Logf("sandbox in %s", time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	c := p.startContainer(p.containerConfig("main", "sh", "-c", "echo hello from $(uname -r); trap 'exit 7' TERM; while :; do sleep 0.1; done"))
	t.Logf("container in %s", time.Since(begin).Round(time.Millisecond))
	n.eventually("the log", func() bool { return strings.Contains(p.log("main"), "hello from") })
	t.Log(p.log("main"))

	for command, want := range map[string]string{
		"hostname":                         "first",
		"cat /etc/hostname":                "first",
		"grep nameserver /etc/resolv.conf": "nameserver 10.9.8.7",
		"cat /proc/sys/net/core/somaxconn": "1234",
		"echo $$ > /dev/shm/x; df -m /dev/shm | tail -1 | awk '{print $2}'": "64",
		"ip -4 addr show eth0 | awk '/inet/ {print $2}' | cut -d/ -f1":      p.ip(),
		"cat /sys/class/net/eth0/mtu":                                       "1400",
	} {
		if got := p.exec(c, "sh", "-c", command); got != want {
			t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
	r, err := p.runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 42"}, Timeout: 60})
	must(t, err)
	if r.ExitCode != 42 || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" {
		t.Errorf("exit code %d, output %q, errors %q", r.ExitCode, r.Stdout, r.Stderr)
	}

	if _, err := p.runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: c, Timeout: 30}); err != nil {
		t.Fatal(err)
	}
	if s := p.status(c); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 7 {
		t.Errorf("the stopped container is %s with exit code %d, want exited, 7", s.State, s.ExitCode)
	}
	p.remove()
	n.nothingLeft()
}

// TestVolumes: what the kubelet writes on the node arrives, and arrives again.
func TestVolumes(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("volumes"))
	podDir := "kubelet/pods/volumes-uid/"
	dir := func(plugin, name string) string {
		path := n.path(podDir+"volumes/kubernetes.io~"+plugin, name)
		must(t, os.MkdirAll(path, 0o777))
		must(t, os.Chmod(path, 0o777))
		return path
	}
	atomicWrite := func(dir, version, text string) {
		must(t, os.MkdirAll(dir+"/..v"+version, 0o755))
		must(t, os.WriteFile(dir+"/..v"+version+"/key", []byte(text), 0o640))
		must(t, os.Symlink("..v"+version, dir+"/..data_tmp"))
		must(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
		_ = os.Symlink("..data/key", dir+"/key")
	}
	configMap := dir("configmap", "conf")
	atomicWrite(configMap, "1", "one")
	shared := dir("empty-dir", "shared")
	hosts := n.write(podDir+"etc-hosts", "10.0.0.1 somebody\n")
	termination := n.write(podDir+"containers/main/0123abcd", "")
	mounts := []*cri.Mount{
		{ContainerPath: "/conf", HostPath: configMap, Readonly: true},
		{ContainerPath: "/shared", HostPath: shared},
		{ContainerPath: "/etc/hosts", HostPath: hosts},
	}
	main := p.containerConfig("main", "sh", "-c", "echo from main > /shared/file; trap 'echo the end > /dev/termination-log; exit 3' TERM; while :; do sleep 0.1; done")
	main.Mounts = append([]*cri.Mount{{ContainerPath: "/dev/termination-log", HostPath: termination}}, mounts...)
	other := p.containerConfig("other", "sleep", "1000")
	other.Mounts = mounts
	c, o := p.startContainer(main), p.startContainer(other)

	n.eventually("the emptyDir is shared", func() bool {
		r, err := p.runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: o, Cmd: []string{"cat", "/shared/file"}, Timeout: 60})
		return err == nil && string(r.Stdout) == "from main\n"
	})
	if entries, err := os.ReadDir(shared); err != nil || len(entries) != 0 {
		t.Errorf("the emptyDir on the node holds %v, %v; want nothing", entries, err)
	}
	if got := p.exec(o, "sh", "-c", "cat /conf/key; cat /etc/hosts; stat -c %a /conf/..data/key"); got != "one10.0.0.1 somebody\n640" {
		t.Errorf("the volumes hold %q", got)
	}
	atomicWrite(configMap, "2", "two")
	must(t, os.RemoveAll(configMap+"/..v1"))
	n.write(podDir+"etc-hosts", "10.0.0.2 somebody-else\n")
	n.eventually("the changes arrive", func() bool {
		return p.exec(c, "sh", "-c", "cat /conf/key /etc/hosts; ls -A /conf | grep v1 || true") == "two10.0.0.2 somebody-else"
	})

	t.Run("subPath", func(t *testing.T) {
		part := n.path(podDir + "volume-subpaths/shared/part/0")
		must(t, os.MkdirAll(part, 0o755))
		must(t, os.MkdirAll(shared+"/a/b", 0o777))
		must(t, syscall.Mount(shared+"/a/b", part, "", syscall.MS_BIND, ""))
		t.Cleanup(func() { must(t, syscall.Unmount(part, syscall.MNT_DETACH)) })
		config := p.containerConfig("part", "sleep", "1000")
		config.Mounts = []*cri.Mount{{ContainerPath: "/part", HostPath: part}}
		p.exec(p.startContainer(config), "sh", "-c", "echo from a part > /part/x")
		if got := p.exec(c, "cat", "/shared/a/b/x", "/shared/file"); got != "from a part\nfrom main" {
			t.Errorf("the volume holds %q", got)
		}
	})

	_, err := p.runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: c, Timeout: 30})
	must(t, err)
	if text, err := os.ReadFile(termination); err != nil || string(text) != "the end\n" {
		t.Errorf("the termination message is %q, %v", text, err)
	}

	t.Run("hostPath is refused", func(t *testing.T) {
		bad := p.containerConfig("bad", "true")
		bad.Mounts = []*cri.Mount{{ContainerPath: "/node", HostPath: "/etc"}}
		id := p.create(bad)
		_, err := p.runtime.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: id})
		if err == nil || !strings.Contains(err.Error(), "hostPath (/etc) is not for this runtime") {
			t.Errorf("error %v", err)
		}
	})
	p.remove()
	n.nothingLeft()
}

// TestNetwork connects from the node, and as containerd does for kubectl port-forward: to the loopback
// address of the pod's network namespace on the node.
func TestNetwork(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("network"))
	p.startContainer(p.containerConfig("main", "sh", "-c", "(while :; do echo at home | nc -l -p 80; done) & while :; do echo abroad | nc -l -p 81; done"))
	paths, err := filepath.Glob(n.path("state/io.containerd.grpc.v1.cri/netns/*"))
	must(t, err)
	if len(paths) != 1 {
		t.Fatalf("network namespaces: %v", paths)
	}
	pod, err := netns.GetFromPath(paths[0])
	must(t, err)
	defer pod.Close()
	for _, test := range []struct {
		what    string
		from    netns.NsHandle
		address string
		want    string
	}{
		{"port-forward", pod, "127.0.0.1:80", "at home\n"},
		{"from the node", n.net, p.ip() + ":81", "abroad\n"},
	} {
		n.eventually(test.what, func() bool {
			conn, err := dialIn(test.from, test.address)
			if err != nil {
				return false
			}
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
			buffer := make([]byte, 100)
			got, err := conn.Read(buffer)
			return err == nil && string(buffer[:got]) == test.want
		})
	}
	p.remove()
	n.nothingLeft()
}

// TestFaults kills what can be killed.
func TestFaults(t *testing.T) {
	n := newNode(t)
	for name, program := range map[string]string{"the machine": "qemu-system", "the shim": "containerd-shim-hyper"} {
		t.Run(name+" is killed", func(t *testing.T) {
			p := n.run(n.podConfig("fault"))
			c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
			for _, pid := range n.processes() {
				if strings.Contains(cmdline(pid), program) {
					must(t, syscall.Kill(pid, syscall.SIGKILL))
				}
			}
			n.eventually("the container has ended", func() bool { return p.status(c).State == cri.ContainerState_CONTAINER_EXITED })
			// 255 is what containerd itself says when a shim does not answer any more.
			if s := p.status(c); s.ExitCode != 137 && (s.ExitCode != 255 || name != "the shim") {
				t.Errorf("exit code %d, want 137", s.ExitCode)
			}
			n.eventually("the sandbox is not ready", func() bool {
				r, err := p.runtime.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
				return err == nil && r.Status.State == cri.PodSandboxState_SANDBOX_NOTREADY
			})
			p.remove()
			n.nothingLeft()
		})
	}
	t.Run("the guest's kernel panics", func(t *testing.T) {
		p := n.run(n.podConfig("fault"))
		config := p.containerConfig("main", "sleep", "1000")
		config.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/bus"} // and not /proc/sysrq-trigger
		c := p.startContainer(config)
		_, _ = p.runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ // which nobody is left to answer
			ContainerId: c, Cmd: []string{"sh", "-c", "echo c > /proc/sysrq-trigger"}, Timeout: int64(testTimeout.Seconds()),
		})
		n.eventually("the container has ended", func() bool { return p.status(c).State == cri.ContainerState_CONTAINER_EXITED })
		if s := p.status(c); s.ExitCode != 137 {
			t.Errorf("exit code %d, want 137", s.ExitCode)
		}
		n.eventually("the node's log tells of the panic", func() bool {
			log, err := os.ReadFile(n.path("log"))
			return err == nil && bytes.Contains(log, []byte("the guest's kernel panicked"))
		})
		p.remove()
		n.nothingLeft()
	})
	t.Run("the pod takes more memory than it may", func(t *testing.T) {
		p := n.run(n.podConfig("fault"))
		c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
		n.limitMemory(p.config.Linux.CgroupParent, 32<<20)
		_, _ = p.runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"dd", "if=/dev/zero", "of=/full", "bs=1M", "count=200"}, Timeout: 60})
		n.eventually("the container has ended", func() bool { return p.status(c).State == cri.ContainerState_CONTAINER_EXITED })
		if s := p.status(c); s.Reason != "OOMKilled" || s.ExitCode != 137 {
			t.Errorf("reason %s, exit code %d, want OOMKilled, 137", s.Reason, s.ExitCode)
		}
		p.remove()
		n.nothingLeft()
	})
	t.Run("containerd is killed", func(t *testing.T) {
		p := n.run(n.podConfig("fault"))
		c := p.startContainer(p.containerConfig("main", "sh", "-c", "while :; do echo tick; sleep 0.2; done"))
		n.kill()
		n.start()
		if got := p.exec(c, "echo", "still here"); got != "still here" {
			t.Errorf("exec after the restart: %q", got)
		}
		before := len(p.log("main"))
		n.eventually("the log goes on", func() bool { return len(p.log("main")) > before })
		p.remove()
		n.nothingLeft()
	})
}

// TestContainers: what containers of one machine share, and what they do not.
func TestContainers(t *testing.T) {
	n := newNode(t)
	config := n.podConfig("containers")
	config.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	p := n.run(config)
	first := p.startContainer(p.containerConfig("first", "sh", "-c", "echo mine > /mine; sleep 1234"))
	confined := p.containerConfig("confined", "sleep", "5678")
	confined.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
	confined.Linux.SecurityContext.ReadonlyRootfs = true
	confined.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
	confined.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	second := p.startContainer(confined)

	if got := p.exec(second, "sh", "-c", "id -u; touch /x 2>&1; ls /mine 2>&1; grep -E 'CapEff|Seccomp:' /proc/self/status | tr -d '\t '"); got !=
		"1000\ntouch: /x: Read-only file system\nls: /mine: No such file or directory\nCapEff:0000000000000000\nSeccomp:2" {
		t.Errorf("the confined container: %q", got)
	}
	log, err := os.ReadFile(n.path("log"))
	must(t, err)
	if bytes.Contains(log, []byte("compile a seccomp profile")) {
		t.Error("the node did not compile the seccomp profile: containerd's log has the reason")
	}
	if got := p.exec(first, "ps"); !strings.Contains(got, "sleep 5678") {
		t.Errorf("the first container does not see the second's processes: %s", got)
	}

	t.Run("out of memory", func(t *testing.T) {
		hungry := p.containerConfig("hungry", "sh", "-c", "x=a; while :; do x=$x$x; done")
		hungry.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 32 << 20}
		id := p.startContainer(hungry)
		n.eventually("it is killed", func() bool { return p.status(id).State == cri.ContainerState_CONTAINER_EXITED })
		if s := p.status(id); s.Reason != "OOMKilled" || s.ExitCode != 137 {
			t.Errorf("reason %s, exit code %d", s.Reason, s.ExitCode)
		}
		if s := p.status(first); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("the first container is %s", s.State)
		}
	})

	t.Run("statistics", func(t *testing.T) {
		r, err := p.runtime.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: first})
		must(t, err)
		if r.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 || r.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
			t.Errorf("of the container: %v", r.Stats)
		}
		s, err := p.runtime.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: p.id})
		must(t, err)
		if s.Stats.GetLinux().GetMemory().GetWorkingSetBytes().GetValue() == 0 {
			t.Errorf("of the pod: %v", s.Stats)
		}
	})

	t.Run("binary input and output", func(t *testing.T) {
		data := make([]byte, 20<<20)
		_, _ = rand.Read(data)
		cmd := exec.Command(bin(t, "ctr"), "-a", n.path("containerd.sock"), "-n", "k8s.io", "tasks", "exec", "--exec-id", "copy", first, "cat")
		cmd.Stdin = bytes.NewReader(data)
		begin := time.Now()
		out, err := cmd.Output()
		if err != nil || !bytes.Equal(out, data) {
			t.Errorf("%d of %d bytes came back, or others (%v)", len(out), len(data), err)
		}
		t.Logf("%d bytes in %s", len(out), time.Since(begin).Round(time.Millisecond))
	})

	t.Run("terminal", func(t *testing.T) {
		r, err := p.runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: first, Cmd: []string{"sh", "-c", "test -t 0"}, Timeout: 60})
		must(t, err)
		if r.ExitCode == 0 {
			t.Error("a process has a terminal that did not ask for one")
		}
		tty := p.containerConfig("tty", "sh", "-c", "test -t 0 && echo a terminal; stty size; sleep 100")
		tty.Tty, tty.Stdin = true, true
		p.startContainer(tty)
		n.eventually("its output", func() bool { return strings.Contains(p.log("tty"), "a terminal") })
	})
	p.remove()
	n.nothingLeft()
}

// TestHang: a guest that does not answer is ended, and its pod with it.
func TestHang(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("hang"))
	c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
	for _, pid := range n.processes() {
		if strings.Contains(cmdline(pid), "qemu-system") {
			must(t, syscall.Kill(pid, syscall.SIGSTOP))
		}
	}
	n.eventually("the container has ended", func() bool { return p.status(c).State == cri.ContainerState_CONTAINER_EXITED })
	p.remove()
	n.nothingLeft()
}

// TestManyAtOnce: pods that start together all run, and are gone together.
func TestManyAtOnce(t *testing.T) {
	n := newNode(t)
	var group errgroup.Group
	for i := range 6 {
		config := n.podConfig(fmt.Sprintf("many-%d", i))
		group.Go(func() error {
			r, err := n.runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "hyper"})
			if err != nil {
				return err
			}
			p := &pod{node: n, config: config, id: r.PodSandboxId}
			created, err := n.runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{
				PodSandboxId: p.id, Config: p.containerConfig("main", "sleep", "1000"), SandboxConfig: config,
			})
			if err != nil {
				return err
			}
			if _, err = n.runtime.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
				return err
			}
			_, err = n.runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id})
			return err
		})
	}
	must(t, group.Wait())
	n.nothingLeft()
}

func (p *pod) ip() string {
	p.t.Helper()
	r, err := p.runtime.PodSandboxStatus(p.t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	must(p.t, err)
	return r.Status.Network.Ip
}
