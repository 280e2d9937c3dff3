//go:build hyper

package hyper

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestForgotten has a shim whose containerd is killed while it starts it: nobody reads the shim's log,
// for which it waits, and the next containerd removes the bundle without a word to it.
func TestForgotten(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "hy")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	bundle, socket := filepath.Join(dir, "bundle"), filepath.Join(dir, "s")
	must(t, os.Mkdir(bundle, 0o700))
	must(t, unix.Mkfifo(filepath.Join(bundle, "log"), 0o700))
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	must(t, err)
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	must(t, err)
	must(t, listener.Close())

	cmd := exec.Command(bin(t, "containerd-shim-hyper-v1"), "-namespace", "k8s.io", "-id", "forgotten", "-address", filepath.Join(dir, "containerd.sock"))
	cmd.Dir, cmd.ExtraFiles = bundle, []*os.File{file}
	must(t, cmd.Start())
	must(t, file.Close())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	awaitOpen(t, cmd.Process.Pid, filepath.Join(bundle, "log"))

	hidden := filepath.Join(dir, ".bundle")
	must(t, os.Rename(bundle, hidden))
	must(t, os.RemoveAll(hidden))
	select {
	case <-exited:
	case <-time.After(testTimeout):
		t.Fatal("the shim goes on")
	}
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("its socket: %v, want none", err)
	}
}

// awaitOpen returns when a process has a file open.
func awaitOpen(t *testing.T, pid int, path string) {
	t.Helper()
	for end := time.Now().Add(testTimeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		all, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*"))
		must(t, err)
		for _, fd := range all {
			if file, err := os.Readlink(fd); err == nil && file == path {
				return
			}
		}
	}
	t.Fatalf("process %d does not open %s", pid, path)
}
