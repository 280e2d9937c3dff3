//go:build linux

package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// portTimeout is how long the port may take to appear after its driver was loaded.
const portTimeout = 30 * time.Second

// openPort opens the virtio-serial port of that name, and waits until a host is at its
// other end: before, a read of it is an end of file.
func openPort(ctx context.Context, name string) (*os.File, error) {
	var device string
	appearing, cancel := context.WithTimeout(ctx, portTimeout)
	defer cancel()
	err := poll(appearing, func() (found bool, err error) {
		device, err = findPort("/sys/class/virtio-ports", name)
		return device != "", err
	})
	if err != nil {
		return nil, fmt.Errorf("virtio-serial port %s: %w", name, err)
	}
	port, err := os.OpenFile(filepath.Join("/dev", device), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// A saved machine may wait here for as long as it likes.
	err = poll(ctx, func() (bool, error) {
		raw, err := port.SyscallConn()
		if err != nil {
			return false, err
		}
		var revents int16
		err = raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			// It does not wait; interrupted, it is asked again.
			_, _ = unix.Poll(fds, 0)
			revents = fds[0].Revents
		})
		return revents != 0 && revents&unix.POLLHUP == 0, err
	})
	if err != nil {
		port.Close()
		return nil, err
	}
	return port, nil
}

// findPort returns the device's name, or "" if there is none yet.
func findPort(class, name string) (string, error) {
	files, err := filepath.Glob(filepath.Join(class, "*", "name"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		have, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		if strings.TrimSpace(string(have)) == name {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", nil
}
