package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestHyperFaults breaks what a pod's virtual machine is made of and stands on. What is
// said about the pod must become true, other pods must not notice, and in the end
// nothing may be left.
func TestHyperFaults(t *testing.T) {
	names := nodes(t)
	node := names[1]
	before := map[string]hostState{}
	for _, n := range names {
		var err error
		if before[n], err = newNodeState(n); err != nil {
			t.Fatal(err)
		}
	}
	tn := newTenant(t, "hyperfaults", "10.0.0.0/16")
	tn.useHyper(t)
	system := operatorNamespace(t, "hyperfaults-system")
	// Its liveness is asked through containerd, its readiness through the network. It is
	// patient, as many machines start beside it.
	tn.run(t, ticker("steady", node, "", small+"livenessProbe: {exec: {command: [test, '!', -e, /tmp/sick]}, periodSeconds: 3, timeoutSeconds: 30, failureThreshold: 4},"))
	tn.waitReady(t, "steady")
	steady := tn.identity(t, node, "steady")

	for _, test := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"Ended", func(t *testing.T) { testEnded(t, tn, system, node) }},
		{"Daemons", func(t *testing.T) { testDaemons(t, tn, node) }},
		{"Moments", func(t *testing.T) { testMoments(t, tn, node) }},
		{"Conversion", func(t *testing.T) { testConversion(t, tn) }},
		{"Upgrade", func(t *testing.T) { testHyperUpgrade(t, tn, node) }},
		{"Pressure", func(t *testing.T) { testPressure(t, tn, node) }},
	} {
		t.Run(test.name, test.run)
		if now := tn.identity(t, node, "steady"); now != steady {
			t.Fatalf("after %s a pod that had nothing to do with it is %s, and was %s", test.name, now, steady)
		}
	}
	t.Run("Doctor", func(t *testing.T) { testHyperLeftovers(t, node) })

	t.Run("Liveness", func(t *testing.T) {
		if _, err := tn.sh("steady", "touch /tmp/sick"); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			out, err := restartsAndReady(tn, "steady")
			if err != nil || out != "1 True" {
				return fmt.Errorf("the pod is not alive any more, and its restarts and readiness are %q, %w", out, err)
			}
			return nil
		})
	})
	for _, in := range []tenant{tn, system} {
		kubectl(t, admin, "delete", "pods", "--all", "-n", in.ns, "--timeout=4m")
	}
	// A node keeps a Network's portal for a while after its last pod, as long as there is the Network.
	kubectl(t, admin, "delete", "tenant", tn.name, "--timeout=4m")
	for _, n := range names {
		awaitNodeState(t, n, before[n])
	}
}

