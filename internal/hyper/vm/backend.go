package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// handOver returns a backend that QEMU, which may open none of our files, can use in
// place of the disk's: the file, or the Unix socket's connection, is open and QEMU's. Others
// stay as they are, such as those that are reached by TCP. When QEMU has taken the
// backend, or refused it, the caller calls release.
func (v *VM) handOver(ctx context.Context, id string, d Disk) (backend map[string]any, release func(), err error) {
	if backend = maps.Clone(d.Backend); backend == nil {
		backend = map[string]any{}
	}
	backend["read-only"], backend["discard"] = d.ReadOnly, "unmap"
	switch backend["driver"] {
	case "file", "host_device":
		path, _ := backend["filename"].(string)
		file, err := openBackend(path, d.ReadOnly)
		if err != nil {
			return nil, nil, err
		}
		defer file.Close()
		var set struct {
			ID int `json:"fdset-id"`
		}
		if err := v.monitor.ExecuteWithFile(ctx, "add-fd", nil, file, &set); err != nil {
			return nil, nil, err
		}
		backend["filename"] = fmt.Sprintf("/dev/fdset/%d", set.ID)
		// What the disk has open stays open.
		return backend, func() { v.release(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}) }, nil
	case "nbd":
		server, _ := backend["server"].(map[string]any)
		if server["type"] != "unix" {
			break
		}
		path, _ := server["path"].(string)
		file, err := dialFile(ctx, path)
		if err != nil {
			return nil, nil, err
		}
		defer file.Close()
		if err := v.monitor.SendFile(ctx, id, file); err != nil {
			return nil, nil, err
		}
		backend["server"] = map[string]any{"type": "fd", "str": id}
		return backend, func() { v.release(ctx, "closefd", map[string]any{"fdname": id}) }, nil
	}
	return backend, func() {}, nil
}

// openBackend opens a disk's file. A device that can be written is ours alone: nobody can
// mount it meanwhile.
func openBackend(name string, readOnly bool) (*os.File, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	// Others have neither content nor size; and to open a FIFO is to wait.
	if m := info.Mode(); !m.IsRegular() && m.Type() != fs.ModeDevice {
		return nil, fmt.Errorf("%s is neither a file nor a block device", name)
	}
	flags := os.O_RDONLY
	if !readOnly {
		flags = os.O_RDWR
		if !info.Mode().IsRegular() {
			flags |= os.O_EXCL
		}
	}
	f, err := os.OpenFile(name, flags, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("%w (%w)", ErrInUse, err)
	}
	return f, err
}

// dialFile connects to a Unix socket.
func dialFile(ctx context.Context, path string) (*os.File, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*net.UnixConn).File()
}

// release takes back what QEMU may not have used, also for a caller who has left.
func (v *VM) release(ctx context.Context, command string, arguments map[string]any) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	// It fails when there is nothing left to take back.
	_ = v.monitor.Execute(ctx, command, arguments, nil)
}
