//go:build hyper

package hyper

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestHostile boots guests that mean harm beside a good one. Whatever they do, they are
// removed in time, their shim stays small, and the good one does not notice.
func TestHostile(t *testing.T) {
	n := newNode(t)
	good := n.run(n.podConfig("good"))
	c := good.startContainer(good.containerConfig("main", "sleep", "100000"))
	ordinary := n.shimMemory(good.id)
	behaviours := map[string]struct {
		sandbox   string // why there is none; empty: there is one
		container string // why there is no container; empty: there is one
	}{
		"garbage": {"guest", ""},
		"silence": {"guest", ""},
		"pings":   {"guest", ""},
		"streams": {"guest", ""},
		"headers": {"headers exceeded", ""},
		"console": {},
		"events":  {},
		"large":   {"", "failed to create shim task"},
		"deaf":    {"", "DeadlineExceeded"},
		"output":  {},
		"lies":    {},
		"frames":  {},
	}
	n.addHostile(buildHostile(t, n), slices.Collect(maps.Keys(behaviours)))

	t.Run("behaviour", func(t *testing.T) {
		for behaviour, want := range behaviours {
			t.Run(behaviour, func(t *testing.T) {
				if behaviour != "frames" { // which takes a processor as long as it lives
					t.Parallel() // most of the time is spent waiting for them
				}
				p, err := n.tryRun(t, behaviour)
				if err == nil {
					p.provoke(t, behaviour, want.container)
					if m := n.shimMemory(p.id); m > ordinary+(64<<20) {
						t.Errorf("the shim needed %d MB, an ordinary one %d MB", m>>20, ordinary>>20)
					}
					p.remove()
				}
				if (err == nil) != (want.sandbox == "") || err != nil && !strings.Contains(err.Error(), want.sandbox) {
					t.Errorf("the sandbox: %v, want %q", err, want.sandbox)
				}
				if got := good.exec(c, "echo", "still here"); got != "still here" {
					t.Errorf("the good pod says %q", got)
				}
			})
		}
	})
	n.eventually("only the good pod's processes are left", func() bool { return len(n.processes()) == 2 })
	if s := good.status(c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the good container is %s", s.State)
	}
	good.remove()
	n.nothingLeft()
}

func buildHostile(t *testing.T, n *node) (program string) {
	t.Helper()
	program = n.path("hostile")
	build := exec.Command("go", "build", "-o", program, "./testdata/hostile")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the hostile guest: %v: %s", err, out)
	}
	return program
}

// addHostile gives containerd a handler for each behaviour, whose machines boot the
// program as PID 1. Pods that run go on.
func (n *node) addHostile(program string, behaviours []string) {
	n.t.Helper()
	ours, err := os.ReadFile(bin(n.t, "hyper/initrd.img"))
	must(n.t, err)
	init, err := os.ReadFile(program)
	must(n.t, err)
	common, err := os.ReadFile(n.path("hyper.yaml"))
	must(n.t, err)
	containerd, err := os.ReadFile(n.path("containerd.toml"))
	must(n.t, err)
	for _, behaviour := range behaviours {
		// The kernel unpacks one archive after the other: the last /init counts.
		archive := bytes.NewBuffer(slices.Clone(ours))
		addFile(archive, "init", 0o100755, init)
		addFile(archive, "behaviour", 0o100644, []byte(behaviour))
		addFile(archive, "TRAILER!!!", 0, nil)
		initrd := n.path(behaviour + ".img")
		must(n.t, os.WriteFile(initrd, archive.Bytes(), 0o644))
		config := n.write(behaviour+".yaml", string(common)+"initrd: "+initrd+"\ntemplates: false\n")
		containerd = fmt.Appendf(containerd, `
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.%s]
      runtime_type = "io.containerd.hyper.v1"
      sandboxer = "shim"
      disable_pause_image_pull = true
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.%[1]s.options]
        ConfigPath = %q
`, behaviour, config)
	}
	n.write("containerd.toml", string(containerd))
	n.kill()
	n.start()
}

