package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/install"
)

// A node with one virtual machine that lives, and all that one leaves whose shim does not.
func TestMachineLeftovers(t *testing.T) {
	const alive, dead = "aaaaaaaaaaaaaaaaaaaa", "dddddddddddddddddddd"
	node := machineNode{root: t.TempDir(), cgroup: fmt.Sprintf("/h8s-test-machines-%d", os.Getpid())}
	cleanUp(t, func(ctx context.Context) error { return clearCgroup(ctx, node.cgroup) })
	expect := func(want ...string) {
		t.Helper()
		got, err := node.leftovers()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(- want, + got):\n%s", diff)
		}
	}
	expect()

	layers := filepath.Join(node.root, machineCache, "layers")
	templates := filepath.Join(node.root, machineCache, "templates", "tenant.acme")
	for _, dir := range []string{
		layers, filepath.Join(templates, "whole"), filepath.Join(templates, ".half"), filepath.Join(templates, ".saving"),
		filepath.Join(node.root, accel.DefaultDir, alive), filepath.Join(node.root, accel.DefaultDir, dead),
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"1.erofs", "1.lock", "2.partial", "2.lock", "3.partial"} {
		if err := os.WriteFile(filepath.Join(layers, file), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(node.root, accel.DefaultDir, "users"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(layers, "2.lock"), filepath.Join(templates, ".saving.lock")} {
		lock, held, err := lockFile(path)
		if err != nil || held {
			t.Fatal(held, err)
		}
		defer lock.Close()
	}
	for _, id := range []string{alive, dead} {
		if err := ensureCgroup(node.cgroup + "/kubepods/besteffort/podx/" + machinePrefix + id); err != nil {
			t.Fatal(err)
		}
	}
	qemu := filepath.Join(t.TempDir(), "qemu-system-x86_64")
	if err := os.Symlink("/bin/sleep", qemu); err != nil {
		t.Fatal(err)
	}
	// What counts is how a process was called, and by whom.
	start := func(path string, args ...string) int {
		cmd := exec.Command(path)
		cmd.Args = args
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
			_ = cmd.Wait()
		})
		if err := joinCgroup(node.cgroup+"/system", cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
		stdin.Close()
		return cmd.Process.Pid
	}
	if err := ensureCgroup(node.cgroup + "/system"); err != nil {
		t.Fatal(err)
	}
	orphan := start(qemu, qemu, "1000")
	start("/bin/sh", install.Shim, "-c", "read go; "+qemu+" 1000; true", "-id", alive+"012345")
	if err := poll(testContext(t), 20*time.Millisecond, func() error {
		if pids, err := cgroupProcesses(node.cgroup); err != nil || len(pids) != 3 {
			return fmt.Errorf("%d processes, want 3: %w", len(pids), err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	expect(
		"cgroup podx/"+machinePrefix+dead, "directory "+accel.DefaultDir+"/"+dead, "half-written "+machineCache+"/layers/3.partial",
		"half-written "+machineCache+"/templates/tenant.acme/.half", fmt.Sprintf("process %d (qemu-system-x86_64)", orphan),
	)
}
