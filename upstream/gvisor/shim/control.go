package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
)

// controlTimeout bounds one call to a sandbox: it answers at once unless it hangs.
const controlTimeout = 30 * time.Second

// sandboxControl reaches a sandbox through the control socket that runsc itself uses. (runsc port-forward does the
// same, at the price of a large process per connection.)
type sandboxControl struct {
	socket    string // path of the control socket
	container string // a container of the sandbox
}

// portForwardOpts is what the sandbox's method containerManager.PortForward takes: the field names and the one
// descriptor of gVisor's boot.PortForwardOpts, whose package would bring in the whole sandbox.
type portForwardOpts struct {
	urpc.FilePayload
	ContainerID string
	Port        uint16
}

// dial implements dialer.
func (s sandboxControl) dial(port uint16) (_ io.ReadWriteCloser, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "forwarded"), os.NewFile(uintptr(fds[1]), "sandbox")
	defer ours.Close()
	defer theirs.Close()
	if err := s.call("containerManager.PortForward", &portForwardOpts{
		FilePayload: urpc.FilePayload{Files: []*os.File{theirs}},
		ContainerID: s.container,
		Port:        port,
	}); err != nil {
		return nil, fmt.Errorf("connect to port %d inside the sandbox: %w", port, err)
	}
	return net.FileConn(ours)
}

func (s sandboxControl) call(method string, arg any) error {
	// By descriptor: the path may be longer than a socket address can be.
	socket, err := os.OpenFile(s.socket, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer socket.Close()
	conn, err := unet.Connect(fmt.Sprintf("/proc/self/fd/%d", socket.Fd()), false)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", s.socket, err)
	}
	timeout := time.AfterFunc(controlTimeout, func() { _ = conn.Close() })
	defer timeout.Stop()
	client := urpc.NewClient(conn)
	defer client.Close()
	return client.Call(method, arg, nil)
}
