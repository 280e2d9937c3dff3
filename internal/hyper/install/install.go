// Package install puts the runtime of virtual machines on a node.
package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

const (
	// Shim is the name of the shim's program.
	Shim = "containerd-shim-hyper-v1"
	// dropIn is the name of the file that makes containerd know the runtime.
	dropIn = "h8s-hyper.toml"
)

// files are what the runtime consists of; the value is the mode that each is installed
// with. The shim finds the others beside itself, and comes last: it never sees a guest
// that is older than itself.
var files = []struct { //nolint:gochecknoglobals // a constant
	name string
	mode fs.FileMode
}{
	{"hyper/vmlinuz", 0o644},
	{"hyper/initrd.img", 0o644},
	{"hyper/seccomp-filter", 0o755},
	{Shim, 0o755},
}

// Files are the names of what the runtime consists of, below its directory.
func Files() []string {
	var names []string
	for _, f := range files {
		names = append(names, f.name)
	}
	return names
}

// Containerd is the part of containerd's configuration that makes it run the handler
// hyper with the shim in dir; if dir is empty, with the one on containerd's PATH.
func Containerd(dir string) []byte {
	runtime := "io.containerd.hyper.v1"
	if dir != "" {
		// Not runtime_path, which containerd heeds for sandboxes with a pause container only.
		runtime = filepath.Join(dir, Shim)
	}
	return []byte(`version = 3

# One shim and one virtual machine per pod, and no pause container.
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.hyper]
  runtime_type = "` + runtime + `"
  sandboxer = "shim"
  disable_pause_image_pull = true
`)
}

// Ensure copies the runtime from source to dir, and writes containerd's configuration
// for it into confDir, which containerd's own must import. restart says that containerd
// does not know of the runtime yet: it reads its configuration when it starts. Each file
// is replaced in one step, pods that run keep the old ones. It is idempotent.
func Ensure(source, dir, confDir string) (restart bool, err error) {
	for _, f := range files {
		to := filepath.Join(dir, f.name)
		if same(filepath.Join(source, f.name), to) {
			continue
		}
		if err := copyFile(filepath.Join(source, f.name), to, f.mode); err != nil {
			return false, fmt.Errorf("install the runtime hyper: %w", err)
		}
	}
	want, path := Containerd(dir), filepath.Join(confDir, dropIn)
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, want) {
		return false, nil
	}
	if err := os.MkdirAll(confDir, 0o755); err != nil {
		return false, fmt.Errorf("configure the runtime hyper: %w", err)
	}
	if err := renameio.WriteFile(path, want, 0o644); err != nil {
		return false, fmt.Errorf("configure the runtime hyper: %w", err)
	}
	return true, nil
}

// Remove removes what Ensure made. It is idempotent.
func Remove(dir, confDir string) error {
	paths := []string{filepath.Join(confDir, dropIn)}
	for _, f := range files {
		paths = append(paths, filepath.Join(dir, f.name))
	}
	var errs []error
	for _, path := range append(paths, filepath.Join(dir, "hyper")) {
		// What another release or an operator has put beside ours stays, with its directory.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// same says whether two files have the same content.
func same(a, b string) bool {
	one, err := os.Open(a)
	if err != nil {
		return false
	}
	defer one.Close()
	other, err := os.Open(b)
	if err != nil {
		return false
	}
	defer other.Close()
	x, y := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errX := io.ReadFull(one, x)
		m, errY := io.ReadFull(other, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return false
		}
		if errX != nil || errY != nil {
			return ended(errX) && ended(errY)
		}
	}
}

func ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	dir := filepath.Dir(to)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A child started meanwhile would inherit the open file for a moment, and nobody can
	// execute a program that is open for writing.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	out, err := renameio.NewPendingFile(to, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer out.Cleanup() //nolint:errcheck // after an error that is returned
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.CloseAtomicallyReplace()
}
