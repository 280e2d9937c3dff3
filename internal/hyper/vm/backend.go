package vm

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"time"
)

// handOver returns a backend that QEMU, which may open none of our files, can use in
// place of this one: the file, or the Unix socket's connection, is open and QEMU's. Others
// stay as they are, such as those that are reached by TCP. When QEMU has taken the
// backend, or refused it, the caller calls release.
func (v *VM) handOver(ctx context.Context, backend map[string]any, readOnly bool) (_ map[string]any, release func(), err error) {
	backend = maps.Clone(backend)
	switch backend["driver"] {
	case "file", "host_device":
		path, _ := backend["filename"].(string)
		mode := os.O_RDWR
		if readOnly {
			mode = os.O_RDONLY
		}
		file, err := os.OpenFile(path, mode, 0)
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
		return backend, func() { v.release("remove-fd", map[string]any{"fdset-id": set.ID}) }, nil
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
		const name = "backend" // disks are changed one at a time
		if err := v.monitor.SendFile(ctx, name, file); err != nil {
			return nil, nil, err
		}
		backend["server"] = map[string]any{"type": "fd", "str": name}
		return backend, func() { v.release("closefd", map[string]any{"fdname": name}) }, nil
	}
	return backend, func() {}, nil
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
func (v *VM) release(command string, arguments map[string]any) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// It fails when there is nothing left to take back.
	_ = v.monitor.Execute(ctx, command, arguments, nil)
}
