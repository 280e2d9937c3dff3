package shim

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestEndWithBundle(t *testing.T) {
	bundle := filepath.Join(t.TempDir(), "bundle")
	if err := os.Mkdir(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(bundle)
	done, ended := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(done) })
	go endWithBundle(done, time.Millisecond, func() { close(ended) })

	// As containerd does: it renames the bundle first.
	hidden := filepath.Join(filepath.Dir(bundle), ".bundle")
	if err := os.Rename(bundle, hidden); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Fatal("the shim ended while its bundle was there")
	case <-time.After(50 * time.Millisecond):
	}
	if err := os.Remove(hidden); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the bundle is gone, and the shim goes on")
	}
}
