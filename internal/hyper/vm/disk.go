package vm

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"h8s.io/hypernetes/internal/hyper/qmp"
)

// Disk is a SCSI disk of the guest.
type Disk struct {
	// Serial identifies the disk: at most 20 letters, digits and hyphens. The guest
	// sees it as the unit serial number.
	Serial   string
	ReadOnly bool
	// Backend is where the disk's content is: the BlockdevOptions of a protocol node,
	// such as {"driver": "file", "filename": "/…"}, {"driver": "host_device", "filename":
	// "/dev/…"} or {"driver": "nbd", "server": …}. Its format is raw. Files, and the Unix sockets of nbd, are opened by us: QEMU's user
	// need not, and cannot connect to such a socket again.
	Backend map[string]any
}

// ErrInUse is why a disk is not added that another machine, or the host, uses.
var ErrInUse = errors.New("it is in use: by another virtual machine, or mounted on this node")

const (
	// diskTimeout bounds a change of disks, which includes connecting to a backend.
	diskTimeout = 30 * time.Second
	maxSerial   = 20
)

var serialFormat = regexp.MustCompile(`^[a-zA-Z0-9-]+$`)

// AddDisk plugs a disk in. It returns when the guest can see it, which then needs a
// moment to find it. It is idempotent: a disk with this serial stays as it is.
//
// An error of the backend reaches the guest as an error of the disk.
func (v *VM) AddDisk(ctx context.Context, d Disk) error {
	return v.change(ctx, "add", d.Serial, func(ctx context.Context, id string, slot *slot) error {
		if slot.used {
			device, err := v.hasDevice(ctx, id)
			if err != nil || device {
				return err
			}
			// A node without a device is what an attempt that was cut off has left. It may
			// have another backend.
			if err := v.removeNode(ctx, id); err != nil {
				return err
			}
		}
		backend, release, err := v.handOver(ctx, id, d)
		if err != nil {
			return err
		}
		defer release()
		slot.used = true
		err = v.monitor.Execute(ctx, "blockdev-add", map[string]any{
			"driver": "raw", "node-name": id, "read-only": d.ReadOnly, "discard": "unmap", "file": backend,
		}, nil)
		if err != nil {
			return err
		}
		err = v.monitor.Execute(ctx, "device_add", map[string]any{
			"driver": "scsi-hd", "id": id, "bus": "scsi.0", "drive": id, "serial": d.Serial, "device_id": d.Serial,
			"rerror": "report", "werror": "report",
		}, nil)
		if err != nil {
			err = errors.Join(inUse(err), v.removeNode(ctx, id))
		}
		return err
	})
}

// inUse tells an image that another QEMU has locked from what else may be wrong.
func inUse(err error) error {
	if refused := (*qmp.Error)(nil); errors.As(err, &refused) && lockRefusal.MatchString(refused.Desc) {
		return fmt.Errorf("%w (%w)", ErrInUse, err)
	}
	return err
}

var lockRefusal = regexp.MustCompile(`^Failed to get (shared )?".*" lock`)

// RemoveDisk takes a disk away, which the guest should not be using any more. It
// returns when QEMU has let go of its backend. It is idempotent.
func (v *VM) RemoveDisk(ctx context.Context, serial string) error {
	return v.change(ctx, "remove", serial, func(ctx context.Context, id string, slot *slot) error {
		device, err := v.hasDevice(ctx, id)
		if err != nil {
			return err
		}
		if device {
			if err := v.removeDevice(ctx, id); err != nil {
				return err
			}
		}
		if err := v.removeNode(ctx, id); err != nil {
			return err
		}
		slot.used = false
		return nil
	})
}

// slot is what is known of a serial number.
type slot struct {
	mu   sync.Mutex // held while its disk is changed
	used bool       // QEMU may have something of it; otherwise it need not be asked
}

// change runs f with the ID that the disk's device and block node have.
func (v *VM) change(ctx context.Context, verb, serial string, f func(ctx context.Context, id string, slot *slot) error) error {
	if len(serial) > maxSerial || !serialFormat.MatchString(serial) {
		return fmt.Errorf("disk serial %q: there must be 1 to %d letters, digits and hyphens", serial, maxSerial)
	}
	ctx, cancel := context.WithTimeout(ctx, diskTimeout)
	defer cancel()
	v.mu.Lock()
	if v.slots[serial] == nil {
		v.slots[serial] = &slot{}
	}
	s := v.slots[serial]
	v.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := f(ctx, "disk-"+serial, s); err != nil {
		return fmt.Errorf("virtual machine %s: %s disk %s: %w", v.id, verb, serial, err)
	}
	return nil
}

func (v *VM) hasDevice(ctx context.Context, id string) (bool, error) {
	type property struct {
		Name string `json:"name"`
	}
	var found []property
	err := v.monitor.Execute(ctx, "qom-list", map[string]any{"path": "/machine/peripheral"}, &found)
	return slices.Contains(found, property{id}), err
}

func (v *VM) removeDevice(ctx context.Context, id string) error {
	gone := make(chan struct{})
	v.mu.Lock()
	v.deleted[id] = gone
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		delete(v.deleted, id)
		v.mu.Unlock()
	}()
	err := v.monitor.Execute(ctx, "device_del", map[string]any{"id": id}, nil)
	if refused := (*qmp.Error)(nil); errors.As(err, &refused) && refused.Class == "DeviceNotFound" {
		return nil // it went between the look and the command
	}
	if err != nil {
		return err
	}
	select {
	case <-gone:
		return nil
	case <-v.done:
		return v.Err()
	case <-ctx.Done():
		return fmt.Errorf("the guest holds on to the disk: %w", context.Cause(ctx))
	}
}

// removeNode removes a disk's block node, if there is one.
func (v *VM) removeNode(ctx context.Context, id string) error {
	type node struct {
		Name string `json:"node-name"`
	}
	var found []node
	err := v.monitor.Execute(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &found)
	if err != nil || !slices.Contains(found, node{id}) {
		return err
	}
	return v.monitor.Execute(ctx, "blockdev-del", map[string]any{"node-name": id}, nil)
}
