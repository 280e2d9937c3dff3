package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEnsure(t *testing.T) {
	source, root := t.TempDir(), t.TempDir()
	dir, confDir := root+"/opt/h8s", root+"/etc/containerd/conf.d"
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	inode := func(name string) os.FileInfo {
		t.Helper()
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	big := strings.Repeat("x", 3<<20)
	write("hyper/vmlinuz", big)
	write("hyper/initrd.img", "initrd")
	write("hyper/seccomp-filter", "filter")
	if _, err := Ensure(source, dir, confDir); err == nil {
		t.Fatal("a source without the shim was installed")
	}
	if _, err := os.Stat(filepath.Join(confDir, dropIn)); err == nil {
		t.Fatal("containerd was told of a runtime that is not there")
	}
	write(Shim, "shim")
	if restart, err := Ensure(source, dir, confDir); err != nil || !restart {
		t.Fatalf("first: restart %t, %v", restart, err)
	}
	if mode := inode(Shim).Mode().Perm(); mode != 0o755 {
		t.Errorf("the shim's mode is %o", mode)
	}
	text, err := os.ReadFile(filepath.Join(confDir, dropIn))
	if err != nil || !strings.Contains(string(text), `runtime_type = "`+dir+`/containerd-shim-hyper-v1"`) {
		t.Errorf("containerd's configuration: %v:\n%s", err, text)
	}

	kernel, initrd := inode("hyper/vmlinuz"), inode("hyper/initrd.img")
	write("hyper/initrd.img", "ibitrd")
	if restart, err := Ensure(source, dir, confDir); err != nil || restart {
		t.Fatalf("again: restart %t, %v", restart, err)
	}
	if !os.SameFile(kernel, inode("hyper/vmlinuz")) {
		t.Error("what had not changed was replaced")
	}
	if os.SameFile(initrd, inode("hyper/initrd.img")) {
		t.Error("a file that pods may have open was written to, or not replaced")
	}

	foreign := filepath.Join(dir, "hyper/kernel-of-ours")
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Remove(dir, confDir); err != nil {
		t.Errorf("with a file that is not the runtime's: %v", err)
	}
	if err := os.Remove(foreign); err != nil {
		t.Errorf("somebody else's file: %v", err)
	}
	for range 2 {
		if err := Remove(dir, confDir); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{dir, confDir} {
		if left, _ := os.ReadDir(d); len(left) != 0 {
			t.Errorf("left in %s: %v", d, left)
		}
	}
}
