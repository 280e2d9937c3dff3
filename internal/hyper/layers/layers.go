// Package layers turns the layer directories of containerd's snapshotters into erofs
// images that virtual machines mount: one read-only file for each layer, made once on
// each node and shared, page cache included, by every machine that uses the layer.
//
// An image holds what overlayfs needs to stack layers: whiteouts (character devices
// 0:0) and extended attributes, trusted ones among them.
package layers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/types"
	"golang.org/x/sys/unix"
)

// Image is a layer as a disk.
type Image struct {
	// Serial names the layer: equal layers of one node have equal serials. It is at most
	// 20 characters long, as a SCSI serial number has to be.
	Serial string
	// Path is the image file. It stays usable for those that have it open, also after
	// the cache has given it up.
	Path string
}

// Cache is a directory of images, which processes share. For each image there are
// serial.erofs and serial.layer, a symbolic link to the directory it was made from.
type Cache struct{ dir string }

// NewCache makes the directory if need be.
func NewCache(dir string) (*Cache, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory for images of container layers: %w", err)
	}
	return &Cache{dir}, nil
}

const (
	imageSuffix   = ".erofs"
	sourceSuffix  = ".layer"
	partialSuffix = ".partial"
	lockSuffix    = ".lock"
)

// Ensure returns the image of a layer directory, and makes it if nobody has yet. Of
// several callers, in one or many processes, one makes it and the others wait. An image
// is there whole or not at all.
func (c *Cache) Ensure(ctx context.Context, layer string) (Image, error) {
	image, err := c.ensure(ctx, layer)
	if err != nil {
		return Image{}, fmt.Errorf("image of the container layer %s: %w", layer, err)
	}
	return image, nil
}

func (c *Cache) ensure(ctx context.Context, layer string) (Image, error) {
	serial, err := serialOf(layer)
	if err != nil {
		return Image{}, err
	}
	image := Image{Serial: serial, Path: filepath.Join(c.dir, serial+imageSuffix)}
	if _, err := os.Stat(image.Path); err == nil {
		return image, nil
	}
	unlock, err := c.lock(ctx, serial)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	if _, err := os.Stat(image.Path); err == nil {
		return image, nil
	}
	source := filepath.Join(c.dir, serial+sourceSuffix)
	if err := os.Symlink(layer, source); err != nil && !errors.Is(err, fs.ErrExist) {
		return Image{}, err
	}
	partial := filepath.Join(c.dir, serial+partialSuffix)
	if err := build(ctx, layer, partial); err != nil {
		_ = os.Remove(partial)
		_ = os.Remove(source)
		return Image{}, err
	}
	return image, os.Rename(partial, image.Path)
}

// serialOf identifies a layer directory: the inode and its time of change tell a
// directory from another one that later gets its name.
func serialOf(layer string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(layer, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: layer, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", &fs.PathError{Op: "stat", Path: layer, Err: unix.ENOTDIR}
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\x00%d\x00%d\x00%d.%d", layer, st.Dev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec))
	return hex.EncodeToString(sum[:10]), nil
}

// lock takes the lock of one image. Its file stays as long as the layer: removed earlier,
// two processes could hold it.
func (c *Cache) lock(ctx context.Context, serial string) (unlock func(), err error) {
	file, err := os.OpenFile(filepath.Join(c.dir, serial+lockSuffix), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	locked := make(chan error, 1)
	go func() {
		locked <- ignoringInterrupts(func() error { return unix.Flock(int(file.Fd()), unix.LOCK_EX) })
	}()
	select {
	case err := <-locked:
		if err != nil {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
		}
		return func() { file.Close() }, nil
	case <-ctx.Done():
		go func() { // whoever makes the image may be slow; the lock, once had, is given back
			if err := <-locked; err == nil {
				_ = unix.Flock(int(file.Fd()), unix.LOCK_UN)
			}
			file.Close()
		}()
		return nil, fmt.Errorf("wait for another process that makes it: %w", context.Cause(ctx))
	}
}

func ignoringInterrupts(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// build runs mkfs.erofs. Without compression: it would cost every first read of a
// page, in machines that are slow already, to save disk that the layer itself uses twice.
func build(ctx context.Context, layer, file string) error {
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	cmd := exec.CommandContext(ctx, "mkfs.erofs", "--quiet", file, layer)
	// Whoever asks may be killed. The signal comes with the end of the thread that forks.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	out, err := cmd.CombinedOutput()
	runtime.UnlockOSThread()
	if ctx.Err() != nil {
		return fmt.Errorf("mkfs.erofs: %w", context.Cause(ctx))
	}
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: install erofs-utils on this node", err)
	}
	if err != nil {
		return fmt.Errorf("mkfs.erofs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync() // before the rename: a crash must not leave a hole under the good name
}

// Collect removes the images of layers that are gone, and what was left half-written by
// somebody who was killed. Machines that run from such an image keep it, as they have it
// open.
func (c *Cache) Collect() error {
	links, err := filepath.Glob(filepath.Join(c.dir, "*"+sourceSuffix))
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range links {
		errs = append(errs, c.collect(link))
	}
	return errors.Join(errs...)
}

func (c *Cache) collect(link string) error {
	serial := strings.TrimSuffix(filepath.Base(link), sourceSuffix)
	layer, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	// The link last: what is left of an interrupted removal is found by it.
	suffixes := []string{imageSuffix, partialSuffix, sourceSuffix, lockSuffix}
	if now, err := serialOf(layer); err == nil && now == serial {
		suffixes = []string{partialSuffix}
		if _, err := os.Lstat(filepath.Join(c.dir, serial+partialSuffix)); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	lock, err := os.OpenFile(filepath.Join(c.dir, serial+lockSuffix), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil // somebody is making it
	}
	for _, suffix := range suffixes {
		if err := os.Remove(filepath.Join(c.dir, serial+suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Directories are the layer directories that a snapshot's mounts stack, the lowest
// first. What a container writes stays in its machine, so an overlay's upper directory
// is not among them.
func Directories(mounts []*types.Mount) ([]string, error) {
	if len(mounts) != 1 {
		return nil, fmt.Errorf("a root file system of %d mounts: use the snapshotter overlayfs or native for this runtime", len(mounts))
	}
	switch m := mounts[0]; m.Type {
	case "bind":
		return []string{m.Source}, nil
	case "overlay":
		for _, option := range m.Options {
			if lower, ok := strings.CutPrefix(option, "lowerdir="); ok {
				layers := strings.Split(lower, ":")
				slices.Reverse(layers)
				return layers, nil
			}
		}
		return nil, errors.New("a root file system of type overlay without lowerdir")
	default:
		return nil, fmt.Errorf("a root file system of type %s: use the snapshotter overlayfs or native for this runtime", m.Type)
	}
}