// testEnded ends virtual machines in every way, all at once. 137 is what ended with its
// machine; 255 is what containerd itself says when a shim does not answer any more.
func testEnded(t *testing.T, tn, system tenant, node string) {
	kill := func(which func(vm) process) func(*testing.T, tenant, string) {
		return func(t *testing.T, in tenant, pod string) { which(in.vm(t, node, pod)).kill(t) }
	}
	machine, shim := func(m vm) process { return m.qemu }, func(m vm) process { return m.shim }
	const never = "restartPolicy: Never,"
	tests := map[string]struct {
		in              tenant
		spec, container string
		end             func(t *testing.T, in tenant, pod string)
		want            string // of the container's end: exit code and reason
	}{
		"qemu":       {tn, "", small, kill(machine), "137 Error"},
		"qemu-never": {tn, never, small, kill(machine), "137 Error"},
		"shim":       {tn, "", small, kill(shim), "255 Error"},
		"shim-never": {tn, never, small, kill(shim), "255 Error"},
		// A guest that does not answer, whoever in it hangs.
		"hang": {tn, "", small, func(t *testing.T, in tenant, pod string) {
			in.vm(t, node, pod).qemu.pause(t)
		}, "137 Error"},
		// Only who is privileged in the guest can, which a tenant's pod is not.
		"panic": {system, "", small + "securityContext: {privileged: true},", func(t *testing.T, in tenant, pod string) {
			_, _ = in.sh(pod, "echo c > /proc/sysrq-trigger")
		}, "137 Error"},
		// QEMU takes more than its pod may have.
		"memory": {tn, never, "resources: {limits: {memory: 128Mi}, requests: {cpu: 10m}},", func(t *testing.T, in tenant, pod string) {
			podsMemory(t, node, in.uid(t, pod)).leave(t, 16<<20)
			_, _ = in.sh(pod, "dd if=/dev/zero of=/full bs=1M count=96")
		}, "137 OOMKilled"},
		// The container's disk is the guest's memory.
		"disk": {tn, never, "", func(t *testing.T, in tenant, pod string) {
			out, err := in.sh(pod, "dd if=/dev/zero of=/full bs=1M 2>&1; touch /full2 && echo x > /full2; echo status $?")
			if err != nil || !strings.Contains(out, "No space left on device") || !strings.Contains(out, "status 1") {
				t.Errorf("a write to a full disk: %v: %s", err, out)
			}
			_, n, err := in.printed(pod)
			if err != nil {
				t.Error(err)
			}
			eventually(t, func() error {
				_, now, err := in.printed(pod)
				if err == nil && now < n+3 {
					err = fmt.Errorf("the log stands at %d since %d", now, n)
				}
				return err
			})
			if out, err := in.sh(pod, "rm /full && echo x > /full2 && cat /full2"); err != nil || out != "x\n" {
				t.Errorf("after room was made: %v: %s", err, out)
			}
		}, ""},
	}
	for pod, test := range tests {
		test.in.run(t, ticker(pod, node, test.spec, test.container))
	}
	for pod, test := range tests {
		test.in.waitReady(t, pod)
	}
	t.Run("at once", func(t *testing.T) {
		for pod, test := range tests {
			t.Run(pod, func(t *testing.T) {
				t.Parallel()
				old := test.in.identity(t, node, pod)
				test.end(t, test.in, pod)
				if test.want == "" {
					if now := test.in.identity(t, node, pod); now != old {
						t.Errorf("the pod was %s and is %s", old, now)
					}
					return
				}
				begin := time.Now()
				state, phase := "lastState", "1 True"
				if test.spec == never {
					state, phase = "state", "0 False"
				}
				limit := time.Minute
				if pod == "hang" {
					limit = 2 * time.Minute // it may be late, until a ping has had 40 seconds
				}
				within(t, limit, func() error {
					out, err := try(admin, "get", "pod", pod, "-n", test.in.ns, "-o", "jsonpath={.status.containerStatuses[0]."+state+".terminated.exitCode} {.status.containerStatuses[0]."+state+".terminated.reason}")
					if pod == "shim" && out == " " {
						// The kubelet may forget how a container ended whose sandbox it has replaced, and
						// then only knows that it has started it again.
						if now, err := restartsAndReady(test.in, pod); err == nil && now == phase {
							return nil
						}
					}
					if err != nil || out != test.want {
						return fmt.Errorf("the container's end is %q, want %q, %w", out, test.want, err)
					}
					return nil
				})
				known := time.Since(begin)
				eventually(t, func() error { // how soon depends on the machines that start beside it
					out, err := restartsAndReady(test.in, pod)
					if err != nil || out != phase {
						return fmt.Errorf("restarts and readiness are %q, want %q, %w", out, phase, err)
					}
					return nil
				})
				t.Logf("known after %.1fs, true again after %.1fs", known.Seconds(), time.Since(begin).Seconds())
				if test.spec == never {
					eventually(t, func() error {
						out, err := try(admin, "get", "pod", pod, "-n", test.in.ns, "-o", "jsonpath={.status.phase}")
						if err != nil || out != "Failed" {
							return fmt.Errorf("the pod is %q, %w", out, err)
						}
						return nil
					})
				} else if now := test.in.identity(t, node, pod); now == old {
					t.Errorf("the pod is as it was: %s", now)
				}
			})
		}
	})
	log, err := os.ReadFile(nodeFile(node, "log/containerd.log"))
	if err != nil || !bytes.Contains(log, []byte("sysrq triggered crash")) {
		t.Errorf("containerd's log does not say that a guest's kernel panicked, %v", err)
	}
	for _, in := range []tenant{tn, system} {
		kubectl(t, admin, "delete", "pods", "-n", in.ns, "-l", "app!=steady", "--wait=false")
	}
}

// testDaemons kills what manages the pods of a node, which live on.
func testDaemons(t *testing.T, tn tenant, node string) {
	for _, program := range []string{"containerd", "kubelet"} {
		old := only(t, node, program)
		old.kill(t)
		restarted(t, node, program, old)
		// The log is whole, and goes on.
		n, err := 0, error(nil)
		eventually(t, func() error { _, n, err = tn.printed("steady"); return err })
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		follow := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), "--kubeconfig="+kubeconfigPath(tn.owner), "logs", "-f", "-n", tn.ns, "steady")
		out, err := follow.StdoutPipe()
		if err == nil {
			err = follow.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		last := ""
		for lines := bufio.NewScanner(out); lines.Scan() && last != fmt.Sprint(n+5); {
			last = lines.Text()
		}
		cancel()
		_ = follow.Wait()
		if last != fmt.Sprint(n+5) {
			t.Errorf("kill -9 of %s: kubectl logs -f, which had %d, ends with %q", program, n, last)
		}
		if _, _, err := tn.printed("steady"); err != nil {
			t.Errorf("kill -9 of %s: %v", program, err)
		}
		eventually(t, func() error {
			out, err := try(admin, "get", "node", node, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
			if err == nil && out != "True" {
				err = fmt.Errorf("node %s is Ready: %s", node, out)
			}
			return err
		})
	}
}

