package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// fakeBin is a directory with files in place of the programs that recipes take from bin/.
func fakeBin(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	if err := os.Mkdir(filepath.Join(bin, "hyper"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{
		"agnhost", "h8s-controller", "h8s-node", "h8s-cni",
		"containerd-shim-hyper-v1", "hyper/vmlinuz", "hyper/initrd.img", "hyper/seccomp-filter",
	} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("program "+p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return bin
}

func TestBuildIsDeterministic(t *testing.T) {
	bin := fakeBin(t)
	for image := range catalog {
		t.Run(image, func(t *testing.T) {
			read := func(out string) (v1.Hash, []byte) {
				t.Helper()
				path := filepath.Join(out, image+".tar")
				tag, err := name.NewTag("localhost/" + image + ":latest")
				if err != nil {
					t.Fatal(err)
				}
				img, err := tarball.ImageFromPath(path, &tag)
				if err != nil {
					t.Fatal(err)
				}
				digest, err := img.Digest()
				if err != nil {
					t.Fatal(err)
				}
				raw, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return digest, raw
			}
			one, two := t.TempDir(), t.TempDir()
			for _, out := range []string{one, two} {
				if written, err := build(t.Context(), image, bin, out); err != nil || !written {
					t.Fatalf("first build: written %t, %v", written, err)
				}
			}
			digestOne, rawOne := read(one)
			digestTwo, rawTwo := read(two)
			if digestOne != digestTwo || string(rawOne) != string(rawTwo) {
				t.Errorf("two builds differ: %s and %s", digestOne, digestTwo)
			}
			if written, err := build(t.Context(), image, bin, one); err != nil || written {
				t.Errorf("build of what is there: written %t, %v", written, err)
			}
		})
	}
}

func TestBuildFollowsItsInputs(t *testing.T) {
	bin, out := fakeBin(t), t.TempDir()
	steps := []struct {
		name    string
		prepare func() error
		written bool
	}{
		{"no archive", func() error { return nil }, true},
		{"nothing changed", func() error { return nil }, false},
		{"input is newer but the same", func() error {
			return os.Chtimes(filepath.Join(bin, "agnhost"), time.Now(), time.Now())
		}, false},
		{"input changed", func() error { return os.WriteFile(filepath.Join(bin, "agnhost"), []byte("other"), 0o755) }, true},
		{"archive damaged", func() error { return os.Truncate(filepath.Join(out, "agnhost.tar"), 100) }, true},
	}
	for _, step := range steps {
		if err := step.prepare(); err != nil {
			t.Fatal(err)
		}
		written, err := build(t.Context(), "agnhost", bin, out)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if written != step.written {
			t.Errorf("%s: written %t, want %t", step.name, written, step.written)
		}
	}
	left, err := filepath.Glob(filepath.Join(out, "*.tmp"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files left: %v, %v", left, err)
	}
}

func TestBuildSaysWhatIsMissing(t *testing.T) {
	tests := map[string]struct{ image, want string }{
		"upstream program": {"agnhost", "run `make upstream`"},
		"own program":      {"h8s", "run `make ours`"},
		"unknown image":    {"nginx", "there are agnhost, busybox, h8s, pause"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "out")
			_, err := build(t.Context(), tt.image, t.TempDir(), out)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
			if _, err := os.Stat(out); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("something was written: %v", err)
			}
		})
	}
}

func TestLayer(t *testing.T) {
	l, err := tree{
		"/tmp":     dir(os.ModeSticky | 0o777),
		"/a/b/c":   {mode: 0o755, data: []byte("program")},
		"/a/b/d":   symlink("c"),
		"/etc/foo": text("bar"),
	}.layer()
	if err != nil {
		t.Fatal(err)
	}
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	type entry struct {
		Name, Link, Data string
		Type             byte
		Mode             int64
	}
	var got []entry
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s: time %s, owner %d:%d", h.Name, h.ModTime, h.Uid, h.Gid)
		}
		got = append(got, entry{h.Name, h.Linkname, string(data), h.Typeflag, h.Mode})
	}
	want := []entry{
		{Name: "a/", Type: tar.TypeDir, Mode: 0o755},
		{Name: "a/b/", Type: tar.TypeDir, Mode: 0o755},
		{Name: "a/b/c", Type: tar.TypeReg, Mode: 0o755, Data: "program"},
		{Name: "a/b/d", Type: tar.TypeSymlink, Mode: 0o777, Link: "c"},
		{Name: "etc/", Type: tar.TypeDir, Mode: 0o755},
		{Name: "etc/foo", Type: tar.TypeReg, Mode: 0o644, Data: "bar"},
		{Name: "tmp/", Type: tar.TypeDir, Mode: 0o1777},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("layer (-want +got):\n%s", diff)
	}
}

