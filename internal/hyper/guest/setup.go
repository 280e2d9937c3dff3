//go:build linux

package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

var validMachineID = regexp.MustCompile(`^[0-9a-f]+$`)

// setUp makes the guest this pod's. It is idempotent.
func (g *guest) setUp(ctx context.Context, s guestapi.Setup) error {
	// First, so that nothing is drawn that another clone draws too.
	if err := addEntropy(s.Entropy); err != nil {
		return fmt.Errorf("entropy: %w", err)
	}
	if !s.Time.IsZero() {
		now := unix.NsecToTimespec(s.Time.UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			return fmt.Errorf("clock: %w", err)
		}
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("hostname %q: %w", s.Hostname, err)
	}
	if s.MachineID != "" {
		if len(s.MachineID) != 32 || !validMachineID.MatchString(s.MachineID) {
			return badRequest("machine ID %q: it has 32 hexadecimal digits", s.MachineID)
		}
		if err := os.WriteFile("/etc/machine-id", []byte(s.MachineID+"\n"), 0o444); err != nil {
			return err
		}
	}
	for _, l := range s.Links {
		if err := g.links.setUp(ctx, l); err != nil {
			return fmt.Errorf("link %s: %w", l.Name, err)
		}
	}
	// After the links: net.ipv6.conf.all.disable_ipv6=0 would make a clone's speak as the template's.
	for name, value := range s.Sysctls {
		if err := setSysctl("/proc/sys", name, value); err != nil {
			return err
		}
	}
	if s.Template {
		// Or the garbage of the boot is collected by each clone, while its first container starts.
		runtime.GC()
	}
	return nil
}

// setSysctl sets a kernel parameter; its name is in either form of sysctl(8): the first
// separator rules, so that an interface's name may have dots in net/ipv4/conf/eth0.1/….
func setSysctl(root, name, value string) error {
	file := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		file = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	if !filepath.IsLocal(file) {
		return badRequest("sysctl %q is no name of one", name)
	}
	f, err := os.OpenFile(filepath.Join(root, file), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(value)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", name, value, err)
	}
	return nil
}

// addEntropy stirs fresh bytes into the kernel's random source, credits them, and makes
// it reseed now: what a clone has of its template is worth nothing from here on.
func addEntropy(fresh []byte) error {
	if len(fresh) == 0 {
		return nil
	}
	random, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer random.Close()
	// struct rand_pool_info of linux/random.h: bits, bytes, and the bytes themselves.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(fresh)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(fresh)))
	info = append(info, fresh...)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0])))
	runtime.KeepAlive(info)
	if errno != 0 {
		return errno
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, random.Fd(), rndReseedCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

// rndReseedCRNG is RNDRESEEDCRNG of linux/random.h.
const rndReseedCRNG = 0x5207
