package vm

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// program is what emulates the machine.
const program = "qemu-system-x86_64"

// machine is a QEMU command line in the making, with the files that QEMU inherits.
type machine struct {
	binary   string
	args     []string
	files    []*os.File // QEMU's from descriptor 3 on
	owned    []*os.File // those that close closes
	readable []string
	writable map[string]*os.File
	template *os.File // the memory that is cloned, or nil
	memory   int64
	manifest manifest
}

// newMachine works out the command line but for the memory and the sockets.
func newMachine(c Config) (*machine, error) {
	if c.CPUs < 1 || c.Memory < 1 || c.Memory%(2<<20) != 0 {
		return nil, fmt.Errorf("%d processors and %d bytes of memory: there must be a processor, and a multiple of 2 MiB", c.CPUs, c.Memory)
	}
	binary, err := exec.LookPath(program)
	if err != nil {
		return nil, fmt.Errorf("%w; install QEMU for x86 (Debian: qemu-system-x86)", err)
	}
	m := &machine{binary: binary, memory: c.Memory, readable: []string{binary}, writable: map[string]*os.File{}}
	m.arg("-machine", "microvm,acpi=on,rtc=on,isa-serial=on,pit=off,pic=off,x-option-roms=off,"+
		"mem-merge=off,dump-guest-core=off,memory-backend=memory")
	parameters := kernelParameters
	switch c.Accel {
	case "kvm":
		m.arg("-accel", "kvm", "-cpu", "host")
	case "tcg":
		frequency, err := tscFrequency()
		if err != nil {
			return nil, err
		}
		// Without ERMS the guest's kernel and libraries copy eight bytes and more at a time:
		// TCG executes "rep movsb" byte by byte. FSRM, which QEMU has since 8.0, means nothing
		// without it, but kernels before 6.5 would not boot. Without LA57 there is a level less
		// of page tables to walk, which TCG does in software.
		m.arg("-accel", "tcg,thread=multi,tb-size=64", "-cpu", "max,erms=off,fsrm=off,la57=off")
		parameters += fmt.Sprintf(" tsc=reliable tsc_early_khz=%d", frequency)
	default:
		return nil, fmt.Errorf("accelerator %q: there are kvm and tcg", c.Accel)
	}
	m.arg("-smp", strconv.Itoa(c.CPUs))
	m.arg("-m", fmt.Sprintf("%dB", c.Memory))
	m.arg("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
	m.arg("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	m.arg("-device", "pvpanic")
	m.arg("-device", "virtio-serial-device,max_ports=2")
	m.arg("-device", "virtserialport,id=channel,chardev=channel,name="+guestapi.Port)
	m.arg("-device", "virtio-scsi-device,id=scsi")
	m.arg("-device", "virtio-rng-device")
	m.arg("-device", "virtio-balloon-device,free-page-reporting=on")
	if c.NIC != nil {
		m.arg("-device", "virtio-net-device,netdev=nic,guest_announce=off")
	}
	card := len(m.args) - 1
	// What follows is not what templates and clones have in common.
	if m.manifest, err = newManifest(m, c, parameters); err != nil {
		return nil, err
	}
	if c.Template == "" {
		m.arg("-append", parameters)
	}
	if c.NIC != nil {
		if c.NIC.Tap == nil || len(c.NIC.HardwareAddr) != 6 {
			return nil, errors.New("a network card needs a tap device and an address of 6 bytes")
		}
		m.args[card] += ",mac=" + c.NIC.HardwareAddr.String()
		m.arg("-netdev", fmt.Sprintf("tap,id=nic,vhost=off,fd=%d", m.inherit(c.NIC.Tap)))
	}
	m.arg("-name", "h8s-"+strings.ReplaceAll(c.ID, ",", ",,"), "-S")
	return m, nil
}

// kernelParameters make the kernel say little, since each byte on the serial console
// costs an exit from the guest, and end QEMU when it panics. The self-tests of the
// kernel's ciphers are two thirds of the instructions before /init. Of the security modules there
// are those that need no policy, which nobody loads into a guest: AppArmor and TOMOYO would be
// asked at each file that is opened, for nothing.
const kernelParameters = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t" +
	" i8042.noaux i8042.nokbd random.trust_cpu=on no_timer_check cryptomgr.notests lsm=landlock,yama"

// tscFrequency is the rate of the host's time stamp counter in kHz, which TCG's guests
// see as theirs. Nothing in the machine would tell them: without a timer of known rate
// they cannot find out.
func tscFrequency() (int, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0, err
	}
	found := bogoMIPS.FindSubmatch(info)
	if found == nil {
		return 0, errors.New("/proc/cpuinfo has no bogomips, from which the rate of the time stamp counter follows")
	}
	mips, err := strconv.ParseFloat(string(found[1]), 64)
	if err != nil {
		return 0, fmt.Errorf("bogomips of /proc/cpuinfo: %w", err)
	}
	return int(math.Round(mips * 1000 / 2)), nil
}

var bogoMIPS = regexp.MustCompile(`(?m)^bogomips\s*: ([0-9.]+)$`)

func (m *machine) arg(args ...string) { m.args = append(m.args, args...) }

// inherit hands QEMU a file, and returns its descriptor there.
func (m *machine) inherit(f *os.File) int {
	m.files = append(m.files, f)
	return len(m.files) + 2
}

// openFiles opens what QEMU's user cannot.
func (m *machine) openFiles(c Config) error {
	if c.Accel == "kvm" {
		device, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("accelerator kvm: %w", err)
		}
		m.writable[kvmDevice] = device
	}
	if c.Template != "" {
		return nil // a clone has its kernel in memory: QEMU would keep another copy
	}
	kernel, err := m.publicFile(c.Kernel)
	if err != nil {
		return err
	}
	initrd, err := m.publicFile(c.Initrd)
	if err != nil {
		return err
	}
	m.arg("-kernel", kernel, "-initrd", initrd)
	return nil
}

