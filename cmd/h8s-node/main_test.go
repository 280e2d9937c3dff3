package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// sh runs in the network namespace of the calling thread.
func sh(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

func TestUninstall(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the test, and the namespace with it
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "bin", "h8s-cni"), filepath.Join(dir, "net.d", "00-h8s.conflist")}
	other := filepath.Join(dir, "net.d", "10-default.conflist")
	for _, f := range append(files, other) {
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sh(t, "nft 'add table inet h8s; add chain inet h8s input { type filter hook input priority 0; }; add table inet mine'; ip link add h8su7 type veth peer name x")
	uninstall := func() error {
		cmd := command()
		cmd.SetArgs([]string{"uninstall", "--cni-bin-dir=" + filepath.Dir(files[0]), "--cni-conf-dir=" + filepath.Dir(files[1])})
		return cmd.ExecuteContext(t.Context())
	}
	if err := uninstall(); err == nil || !strings.Contains(err.Error(), "ip link delete h8su7") {
		t.Errorf("with a portal on the node: %v", err)
	}
	if out := sh(t, "nft list tables"); !strings.Contains(out, "table inet h8s\n") {
		t.Errorf("nothing guards the portal: %s", out)
	}
	sh(t, "ip link delete h8su7")
	for range 2 { // again is no error
		if err := uninstall(); err != nil {
			t.Fatal(err)
		}
		if out := sh(t, "nft list tables"); out != "table inet mine\n" {
			t.Errorf("tables are now: %s", out)
		}
	}
	for _, f := range files {
		if _, err := os.Stat(f); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", f, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("what is not ours is gone: %v", err)
	}
}
