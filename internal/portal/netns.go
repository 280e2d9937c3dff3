package portal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inNetns runs fn on a thread that is in ns; programs that fn starts and sockets that it opens are in ns, too.
func inNetns(ns netns.NsHandle, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err = netns.Set(ns); err != nil {
			err = fmt.Errorf("enter network namespace: %w", err)
		} else {
			err = fn()
		}
		// A thread that cannot go home stays locked, so that it ends with its goroutine.
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// newNetns makes a network namespace that lives as long as the handle does.
func newNetns() (netns.NsHandle, error) {
	type made struct {
		ns  netns.NsHandle
		err error
	}
	result := make(chan made, 1)
	go func() {
		// The thread is never unlocked: it is of no use any more and ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			result <- made{netns.None(), fmt.Errorf("make network namespace: %w", err)}
			return
		}
		ns, err := netns.Get()
		result <- made{ns, err}
	}()
	m := <-result
	return m.ns, m.err
}

// isNetns says whether path is a namespace, rather than an empty file left by a crash, or nothing.
func isNetns(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// sameNetns says whether path is the namespace ns.
func sameNetns(path string, ns netns.NsHandle) bool {
	var a, b unix.Stat_t
	return unix.Stat(path, &a) == nil && unix.Fstat(int(ns), &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// bindNetns gives ns the name path, in place of whatever has it now.
func bindNetns(ns netns.NsHandle, path string) error {
	if err := unbindNetns(path); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", int(ns)), path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("bind network namespace to %s: %w", path, err)
	}
	return nil
}

// unbindNetns removes the name path of a namespace.
func unbindNetns(path string) error {
	for isNetns(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// setSysctl writes net.<name> of the current thread's namespace, unless it has that value.
func setSysctl(name, value string) error {
	path := filepath.Join("/proc/sys/net", name)
	old, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && strings.HasPrefix(name, "ipv6/") {
		return nil // A kernel without IPv6 needs no telling.
	}
	if err == nil && strings.TrimSpace(string(old)) == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl net/%s to %s: %w", name, value, err)
	}
	return nil
}
