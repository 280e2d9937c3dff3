package directvolume

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestLife(t *testing.T) {
	dir := t.TempDir()
	s, target := New(filepath.Join(dir, "records")), filepath.Join(dir, "pods/u/volumes/kubernetes.io~csi/v/mount")
	v := Volume{
		Disk:       map[string]any{"driver": "nbd", "server": map[string]any{"type": "unix", "path": "/s"}},
		FileSystem: "ext4", Options: []string{"noatime"}, ReadOnly: true,
	}
	if _, err := s.Attach(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("before it is published: %v, want ErrNotExist", err)
	}
	for range 2 {
		must(t, s.Publish(target, v))
	}
	if err := s.Publish(target, Volume{Disk: map[string]any{"driver": "file"}}); err == nil {
		t.Error("another disk takes its place")
	}
	// As the kubelet does it for a subPath, and as containerd finds the path.
	must(t, os.MkdirAll(filepath.Join(target, "a", "b"), 0o750))
	link := filepath.Join(dir, "link")
	must(t, os.Symlink(filepath.Join(dir, "pods"), link))
	a, err := s.Attach(filepath.Join(link, "u/volumes/kubernetes.io~csi/v/mount"))
	must(t, err)
	if d := cmp.Diff(v, a.Volume); d != "" {
		t.Error(d)
	}
	if a.Unpublished() {
		t.Error("it is unpublished already")
	}

	hurried, cancel := context.WithTimeout(t.Context(), 3*releasePoll)
	defer cancel()
	if err := s.Unpublish(hurried, target); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while a machine has it: %v, want a deadline", err)
	}
	if !a.Unpublished() {
		t.Error("the machine is not told")
	}
	if _, err := s.Attach(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("attached again: %v, want ErrNotExist", err)
	}
	patient, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan error)
	go func() { done <- s.Unpublish(patient, target) }()
	must(t, a.Release())
	must(t, <-done)
	must(t, s.Unpublish(patient, target))
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the target: %v, want none", err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "records")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestForeign: what somebody has put at the target is not taken away.
func TestForeign(t *testing.T) {
	dir := t.TempDir()
	s, target := New(filepath.Join(dir, "records")), filepath.Join(dir, "target")
	must(t, s.Publish(target, Volume{Disk: map[string]any{"driver": "file"}, FileSystem: "xfs"}))
	file := filepath.Join(target, "precious")
	must(t, os.WriteFile(file, nil, 0o600))
	if err := s.Unpublish(t.Context(), target); err == nil {
		t.Error("no error")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestRefused(t *testing.T) {
	for name, test := range map[string]struct {
		target string
		volume Volume
		want   string
	}{
		"relative":    {"a/b", Volume{Disk: map[string]any{"driver": "file"}, FileSystem: "ext4"}, "absolute"},
		"no driver":   {"/a", Volume{Disk: map[string]any{"filename": "/x"}}, "disk.driver"},
		"file system": {"/a", Volume{Disk: map[string]any{"driver": "file"}, FileSystem: "ntfs"}, "use one of ext4, xfs"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "records")
			err := New(dir).Publish(test.target, test.volume)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("something was written")
			}
		})
	}
}