// testMoments kills, when one pod is being started and another one deleted, what does it.
func testMoments(t *testing.T, tn tenant, node string) {
	own := func(which func(vm) process) func(t *testing.T, m vm) {
		return func(t *testing.T, m vm) { _ = which(m).crash() } // it may have ended meanwhile
	}
	tests := map[string]struct {
		daemon string
		kill   func(t *testing.T, m vm)
	}{
		"containerd": {daemon: "containerd"},
		"kubelet":    {daemon: "kubelet"},
		"shim":       {kill: own(func(m vm) process { return m.shim })},
		"qemu":       {kill: own(func(m vm) process { return m.qemu })},
	}
	for what := range tests {
		tn.run(t, ticker("ending-"+what, node, "", small))
	}
	for what := range tests {
		tn.waitReady(t, "ending-"+what)
	}
	for what, test := range tests {
		starting, ending := "starting-"+what, "ending-"+what
		uid, was := tn.uid(t, ending), tn.vm(t, node, ending)
		kubectl(t, tn.owner, "delete", "pod", ending, "-n", tn.ns, "--wait=false")
		tn.run(t, ticker(starting, node, "", small))
		id := tn.uid(t, starting)
		var booting vm
		// It is long, where a kubelet that was killed a moment ago has to start first.
		if err := await(patience, func() (err error) { booting, err = findVM(node, id); return err }); err != nil {
			t.Fatal(err)
		}
		if err := await(20*time.Second, func() error {
			log, err := os.ReadFile(nodeFile(node, "var/log/pods/"+tn.ns+"_"+ending+"_"+uid+"/c/0.log"))
			if err == nil && !bytes.Contains(log, []byte("ending")) {
				err = fmt.Errorf("pod %s is not being stopped", ending)
			}
			return err
		}); err != nil {
			t.Logf("the moment may have passed: %v", err)
		}
		if test.daemon != "" {
			old := only(t, node, test.daemon)
			old.kill(t)
			restarted(t, node, test.daemon, old)
		} else {
			test.kill(t, booting)
			test.kill(t, was)
		}
		defer func() {
			eventually(t, func() error {
				out, err := try(admin, "get", "pods", "-n", tn.ns, "-l", "app="+ending, "-o", "name")
				if err == nil && out != "" {
					err = fmt.Errorf("%s was killed, and %s is still there", what, out)
				}
				return err
			})
			tn.waitReady(t, starting)
			if got, err := tn.sh(starting, "echo hello"); err != nil || got != "hello\n" {
				t.Errorf("%s was killed while pod %s started: exec: %q, %v", what, starting, got, err)
			}
			kubectl(t, tn.owner, "delete", "pod", starting, "-n", tn.ns, "--wait=false")
		}()
	}
}

// await is poll for what lasts for a moment only.
func await(within time.Duration, f func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(10 * time.Millisecond) // to look takes as long
	}
}

// testConversion kills, while a layer becomes a disk, on one node what writes it, on the
// other one the shim that waits for it.
func testConversion(t *testing.T, tn tenant) {
	const tag = "localhost/e2e-layer:latest"
	archive := filepath.Join(t.TempDir(), "layer.tar")
	if err := addLayer(filepath.Join(cluster.bin, "images", "busybox.tar"), archive, tag); err != nil {
		t.Fatal(err)
	}
	if out, err := h8sOutput(6*time.Minute, "image", "load", "--name", cluster.cluster, archive); err != nil {
		t.Fatalf("h8s image load: %v: %s", err, out)
	}
	for i, n := range nodes(t) {
		pod := "convert-" + n
		tn.run(t, strings.ReplaceAll(ticker(pod, n, "", small), "localhost/busybox:latest", tag))
		var writer process
		if err := await(patience, func() error {
			if found := processes(n, "mkfs.erofs"); len(found) == 1 {
				writer = found[0]
				return nil
			}
			return fmt.Errorf("no layer is converted on node %s", n)
		}); err != nil {
			t.Fatal(err)
		}
		writer.pause(t) // so that it does not end because it has finished
		victim := writer
		if i == 0 {
			victim = tn.vm(t, n, pod).shim
		}
		victim.kill(t)
		if err := poll(patience, func() error {
			if slices.ContainsFunc(processes(n, "mkfs.erofs"), func(p process) bool { return p.pid == writer.pid }) {
				return fmt.Errorf("mkfs.erofs, process %d, is still there although nobody waits for it", writer.pid)
			}
			return nil
		}); err != nil {
			t.Error(err)
			writer.kill(t)
		}
	}
	for _, n := range nodes(t) {
		tn.waitReady(t, "convert-"+n)
		if out, err := tn.sh("convert-"+n, "tail -c 4 /layer/99"); err != nil || out != "end\n" {
			t.Errorf("the layer on node %s ends with %q, %v", n, out, err)
		}
		if left, err := filepath.Glob(nodeFile(n, "var/lib/h8s/hyper/layers/*.partial")); err != nil || len(left) > 0 {
			t.Errorf("half a layer is left: %v, %v", left, err)
		}
		kubectl(t, tn.owner, "delete", "pod", "convert-"+n, "-n", tn.ns, "--wait=false")
	}
}

