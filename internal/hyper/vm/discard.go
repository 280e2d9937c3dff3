package vm

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A clone maps its template's memory file privately. When its guest reports free
// pages, QEMU means to drop the clone's own copies of them: it punches a hole into the
// file, which all clones share, and then drops the copies. The hole must not come to
// be, and QEMU must believe that it did, or else it keeps the copies. So each
// fallocate of a clone's QEMU is first shown to us, by seccomp(2).

// discards answers for one QEMU.
type discards struct {
	listener *os.File
	memory   unix.Stat_t // the template's file
}

// filterDiscards makes the calling thread, and what it starts, ask before each
// fallocate. The thread should have no other use, and can get no new privileges.
func filterDiscards(memory *os.File) (*discards, error) {
	var d discards
	if err := unix.Fstat(int(memory.Fd()), &d.memory); err != nil {
		return nil, fmt.Errorf("template's memory: %w", err)
	}
	const dataNumber, dataArch = 0, 4 // offsets in struct seccomp_data
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: dataArch},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: dataNumber},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FALLOCATE, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return nil, fmt.Errorf("seccomp filter with a listener: %w", errno)
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		unix.Close(int(fd))
		return nil, err
	}
	d.listener = os.NewFile(fd, "seccomp")
	return &d, nil
}

// notification and response are struct seccomp_notif and seccomp_notif_resp.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

type response struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

// serve answers until close: it lets nobody punch holes into the template, and leaves
// all else to the kernel.
func (d *discards) serve() {
	conn, err := d.listener.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Read(func(fd uintptr) (done bool) {
		for {
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(ready, 0); err == unix.EINTR {
				continue
			} else if err != nil || n == 0 {
				return err != nil
			}
			if ready[0].Revents&unix.POLLIN == 0 {
				return true // nobody is left who could ask
			}
			var n notification
			if ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n)) != nil {
				continue // who asked is gone
			}
			r := response{id: n.id}
			var file unix.Stat_t
			switch err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", n.pid, int32(n.args[0])), &file); {
			case err != nil:
				r.errno = -int32(unix.EBADF)
			case file.Dev == d.memory.Dev && file.Ino == d.memory.Ino:
				// It returns 0 without having been carried out.
			default:
				r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
			}
			_ = ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
		}
	})
}

func ioctl(fd uintptr, request uint, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// close ends serve.
func (d *discards) close() { d.listener.Close() }