// publicFile returns the path by which QEMU can read a file that is no secret, wherever that is.
func (m *machine) publicFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	m.own(f)
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if info.Mode().Perm()&0o004 == 0 {
		return "", fmt.Errorf("%s: QEMU, which has a user of its own, may not read it: chmod o+r", path)
	}
	m.readable = append(m.readable, path)
	return fmt.Sprintf("/proc/self/fd/%d", m.inherit(f)), nil
}

func (m *machine) own(f *os.File) { m.owned = append(m.owned, f) }

// close closes our copies of QEMU's files.
func (m *machine) close() {
	for _, f := range m.owned {
		f.Close()
	}
	m.owned = nil
	for _, f := range m.writable {
		f.Close()
	}
}

// ownMemory gives the guest anonymous memory.
func (m *machine) ownMemory() {
	m.arg("-object", fmt.Sprintf("memory-backend-ram,id=memory,size=%d", m.memory))
}

// fileMemory gives the guest what is in a file as its memory. When shared, what the
// guest writes goes to the file, which is open for writing. Otherwise it keeps a page of
// its own for each that it writes, and the file is open for reading only.
func (m *machine) fileMemory(f *os.File, shared bool) {
	share := "on"
	if !shared {
		share, m.template = "off", f
	}
	m.writable[memoryName] = f
	m.arg("-object", fmt.Sprintf("memory-backend-file,id=memory,size=%d,share=%s,mem-path=%s", m.memory, share, memoryName))
}

const (
	// memoryName is what QEMU opens as the guest's memory: no file has this name.
	memoryName = "/h8s/memory"
	kvmDevice  = "/dev/kvm"
)

// socket makes a character device that is one end of a stream, and returns the other.
// No other process can connect to it.
func (m *machine) socket(id string) (net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), id)
	m.own(theirs)
	m.arg("-chardev", fmt.Sprintf("socket,id=%s,fd=%d", id, m.inherit(theirs)))

	ours := os.NewFile(uintptr(fds[0]), id)
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	return conn, nil
}

// console connects the guest's serial port with w. QEMU never waits for it: when w is
// slow, the guest's transmitter is.
func (m *machine) console(w io.Writer) error {
	if w == nil {
		m.arg("-serial", "null")
		return nil
	}
	conn, err := m.socket("console")
	if err != nil {
		return err
	}
	m.arg("-serial", "chardev:console")
	go func() {
		defer conn.Close()
		if _, err := io.Copy(w, conn); err != nil {
			_, _ = io.Copy(io.Discard, conn)
		}
	}()
	return nil
}