// unpack writes a tree under a directory, as a container's root.
func unpack(t *testing.T, root string, trees ...tree) {
	t.Helper()
	for _, tree := range trees {
		for name, f := range tree {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			var err error
			switch f.mode.Type() {
			case fs.ModeDir:
				err = os.MkdirAll(path, f.mode.Perm())
			case fs.ModeSymlink:
				err = os.Symlink(f.link, path)
			default:
				err = os.WriteFile(path, f.data, f.mode.Perm())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestProgramsRunInTheirImages(t *testing.T) {
	bin := fakeBin(t)
	tests := map[string]struct {
		image   string
		command []string
		want    string
	}{
		"nft, with its libraries": {"h8s", []string{"/usr/sbin/nft", "--check", "add table inet x; list ruleset"}, ""},
		"nft's version":           {"h8s", []string{"/usr/sbin/nft", "--version"}, "nftables v"},
		"shell":                   {"busybox", []string{"/bin/sh", "-c", "echo $((6*7)); ls /etc"}, "42\ngroup\nnsswitch.conf\npasswd"},
		"exec in agnhost":         {"agnhost", []string{"/bin/sh", "-c", "cat /agnhost | wc -c"}, "15"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			c, err := catalog[tt.image](t.Context(), bin)
			if err != nil {
				t.Fatal(err)
			}
			root := t.TempDir()
			unpack(t, root, c.layers...)
			cmd := exec.CommandContext(t.Context(), tt.command[0], tt.command[1:]...)
			cmd.Path, cmd.Dir, cmd.Env = tt.command[0], "/", c.config.Env
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.HasPrefix(string(out), tt.want) {
				t.Errorf("got %q, want it to begin with %q", out, tt.want)
			}
		})
	}
}

// TestPause runs pause as PID 1 of a process namespace, with an orphan to reap.
func TestPause(t *testing.T) {
	c, err := catalog["pause"](t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	unpack(t, root, c.layers...)
	// The shell becomes pause and leaves it the background process as its child.
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "sleep 1d & exec "+filepath.Join(root, "pause"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	proc := fmt.Sprintf("/proc/%d", cmd.Process.Pid)
	read := func(name string) string {
		data, err := os.ReadFile(filepath.Join(proc, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	children := func() []string { return strings.Fields(read(fmt.Sprintf("task/%d/children", cmd.Process.Pid))) }
	// SIGINT, SIGTERM and SIGCHLD, as /proc shows the mask of caught signals.
	eventually(t, "pause handles its signals", func() bool { return strings.Contains(read("status"), "SigCgt:\t0000000000014002\n") })

	orphans := children()
	if len(orphans) != 1 {
		t.Fatalf("children %v, want one", orphans)
	}
	orphan, err := strconv.Atoi(orphans[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(orphan, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the orphan is reaped", func() bool { return len(children()) == 0 })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	eventually(t, "pause ends on SIGTERM", func() bool {
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			return true
		default:
			return false
		}
	})
}

// eventually polls until ok or a minute has gone by.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("%s: not in a minute", what)
		case <-tick.C:
		}
	}
}
