package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrTemplate is why a template cannot be cloned: there is none, or it was saved by
// another QEMU, of another kernel, initial file system, size or host. Save a new one.
var ErrTemplate = errors.New("the template does not fit")

// The files of a template.
const (
	memoryFile   = "memory"
	stateFile    = "state"
	manifestFile = "manifest.json"
)

// manifest is what a template and its clones must have in common.
type manifest struct {
	Boot    string   `json:"boot"` // the host's boot ID: processors and their clocks differ from boot to boot
	Files   []string `json:"files"`
	Machine []string `json:"machine"` // the kernel's parameters, and arguments of QEMU
}

func newManifest(m *machine, c Config, parameters string) (manifest, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return manifest{}, err
	}
	found := manifest{Boot: strings.TrimSpace(string(boot)), Machine: append([]string{parameters}, m.args...)}
	for _, path := range []string{m.binary, c.Kernel, c.Initrd} {
		identity, err := fileIdentity(path)
		if err != nil {
			return manifest{}, err
		}
		found.Files = append(found.Files, identity)
	}
	return found, nil
}

// fileIdentity changes with the file's content, unless someone means to deceive: a
// hash would take longer than the rest of a start.
func fileIdentity(path string) (string, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return fmt.Sprintf("%s: inode %d:%d, %d bytes, modified %d.%09d",
		path, s.Dev, s.Ino, s.Size, s.Mtim.Sec, s.Mtim.Nsec), nil
}

// differs says in what m and n differ, or is empty.
func (m manifest) differs(n manifest) string {
	switch {
	case m.Boot != n.Boot:
		return "the host was restarted"
	case !reflect.DeepEqual(m.Files, n.Files):
		return fmt.Sprintf("QEMU, the kernel or the initial file system were %q, and are %q", m.Files, n.Files)
	case !reflect.DeepEqual(m.Machine, n.Machine):
		return fmt.Sprintf("the machine was %q, and is %q", m.Machine, n.Machine)
	}
	return ""
}

// openTemplate opens the files of a template: they stay the same when the directory
// is replaced.
func openTemplate(dir string, want manifest, size int64) (memory, state *os.File, err error) {
	err = func() error {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		text, err := root.ReadFile(manifestFile)
		if err != nil {
			return err
		}
		var found manifest
		if err := json.Unmarshal(text, &found); err != nil {
			return err
		}
		if d := found.differs(want); d != "" {
			return errors.New(d)
		}
		if memory, err = root.Open(memoryFile); err != nil {
			return err
		}
		if info, err := memory.Stat(); err != nil || info.Size() != size {
			memory.Close()
			return errors.Join(err, errors.New("its memory is incomplete"))
		}
		if state, err = root.Open(stateFile); err != nil {
			memory.Close()
		}
		return err
	}()
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %s: %w", ErrTemplate, dir, err)
	}
	return memory, state, nil
}

// setMigration makes a migration leave out memory that is in a file, and announce
// nothing on the network, where nobody knows a template's hardware address.
func (v *VM) setMigration(ctx context.Context) error {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	err := v.monitor.Execute(ctx, "migrate-set-capabilities", map[string]any{
		"capabilities": []capability{{"x-ignore-shared", true}, {"events", true}},
	}, nil)
	if err != nil {
		return err
	}
	return v.monitor.Execute(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil)
}

// awaitMigration waits for the end of a migration.
func (v *VM) awaitMigration(ctx context.Context) error {
	select {
	case <-v.migrated:
	case <-v.done:
		return v.Err()
	case <-ctx.Done():
		return fmt.Errorf("QEMU did not finish a migration: %w", context.Cause(ctx))
	}
	var answer struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	if err := v.monitor.Execute(ctx, "query-migrate", nil, &answer); err != nil {
		return err
	}
	if answer.Status != "completed" {
		return fmt.Errorf("migration %s: %s", answer.Status, answer.Error)
	}
	return nil
}

// load makes the machine continue where a template was saved.
func (v *VM) load(ctx context.Context, state *os.File) error {
	if err := v.setMigration(ctx); err != nil {
		return err
	}
	return v.migrate(ctx, "migrate-incoming", state)
}

// save stops the machine and writes its state.
func (v *VM) save(ctx context.Context, state *os.File) error {
	if err := v.setMigration(ctx); err != nil {
		return err
	}
	if err := v.monitor.Execute(ctx, "stop", nil, nil); err != nil {
		return err
	}
	return v.migrate(ctx, "migrate", state)
}

