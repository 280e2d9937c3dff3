//go:build linux

package guest

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

const (
	modulesDir = "/modules" // the image's builder, images/guest, fills it
	cgroupRoot = "/sys/fs/cgroup"
	// podCgroup holds all containers. It may not have all of the machine: PID 1, which
	// no limit holds, lives on what is left.
	podCgroup = "h8s"
	// reserved is what of the memory and the PIDs the containers never get.
	reservedMemory = 24 << 20
	reservedPIDs   = 256
)

// boot makes the initramfs a system in which crun runs containers.
func boot() error {
	if err := leaveRootfs(); err != nil {
		return fmt.Errorf("a root that can be pivoted: %w", err)
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"shm", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
		{"cgroup2", cgroupRoot, "cgroup2", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, "nsdelegate"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	for _, dir := range []string{
		"/etc", "/tmp", guestapi.BundleDir, guestapi.VolumeDir, guestapi.DiskDir, guestapi.PipeDir,
	} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{
		layersLink:   guestapi.DiskDir,  // a short way to the layers: mount(2) takes a page of options
		"/dev/stdin": "/proc/self/fd/0", // crun update reads what it changes from there
	} {
		if err := os.Symlink(target, link); err != nil {
			return err
		}
	}
	for name, value := range map[string]string{"PATH": "/sbin", "HOME": "/", "TMPDIR": "/tmp"} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	// What crun and everything below start with: the containers' own value is in their specification.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return err
	}
	if err := loadModules(filepath.Join(modulesDir, "boot")); err != nil {
		return err
	}
	if err := seal(guestapi.Runtime); err != nil {
		return fmt.Errorf("seal %s: %w", guestapi.Runtime, err)
	}
	// After all that takes memory for good.
	if err := setUpCgroups(cgroupRoot); err != nil {
		return fmt.Errorf("cgroups: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// leaveRootfs makes the initramfs a mount like any other: the kernel's own mount of
// it has no parent, and pivot_root(2), which crun needs, refuses it. A bind
// mount of it, moved to the top, has one, and costs neither copy nor memory.
func leaveRootfs() error {
	const stage = "/stage"
	if err := os.Mkdir(stage, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", stage, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Chdir(stage); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return os.Remove(stage)
}

// seal replaces a program by a link to a sealed copy in memory. crun makes itself one
// at each start unless it is one already, so that no container can write to the program that
// entered it (CVE-2019-5736); that costs a copy, a second start, and under TCG the translation
// of all its code.
func seal(program string) error {
	code, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate(filepath.Base(program), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	writer := os.NewFile(uintptr(fd), program)
	defer writer.Close()
	if _, err := writer.Write(code); err != nil {
		return err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(writer.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return err
	}
	// What is open for writing cannot be executed. This one stays open as long as we live.
	reader, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", writer.Fd()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := os.Remove(program); err != nil {
		return err
	}
	return os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), reader), program)
}

// setUpCgroups gives the containers a cgroup with all controllers and all of the
// machine but what PID 1 needs.
func setUpCgroups(root string) error {
	pod := filepath.Join(root, podCgroup)
	if err := os.Mkdir(pod, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	var enable []string
	for _, c := range strings.Fields(string(controllers)) {
		enable = append(enable, "+"+c)
	}
	for _, dir := range []string{root, pod} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(enable, " ")), 0); err != nil {
			return err
		}
	}
	free, err := availableMemory("/proc/meminfo")
	if err != nil {
		return err
	}
	threads, err := os.ReadFile("/proc/sys/kernel/threads-max")
	if err != nil {
		return err
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(threads)))
	if err != nil {
		return err
	}
	for file, value := range map[string]int64{
		"memory.max": max(free-reservedMemory, free/2),
		"pids.max":   int64(max(most-reservedPIDs, most/2)),
	} {
		if err := os.WriteFile(filepath.Join(pod, file), []byte(strconv.FormatInt(value, 10)), 0); err != nil {
			return err
		}
	}
	return nil
}

// availableMemory is how many bytes can be had before something else has to give way.
func availableMemory(meminfo string) (int64, error) {
	text, err := os.ReadFile(meminfo)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kilobytes, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kilobytes << 10, err
		}
	}
	return 0, fmt.Errorf("%s does not tell what is available", meminfo)
}

// loadModules loads the kernel modules of a directory in the order of their names, and
// removes them, as they lie in memory. It does nothing where there is none.
func loadModules(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := loadModule(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("kernel module %s: %w", e.Name(), err)
		}
	}
	return os.RemoveAll(dir)
}

func loadModule(file string) error {
	if !strings.HasSuffix(file, ".gz") {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		return loaded(unix.FinitModule(int(f.Fd()), "", 0))
	}
	packed, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return err
	}
	image, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	return loaded(unix.InitModule(image, ""))
}

func loaded(err error) error {
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// reap begins to reap every child, and makes PID 1 deaf to all signals: a container that
// shares the machine's PID namespace may send any.
func reap() {
	all := make(chan os.Signal, 1)
	signal.Notify(all)
	go func() {
		for range all {
		}
	}()
	children := make(chan os.Signal, 1) // what comes while it is full is reaped with the one in it
	signal.Notify(children, unix.SIGCHLD)
	go func() {
		for range children {
			if err := reaper.Reap(); err != nil {
				fmt.Fprintln(os.Stderr, "hyperinit: reap:", err)
			}
		}
	}()
}
