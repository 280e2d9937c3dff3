package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// makeTarget runs make in a working tree as a person does who has just logged in:
// whatever make this test runs under is not its business.
func makeTarget(t testing.TB, tree, scratchDir string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "make", args...)
	cmd.Dir = tree
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "MFLAGS=")
	})
	cmd.Env = append(cmd.Env, "TMPDIR="+scratchDir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make %s: %v:\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// workingTree makes a copy of this one, with what was built in it. Upstream
// programs, which nothing here changes, are links.
func workingTree(t testing.TB) string {
	t.Helper()
	tree, err := os.MkdirTemp(cluster.bin, "tree-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tree) })
	script := `
		cp -a Makefile go.mod go.sum api build cmd deploy images internal upstream "$1"
		mkdir "$1/bin"
		cp -a bin/.version bin/.deps bin/h8s* bin/images "$1/bin"
		for f in $(find bin -maxdepth 1 -type f ! -name '.*' ! -name 'h8s*') bin/cni bin/hyper; do cp -al "$f" "$1/bin"; done`
	cmd := exec.CommandContext(t.Context(), "bash", "-euc", script, "bash", tree)
	cmd.Dir = cluster.root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("copy the working tree, in which `make build` must have run: %v: %s", err, out)
	}
	return tree
}

// TestSideBySide does with make what a newcomer does, on a second cluster while
// this one is up, then pulls a newer version, and at the end looks for what is left.
func TestSideBySide(t *testing.T) {
	const name = "beside"
	tree := workingTree(t)
	bin, scratchDir := filepath.Join(tree, "bin"), t.TempDir()
	version, err := os.ReadFile(filepath.Join(bin, ".version"))
	if err != nil {
		t.Fatal(err)
	}
	mk := func(target string) string {
		t.Helper()
		return makeTarget(t, tree, scratchDir, target, "NAME="+name, "VERSION="+strings.TrimSpace(string(version)))
	}
	_, _ = h8sOutput(2*time.Minute, "down", "--name", name)
	before, err := newHostState(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = h8sOutput(2*time.Minute, "down", "--name", name) })

	out := mk("up")
	var b beside
	b.bin = bin
	if b.config, err = h8sOutput(time.Minute, "kubeconfig", "--name", name); err != nil {
		t.Fatalf("h8s kubeconfig: %v: %s", err, b.config)
	}
	b.config = manifest(t, b.config)
	alreadyUp := fmt.Sprintf("cluster %q is already up\n", name)
	// upAgain has nothing to do. It gives the nodes a moment to say that they are ready, and may look after
	// them once more if they do not; what it does because of a change is wrong at once.
	upAgain := func(t *testing.T) {
		t.Helper()
		complete(t, name)
		eventually(t, func() error {
			out := mk("up")
			for _, did := range []string{"✓ build", "changed since", "older builds"} {
				if strings.Contains(out, did) {
					t.Fatalf("make up again finds what nobody has changed: %s", out)
				}
			}
			if out != alreadyUp {
				return fmt.Errorf("make up again does more than to say %q:\n%s", alreadyUp, out)
			}
			return nil
		})
	}

	t.Run("Addresses", func(t *testing.T) {
		// Each answers for itself, and their nodes do not share an address.
		addresses := map[string]string{}
		for cluster, args := range map[string][]string{name: {"--kubeconfig=" + b.config}, cluster.cluster: nil} {
			out := kubectl(t, admin, append(args, "get", "nodes", "-o", `jsonpath={.items[*].status.addresses[?(@.type=="InternalIP")].address}`)...)
			for _, a := range strings.Fields(out) {
				if other := addresses[a]; other != "" {
					t.Errorf("clusters %s and %s both have a node at %s", cluster, other, a)
				}
				if _, err := netip.ParseAddr(a); err != nil {
					t.Error(err)
				}
				addresses[a] = cluster
			}
		}
	})
	t.Run("Demo", func(t *testing.T) { b.testDemo(t, out) })
	t.Run("AlreadyUp", func(t *testing.T) {
		b.kubectl(t, "wait", "--for=condition=Ready", "nodes", "--all", "--timeout=4m")
		upAgain(t)
	})
	t.Run("Refused", func(t *testing.T) {
		for flag, want := range map[string]string{
			"--nodes=3":                "has 2 nodes and that cannot change",
			"--resolver=192.0.2.1:53":  "uses the machine's resolvers and that cannot change",
			"--bin-dir=" + cluster.bin: "not those in " + cluster.bin,
			"--no-product":             "leave --no-product out",
			"--name=no_label":          "not a DNS label",
		} {
			out, err := b.h8s("up", "--name", name, flag)
			if err == nil || !strings.Contains(out, want) {
				t.Errorf("h8s up %s: %v, and does not say %q: %s", flag, err, want, out)
			}
		}
	})
	t.Run("Upgrade", func(t *testing.T) {
		const sentence = "this build was pulled"
		pulled := filepath.Join(tree, "cmd", "h8s-node", "pulled.go")
		if err := os.WriteFile(pulled, []byte("package main\n\nfunc init() { println(\""+sentence+"\") }\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		values := filepath.Join(tree, "deploy", "h8s", "values.yaml")
		text, err := os.ReadFile(values)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(values, []byte(strings.ReplaceAll(string(text), "logLevel: info", "logLevel: debug")), 0o644); err != nil {
			t.Fatal(err)
		}
		out := mk("up")
		for _, want := range []string{"✓ build ours", "✓ build images", "changed since they were installed: the chart or its values, image h8s\n", "✓ load images", "✓ upgrade hypernetes"} {
			if !strings.Contains(out, want) {
				t.Errorf("make up does not say %q:\n%s", want, out)
			}
		}
		pods := strings.Fields(b.kubectl(t, "get", "pods", "-n", systemNamespace, "-l", "app.kubernetes.io/component=node", "-o", "name"))
		if len(pods) != 2 {
			t.Errorf("node agents: %v", pods)
		}
		for _, pod := range pods {
			if log := b.kubectl(t, "logs", "-n", systemNamespace, pod); !strings.Contains(log, sentence) {
				t.Errorf("%s is not of the new build: %s", pod, log)
			}
		}
		out = b.kubectl(t, "get", "pods", "-n", systemNamespace, "-o", "jsonpath={.items[*].spec.containers[*].args}")
		if strings.Count(out, "--log-level=debug") != 3 {
			t.Errorf("the pods are not of the new chart: %s", out)
		}
		b.webs(t)
		upAgain(t) // kubelet may find out late that its network plugin was away for a moment
	})
	t.Run("Programs", func(t *testing.T) {
		// Nothing starts etcd again before the end of this test.
		if err := os.Rename(filepath.Join(bin, "kube-scheduler"), filepath.Join(bin, "etcd")); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(bin, "kube-proxy"), filepath.Join(bin, "kube-scheduler")); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			out, err := b.h8s("up", "--name", name)
			if !strings.Contains(out, "still runs older builds of etcd, kube-scheduler: ") {
				t.Fatalf("h8s up does not say which programs have changed: %v: %s", err, out)
			}
			if err != nil || !strings.HasSuffix(out, alreadyUp) {
				return fmt.Errorf("h8s up does more than to say which programs have changed: %w: %s", err, out)
			}
			return nil
		})
	})
	// A virtual machine goes like everything else.
	if _, err := tryInput(admin, ticker("machine", "n1", "", small), "--kubeconfig="+b.config, "apply", "-n", "acme-shop", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	b.kubectl(t, "wait", "-n", "acme-shop", "--for=condition=Ready", "pod/machine", "--timeout=4m")
	eventually(t, func() error { // a child of a program, before it becomes another one, is of the same name
		if n := len(processesBelow("/h8s-"+name+"/", qemu)); n != 1 {
			return fmt.Errorf("%d virtual machines run, want 1", n)
		}
		if n := len(processesBelow("/h8s-"+name+"/", "runsc-sandbox")); n != 4 {
			return fmt.Errorf("%d sandboxes run, want the demo's 4", n)
		}
		return nil
	})
	if out := mk("down"); out != fmt.Sprintf("cluster %q is down\n", name) {
		t.Errorf("make down: %s", out)
	}
	if err := awaitRestored(before, name); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(scratchDir); err != nil || len(left) > 0 {
		t.Errorf("scratch files are left: %v, %v", left, err)
	}
	if _, err := h8sOutput(2*time.Minute, "status", "--name", name); err == nil {
		t.Error("h8s status succeeds after h8s down")
	}
	if _, err := h8sOutput(2*time.Minute, "down", "--name", name); err != nil {
		t.Errorf("h8s down again: %v", err)
	}
	kubectl(t, admin, "get", "nodes")
}

