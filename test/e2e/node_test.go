package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// process is one process of the cluster under test, by its number on the machine.
type process struct {
	pid  int
	args []string
}

// processes are those of one node whose program is called name, by the node's
// cgroup: those of its pods are among them.
func processes(node, name string) []process {
	return processesBelow("/h8s-"+cluster.cluster+"/"+node+"/", name)
}

func processesBelow(cgroup, name string) []process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var found []process
	for _, dir := range dirs {
		groups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil || !strings.Contains(string(groups), ":"+cgroup) {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(cmdline) == 0 { // gone, or a zombie
			continue
		}
		args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
		if filepath.Base(args[0]) != name {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err == nil {
			found = append(found, process{pid, args})
		}
	}
	return found
}

// nodeInit is PID 1 of a node.
func nodeInit(node string) (process, error) {
	for _, p := range processes(node, "h8s") {
		if slices.Contains(p.args, "node-init") {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("node %s has no init", node)
}

// parent is the process that started p.
func (p process) parent() (process, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return process{}, err
	}
	for line := range strings.Lines(string(status)) {
		if pid, ok := strings.CutPrefix(line, "PPid:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(pid))
			return process{pid: n}, err
		}
	}
	return process{}, fmt.Errorf("process %d has no parent", p.pid)
}

// crash ends a process as a crash would: no signal handler runs.
func (p process) crash() error {
	if err := unix.Kill(p.pid, unix.SIGKILL); err != nil {
		return fmt.Errorf("kill -9 %d (%s): %w", p.pid, strings.Join(p.args, " "), err)
	}
	return nil
}

// kill is crash that must succeed.
func (p process) kill(t testing.TB) {
	t.Helper()
	if err := p.crash(); err != nil {
		t.Fatal(err)
	}
}

// pause stops a process, so that it does nothing until it is resumed.
func (p process) pause(t testing.TB) (resume func()) {
	t.Helper()
	if err := unix.Kill(p.pid, unix.SIGSTOP); err != nil {
		t.Fatalf("stop process %d: %v", p.pid, err)
	}
	return func() {
		if err := unix.Kill(p.pid, unix.SIGCONT); err != nil {
			t.Errorf("resume process %d: %v", p.pid, err)
		}
	}
}

// tryNode runs a shell command on a node, as its administrator would.
func tryNode(node, command string) (string, error) {
	p, err := nodeInit(node)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(p.pid), "--mount", "--net", "--uts", "--ipc", "--pid",
		"/bin/sh", "-c", command)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("on node %s: %s: %w: %s", node, command, err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// onNode is tryNode that must succeed.
func onNode(t testing.TB, node, command string) string {
	t.Helper()
	out, err := tryNode(node, command)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// doctor runs `h8s doctor` and gives back what it finds wrong with our cluster.
// It looks at every cluster of the machine; others are others' business.
func doctor(t testing.TB) string {
	t.Helper()
	out, _ := h8sOutput(time.Minute, "doctor", "-o", "json") // it exits with 1 if anything is wrong anywhere
	var checks []struct{ Name, Status, Detail string }
	if err := json.Unmarshal([]byte(out), &checks); err != nil {
		t.Fatalf("h8s doctor printed no JSON: %v: %s", err, out)
	}
	var wrong []string
	examined := false
	for _, c := range checks {
		if c.Name != "cluster "+cluster.cluster && !strings.HasPrefix(c.Name, "cluster "+cluster.cluster+" ") {
			continue
		}
		examined = true
		if c.Status != "ok" {
			wrong = append(wrong, c.Name+": "+c.Detail)
		}
	}
	if !examined {
		t.Fatalf("h8s doctor does not examine the cluster: %s", out)
	}
	return strings.Join(wrong, "\n")
}

// doctorReports waits until doctor finds all of these wrong. It does not wait for long: who stopped the node's agent,
// which would remove them, has about a minute until the kubelet kills it and starts another one.
func doctorReports(t testing.TB, wants ...string) {
	t.Helper()
	within(t, 45*time.Second, func() error { // of a node that answers late it says only that
		wrong := doctor(t)
		for _, want := range wants {
			if !strings.Contains(wrong, want) {
				return fmt.Errorf("h8s doctor does not report %s: %q", want, wrong)
			}
		}
		return nil
	})
}

// doctorContent waits until doctor finds nothing wrong.
func doctorContent(t testing.TB) {
	t.Helper()
	eventually(t, func() error {
		if wrong := doctor(t); wrong != "" {
			return fmt.Errorf("h8s doctor: %s", wrong)
		}
		return nil
	})
}

// upLimit is for `h8s up`. Its own limits are to end first: killed in the middle of helm, it leaves
// a release that the next one has to repair.
const upLimit = 10 * time.Minute

// complete asserts that `h8s up` came to its end; whether the nodes are ready does not matter. To be asked before
// another `h8s up`, which would complete what that one left.
func complete(t testing.TB, name string) {
	t.Helper()
	out, _ := h8sOutput(time.Minute, "status", "--name", name, "-o", "json") // it exits with 1 if a node is not ready
	var status struct{ Complete bool }
	if err := json.Unmarshal([]byte(out), &status); err != nil || !status.Complete {
		t.Errorf("h8s up has not completed cluster %q: %v: %s", name, err, out)
	}
}

// h8sOutput runs our CLI and gives back all that it printed.
func h8sOutput(within time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(cluster.bin, "h8s"), args...).CombinedOutput()
	return string(out), err
}
