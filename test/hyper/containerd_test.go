//go:build hyper

package hyper

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"h8s.io/hypernetes/test/conformance"
)

// TestContainerd runs containerd's own tests of the CRI, with this runtime, and holds
// them to containerd.yaml.
func TestContainerd(t *testing.T) {
	text, err := os.ReadFile("containerd.yaml")
	must(t, err)
	list, err := conformance.ParseList(text)
	must(t, err)
	program := bin(t, "cri-integration.test")

	n := newNode(t)
	const busybox, pause = "localhost/busybox:peers", "localhost/pause:peers"
	must(t, conformance.WriteImages(filepath.Dir(program), n.path("images.tar"), []string{busybox, pause}))
	images := n.write("images.toml", "alpine = '"+busybox+"'\nbusybox = '"+busybox+"'\npause = '"+pause+"'\n")
	run := func(t *testing.T, flags ...string) (string, error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, append(flags,
			"-cri-endpoint=unix://"+n.path("containerd.sock"), "-runtime-handler=hyper", "-image-list="+images,
			// Tests that restart containerd find it by its name among the machine's processes.
			"-containerd-bin="+n.path("nothing-that-runs"))...)
		cmd.Dir = n.dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	names, err := run(t, "-test.list=^Test") // it connects even for this
	must(t, err)
	all := slices.DeleteFunc(strings.Fields(names), func(name string) bool { return !strings.HasPrefix(name, "Test") })
	for _, g := range list.Groups {
		passes, unlisted, stale := g.Plan(all)
		for _, name := range unlisted {
			t.Errorf("%s: it is not in the list: say that it passes, or why it is excluded", name)
		}
		for _, name := range stale {
			t.Errorf("%s: there is no such test any more: remove it from the list", name)
		}
		for _, name := range passes {
			t.Run(name, func(t *testing.T) {
				// Each time: some of them remove images.
				n.command("ctr", "-a", n.path("containerd.sock"), "-n", "k8s.io", "images", "import", n.path("images.tar"))
				var failure string
				for range 2 { // its deadlines are for a faster machine
					out, err := run(t, "-test.v", "-test.run=^"+name+"$")
					if err == nil && strings.Contains(out, "--- PASS: "+name+" ") {
						return
					}
					failure = fmt.Sprintf("%v:\n%s", err, out)
				}
				t.Error(failure)
			})
		}
	}
	n.eventually("the pods' shims end", func() bool { return len(n.processes()) == 0 })
}
