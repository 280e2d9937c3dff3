//go:build hyper

package vm

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const prisonerMode = "be-prisoner"

// TestPrison runs this program where QEMU would be, in place of a QEMU that its guest has
// taken over: it tries what that would try.
func TestPrison(t *testing.T) {
	// All of it is readable by everybody, so that the user ID alone keeps nothing.
	public, err := os.MkdirTemp("/tmp", "prison-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(public) })
	if err := os.Chmod(public, 0o777); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(public, "prisoner")
	self, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(program, self, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	neighbour := filepath.Join(public, "neighbour")
	if err := os.WriteFile(neighbour, []byte("secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(neighbour, 0o666); err != nil {
		t.Fatal(err)
	}
	template, err := os.OpenFile(filepath.Join(public, "template"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		_, err = template.WriteString("template")
	}
	if err != nil {
		t.Fatal(err)
	}
	template.Close()
	if template, err = os.Open(template.Name()); err != nil {
		t.Fatal(err)
	}
	abstract, err := net.Listen("unix", "@h8s-test-"+filepath.Base(public))
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()

	cmd := exec.Command(program, prisonerMode, neighbour, abstract.Addr().String(), fmt.Sprint(os.Getpid()))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	exited, err := startConfined(cmd, confinement{
		user: 1_900_000_000, dir: public, readable: []string{program},
		writable: map[string]*os.File{memoryName: template}, template: template,
	})
	if err != nil {
		t.Fatal(err)
	}
	tried := map[string]string{}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		what, result, _ := strings.Cut(lines.Text(), "\t")
		tried[what] = result
	}
	<-exited
	if len(tried) != len(attempts) {
		t.Errorf("%d attempts, want %d: %v (%s)", len(tried), len(attempts), tried, cmd.ProcessState)
	}
	for what, result := range tried {
		want := "refused"
		if attempts[what].works {
			want = "done"
		}
		if !strings.HasPrefix(result, want) {
			t.Errorf("%s: %s, want %s", what, result, want)
		}
	}
	if text, err := os.ReadFile(template.Name()); err != nil || string(text) != "template" {
		t.Errorf("the template is %q now (%v)", text, err)
	}
}

type attempt struct {
	works bool // it is what QEMU needs
	try   func(neighbour, abstract string, parent int) error
}

func open(path string, flags int) error {
	f, err := os.OpenFile(path, flags, 0o600)
	if err == nil {
		f.Close()
	}
	return err
}

var attempts = map[string]attempt{
	"read a library's directory": {true, func(string, string, int) error { return open("/usr/share", os.O_RDONLY) }},
	"write /dev/null":            {true, func(string, string, int) error { return open("/dev/null", os.O_WRONLY) }},
	"map its memory privately": {true, func(string, string, int) error {
		f, err := os.OpenFile(memoryName, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		m, err := unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		if err == nil {
			m[0] = 'T'
		}
		return err
	}},
	"connect by TCP": {true, func(string, string, int) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: 1, Addr: [4]byte{127, 0, 0, 1}})
		if errors.Is(err, unix.ECONNREFUSED) { // by the kernel's stack
			return nil
		}
		return err
	}},
	"believe in a hole in the template": {true, func(string, string, int) error {
		f, err := os.OpenFile(memoryName, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4)
	}},
	"write the template": {false, func(string, string, int) error {
		f, err := os.OpenFile(memoryName, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte("X"), 0)
		return err
	}},
	"map the template shared": {false, func(string, string, int) error {
		f, err := os.OpenFile(memoryName, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = unix.Mmap(int(f.Fd()), 0, 8, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	}},
	"open the template again": {false, func(string, string, int) error {
		f, err := os.OpenFile(memoryName, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		return open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY)
	}},
	"read /etc/shadow":       {false, func(string, string, int) error { return open("/etc/shadow", os.O_RDONLY) }},
	"read /etc/passwd":       {false, func(string, string, int) error { return open("/etc/passwd", os.O_RDONLY) }},
	"read a neighbour's":     {false, func(n, _ string, _ int) error { return open(n, os.O_RDONLY) }},
	"write a neighbour's":    {false, func(n, _ string, _ int) error { return open(n, os.O_RDWR) }},
	"list a directory":       {false, func(n, _ string, _ int) error { return open(filepath.Dir(n), os.O_RDONLY) }},
	"list its own directory": {false, func(string, string, int) error { return open(".", os.O_RDONLY) }},
	"make a file":            {false, func(string, string, int) error { return open("mine", os.O_WRONLY|os.O_CREATE) }},
	"remove a file":          {false, func(n, _ string, _ int) error { return os.Remove(n) }},
	"read the parent's memory": {false, func(_, _ string, parent int) error {
		return open(fmt.Sprintf("/proc/%d/mem", parent), os.O_RDONLY)
	}},
	"read the parent's environment": {false, func(_, _ string, parent int) error {
		return open(fmt.Sprintf("/proc/%d/environ", parent), os.O_RDONLY)
	}},
	"list processes":     {false, func(string, string, int) error { return open("/proc", os.O_RDONLY) }},
	"signal the parent":  {false, func(_, _ string, parent int) error { return unix.Kill(parent, 0) }},
	"trace the parent":   {false, func(_, _ string, parent int) error { return unix.PtraceAttach(parent) }},
	"become root":        {false, func(string, string, int) error { return unix.Setuid(0) }},
	"open /dev/kvm":      {false, func(string, string, int) error { return open("/dev/kvm", os.O_RDWR) }},
	"new user namespace": {false, func(string, string, int) error { return permission(unix.Unshare(unix.CLONE_NEWUSER)) }},
	"mount":              {false, func(string, string, int) error { return unix.Mount("x", "/tmp", "tmpfs", 0, "") }},
	"abstract socket": {false, func(_, abstract string, _ int) error {
		c, err := net.Dial("unix", abstract)
		if err == nil {
			c.Close()
		}
		return err
	}},
	"listen":          {false, func(string, string, int) error { return listen(unix.IPPROTO_TCP) }},
	"listen by MPTCP": {false, func(string, string, int) error { return listen(unix.IPPROTO_MPTCP) }},
	"a socket for packets": {false, func(string, string, int) error {
		_, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		return err
	}},
	"a socket for ciphers": {false, func(string, string, int) error {
		_, err := unix.Socket(unix.AF_ALG, unix.SOCK_SEQPACKET, 0)
		return err
	}},
	"BPF":      {false, func(string, string, int) error { return call(unix.SYS_BPF, 0) }},
	"io_uring": {false, func(string, string, int) error { return call(unix.SYS_IO_URING_SETUP, 1) }},
	"keys":     {false, func(string, string, int) error { return call(unix.SYS_KEYCTL, 0) }},
}

func listen(protocol int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, protocol)
	if err != nil {
		return err
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
}

// permission is an error only where the kernel refuses the call, and not its arguments.
func permission(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return err
	}
	return nil
}

func call(number, argument uintptr) error {
	_, _, errno := unix.Syscall(number, argument, 0, 0)
	return permission(errno)
}

// bePrisoner makes all attempts, and tells how each went.
func bePrisoner() {
	var parent int
	if _, err := fmt.Sscan(os.Args[4], &parent); err != nil || parent <= 1 {
		os.Exit(1)
	}
	for what, a := range attempts {
		result := "done"
		if err := a.try(os.Args[2], os.Args[3], parent); err != nil {
			result = "refused: " + err.Error()
		}
		fmt.Printf("%s\t%s\n", what, result)
	}
}
