package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// kernel is an unpacked kernel package.
type kernel struct {
	image   string // file
	modules string // directory, with modules.dep
}

// ensureKernel returns the kernel that Debian's package linux-image-cloud-amd64 stands
// for, unpacked below dir; it downloads only what is not there. Where apt cannot tell
// (no package lists), the newest one that is there will do.
func ensureKernel(ctx context.Context, dir string) (kernel, error) {
	return withLists(ctx, func() (kernel, error) { return obtainKernel(ctx, dir) })
}

// withLists has obtain tried again with fresh package lists if it fails. There may be none, or
// old ones that name what Debian does not keep any more.
func withLists[T any](ctx context.Context, obtain func() (T, error)) (T, error) {
	obtained, err := obtain()
	if err == nil {
		return obtained, nil
	}
	if _, update := run(ctx, "", "apt-get", "update", "-q"); update != nil {
		return obtained, errors.Join(err, update)
	}
	return obtain()
}

func obtainKernel(ctx context.Context, dir string) (kernel, error) {
	const meta = "linux-image-cloud-amd64"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return kernel{}, err
	}
	name, version, err := candidate(ctx, meta)
	if err != nil {
		have, globErr := filepath.Glob(filepath.Join(dir, "*", "modules.dep.done"))
		if globErr != nil || len(have) == 0 {
			return kernel{}, err
		}
		return open(filepath.Dir(have[len(have)-1]))
	}
	unpacked := filepath.Join(dir, name+"_"+version)
	done := filepath.Join(unpacked, "modules.dep.done")
	if _, err := os.Stat(done); err == nil {
		return open(unpacked)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return kernel{}, err
	}
	scratch, err := os.MkdirTemp(dir, "download-")
	if err != nil {
		return kernel{}, err
	}
	defer os.RemoveAll(scratch)
	// apt downloads as its own user, who may not write here; then it warns and does it as root.
	if _, err := run(ctx, scratch, "apt-get", "download", "-q", name+"="+version); err != nil {
		return kernel{}, err
	}
	debs, err := filepath.Glob(filepath.Join(scratch, "*.deb"))
	if err != nil {
		return kernel{}, err
	}
	if len(debs) != 1 {
		return kernel{}, fmt.Errorf("apt-get download %s left %d packages, not one", name, len(debs))
	}
	if err := os.RemoveAll(unpacked); err != nil {
		return kernel{}, err
	}
	if _, err := run(ctx, dir, "dpkg-deb", "--extract", debs[0], unpacked); err != nil {
		return kernel{}, err
	}
	k, err := open(unpacked)
	if err != nil {
		return kernel{}, err
	}
	// The package's own script, which is not run, would do this.
	if _, err := run(ctx, dir, "/sbin/depmod", "--basedir", unpacked, filepath.Base(k.modules)); err != nil {
		return kernel{}, err
	}
	return k, os.WriteFile(done, nil, 0o644)
}

// strip takes away from a module what costs time when it is loaded and gives a pod
// nothing: the signature, which the kernel would verify although all that it boots comes
// from one place, and the types for BPF, which it would check.
func strip(ctx context.Context, module string) ([]byte, error) {
	stripped, err := os.CreateTemp("", "module-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(stripped.Name())
	defer stripped.Close()
	// A signature stands behind the ELF file, and is not copied.
	if _, err := run(ctx, "", "objcopy", "--strip-debug", "--remove-section=.BTF", module, stripped.Name()); err != nil {
		return nil, err
	}
	return os.ReadFile(stripped.Name())
}

// open finds what matters in an unpacked package.
func open(unpacked string) (kernel, error) {
	images, err := filepath.Glob(filepath.Join(unpacked, "boot", "vmlinuz-*"))
	if err != nil {
		return kernel{}, err
	}
	if len(images) != 1 {
		return kernel{}, fmt.Errorf("%s holds %d kernels, not one; remove it to have it unpacked again", unpacked, len(images))
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return kernel{image: images[0], modules: filepath.Join(unpacked, "lib", "modules", release)}, nil
}

// candidate asks apt which package meta depends on, and in which version.
func candidate(ctx context.Context, meta string) (name, version string, err error) {
	shown, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", meta)
	if err != nil {
		return "", "", fmt.Errorf("which kernel to use: %w; run apt-get update", err)
	}
	for line := range strings.Lines(shown) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if key != "Depends" {
			continue
		}
		// linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)
		name, rest, ok := strings.Cut(strings.Split(value, ",")[0], " (= ")
		if !ok {
			return "", "", fmt.Errorf("which kernel to use: %s depends on %q, not on one version of one package", meta, value)
		}
		return name, strings.TrimSuffix(rest, ")"), nil
	}
	return "", "", fmt.Errorf("which kernel to use: apt knows no package %s; run apt-get update", meta)
}

// run runs a program and returns what it prints; its errors hold what it complains.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	// A make that runs this one has flags that are not for what this one makes.
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MAKEFLAGS=", "MFLAGS=", "MAKEOVERRIDES=")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
