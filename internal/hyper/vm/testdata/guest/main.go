// Command guest is PID 1 of the virtual machines of package vm's tests. It answers
// lines on the channel's port.
package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

func main() {
	err := run()
	fmt.Println("test guest:", err)
	time.Sleep(time.Second)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for target, kind := range map[string]string{"/dev": "devtmpfs", "/sys": "sysfs", "/proc": "proc"} {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(kind, target, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	if err := load(); err != nil {
		return err
	}
	for {
		port, err := openPort()
		if err != nil {
			return err
		}
		if err := awaitHost(port); err != nil {
			return err
		}
		if err := serve(port); err != nil {
			return err
		}
		// The host sees by this that we know that it has left.
		if err := port.Close(); err != nil {
			return err
		}
	}
}

// load loads the image's modules in the order of their names.
func load() error {
	files, err := filepath.Glob("/modules/*/[0-9]*-*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("module %s: %w", path, err)
		}
		f.Close()
	}
	return nil
}

func openPort() (*os.File, error) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, p := range ports {
			if name, _ := os.ReadFile(p); strings.TrimSpace(string(name)) == guestapi.Port {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(p)), os.O_RDWR|unix.O_NONBLOCK, 0)
			}
		}
	}
	return nil, fmt.Errorf("no port %s", guestapi.Port)
}

// awaitHost waits until the host's side of the port is open again: reads are at their
// end until then.
func awaitHost(port *os.File) error {
	raw, err := port.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents&unix.POLLHUP == 0
	})
}

func serve(port *os.File) error {
	in := bufio.NewReader(port)
	for {
		line, err := in.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		answer, err := answer(strings.Fields(line))
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(port, answer); err != nil {
			return err
		}
	}
}

var (
	kept string
	held []byte
)

func answer(words []string) (string, error) {
	switch words[0] {
	case "echo":
		return strings.Join(words[1:], " "), nil
	case "keep":
		kept = words[1]
		return "", nil
	case "kept":
		return kept, nil
	case "clock":
		b, err := os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
		return string(bytes.TrimSpace(b)), err
	case "uptime": // nanoseconds
		var now unix.Timespec
		err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
		return fmt.Sprint(now.Nano()), err
	case "cpus":
		return fmt.Sprint(runtime.NumCPU()), nil
	case "address":
		links, _ := filepath.Glob("/sys/class/net/e*/address")
		if len(links) != 1 {
			return "", fmt.Errorf("%d network cards", len(links))
		}
		b, err := os.ReadFile(links[0])
		return string(bytes.TrimSpace(b)), err
	case "disk": // serial: its device, or none
		return disk(words[1])
	case "sum": // device, bytes
		f, err := os.Open("/dev/" + words[1])
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return "", err
		}
		return fmt.Sprintf("%x", h.Sum(nil)), nil
	case "write": // device, text: at its start
		f, err := os.OpenFile("/dev/"+words[1], os.O_RDWR|unix.O_SYNC, 0)
		if err != nil {
			return "", err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(words[2]), 0)
		return "", err
	case "fill": // bytes: of memory, which are given back
		var n int
		if _, err := fmt.Sscan(words[1], &n); err != nil {
			return "", err
		}
		m, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return "", err
		}
		for i := 0; i < n; i += 4096 {
			m[i] = 1
		}
		return "", unix.Munmap(m)
	case "hold": // bytes: of memory, which are kept
		var n int
		if _, err := fmt.Sscan(words[1], &n); err != nil {
			return "", err
		}
		var err error
		held, err = unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		for i := range held {
			held[i] = 'h'
		}
		return "", err
	case "held": // how many bytes are as they were
		return fmt.Sprint(bytes.Count(held, []byte("h"))), nil
	case "release":
		return "", unix.Munmap(held)
	case "shout": // bytes: to the console
		var n int
		if _, err := fmt.Sscan(words[1], &n); err != nil {
			return "", err
		}
		_, err := os.Stdout.Write(bytes.Repeat([]byte("x"), n))
		return "", err
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "", fmt.Errorf("no word %q", words[0])
}

// disk finds a disk by its unit serial number (page 80h of the vital product data).
func disk(serial string) (string, error) {
	pages, err := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
	if err != nil {
		return "", err
	}
	for _, p := range pages {
		b, err := os.ReadFile(p)
		if err == nil && len(b) > 4 && string(b[4:]) == serial {
			return strings.Split(p, "/")[3], nil
		}
	}
	return "none", nil
}
