//go:build hyper

package hyper

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

// tenantPod is the configuration of a tenant's pod.
func (n *node) tenantPod(name, tenant string) *cri.PodSandboxConfig {
	config := n.podConfig(name)
	config.Annotations = map[string]string{v1alpha1.AnnotationTenant: tenant}
	return config
}

// qemu is the process ID of the pod's virtual machine.
func (p *pod) qemu() int {
	p.t.Helper()
	for _, pid := range p.processes() {
		if dir, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); strings.HasPrefix(p.id, filepath.Base(dir)) &&
			strings.Contains(cmdline(pid), "qemu-system") {
			return pid
		}
	}
	p.t.Fatalf("no virtual machine of %s", p.config.Metadata.Name)
	return 0
}

// template is the directory of which the pod's machine is a clone, or empty.
func (p *pod) template() string {
	p.t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.qemu()))
	must(p.t, err)
	for line := range strings.Lines(string(maps)) {
		if i := strings.Index(line, p.path("cache/templates")); i >= 0 {
			rel, err := filepath.Rel(p.path("cache/templates"), filepath.Dir(strings.TrimSpace(line[i:])))
			must(p.t, err)
			return rel
		}
	}
	return ""
}

// hardwareAddr is the address that CNI gave to the pod's interface.
func (n *node) hardwareAddr(known []string) (path, address string) {
	n.t.Helper()
	paths, err := filepath.Glob(n.path("state/io.containerd.grpc.v1.cri/netns/*"))
	must(n.t, err)
	paths = slices.DeleteFunc(paths, func(p string) bool { return slices.Contains(known, p) })
	if len(paths) != 1 {
		n.t.Fatalf("new network namespaces: %v", paths)
	}
	ns, err := netns.GetFromPath(paths[0])
	must(n.t, err)
	defer ns.Close()
	nl, err := netlink.NewHandleAt(ns)
	must(n.t, err)
	defer nl.Close()
	eth, err := nl.LinkByName("eth0")
	must(n.t, err)
	return paths[0], eth.Attrs().HardwareAddr.String()
}

// TestClones: pods of one tenant are clones of one template, and nothing in them is
// another's.
func TestClones(t *testing.T) {
	n := newNode(t)
	var known []string
	var pods []*pod
	unique := map[string]string{} // what was seen, and where
	for _, test := range []struct{ name, tenant, template string }{
		{"one", "red", "tenant.red/1cpu-512Mi"},
		{"two", "red", "tenant.red/1cpu-512Mi"},
		{"three", "blue", "tenant.blue/1cpu-512Mi"},
	} {
		begin := time.Now()
		p := n.run(n.tenantPod(test.name, test.tenant))
		pods = append(pods, p)
		t.Logf("sandbox %s in %s", test.name, time.Since(begin).Round(time.Millisecond))
		if got := p.template(); got != test.template {
			t.Errorf("%s is a clone of template %q, want %q", test.name, got, test.template)
		}
		c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
		path, address := n.hardwareAddr(known)
		known = append(known, path)
		if got := p.exec(c, "cat", "/sys/class/net/eth0/address"); got != address {
			t.Errorf("%s: its interface's hardware address is %s, want %s", test.name, got, address)
		}
		if got := p.exec(c, "hostname"); got != test.name {
			t.Errorf("%s: its name is %q", test.name, got)
		}
		var now int64
		before := time.Now().Unix()
		_, err := fmt.Sscan(p.exec(c, "date", "+%s"), &now)
		must(t, err)
		if now < before-1 || now > time.Now().Unix()+1 {
			t.Errorf("%s: its clock says %d, and it is %d", test.name, now, before)
		}
		const random = "/proc/sys/kernel/random/"
		for _, id := range strings.Fields(p.exec(c, append([]string{"cat", random + "boot_id"}, slices.Repeat([]string{random + "uuid"}, 50)...)...)) {
			if where := unique[id]; where != "" {
				t.Errorf("%s draws %s, as does %s", test.name, id, where)
			}
			unique[id] = test.name
		}
	}
	if len(unique) != 3*51 {
		t.Errorf("%d different random numbers, want %d", len(unique), 3*51)
	}
	for _, p := range pods {
		p.remove()
	}
	n.nothingLeft()
}

// TestCold: without a template to clone, a pod boots.
func TestCold(t *testing.T) {
	for name, prepare := range map[string]func(*node){
		"templates are off":        func(n *node) { n.setHyper("templates: off") },
		"templates cannot be made": func(n *node) { n.write("cache/templates", "a file") },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			prepare(n)
			begin := time.Now()
			p := n.run(n.tenantPod("cold", "red"))
			t.Logf("sandbox in %s", time.Since(begin).Round(time.Millisecond))
			if got := p.template(); got != "" {
				t.Errorf("it is a clone of template %q", got)
			}
			c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
			if got := p.exec(c, "hostname"); got != "cold" {
				t.Errorf("its name is %q", got)
			}
			p.remove()
			n.nothingLeft()
		})
	}
}

// TestSlowBoot: on a busy node, a guest may take longer to boot than one that has
// booted may take to answer.
func TestSlowBoot(t *testing.T) {
	n := newNode(t)
	n.setHyper("templates: off")
	ran := make(chan *pod)
	go func() {
		defer close(ran)
		config := n.podConfig("slow")
		r, err := n.runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: "hyper"})
		if err != nil {
			t.Error(err)
			return
		}
		ran <- &pod{node: n, config: config, id: r.PodSandboxId}
	}()
	var machine int
	n.eventually("QEMU runs", func() bool {
		for _, pid := range n.processes() {
			if line := cmdline(pid); strings.Contains(line, "qemu-system") && !strings.Contains(line, "h8s-probe") {
				machine = pid
			}
		}
		return machine > 1
	})
	must(t, syscall.Kill(machine, syscall.SIGSTOP))
	time.Sleep(22 * time.Second) // it is busy
	must(t, syscall.Kill(machine, syscall.SIGCONT))
	if p := <-ran; p != nil {
		p.remove()
	}
	n.nothingLeft()
}

// setHyper adds a line to the runtime's configuration, for pods to come.
func (n *node) setHyper(line string) {
	n.t.Helper()
	text, err := os.ReadFile(n.path("hyper.yaml"))
	must(n.t, err)
	n.write("hyper.yaml", string(text)+line+"\n")
}

// TestSharedTemplates: only an operator's word lets tenants share.
func TestSharedTemplates(t *testing.T) {
	n := newNode(t)
	n.setHyper("shareTemplates: true")
	for _, tenant := range []string{"red", "blue"} {
		p := n.run(n.tenantPod(tenant, tenant))
		if got := p.template(); got != "everybody/1cpu-512Mi" {
			t.Errorf("the pod of %s is a clone of template %q", tenant, got)
		}
		p.remove()
	}
	n.nothingLeft()
}

// BenchmarkSandbox measures RunPodSandbox alone (ms-ready).
func BenchmarkSandbox(b *testing.B) {
	for name, line := range map[string]string{"cold": "templates: off", "clone": ""} {
		b.Run(name, func(b *testing.B) {
			n := newNode(b)
			n.setHyper(line)
			n.run(n.tenantPod("first", "red")).remove()
			var ready time.Duration
			for i := 0; b.Loop(); i++ {
				begin := time.Now()
				p := n.run(n.tenantPod(fmt.Sprint("pod-", i), "red"))
				ready += time.Since(begin)
				p.remove()
			}
			b.ReportMetric(float64(ready.Milliseconds())/float64(b.N), "ms-ready")
		})
	}
}