func (v *VM) migrate(ctx context.Context, command string, state *os.File) error {
	if err := v.monitor.SendFile(ctx, "state", state); err != nil {
		return err
	}
	if err := v.monitor.Execute(ctx, command, map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return v.awaitMigration(ctx)
}

// templateAddr is the hardware address of a template's card.
var templateAddr = net.HardwareAddr{2, 0, 0, 0, 0, 1}

// SaveTemplate boots the machine, calls ready with its channel when the guest has
// opened that, and saves it into dir, which is then complete and replaces what was
// there, or is as it was. ready talks with the guest, and returns when that is as its
// clones shall be.
//
// After ready the channel is closed. The guest must then close its port and open it
// again, so that none of its clones takes its host for the template's.
//
// Of callers who want the same template at the same time, one saves it and the others
// wait for that.
func SaveTemplate(ctx context.Context, c Config, dir string, ready func(context.Context, io.ReadWriteCloser) error) error {
	if err := saveTemplate(ctx, c, filepath.Clean(dir), ready); err != nil {
		return fmt.Errorf("save template %s: %w", dir, err)
	}
	return nil
}

func saveTemplate(ctx context.Context, c Config, dir string, ready func(context.Context, io.ReadWriteCloser) error) (err error) {
	if err := c.chooseAccel(ctx); err != nil {
		return err
	}
	partial := partialName(dir)
	begin := time.Now()
	unlock, err := lock(ctx, partial+".lock", unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	// There may be one that someone left who was killed.
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := os.Mkdir(partial, 0o700); err != nil {
		return err
	}
	defer func() {
		// What is here is the partial template, or the one that was replaced.
		err = errors.Join(err, os.RemoveAll(partial))
	}()
	if c.NIC != nil && c.NIC.Tap == nil {
		tap, err := unconnectedTap()
		if err != nil {
			return err
		}
		defer tap.Close()
		c.NIC = &NIC{Tap: tap, HardwareAddr: templateAddr}
	}
	c.Template = ""
	m, err := newMachine(c)
	if err != nil {
		return err
	}
	defer m.close()
	if info, err := os.Stat(filepath.Join(dir, manifestFile)); err == nil && info.ModTime().After(begin) {
		if memory, state, err := openTemplate(dir, m.manifest, c.Memory); err == nil {
			return errors.Join(memory.Close(), state.Close())
		}
	}
	memory, err := os.OpenFile(filepath.Join(partial, memoryFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	m.fileMemory(memory, true)
	if err := memory.Truncate(c.Memory); err != nil {
		return err
	}
	state, err := os.OpenFile(filepath.Join(partial, stateFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer state.Close()
	v, err := m.launch(ctx, c)
	if err != nil {
		return err
	}
	defer func() {
		v.Kill()
		<-v.done
		v.channel.Close()
	}()
	if err := v.monitor.Execute(ctx, "cont", nil, nil); err != nil {
		return v.failure(err)
	}
	if err := v.awaitPort(ctx, 1); err != nil {
		return v.failure(err)
	}
	if err := ready(ctx, v.channel); err != nil {
		return v.failure(err)
	}
	v.mu.Lock()
	opened := v.opened
	v.mu.Unlock()
	v.channel.Close()
	if err := v.awaitPort(ctx, opened+1); err != nil {
		return v.failure(err)
	}
	if err := v.save(ctx, state); err != nil {
		return v.failure(err)
	}
	text, err := json.MarshalIndent(m.manifest, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(partial, manifestFile), append(text, '\n'), 0o600); err != nil {
		return err
	}
	return replaceDir(partial, dir)
}

// partialName is what dir is called while it is incomplete.
func partialName(dir string) string {
	return filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir))
}

// replaceDir gives the directory partial the name dir. What had that name has then
// the other.
func replaceDir(partial, dir string) error {
	err := unix.Renameat2(unix.AT_FDCWD, partial, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.ENOENT) {
		err = os.Rename(partial, dir)
	}
	return err
}

// AwaitGuest waits until the guest has opened the channel's port. Nobody reads the
// channel before: what is timed there should begin here.
func (v *VM) AwaitGuest(ctx context.Context) error {
	if err := v.awaitPort(ctx, 1); err != nil {
		return fmt.Errorf("virtual machine %s: %w", v.id, err)
	}
	return nil
}

// awaitPort waits until the guest has opened the channel's port for the nth time.
func (v *VM) awaitPort(ctx context.Context, n int) error {
	for {
		v.mu.Lock()
		opened, changed := v.opened, v.portChanged
		v.mu.Unlock()
		if opened >= n {
			return nil
		}
		select {
		case <-changed:
		case <-v.done:
			return v.Err()
		case <-ctx.Done():
			if n > 1 {
				return fmt.Errorf("the guest did not open its port again when the channel was closed: %w", context.Cause(ctx))
			}
			return fmt.Errorf("the guest did not open its port: %w", context.Cause(ctx))
		}
	}
}

// unconnectedTap makes a tap device that is in no network namespace that has a name:
// it disappears with the file.
func unconnectedTap() (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	made := make(chan result)
	go func() {
		// The thread is in a namespace of its own from here on, and ends with the
		// goroutine because it is never unlocked.
		runtime.LockOSThread()
		file, err := func() (*os.File, error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return nil, fmt.Errorf("new network namespace: %w", err)
			}
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("/dev/net/tun: %w", err)
			}
			file := os.NewFile(uintptr(fd), "tap")
			request, err := unix.NewIfreq("tap0")
			if err == nil {
				request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
				err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
			}
			if err != nil {
				file.Close()
				return nil, fmt.Errorf("make a tap device: %w", err)
			}
			return file, nil
		}()
		made <- result{file, err}
	}()
	r := <-made
	return r.file, r.err
}