// addFile appends a file to a cpio archive in the format "newc".
func addFile(archive *bytes.Buffer, name string, mode int, content []byte) {
	pad := func() { archive.Write(make([]byte, -archive.Len()&3)) }
	pad()
	fmt.Fprintf(archive, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad()
	archive.Write(content)
	pad()
}

func (n *node) tryRun(t *testing.T, behaviour string) (*pod, error) {
	t.Helper()
	config := n.podConfig(behaviour)
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	begin := time.Now()
	r, err := n.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: behaviour})
	t.Logf("sandbox after %s: %.2000v", time.Since(begin).Round(time.Millisecond), err)
	if err != nil {
		return nil, err
	}
	return &pod{node: n, config: config, id: r.PodSandboxId}, nil
}

// provoke gives a guest occasion to do its worst.
func (p *pod) provoke(t *testing.T, behaviour, refused string) {
	t.Helper()
	patience := testTimeout
	if refused == "DeadlineExceeded" {
		patience = 20 * time.Second // the kubelet has two minutes
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if behaviour == "frames" {
		received := p.stackOf(t)
		p.eventually("frames leave the pod", func() bool { _, sent := received(); return sent > 10000 })
		if packets, _ := received(); packets != 0 {
			t.Errorf("the node's stack in the pod's namespace has received %d packets", packets)
		}
	}
	created, err := p.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.id, Config: p.containerConfig("main", "true"), SandboxConfig: p.config,
	})
	if err == nil {
		_, err = p.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId})
	}
	if (err == nil) != (refused == "") || err != nil && !strings.Contains(err.Error(), refused) {
		t.Errorf("a container: %.2000v, want %q", err, refused)
	}
	if err == nil {
		if _, err := p.runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: created.ContainerId}); err == nil {
			t.Error("statistics that are none are passed on")
		}
	}
	if err == nil && behaviour == "lies" {
		// It is not killed when its time is over; the machine is.
		_, err := p.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: created.ContainerId, Cmd: []string{"true"}, Timeout: 5})
		if err == nil {
			t.Error("a process that there is not has ended well")
		}
	}
	time.Sleep(2 * time.Second) // for it to flood what it can
}

// stackOf returns what tells how many packets the stack of the pod's namespace has received,
// and how many have left by its interface, since now.
func (p *pod) stackOf(t *testing.T) func() (received, sent int) {
	t.Helper()
	all, err := filepath.Glob(p.path("state", "*", "netns", "*"))
	must(t, err)
	address := p.ip()
	var ns netns.NsHandle
	for _, path := range all {
		h, err := netns.GetFromPath(path)
		must(t, err)
		nl, err := netlink.NewHandleAt(h)
		must(t, err)
		if a, err := nl.AddrList(nil, netlink.FAMILY_V4); err == nil {
			for _, one := range a {
				if one.IP.String() == address {
					ns = h
				}
			}
		}
		nl.Close()
	}
	if ns == 0 {
		t.Fatalf("no namespace of %v has the address %s", all, address)
	}
	read := func() (received, sent int) {
		must(t, inNet(ns, func() error {
			text, err := os.ReadFile("/proc/thread-self/net/snmp")
			if err != nil {
				return err
			}
			lines := strings.Split(string(text), "\n")
			if _, err := fmt.Sscan(strings.Fields(lines[1])[3], &received); err != nil { // Ip: InReceives
				return err
			}
			l, err := netlink.LinkByName("eth0")
			if err == nil {
				sent = int(l.Attrs().Statistics.TxPackets)
			}
			return err
		}))
		return received, sent
	}
	before, sentBefore := read()
	return func() (int, int) {
		now, sent := read()
		return now - before, sent - sentBefore
	}
}

// shimMemory is the most that the shim of a sandbox has ever had resident.
func (n *node) shimMemory(sandbox string) (bytes int) {
	n.t.Helper()
	for _, pid := range n.processes() {
		if c := cmdline(pid); !strings.Contains(c, "containerd-shim-hyper") || !strings.Contains(c, sandbox) {
			continue
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		must(n.t, err)
		for line := range strings.Lines(string(text)) {
			if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &bytes); err == nil {
				return bytes << 10
			}
		}
	}
	n.t.Fatalf("no shim of sandbox %s", sandbox)
	return 0
}
