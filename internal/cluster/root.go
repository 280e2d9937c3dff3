package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// enterRoot gives the calling process (node init, alone in a new mount namespace)
// the node's own root: the machine's programs read-only, everything else private.
func enterRoot(state stateDir, node, binDir string) error {
	// From here on no mount made in the node reaches the machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	root := state.node(node, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=755,size=16m"); err != nil {
		return fmt.Errorf("mount the node's root: %w", err)
	}
	r := rootBuilder{root: root}
	for _, dir := range []string{"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		r.system("/" + dir)
	}
	for _, dir := range []string{"etc", "var", "opt", "run", "tmp"} {
		r.bind(state.node(node, dir), "/"+dir)
	}
	r.bindReadOnly(binDir, nodeBinDir)
	r.bind(state.node(node, "log"), "/var/log/h8s")
	for _, dir := range []string{"/root", "/home", "/mnt", "/srv", "/media"} {
		r.dir(dir)
	}
	r.dir("/proc")
	r.mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	r.sysctls(state.node(node, "sysctl"))
	r.dir("/sys")
	r.mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	r.bindTree("/sys/fs/cgroup", "/sys/fs/cgroup")
	r.bind("/dev", "/dev")
	r.mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5")
	r.mountIfThere("tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777")
	r.mountIfThere("mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if r.err != nil {
		return r.err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	// Both roots at one place: the old one lies on top and is taken away.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot into the node's root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the machine's root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	// kubelet, containerd and CNI plugins expect mounts to travel between
	// namespaces, as on a machine that systemd started.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts inside the node: %w", err)
	}
	return nil
}

// rootBuilder builds a root file system; after the first error it does nothing.
type rootBuilder struct {
	root string
	err  error
}

func (r *rootBuilder) dir(path string) {
	if r.err == nil {
		r.err = os.MkdirAll(filepath.Join(r.root, path), 0o755)
	}
}

func (r *rootBuilder) mount(source, target, fstype string, flags uintptr, options string) {
	if r.err != nil {
		return
	}
	if err := unix.Mount(source, filepath.Join(r.root, target), fstype, flags, options); err != nil {
		r.err = fmt.Errorf("mount %s (%s) in the node: %w", target, fstype, err)
	}
}

func (r *rootBuilder) mountIfThere(source, target, fstype string, flags uintptr, options string) {
	if r.err != nil {
		return
	}
	if _, err := os.Stat(filepath.Join(r.root, target)); err == nil {
		r.mount(source, target, fstype, flags, options)
	}
}

// bind shows source, which is made if need be, at target.
func (r *rootBuilder) bind(source, target string) {
	if r.err == nil {
		r.err = os.MkdirAll(source, 0o755)
	}
	r.dir(target)
	r.mount(source, target, "", unix.MS_BIND, "")
}

func (r *rootBuilder) bindTree(source, target string) {
	r.dir(target)
	r.mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
}

func (r *rootBuilder) bindReadOnly(source, target string) {
	r.bindTree(source, target)
	if r.err != nil {
		return
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(unix.AT_FDCWD, filepath.Join(r.root, target), unix.AT_RECURSIVE, attr); err != nil {
		r.err = fmt.Errorf("make %s read-only in the node: %w", target, err)
	}
}

// system shows a directory of the machine's operating system read-only; a
// symbolic link (/bin → usr/bin) stays one.
func (r *rootBuilder) system(path string) {
	if r.err != nil {
		return
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		r.err = err
	case info.Mode()&fs.ModeSymlink != 0:
		link, err := os.Readlink(path)
		if err == nil {
			err = os.Symlink(link, filepath.Join(r.root, path))
		}
		r.err = err
	default:
		r.bindReadOnly(path, path)
	}
}

// sysctlValues are what kubelet wants the machine's sysctls to be, and would set.
var sysctlValues = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// sysctls keeps the node's hands off the sysctls that belong to the whole machine:
// they are read-only, and in the place of those that kubelet insists on it finds
// files that already say what it wants. Those below net/ are the node's own.
func (r *rootBuilder) sysctls(dir string) {
	for _, tree := range []string{"/proc/sys/kernel", "/proc/sys/vm", "/proc/sys/fs"} {
		r.mount(filepath.Join(r.root, tree), tree, "", unix.MS_BIND|unix.MS_REC, "")
		r.mount("", tree, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	for name, value := range sysctlValues {
		if r.err != nil {
			return
		}
		source, target := filepath.Join(dir, name), "/proc/sys/"+name
		if _, err := os.Stat(filepath.Join(r.root, target)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		r.err = writeFile(source, []byte(value+"\n"), 0o644)
		r.mount(source, target, "", unix.MS_BIND, "")
	}
}

// etcCopies are the files of the machine's /etc that programs of a node read.
var etcCopies = []string{
	"alternatives", "group", "host.conf", "iproute2", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
	"localtime", "nsswitch.conf", "os-release", "passwd", "protocols", "services", "ssl", "pki", "ca-certificates",
}

// copyEtc brings files of the machine's /etc up to date in the node's.
func copyEtc(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var sources []string
	for _, name := range etcCopies {
		path := filepath.Join("/etc", name)
		if _, err := os.Lstat(path); err == nil {
			sources = append(sources, path)
		}
	}
	args := append([]string{"--archive", "--update", "--target-directory=" + dir}, sources...)
	if out, err := exec.Command("cp", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the machine's /etc to %s: %w: %s", dir, err, out)
	}
	mtab := filepath.Join(dir, "mtab")
	if err := os.Symlink("/proc/mounts", mtab); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
