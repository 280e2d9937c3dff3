package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/directvolume"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// disks are those that a machine has, or has had: layers, and volumes.
type disks struct {
	mu  sync.Mutex
	all map[string]*disk // by serial
}

// disk is in the machine while it has users: containers have layers and devices, records
// have volumes.
type disk struct {
	serial string

	mu       sync.Mutex // held while it is plugged in or out
	plugged  bool       // into the machine
	inside   bool       // the guest makes use of it
	readOnly bool
	users    map[string]bool
}

func (d *disks) get(serial string) *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all == nil {
		d.all = map[string]*disk{}
	}
	if d.all[serial] == nil {
		d.all[serial] = &disk{serial: serial, users: map[string]bool{}}
	}
	return d.all[serial]
}

func (d *disks) list() []*disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]*disk, 0, len(d.all))
	for _, one := range d.all {
		all = append(all, one)
	}
	return all
}

// writable reports whether there is a disk to which the guest may have something to write.
func (d *disks) writable() bool {
	for _, one := range d.list() {
		one.mu.Lock()
		writable := one.inside && !one.readOnly
		one.mu.Unlock()
		if writable {
			return true
		}
	}
	return false
}

// plug makes a disk's content the guest's for a user, and reports whether it was not that
// before. It is idempotent.
func (p *pod) plug(ctx context.Context, d *disk, user string, backend map[string]any, inside guestapi.Disk) (added bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inside && d.readOnly && !inside.ReadOnly {
		return false, refusal("a volume that one container of the pod has as read-only cannot be written by another")
	}
	if !d.inside {
		d.plugged = true // perhaps
		if err := p.vm.AddDisk(ctx, vm.Disk{Serial: d.serial, ReadOnly: inside.ReadOnly, Backend: backend}); err != nil {
			return false, errors.Join(err, p.remove(ctx, d))
		}
		if err := p.guest.call(ctx, http.MethodPut, "/v1/disks/"+d.serial, inside); err != nil {
			return false, errors.Join(err, p.remove(ctx, d))
		}
		d.inside, d.readOnly = true, inside.ReadOnly
	}
	added = !d.users[user]
	d.users[user] = true
	return added, nil
}

// unplug takes a disk away that has no users. It fails while the guest still uses it, and is
// idempotent.
func (p *pod) unplug(ctx context.Context, d *disk) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.users) > 0 {
		return nil
	}
	if d.inside {
		if err := p.guest.send(ctx, http.MethodDelete, "/v1/disks/"+d.serial, nil); err != nil {
			return err
		}
		d.inside = false
	}
	return p.remove(ctx, d)
}

// remove removes a disk from the machine that the guest has done with. The disk is locked.
func (p *pod) remove(ctx context.Context, d *disk) error {
	if !d.plugged {
		return nil
	}
	err := p.vm.RemoveDisk(ctx, d.serial)
	d.plugged = err != nil
	return err
}

func (d *disk) leave(user string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.users, user)
}