// beside is the second cluster.
type beside struct{ bin, config string }

func (b beside) h8s(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(b.bin, "h8s"), args...).CombinedOutput()
	return string(out), err
}

func (b beside) kubectl(t testing.TB, args ...string) string {
	t.Helper()
	return kubectl(t, admin, append([]string{"--kubeconfig=" + b.config}, args...)...)
}

// webs asserts that each tenant's web Service answers within the tenant, by that
// tenant's pods.
func (b beside) webs(t testing.TB) {
	t.Helper()
	for _, namespace := range []string{"acme-shop", "globex-shop"} {
		pods := strings.Fields(b.kubectl(t, "get", "pods", "-n", namespace, "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"))
		if len(pods) != 2 {
			t.Errorf("%s has the pods %v, want two", namespace, pods)
		}
		eventually(t, func() error {
			out, err := try(admin, "--kubeconfig="+b.config, "exec", "-n", namespace, "deploy/web", "--", "wget", "-qO-", "http://web/hostname")
			if err == nil && !slices.Contains(pods, out) {
				t.Errorf("in %s the Service web is answered by %q, want one of %v", namespace, out, pods)
			}
			return err
		})
	}
}

// testDemo reads what `make up` printed, and does as it says.
func (b beside) testDemo(t *testing.T, printed string) {
	if strings.Contains(printed, "✓ build") {
		t.Errorf("make up builds what was built:\n%s", printed)
	}
	for _, want := range []string{"✓ make demo tenants", "tenant acme    on 10.0.0.0/16: namespace acme-shop of alice", "tenant globex  on 10.0.0.0/16: namespace globex-shop of bob"} {
		if !strings.Contains(printed, want) {
			t.Errorf("make up does not say %q:\n%s", want, printed)
		}
	}
	var networks struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ CIDRs []string }
		}
	}
	if err := json.Unmarshal([]byte(b.kubectl(t, "get", "networks", "-o", "json")), &networks); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(networks.Items); got != "[{{acme} {[10.0.0.0/16]}} {{globex} {[10.0.0.0/16]}}]" {
		t.Errorf("networks are %s", got)
	}
	b.webs(t)

	_, commands, _ := strings.Cut(printed, "\nTry:\n")
	lines := strings.Split(strings.TrimSpace(commands), "\n")
	if len(lines) != 3 {
		t.Fatalf("make up does not end with three commands:\n%s", printed)
	}
	dir := t.TempDir()
	run := func(line string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "bash", "-c", line)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run(lines[0]); err != nil || !strings.Contains(out, "tenant.h8s.io/acme") || !strings.Contains(out, "pod/web-") {
		t.Errorf("%s: %v: %s", lines[0], err, out)
	}
	if out, err := run(lines[1]); err != nil || !strings.HasPrefix(out, "web-") {
		t.Errorf("%s: %v: %s", lines[1], err, out)
	}
	if out, err := run(lines[2]); err == nil || !strings.Contains(out, "(Forbidden)") {
		t.Errorf("%s: %v: %s", lines[2], err, out)
	}
}

