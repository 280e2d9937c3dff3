//go:build linux

package guest

import (
	"bytes"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// blockDevices tells when the kernel has added or removed a block device.
type blockDevices struct {
	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, at each change
}

// watchBlockDevices listens to the kernel's own messages for as long as the process lives.
func watchBlockDevices() (*blockDevices, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("socket for the kernel's device events: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "uevents")
	// The kernel sends to the first group.
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		socket.Close()
		return nil, fmt.Errorf("listen to the kernel's device events: %w", err)
	}
	b := &blockDevices{changed: make(chan struct{})}
	go func() {
		defer socket.Close()
		message := make([]byte, 8<<10)
		for {
			n, err := socket.Read(message)
			// When there were too many (ENOBUFS), a disk's may have been among them.
			if err == nil && !bytes.Contains(message[:n], []byte("\x00SUBSYSTEM=block\x00")) {
				continue
			}
			b.mu.Lock()
			close(b.changed)
			b.changed = make(chan struct{})
			b.mu.Unlock()
		}
	}()
	return b, nil
}

// next is closed at the next change from now on.
func (b *blockDevices) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.changed
}