// attachLayers makes the guest mount layer directories, the lowest first, and returns
// their serials. Containers of one image share them.
func (p *pod) attachLayers(ctx context.Context, c *container, dirs []string) ([]string, error) {
	serials := make([]string, len(dirs))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for i, dir := range dirs {
		group.Go(func() error {
			image, err := p.cache.Ensure(ctx, dir)
			if err != nil {
				return err
			}
			serials[i] = image.Serial
			_, err = p.plug(ctx, p.disks.get(image.Serial), c.id,
				map[string]any{"driver": "file", "filename": image.Path}, guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
			return err
		})
	}
	return serials, group.Wait()
}

// detach takes the disks away that no container has any more. One that the guest is not
// done with goes with the next container.
func (p *pod) detach(c *container) {
	ctx, cancel := context.WithTimeout(p.ctx, callTimeout)
	defer cancel()
	for _, d := range p.disks.list() {
		d.leave(c.id)
		if err := p.unplug(ctx, d); err != nil && p.vm.Err() == nil {
			log.L.WithError(err).WithField("disk", d.serial).Debug("a container's disk stays for now")
		}
	}
}

// published is the user of a volume's disk: its record.
const published = "published"

// attachVolume makes the guest mount a volume that stands on a disk, and makes there the part
// of it that is to be mounted from onNode.
func (p *pod) attachVolume(ctx context.Context, v volume, onNode string) error {
	record, err := directvolume.New(p.settings.DirectVolumeDir).Attach(v.source)
	if errors.Is(err, fs.ErrNotExist) {
		return nodeMount(filepath.Base(filepath.Dir(v.source)))
	}
	if err != nil {
		return err
	}
	if record.FileSystem == "" {
		return errors.Join(refusal("the disk at "+v.source+" is published without a file system; use volumeMode: Block"), record.Release())
	}
	inside := guestapi.Disk{FileSystem: record.FileSystem, ReadOnly: record.ReadOnly, Options: record.Options}
	if inside.Group, err = groupOf(v.source); err == nil {
		err = p.plugRecord(ctx, p.disks.get(v.name), record, inside)
	}
	if err != nil {
		return fmt.Errorf("volume at %s: %w", v.source, err)
	}
	if v.sub == "" || record.ReadOnly {
		return nil
	}
	r, w := io.Pipe()
	defer r.Close()
	go func() { _ = w.CloseWithError(v.directories(w, onNode)) }()
	return p.guest.send(ctx, http.MethodPatch, "/v1/disks/"+v.name, r)
}

// groupOf is the group that the kubelet has given a directory for a pod's fsGroup, or nil.
func groupOf(dir string) (*int, error) {
	info, err := os.Stat(dir)
	if err != nil || info.Mode()&fs.ModeSetgid == 0 {
		return nil, err
	}
	group := int(info.Sys().(*syscall.Stat_t).Gid)
	return &group, nil
}

// plugRecord plugs a published disk in, until it is unpublished or the machine ends. It takes
// over the record.
func (p *pod) plugRecord(ctx context.Context, d *disk, record *directvolume.Attachment, inside guestapi.Disk) error {
	added, err := p.plug(ctx, d, published, record.Disk, inside)
	if err != nil || !added {
		return errors.Join(err, record.Release())
	}
	go p.await(d, record) //nolint:contextcheck // for as long as the pod lives
	return nil
}

// await takes a published disk away when it is unpublished, as soon as nothing in the
// guest uses it.
func (p *pod) await(d *disk, record *directvolume.Attachment) {
	defer func() { _ = record.Release() }()
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for warned := false; ; {
		select {
		case <-p.ctx.Done(): // QEMU has ended, and the disk is free
			return
		case <-ticker.C:
		}
		if !record.Unpublished() {
			continue
		}
		d.leave(published)
		ctx, cancel := context.WithTimeout(p.ctx, callTimeout)
		err := p.unplug(ctx, d)
		cancel()
		if err == nil {
			return
		}
		if !warned {
			warned = true
			log.L.WithError(err).WithField("disk", d.serial).Warn("a volume was unpublished that is still in use")
		}
	}
}

// attachDevices gives the guest the block devices among those that were asked for: volumes of
// the pod with volumeMode: Block.
func (p *pod) attachDevices(ctx context.Context, c *container, asked []device) ([]guestapi.Device, error) {
	if len(asked) == 0 {
		return nil, nil
	}
	volumes, err := blockVolumes(p.kubeletDir())
	if err != nil {
		return nil, err
	}
	var attached []guestapi.Device
	for _, a := range asked {
		path, ok := volumes[unix.Mkdev(uint32(a.Major), uint32(a.Minor))]
		if !ok || a.Type != "b" {
			if a.sweeping {
				continue
			}
			return nil, refusal("device " + a.Path + " is the node's, and not for this runtime: the pod is a virtual machine; " +
				"it can have a volume with volumeMode: Block")
		}
		serial, err := p.attachDevice(ctx, c, path, !strings.Contains(a.access, "w"))
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", a.Path, err)
		}
		inside := guestapi.Device{Serial: serial, Path: a.Path, Mode: 0o600, Access: a.access}
		if a.FileMode != nil {
			inside.Mode = uint32(a.FileMode.Perm())
		}
		if a.UID != nil {
			inside.UID = *a.UID
		}
		if a.GID != nil {
			inside.GID = *a.GID
		}
		attached = append(attached, inside)
	}
	return attached, nil
}

func (p *pod) attachDevice(ctx context.Context, c *container, path string, readOnly bool) (serial string, err error) {
	d, inside := p.disks.get(diskSerial("dev", path)), guestapi.Disk{ReadOnly: readOnly}
	record, err := directvolume.New(p.settings.DirectVolumeDir).Attach(path)
	if errors.Is(err, fs.ErrNotExist) {
		_, err = p.plug(ctx, d, c.id, map[string]any{"driver": "host_device", "filename": path}, inside)
		return d.serial, err
	}
	if err != nil {
		return "", err
	}
	if record.FileSystem != "" {
		return "", errors.Join(refusal("the disk at "+path+" is published with a file system"), record.Release())
	}
	inside.ReadOnly = inside.ReadOnly || record.ReadOnly
	return d.serial, p.plugRecord(ctx, d, record, inside)
}

// blockVolumes are the paths of a pod's volumes with volumeMode: Block, by device number. The kubelet
// makes a symbolic link for each, which leads to where the driver has published it.
func blockVolumes(podDir string) (map[uint64]string, error) {
	links, err := filepath.Glob(filepath.Join(podDir, "volumeDevices", "*", "*"))
	if err != nil {
		return nil, err
	}
	found := map[uint64]string{}
	for _, link := range links {
		path, err := filepath.EvalSymlinks(link)
		if err != nil {
			return nil, fmt.Errorf("a volume with volumeMode: Block: %w", err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			found[st.Rdev] = path
		}
	}
	return found, nil
}