// TestInterruptedUp kills `h8s up` in its middle: the next one completes what it
// left, and `h8s down` removes all of it.
func TestInterruptedUp(t *testing.T) {
	const name = "cut"
	helm := func(lines *bufio.Scanner) bool {
		return lines.Scan() && strings.Contains(lines.Text(), "… install hypernetes") &&
			poll(patience, func() error {
				if len(processesBelow("/h8s-"+name+"/up", "helm")) == 0 {
					return fmt.Errorf("helm does not run")
				}
				_, err := try(admin, "--kubeconfig=/var/lib/h8s/"+name+"/admin.kubeconfig", "get", "secret", "-n", systemNamespace, "sh.helm.release.v1.h8s.v1")
				return err
			}) == nil
	}
	shows := func(want string) func(lines *bufio.Scanner) bool {
		return func(lines *bufio.Scanner) bool { return lines.Scan() && strings.Contains(lines.Text(), want) }
	}
	tests := map[string]struct {
		moment  func(lines *bufio.Scanner) bool // reads on until it has come
		upAgain bool
	}{
		"at the start":               {shows("… start network"), false},
		"when the nodes start":       {shows("… start nodes"), false},
		"when helm runs":             {helm, false},
		"when helm runs, then again": {helm, true},
	}
	_, _ = h8sOutput(2*time.Minute, "down", "--name", name)
	before, err := newHostState(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = h8sOutput(2*time.Minute, "down", "--name", name) })
	for moment, test := range tests {
		t.Run(moment, func(t *testing.T) {
			up := []string{"up", "--name", name, "--nodes", "1", "--resolver", outsideDNS}
			cmd := exec.CommandContext(t.Context(), filepath.Join(cluster.bin, "h8s"), up...)
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(stdout)
			for !test.moment(lines) {
				if lines.Err() != nil || lines.Text() == "" {
					t.Errorf("the moment to kill h8s up has not come: %v", lines.Err())
					break
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
				t.Errorf("h8s up was not killed in its middle: %v", err)
			}
			if test.upAgain {
				if out, err := h8sOutput(upLimit, up...); err != nil {
					t.Errorf("h8s up again: %v: %s", err, out)
				}
				complete(t, name)
				eventually(t, func() error { // it gives the nodes a moment to say that they are ready
					out, err := h8sOutput(upLimit, up...)
					if strings.Contains(out, "changed since") {
						t.Fatalf("h8s up once more finds what nobody has changed: %s", out)
					}
					if err != nil || !strings.Contains(out, "already up") {
						return fmt.Errorf("h8s up once more: %w: %s", err, out)
					}
					return nil
				})
			}
			if out, err := h8sOutput(2*time.Minute, "down", "--name", name); err != nil {
				t.Errorf("h8s down: %v: %s", err, out)
			}
			if err := awaitRestored(before, name); err != nil {
				t.Error(err)
			}
		})
	}
}
