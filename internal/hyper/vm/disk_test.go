//go:build hyper

package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDisks(t *testing.T) { testDisks(t, boot(t, config(t))) }

func testDisks(t *testing.T, g *guest) {
	for name, backend := range map[string]func(t *testing.T, content []byte) (_ map[string]any, read func() []byte){
		"file": fileBackend,
		"nbd":  nbdBackend,
	} {
		t.Run(name, func(t *testing.T) {
			content := bytes.Repeat([]byte(name), 1<<20)
			options, read := backend(t, content)
			disk := Disk{Serial: "0123456789-" + name, Backend: options}
			for range 2 { // the same disk once more, after it was removed
				for range 2 { // idempotent
					if err := g.AddDisk(deadline(t), disk); err != nil {
						t.Fatal(err)
					}
				}
				device := g.awaitDisk(disk.Serial)
				want := fmt.Sprintf("%x", sha256.Sum256(read()))
				if got := g.ask("sum " + device); got != want {
					t.Errorf("sum %s, want %s", got, want)
				}
				g.ask("write %s HELLO", device)
				if got := read(); !bytes.HasPrefix(got, []byte("HELLO")) {
					t.Errorf("after the guest's write it begins with %q", got[:8])
				}
				for range 2 {
					if err := g.RemoveDisk(deadline(t), disk.Serial); err != nil {
						t.Fatal(err)
					}
				}
				eventually(t, "the guest loses the disk", func() (bool, string) {
					got := g.ask("disk " + disk.Serial)
					return got == "none", got
				})
			}
			disk.ReadOnly = true
			if err := g.AddDisk(deadline(t), disk); err != nil {
				t.Fatal(err)
			}
			device := g.awaitDisk(disk.Serial)
			if _, err := ask(g.Channel(), g.in, "write "+device+" WORLD"); err == nil {
				t.Error("the guest can write to a disk that is read-only")
			}
			if err := g.RemoveDisk(deadline(t), disk.Serial); err != nil {
				t.Fatal(err)
			}
			if err := noFiles(g.Pid(), "content"); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("many", func(t *testing.T) {
		const many = 40
		for i := range many {
			options, _ := fileBackend(t, fmt.Appendf(nil, "%512d", i))
			if err := g.AddDisk(deadline(t), Disk{Serial: fmt.Sprint("d", i), ReadOnly: true, Backend: options}); err != nil {
				t.Fatal(err)
			}
		}
		for i := range many {
			device := g.awaitDisk(fmt.Sprint("d", i))
			want := fmt.Sprintf("%x", sha256.Sum256(fmt.Appendf(nil, "%512d", i)))
			if got := g.ask("sum " + device); got != want {
				t.Errorf("disk %d: sum %s, want %s", i, got, want)
			}
		}
		for i := range many {
			if err := g.RemoveDisk(deadline(t), fmt.Sprint("d", i)); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("refused", func(t *testing.T) {
		backend := map[string]any{"driver": "null-co", "size": 1 << 20}
		for name, disk := range map[string]Disk{
			"no serial":      {Backend: backend},
			"long serial":    {Serial: strings.Repeat("a", maxSerial+1), Backend: backend},
			"odd serial":     {Serial: "a,b", Backend: backend},
			"no backend":     {Serial: "a"},
			"a directory":    {Serial: "e", Backend: map[string]any{"driver": "file", "filename": "/"}},
			"a character":    {Serial: "f", Backend: map[string]any{"driver": "host_device", "filename": "/dev/zero"}},
			"no such file":   {Serial: "b", Backend: map[string]any{"driver": "file", "filename": "/nonexistent"}},
			"no such driver": {Serial: "c", Backend: map[string]any{"driver": "none"}},
			"nobody listens": {Serial: "d", Backend: nbdOptions("/nonexistent")},
		} {
			t.Run(name, func(t *testing.T) {
				err := g.AddDisk(deadline(t), disk)
				if err == nil {
					t.Fatal("it is added")
				}
				t.Log(err)
				disk.Backend = backend
				if disk.Serial = strings.Trim(disk.Serial, ","); len(disk.Serial) == 1 {
					if err := g.AddDisk(deadline(t), disk); err != nil {
						t.Errorf("after that, with a backend: %v", err)
					}
					if err := g.RemoveDisk(deadline(t), disk.Serial); err != nil {
						t.Error(err)
					}
				}
			})
		}
	})
	t.Run("in use", func(t *testing.T) {
		options, _ := fileBackend(t, make([]byte, 1<<20))
		loop, err := exec.Command("losetup", "--find", "--show", options["filename"].(string)).Output()
		if err != nil {
			t.Fatal(err)
		}
		device := strings.TrimSpace(string(loop))
		t.Cleanup(func() { _ = exec.Command("losetup", "--detach", device).Run() })
		for name, backend := range map[string]map[string]any{
			"file": options, "device": {"driver": "host_device", "filename": device},
		} {
			t.Run(name, func(t *testing.T) {
				if err := g.AddDisk(deadline(t), Disk{Serial: "first", Backend: backend}); err != nil {
					t.Fatal(err)
				}
				// One machine's two disks are no less strangers than two machines' are.
				second := Disk{Serial: "second", Backend: backend}
				err := g.AddDisk(deadline(t), second)
				if !errors.Is(err, ErrInUse) {
					t.Errorf("the second: %v, want ErrInUse", err)
				}
				if err := g.RemoveDisk(deadline(t), "first"); err != nil {
					t.Fatal(err)
				}
				if err := g.AddDisk(deadline(t), second); err != nil {
					t.Errorf("after the first was removed: %v", err)
				}
				if err := g.RemoveDisk(deadline(t), "second"); err != nil {
					t.Fatal(err)
				}
			})
		}
	})
	t.Run("cut off", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		options, _ := fileBackend(t, make([]byte, 1<<20))
		disk := Disk{Serial: "cut-off", Backend: options}
		if err := g.AddDisk(ctx, disk); err == nil {
			t.Error("it is added by a caller who has left")
		}
		if err := g.AddDisk(deadline(t), disk); err != nil {
			t.Error(err)
		}
		if err := g.RemoveDisk(ctx, disk.Serial); err == nil {
			t.Error("it is removed by a caller who has left")
		}
		if err := g.RemoveDisk(deadline(t), disk.Serial); err != nil {
			t.Error(err)
		}
	})
}

func (g *guest) awaitDisk(serial string) (device string) {
	g.t.Helper()
	eventually(g.t, "the guest finds the disk "+serial, func() (bool, string) {
		device = g.ask("disk " + serial)
		return device != "none", device
	})
	return device
}

// noFiles fails when a process has a file open whose name contains part.
func noFiles(pid int, part string) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if path, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && strings.Contains(path, part) {
			return fmt.Errorf("QEMU has %s open", path)
		}
	}
	return nil
}

func fileBackend(t *testing.T, content []byte) (options map[string]any, read func() []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]any{"driver": "file", "filename": path}, func() []byte {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Error(err)
		}
		return got
	}
}

// nbdBackend serves a file from another process.
func nbdBackend(t *testing.T, content []byte) (options map[string]any, read func() []byte) {
	t.Helper()
	file, read := fileBackend(t, content)
	socket := filepath.Join(t.TempDir(), "nbd")
	server := exec.Command("qemu-nbd", "--persistent", "--shared=2", "--format=raw", "--socket="+socket, file["filename"].(string))
	server.Stderr = os.Stderr
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(unix.SIGTERM)
		_ = server.Wait()
	})
	eventually(t, "qemu-nbd listens", func() (bool, string) {
		_, err := os.Stat(socket)
		return err == nil, fmt.Sprint(err)
	})
	return nbdOptions(socket), read
}

func nbdOptions(socket string) map[string]any {
	return map[string]any{"driver": "nbd", "server": map[string]any{"type": "unix", "path": socket}}
}