// addLayer makes of the image in an archive another one, with another tag, that has a
// layer which nobody has converted yet: 100 files of a megabyte each.
func addLayer(archive, to, tag string) error {
	img, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		return err
	}
	var files bytes.Buffer
	w := tar.NewWriter(&files)
	content := make([]byte, 1<<20)
	for i := range 100 {
		_, _ = rand.Read(content) // it does not fail
		copy(content[len(content)-4:], "end\n")
		if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("layer/%d", i), Mode: 0o644, Size: int64(len(content))}); err != nil {
			return err
		}
		if _, err := w.Write(content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files.Bytes())), nil })
	if err != nil {
		return err
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		return err
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(to, ref, img)
}

// testHyperUpgrade puts a new shim and a new guest into their places on a node, below a
// pod that runs. The new guest is known by a sysctl that it sets.
func testHyperUpgrade(t *testing.T, tn tenant, node string) {
	const swappiness = "cat /proc/sys/vm/swappiness"
	dir := nodeFile(node, "var/lib/h8s-e2e")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	newGuest(t, dir)
	tn.run(t, ticker("old-one", node, "", small), ticker("old-two", node, "", small))
	tn.waitReady(t, "old-one", "old-two")
	old := tn.identity(t, node, "old-one")

	const put = "cp /opt/h8s/bin/" + hyperShim + " /var/lib/h8s-e2e/ && " +
		"mount --bind /var/lib/h8s-e2e/" + hyperShim + " /opt/h8s/bin/" + hyperShim + " && mount --bind /var/lib/h8s-e2e/initrd.img /opt/h8s/bin/hyper/initrd.img"
	takeAway := once(func() { onNode(t, node, "umount -l /opt/h8s/bin/"+hyperShim+" /opt/h8s/bin/hyper/initrd.img") })
	onNode(t, node, put)
	defer takeAway()

	tn.run(t, ticker("new", node, "", small))
	tn.waitReady(t, "new")
	if out, err := tn.sh("new", swappiness); err != nil || out != "77\n" {
		t.Errorf("a new pod has the old guest: %q, %v", out, err)
	}
	isNew := func(p process) bool {
		running, err1 := os.Stat(fmt.Sprintf("/proc/%d/exe", p.pid))
		file, err2 := os.Stat(filepath.Join(dir, hyperShim))
		return errors.Join(err1, err2) == nil && os.SameFile(running, file)
	}
	if !isNew(tn.vm(t, node, "new").shim) || isNew(tn.vm(t, node, "old-one").shim) {
		t.Error("the new shim is not the new pod's alone")
	}
	if now := tn.identity(t, node, "old-one"); now != old {
		t.Errorf("the old pod was %s and is %s", old, now)
	}
	// The one is stopped by its own shim; what the other one's shim leaves is the new one's to clean up.
	shim := tn.vm(t, node, "old-two").shim
	kubectl(t, tn.owner, "delete", "pod", "old-one", "-n", tn.ns, "--timeout=4m")
	shim.kill(t)
	eventually(t, func() error {
		out, err := tn.sh("old-two", swappiness)
		if err == nil && out != "77\n" {
			err = fmt.Errorf("started again, the pod has the old guest: %q", out)
		}
		return err
	})
	takeAway()
	kubectl(t, tn.owner, "delete", "pod", "old-two", "new", "-n", tn.ns, "--timeout=4m")
}

