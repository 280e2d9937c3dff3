package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestStopWhileItStarts: the shim may end as soon as stop has returned, so nothing of a start
// that was under way is left by then.
func TestStopWhileItStarts(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	settings := Config{CacheDir: filepath.Join(dir, "cache"), RunDir: filepath.Join(dir, "run"), Accel: "tcg"}
	// Somebody collects templates, and the machine waits for them.
	if err := os.MkdirAll(filepath.Join(settings.CacheDir, "templates"), 0o700); err != nil {
		t.Fatal(err)
	}
	collects, err := os.OpenFile(filepath.Join(settings.CacheDir, "templates", ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer collects.Close()
	if err := unix.Flock(int(collects.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	p, err := newPod("sandbox", &cri.PodSandboxConfig{}, podNamespace(t), settings, t.TempDir(), func(string, any) {})
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- p.start(ctx) }()
	for {
		_, err := os.Stat(p.left.RunDir)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			t.Fatalf("it does not start: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
	for range 2 {
		if err := p.stop(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(p.left.RunDir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the pod was stopped, and its directory is there (%v)", err)
		}
	}
	if err := <-started; !errors.Is(err, errStopped) {
		t.Errorf("the start ends with %v, want %v", err, errStopped)
	}
	if err := p.start(ctx); err == nil {
		t.Error("a pod that was stopped starts")
	}
}

// podNamespace makes a network namespace with an eth0, and returns its path.
func podNamespace(t *testing.T) string {
	t.Helper()
	type made struct {
		ns  netns.NsHandle
		err error
	}
	done := make(chan made)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		if err == nil {
			err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "node"})
		}
		done <- made{ns, err}
	}()
	m := <-done
	if m.err != nil {
		t.Fatal(m.err)
	}
	t.Cleanup(func() { m.ns.Close() })
	return fmt.Sprintf("/proc/self/fd/%d", int(m.ns))
}
