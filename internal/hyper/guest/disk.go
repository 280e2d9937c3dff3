//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// diskTimeout is how long a disk may take to appear after the host has plugged it in.
const diskTimeout = 15 * time.Second

var fileSystems = []string{"erofs", "ext4", "xfs"}

// disks are the host's disks, by SCSI serial number.
type disks struct {
	dir string

	mu      sync.Mutex
	mounted map[string]mounted
}

type mounted struct {
	guestapi.Disk
	device string
}

func (m mounted) mount(target string) error {
	options := slices.Clone(m.Options)
	if m.ReadOnly {
		options = append(options, "ro")
	}
	at := mount.Mount{Type: m.FileSystem, Source: m.device, Options: options}
	return at.Mount(target)
}

func newDisks(dir string) *disks {
	return &disks{dir: dir, mounted: map[string]mounted{}}
}

// mount waits for the disk and mounts it, or links to its node. It is idempotent.
func (d *disks) mount(ctx context.Context, serial string, disk guestapi.Disk) error {
	if err := checkName("disk", serial); err != nil {
		return err
	}
	if disk.FileSystem != "" && !slices.Contains(fileSystems, disk.FileSystem) {
		return badRequest("disk %s: file system %q is not one of %s", serial, disk.FileSystem, strings.Join(fileSystems, ", "))
	}
	waiting, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	var device string
	err := poll(waiting, func() (bool, error) {
		name, err := findDisk("/sys/block", serial)
		if err != nil || name == "" {
			return false, err
		}
		device = filepath.Join("/dev", name)
		return usable(device)
	})
	if err != nil {
		return fmt.Errorf("disk %s does not appear: %w", serial, err)
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	if have, ok := d.mounted[serial]; ok {
		if !reflect.DeepEqual(have.Disk, disk) {
			return fmt.Errorf("disk %s is in use in another way: %w", serial, unix.EBUSY)
		}
		return nil
	}
	target := filepath.Join(d.dir, serial)
	if disk.FileSystem == "" {
		if err := os.Symlink(device, target); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		d.mounted[serial] = mounted{disk, device}
		return nil
	}
	if err := loadModules(filepath.Join(modulesDir, disk.FileSystem)); err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := (mounted{disk, device}).mount(target); err != nil {
		_ = os.Remove(target)
		return fmt.Errorf("disk %s: mount: %w", serial, err)
	}
	d.mounted[serial] = mounted{disk, device}
	return nil
}

// unmount lets the host take the disk away. It is idempotent, and fails with EBUSY
// while something uses the disk.
func (d *disks) unmount(serial string) error {
	if err := checkName("disk", serial); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	disk, ok := d.mounted[serial]
	if !ok {
		return nil
	}
	target := filepath.Join(d.dir, serial)
	if disk.FileSystem != "" {
		if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("disk %s: unmount: %w", serial, err)
		}
	}
	// An overlay keeps its layers when they are unmounted elsewhere: only the
	// device knows.
	f, err := os.OpenFile(disk.device, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("disk %s is in use: %w", serial, err)
		if disk.FileSystem != "" {
			err = errors.Join(err, disk.mount(target))
		}
		return err
	}
	if err == nil { // else it is gone already
		f.Close()
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	delete(d.mounted, serial)
	return nil
}

// usable reports whether a disk can be opened: it is listed before it has been probed.
func usable(device string) (bool, error) {
	f, err := os.Open(device)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

// findDisk returns the name of the SCSI disk with that serial number, or "" if there is
// none yet.
func findDisk(block, serial string) (string, error) {
	pages, err := filepath.Glob(filepath.Join(block, "sd*", "device", "vpd_pg80"))
	if err != nil {
		return "", err
	}
	for _, page := range pages {
		// The unit serial number page of SPC: a header of four bytes, and the number.
		data, err := os.ReadFile(page)
		if err != nil || len(data) < 4 {
			continue // it comes or goes
		}
		if strings.Trim(string(data[4:]), " \x00") == serial {
			return filepath.Base(filepath.Dir(filepath.Dir(page))), nil
		}
	}
	return "", nil
}
