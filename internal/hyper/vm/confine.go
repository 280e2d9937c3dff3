package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confinement is what is left of the node to a QEMU that its guest has taken over.
type confinement struct {
	user uint32 // and group; it is in no other
	dir  string // its working directory, where it can neither read nor write
	// readable are files and directories that it may read, and execute.
	readable []string
	// writable are files that it may open for reading and writing, under these names. What it
	// gets is the file as we have it open.
	writable map[string]*os.File
	// template, if not nil, is the file among them that it must not change.
	template *os.File
}

// systemFiles are what programs need to run. Those of resolvers, and Ceph's, are for
// disks on the network, whose drivers QEMU loads when it is told of such a disk.
var systemFiles = []string{
	"/usr", "/lib", "/lib64", "/etc/ld.so.cache",
	"/dev/null", "/dev/random", "/dev/urandom", "/sys/devices/system/cpu", "/etc/localtime",
	"/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/gai.conf", "/etc/services",
	"/etc/ssl/openssl.cnf", "/etc/ceph",
}

// apply takes from the calling thread, for good, what the program that it executes must
// not have, except for root's user ID, which the execution itself takes (see start).
// The caller serves the supervisor that it returns.
func (c confinement) apply() (*supervisor, error) {
	// A thread shares its working directory with the others of its process.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("working directory of its own: %w", err)
	}
	if err := unix.Chdir(c.dir); err != nil {
		return nil, &fs.PathError{Op: "chdir", Path: c.dir, Err: err}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("no new privileges: %w", err)
	}
	// With huge pages all of a guest's memory is the pod's at once, also what the guest has never
	// used. The kernel keeps this by address space: it is the caller's, too.
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("no transparent huge pages: %w", err)
	}
	if err := dropCapabilities(); err != nil {
		return nil, err
	}
	if err := restrictFiles(append(systemFiles, c.readable...)); err != nil {
		return nil, fmt.Errorf("restrict QEMU by Landlock: %w", err)
	}
	return supervise(c.writable, c.template)
}

// dropCapabilities makes sure that no execution ever gives one back.
func dropCapabilities() error {
	for c := uintptr(0); ; c++ {
		switch err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); {
		case errors.Is(err, unix.EINVAL) && c > unix.CAP_AUDIT_READ: // the kernel's last one was before it
			return nil
		case err != nil:
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
}

// What Landlock rules, by the version of its interface that brought it: see landlock(7).
// TCP connections are not among it: they lead to disks on the network.
var landlockFiles = []uint64{
	1: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1,
	2: unix.LANDLOCK_ACCESS_FS_REFER,
	3: unix.LANDLOCK_ACCESS_FS_TRUNCATE,
	5: unix.LANDLOCK_ACCESS_FS_IOCTL_DEV,
}

const (
	landlockNet   = 4
	landlockScope = 6
)

// restrictFiles lets the calling thread, and what it starts, open nothing but these
// paths, and what is below them, for reading; and /dev/null for writing. It may then
// listen on no TCP port, and neither connect to abstract sockets of others nor signal
// them. Paths that do not exist are left out.
//
// Well-kept libraries for this (go-landlock) restrict all threads of a process.
func restrictFiles(readable []string) error {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return fmt.Errorf("%w: this node needs Linux 5.13 or later, with landlock in its boot parameter lsm=", errno)
	}
	var rules unix.LandlockRulesetAttr
	for version, accesses := range landlockFiles {
		if uintptr(version) <= abi {
			rules.Handled_access_fs |= accesses
		}
	}
	if abi >= landlockNet {
		rules.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP
	}
	if abi >= landlockScope {
		rules.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&rules)), unsafe.Sizeof(rules), 0)
	if errno != 0 {
		return fmt.Errorf("make a set of rules: %w", errno)
	}
	defer unix.Close(int(set))
	for _, path := range readable {
		if err := allowReading(set, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &fs.PathError{Op: "allow reading", Path: path, Err: err}
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func allowReading(set uintptr, path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	rule := unix.LandlockPathBeneathAttr{
		Allowed_access: unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE,
		Parent_fd:      int32(fd),
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		rule.Allowed_access |= unix.LANDLOCK_ACCESS_FS_READ_DIR
	case path == os.DevNull:
		rule.Allowed_access |= unix.LANDLOCK_ACCESS_FS_WRITE_FILE
	}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH,
		uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
