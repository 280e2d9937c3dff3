package vm

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Two kinds of system calls of a QEMU are first shown to us, by seccomp(2).
//
// openat for reading and writing: QEMU opens its guest's memory and /dev/kvm by name,
// neither of which its user may. It gets our descriptor in place of its own.
// In this way a clone, which must ask for both, has its template's memory open for
// reading alone, and a private mapping needs no more.
//
// fallocate: a clone maps its template's memory file privately. When its guest reports
// free pages, QEMU means to drop the clone's own copies of them: it punches a hole into
// the file, which all clones share, and then drops the copies. The hole must not come to
// be, and QEMU must believe that it did, or else it keeps the copies.
//
// The answers decide nothing about what is not ours to give: whoever changes a system
// call's arguments while it is looked at finds the kernel's own checks.

// supervisor answers for one QEMU.
type supervisor struct {
	listener *os.File
	files    map[string]*os.File // what it may open for reading and writing, by name
	template *unix.Stat_t        // what keeps its content, or nil
	served   chan struct{}       // closed when serve has ended
}

// denied are system calls that QEMU has no use for and that much of a kernel can be reached by,
// beside those that its own filter (-sandbox) denies.
var denied = []uint32{
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
	unix.SYS_PIDFD_GETFD, unix.SYS_KCMP, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_IO_URING_SETUP, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_FANOTIFY_INIT,
}

// families and protocols are the sockets that QEMU may have. Landlock's rules of TCP do
// not hold for those that imitate it, such as MPTCP.
var (
	families  = []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK}
	protocols = []uint32{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP}
)

const newNamespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// filter is the program that looks at each system call: see seccomp(2).
func filter() []unix.SockFilter {
	const number, arch, arguments = 0, 4, 16 // offsets in struct seccomp_data
	var (
		load = func(at uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
		}
		argument = func(n uint32) unix.SockFilter { return load(arguments + 8*n) } // its lower half
		and      = func(k uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: k}
		}
		// If it is k, go on; otherwise skip so many.
		is = func(k uint32, skip uint8) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
		}
		end = func(action uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
		}
		refuse = func(e unix.Errno) unix.SockFilter { return end(unix.SECCOMP_RET_ERRNO | uint32(e)) }
	)
	const x32 = 0x40000000 // the lowest number of another convention
	p := []unix.SockFilter{
		load(arch),
		is(unix.AUDIT_ARCH_X86_64, 2),
		load(number),
		{Code: unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K, K: x32, Jf: 1},
		end(unix.SECCOMP_RET_KILL_PROCESS),
		is(unix.SYS_OPENAT, 5),
		argument(2), and(unix.O_ACCMODE), is(unix.O_RDWR, 1),
		end(unix.SECCOMP_RET_USER_NOTIF),
		end(unix.SECCOMP_RET_ALLOW),
		is(unix.SYS_FALLOCATE, 1),
		end(unix.SECCOMP_RET_USER_NOTIF),
		is(unix.SYS_CLONE, 5),
		argument(0), and(newNamespaces), is(0, 1),
		end(unix.SECCOMP_RET_ALLOW),
		refuse(unix.EPERM),
		is(unix.SYS_CLONE3, 1), // whose arguments cannot be seen; libraries then use clone
		refuse(unix.ENOSYS),
	}
	for _, number := range denied {
		p = append(p, is(number, 1), refuse(unix.EPERM))
	}
	var sockets []unix.SockFilter
	for _, allowed := range []struct {
		argument uint32
		values   []uint32
	}{{0, families}, {2, protocols}} {
		sockets = append(sockets, argument(allowed.argument))
		for i, value := range allowed.values {
			sockets = append(sockets, unix.SockFilter{
				Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: value, Jt: uint8(len(allowed.values) - i), // behind the refusal
			})
		}
		sockets = append(sockets, refuse(unix.EPERM))
	}
	p = append(p, is(unix.SYS_SOCKET, uint8(len(sockets))))
	return append(append(p, sockets...), end(unix.SECCOMP_RET_ALLOW))
}

// supervise makes the calling thread, and what it starts, ask first. The thread should
// have no other use, and can get no new privileges.
func supervise(files map[string]*os.File, template *os.File) (*supervisor, error) {
	s := &supervisor{files: files, served: make(chan struct{})}
	if template != nil {
		s.template = &unix.Stat_t{}
		if err := unix.Fstat(int(template.Fd()), s.template); err != nil {
			return nil, fmt.Errorf("template's memory: %w", err)
		}
	}
	instructions := filter()
	program := unix.SockFprog{Len: uint16(len(instructions)), Filter: &instructions[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(instructions)
	if errno != 0 {
		return nil, fmt.Errorf("seccomp filter with a listener: %w", errno)
	}
	if err := unix.SetNonblock(int(fd), true); err != nil {
		unix.Close(int(fd))
		return nil, err
	}
	s.listener = os.NewFile(fd, "seccomp")
	return s, nil
}

// notification, response and addition are struct seccomp_notif, seccomp_notif_resp and
// seccomp_notif_addfd.
type (
	notification struct {
		id    uint64
		pid   uint32
		flags uint32
		nr    int32
		arch  uint32
		ip    uint64
		args  [6]uint64
	}
	response struct {
		id    uint64
		value int64
		errno int32
		flags uint32
	}
	addition struct {
		id                        uint64
		flags, from, to, newFlags uint32
	}
)

// serve answers until close.
func (s *supervisor) serve() {
	defer close(s.served)
	conn, err := s.listener.SyscallConn()
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
			s.answer(fd, &n)
		}
	})
}

func (s *supervisor) answer(listener uintptr, n *notification) {
	r := response{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	switch n.nr {
	case unix.SYS_FALLOCATE:
		var file unix.Stat_t
		switch err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", n.pid, int32(n.args[0])), &file); {
		case err != nil:
			r.flags, r.errno = 0, -int32(unix.EBADF)
		case s.template != nil && file.Dev == s.template.Dev && file.Ino == s.template.Ino:
			r.flags = 0 // it returns 0 without having been carried out
		}
	case unix.SYS_OPENAT:
		file := s.files[nameAt(n.pid, n.args[1])]
		if file == nil {
			break
		}
		a := addition{id: n.id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, from: uint32(file.Fd()), newFlags: unix.O_CLOEXEC}
		err := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&a))
		runtime.KeepAlive(file)
		if err == nil {
			return
		}
		r.flags, r.errno = 0, -int32(unix.EIO)
	}
	_ = ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
}

// nameAt is the short text at an address of a process, or empty.
func nameAt(pid uint32, address uint64) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return ""
	}
	defer memory.Close()
	var text [64]byte
	n, _ := memory.ReadAt(text[:], int64(address))
	name, _, ok := bytes.Cut(text[:n], []byte{0})
	if !ok {
		return ""
	}
	return string(name)
}

func ioctl(fd uintptr, request uint, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

// close ends serve, and closes the files.
func (s *supervisor) close() {
	s.listener.Close()
	<-s.served
	for _, f := range s.files {
		f.Close()
	}
}
