// Command guest makes what a pod's virtual machine boots: Debian's cloud kernel, and an
// initramfs of our init, crun, and the few kernel modules that they need. The kernel's
// package is downloaded and unpacked, not installed; crun is built of its package's source,
// and so is seccomp-filter, which works for it on the node.
// What is right already stays.
package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// bootModules are loaded at boot, with what they need, in this order.
var bootModules = []string{
	"virtio_mmio", "virtio_console", "virtio_net", "virtio_scsi", "sd_mod",
	"virtio_rng", "virtio_balloon", "erofs", "overlay",
	// They tell QEMU of a panic: it would look like a restart.
	"pvpanic", "pvpanic_mmio",
}

// fileSystems are loaded when a disk is mounted that has one of them. They lie packed
// in the guest's memory until then. The cloud kernel has ext4 built in.
var fileSystems = []string{"xfs"}

func main() {
	out := flag.String("out", "bin/hyper", "directory that holds hyperinit, and gets vmlinuz, initrd.img and seccomp-filter")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := build(ctx, *out)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest image:", err)
		os.Exit(1)
	}
}

func build(ctx context.Context, out string) error {
	start := time.Now()
	out, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	k, err := ensureKernel(ctx, filepath.Join(out, "kernel"))
	if err != nil {
		return err
	}
	image, err := os.ReadFile(k.image)
	if err != nil {
		return err
	}
	built := filepath.Join(out, "crun")
	if err := ensureCrun(ctx, built); err != nil {
		return err
	}
	filter, err := os.ReadFile(filepath.Join(built, "seccomp-filter"))
	if err != nil {
		return err
	}
	t, err := guestTree(ctx, k, filepath.Join(out, "hyperinit"), filepath.Join(built, "crun"))
	if err != nil {
		return err
	}
	var initrd bytes.Buffer
	if err := writeCPIO(&initrd, t); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode fs.FileMode
	}{{"vmlinuz", image, 0o644}, {"seccomp-filter", filter, 0o755}, {"initrd.img", initrd.Bytes(), 0o644}} {
		written, err := ensureFile(filepath.Join(out, f.name), f.data, f.mode)
		if err != nil {
			return err
		}
		state := "unchanged"
		if written {
			state = "built"
		}
		fmt.Printf("  guest %-28s %4.0fs  %s, %.1f MB\n", f.name, time.Since(start).Seconds(), state, float64(len(f.data))/1e6)
	}
	return nil
}

// guestTree gathers the initramfs; package guest knows these paths.
func guestTree(ctx context.Context, k kernel, initProgram, crun string) (tree, error) {
	t := tree{
		// The kernel opens the one for init, and Go's runtime the other, before init has
		// mounted anything.
		"dev/console": {mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, device: unix.Mkdev(5, 1)},
		"dev/null":    {mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, device: unix.Mkdev(1, 3)},
	}
	hyperinit, err := os.ReadFile(initProgram)
	if err != nil {
		return nil, fmt.Errorf("%w; run make hyper", err)
	}
	t["init"] = node{mode: 0o755, data: hyperinit}
	data, err := os.ReadFile(crun)
	if err != nil {
		return nil, err
	}
	t["sbin/crun"] = node{mode: 0o755, data: data}
	f, err := os.Open(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	deps, err := readDependencies(f)
	if err != nil {
		return nil, err
	}
	boot, err := deps.order(bootModules...)
	if err != nil {
		return nil, err
	}
	if err := addModules(ctx, t, "modules/boot", k.modules, boot, plain); err != nil {
		return nil, err
	}
	for _, name := range fileSystems {
		files, err := deps.order(name)
		if err != nil {
			return nil, err
		}
		if err := addModules(ctx, t, "modules/"+name, k.modules, files, gzipped); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// addModules puts files below dir under names that sort in load order.
func addModules(ctx context.Context, t tree, dir, from string, files []string, pack func(name string, data []byte) (string, []byte)) error {
	for i, file := range files {
		data, err := strip(ctx, filepath.Join(from, file))
		if err != nil {
			return err
		}
		name, data := pack(fmt.Sprintf("%02d-%s", i, path.Base(file)), data)
		t[path.Join(dir, name)] = node{mode: 0o644, data: data}
	}
	return nil
}

func plain(name string, data []byte) (string, []byte) { return name, data }

func gzipped(name string, data []byte) (string, []byte) {
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	// A buffer takes all.
	_, _ = w.Write(data)
	_ = w.Close()
	return name + ".gz", packed.Bytes()
}

// ensureFile makes name hold data and have a mode, whole or not at all, and reports whether
// it had to be written.
func ensureFile(name string, data []byte, mode fs.FileMode) (written bool, err error) {
	have, err := os.ReadFile(name)
	if err == nil && bytes.Equal(have, data) {
		return false, os.Chmod(name, mode)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return true, renameio.WriteFile(name, data, mode)
}