// newGuest builds an initramfs whose init differs from the product's.
func newGuest(t *testing.T, dir string) {
	t.Helper()
	scratch := t.TempDir()
	source := filepath.Join(scratch, "other.go")
	if err := os.WriteFile(source, []byte(`package main

import (
	"os"
	"time"
)

func init() {
	go func() {
		for os.WriteFile("/proc/sys/vm/swappiness", []byte("77"), 0) != nil {
			time.Sleep(10 * time.Millisecond)
		}
	}()
}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(cluster.root, "cmd/hyperinit/other.go"): source}})
	if err == nil {
		err = os.WriteFile(filepath.Join(scratch, "overlay.json"), overlay, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", `
		cp -a bin/hyper/kernel bin/hyper/crun "$1"
		CGO_ENABLED=0 go build -overlay "$1/overlay.json" -ldflags '-s -w' -o "$1/hyperinit" ./cmd/hyperinit
		go run ./images/guest -out "$1"
		mv "$1/initrd.img" "$2"`, "bash", scratch, dir)
	cmd.Dir = cluster.root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build another guest: %v: %s", err, out)
	}
}

// testPressure leaves the pods of a node less memory than they want: who asks for no
// share of it goes first, and nobody else with it.
func testPressure(t *testing.T, tn tenant, node string) {
	tn.run(t, ticker("glutton", node, "restartPolicy: Never,", ""))
	tn.waitReady(t, "glutton")
	machine := tn.vm(t, node, "glutton").qemu
	// It begins when the kubelet does not look. That looks every ten seconds only, at numbers as
	// old, and would evict the next pod when the first has gone.
	if _, err := tn.sh("glutton", "(sleep 5; exec dd if=/dev/zero of=/full bs=1M count=220) >/dev/null 2>&1 &"); err != nil {
		t.Fatal(err)
	}
	resume := once(only(t, node, "kubelet").pause(t))
	defer resume()
	undo := podsMemory(t, node, "").leave(t, 96<<20)
	defer undo()
	// A node whose kubelet says nothing for long is given up, and its pods with it: its Lease is renewed meanwhile.
	eventually(t, func() error {
		if !slices.ContainsFunc(processes(node, qemu), func(p process) bool { return p.pid == machine.pid }) {
			return nil
		}
		_, err := try(admin, "patch", "lease", node, "-n", "kube-node-lease", "--type=merge", "-p",
			fmt.Sprintf(`{"spec":{"renewTime":%q}}`, time.Now().UTC().Format(metav1.RFC3339Micro)))
		return errors.Join(fmt.Errorf("the machine of the pod, process %d, is still there", machine.pid), err)
	})
	undo()
	resume()
	eventually(t, func() error {
		out, err := try(tn.owner, "get", "pod", "glutton", "-n", tn.ns, "-o", "jsonpath={.status.phase} {.status.reason} {.status.containerStatuses[0].state.terminated.exitCode}")
		// The reason says OOMKilled only where it was a limit of the pod's own.
		if err != nil || out != "Failed  137" {
			return fmt.Errorf("the pod is %q, %w", out, err)
		}
		return nil
	})
	kubectl(t, tn.owner, "delete", "pod", "glutton", "-n", tn.ns, "--wait=false")
}

// testHyperLeftovers makes what a fault could leave, and lets doctor find it.
func testHyperLeftovers(t *testing.T, node string) {
	doctorContent(t)
	const id = "0123456789abcdef0123"
	cgroup := filepath.Join(podCgroups(node)[0], "h8s-"+id)
	for name, test := range map[string]struct{ add, del, want string }{
		"directory":    {"mkdir -p /run/h8s/hyper/" + id, "rmdir /run/h8s/hyper/" + id, "/run/h8s/hyper/" + id},
		"half a layer": {"touch /var/lib/h8s/hyper/layers/" + id + ".partial", "rm /var/lib/h8s/hyper/layers/" + id + ".partial", id + ".partial"},
		"cgroup":       {"mkdir " + cgroup, "rmdir " + cgroup, "h8s-" + id},
	} {
		t.Run(name, func(t *testing.T) {
			onNode(t, node, test.add)
			defer func() { _, _ = tryNode(node, test.del) }()
			doctorReports(t, test.want, node)
		})
	}
	t.Run("process", func(t *testing.T) {
		// What QEMU is to doctor: a program of that name in the cgroup of the node's pods.
		fake := filepath.Join(t.TempDir(), qemu)
		if err := os.Symlink("/bin/sleep", fake); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), fake, "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		if err := os.WriteFile(filepath.Join(podCgroups(node)[0], "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0); err != nil {
			t.Fatal(err)
		}
		doctorReports(t, fmt.Sprintf("process %d", cmd.Process.Pid))
	})
	doctorContent(t)
}
