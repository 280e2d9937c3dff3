//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
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

const (
	// diskTimeout is how long a disk may take to appear after the host has plugged it in.
	diskTimeout = time.Minute
	// diskRescan is how often is looked for a disk of which the kernel has not told.
	diskRescan = time.Second
	// killTimeout is how long processes that are killed may take to end.
	killTimeout = 3 * time.Second
)

var fileSystems = []string{"erofs", "ext4", "xfs"}

// disks are the host's disks, by SCSI serial number.
type disks struct {
	dir     string
	devices *blockDevices

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
	if err := at.Mount(target); err != nil {
		return err
	}
	if m.Group == nil || m.ReadOnly {
		return nil
	}
	return giveToGroup(target, *m.Group)
}

func newDisks(dir string, devices *blockDevices) *disks {
	return &disks{dir: dir, devices: devices, mounted: map[string]mounted{}}
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
	rescan := time.NewTicker(diskRescan)
	defer rescan.Stop()
	for {
		changed := d.devices.next()
		err := d.attempt(serial, disk)
		// A disk is listed, and has its node, before it can be opened.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENXIO) {
			return err
		}
		select {
		case <-changed:
		case <-rescan.C:
		case <-waiting.Done():
			return fmt.Errorf("disk %s does not appear: %w: %w", serial, waiting.Err(), err)
		}
	}
}

// attempt fails with ErrNotExist or ENXIO while the kernel has not got to the disk.
func (d *disks) attempt(serial string, disk guestapi.Disk) error {
	name, err := findDisk("/sys/block", serial)
	if err != nil {
		return err
	}
	device := filepath.Join("/dev", name)
	if err := usable(device); err != nil {
		return err
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
		_ = unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
		_ = os.Remove(target)
		return fmt.Errorf("disk %s: mount %s: %w", serial, disk.FileSystem, err)
	}
	d.mounted[serial] = mounted{disk, device}
	return nil
}

// giveToGroup does what the kubelet does for a pod's fsGroup, unless the root shows that
// it was done: all belongs to the group, which may do what the owner may, and so will what is
// added.
func giveToGroup(dir string, group int) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if int(st.Gid) == group && st.Mode&unix.S_ISGID != 0 && st.Mode&0o070 == 0o070 {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	// The root is the last: it says that all the rest is done.
	return giveTreeToGroup(root, ".", group)
}

func giveTreeToGroup(root *os.Root, name string, group int) error {
	info, err := root.Lstat(name)
	if err != nil {
		return err
	}
	if info.IsDir() {
		entries, err := readDir(root, name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := giveTreeToGroup(root, filepath.Join(name, e.Name()), group); err != nil {
				return err
			}
		}
	}
	if err := root.Lchown(name, -1, group); err != nil || info.Mode()&fs.ModeSymlink != 0 {
		return err
	}
	mode := info.Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) | 0o660
	if info.IsDir() {
		mode |= 0o110 | fs.ModeSetgid
	}
	return root.Chmod(name, mode)
}

// directories makes directories of a disk that has a file system: see addDirectories.
func (d *disks) directories(serial string, archive io.Reader) error {
	if err := checkName("disk", serial); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mounted[serial].FileSystem == "" {
		return badRequest("disk %s is not mounted", serial)
	}
	if err := addDirectories(filepath.Join(d.dir, serial), archive); err != nil {
		return fmt.Errorf("disk %s: %w", serial, err)
	}
	return nil
}

// settle unmounts the file systems that can be written, after whoever uses them was
// killed: what was written is on the disks then.
func (d *disks) settle(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	killed := false
	for serial, m := range d.mounted {
		if m.FileSystem == "" || m.ReadOnly {
			continue
		}
		if !killed {
			killed = true
			errs = append(errs, killContainers(ctx, filepath.Join(cgroupRoot, podCgroup)))
		}
		target := filepath.Join(d.dir, serial)
		if err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW); err != nil {
			errs = append(errs, fmt.Errorf("disk %s: unmount: %w", serial, err))
			continue
		}
		_ = os.Remove(target)
		delete(d.mounted, serial)
	}
	unix.Sync()
	return errors.Join(errs...)
}

// killContainers kills all processes of a cgroup, and returns when there are none.
func killContainers(ctx context.Context, cgroup string) error {
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	err := poll(ctx, func() (bool, error) {
		events, err := os.ReadFile(filepath.Join(cgroup, "cgroup.events"))
		return strings.Contains(string(events), "populated 0"), err
	})
	if err != nil {
		return fmt.Errorf("processes of the containers do not end: %w", err)
	}
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

// usable fails with ENXIO while a disk cannot be opened yet.
func usable(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	return f.Close()
}

// findDisk returns the name of the SCSI disk with that serial number, or ErrNotExist.
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
	return "", fmt.Errorf("the kernel has found no disk with this serial number: %w", fs.ErrNotExist)
}
