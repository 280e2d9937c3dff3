//go:build hyper

package layers

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func newCache(t *testing.T) *Cache {
	t.Helper()
	c, err := NewCache(filepath.Join(t.TempDir(), "cache"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// layer is a directory with everything that an upper layer of an image can have.
func layer(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "fs")
	must(t, os.MkdirAll(filepath.Join(dir, "opaque"), 0o755))
	must(t, unix.Setxattr(filepath.Join(dir, "opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	must(t, unix.Mknod(filepath.Join(dir, "removed"), unix.S_IFCHR, 0))
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o640))
	must(t, os.Chown(filepath.Join(dir, "file"), 12345, 54321))
	must(t, os.Symlink("file", filepath.Join(dir, "link")))
	must(t, os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "hard")))
	must(t, unix.Setxattr(filepath.Join(dir, "file"), "user.note", []byte("hello"), 0))
	return dir
}

// What an image holds is read back with fsck.erofs, which needs no erofs in the kernel.
func TestImageHoldsTheLayer(t *testing.T) {
	c, source := newCache(t), layer(t)
	image, err := c.Ensure(t.Context(), source)
	must(t, err)
	if len(image.Serial) > 20 {
		t.Errorf("the serial %s has more than 20 characters", image.Serial)
	}
	out := filepath.Join(t.TempDir(), "out")
	must(t, os.Mkdir(out, 0o755))
	if text, err := exec.Command("fsck.erofs", "--extract="+out, "--overwrite", image.Path).CombinedOutput(); err != nil {
		t.Fatalf("fsck.erofs: %v: %s", err, text)
	}
	if content, err := os.ReadFile(filepath.Join(out, "link")); err != nil || string(content) != "content" {
		t.Errorf("read %q, %v by the link", content, err)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(out, "file"), &st))
	if st.Uid != 12345 || st.Gid != 54321 || st.Mode&0o777 != 0o640 {
		t.Errorf("the file is %d:%d %o", st.Uid, st.Gid, st.Mode&0o777)
	}
	must(t, unix.Stat(filepath.Join(out, "removed"), &st))
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the whiteout has mode %o, device %d", st.Mode, st.Rdev)
	}
	// This fsck.erofs does not extract attributes; it is enough that they are stored.
	content, err := os.ReadFile(image.Path)
	must(t, err)
	for _, attribute := range []string{"overlay.opaque", "note"} {
		if !strings.Contains(string(content), attribute) {
			t.Errorf("the image has no attribute %s", attribute)
		}
	}
}

func TestMadeOnce(t *testing.T) {
	c, source := newCache(t), layer(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	inodes := map[uint64]bool{}
	for range 8 {
		wg.Go(func() {
			image, err := c.Ensure(t.Context(), source)
			if err != nil {
				t.Error(err)
				return
			}
			var st unix.Stat_t
			if err := unix.Stat(image.Path, &st); err != nil {
				t.Error(err)
			}
			mu.Lock()
			inodes[st.Ino] = true
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(inodes) != 1 {
		t.Errorf("%d images were made, want one", len(inodes))
	}
}

func TestNothingHalfMade(t *testing.T) {
	c, source := newCache(t), layer(t)
	t.Run("the program fails", func(t *testing.T) {
		bin := t.TempDir()
		must(t, os.WriteFile(filepath.Join(bin, "mkfs.erofs"), []byte("#!/bin/sh\necho half > $2; echo no space left >&2; exit 1\n"), 0o755))
		t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
		if _, err := c.Ensure(t.Context(), source); err == nil || !strings.Contains(err.Error(), "no space left") {
			t.Errorf("error %v", err)
		}
		images, _ := filepath.Glob(filepath.Join(c.dir, "*[^k]")) // all but *.lock
		if len(images) != 0 {
			t.Errorf("left behind: %v", images)
		}
	})
	t.Run("the next caller makes it", func(t *testing.T) {
		if _, err := c.Ensure(t.Context(), source); err != nil {
			t.Error(err)
		}
	})
}

func TestEnsureGivesUpWithItsContext(t *testing.T) {
	c, source := newCache(t), layer(t)
	serial, err := serialOf(source)
	must(t, err)
	unlock, err := c.lock(t.Context(), serial) // as another process that makes it
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Ensure(ctx, source); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	unlock()
	if _, err := c.Ensure(t.Context(), source); err != nil {
		t.Error(err)
	}
}

func TestCollect(t *testing.T) {
	c, kept, gone, replaced := newCache(t), layer(t), layer(t), layer(t)
	var images []Image
	for _, source := range []string{kept, gone, replaced} {
		image, err := c.Ensure(t.Context(), source)
		must(t, err)
		images = append(images, image)
	}
	must(t, os.RemoveAll(gone))
	must(t, os.Rename(replaced, replaced+".old"))
	must(t, os.Mkdir(replaced, 0o755))
	must(t, c.Collect())
	for i, want := range []bool{true, false, false} {
		if _, err := os.Stat(images[i].Path); (err == nil) != want {
			t.Errorf("image %d: %v, want it there: %v", i, err, want)
		}
	}
	if again, err := c.Ensure(t.Context(), replaced); err != nil || again == images[2] {
		t.Errorf("the directory that took the name got %v, %v", again, err)
	}
}

// What somebody began to write who was killed goes; what somebody is writing stays.
func TestCollectHalfWritten(t *testing.T) {
	for name, test := range map[string]struct{ writing, want bool }{"abandoned": {false, false}, "being written": {true, true}} {
		t.Run(name, func(t *testing.T) {
			c, source := newCache(t), layer(t)
			image, err := c.Ensure(t.Context(), source)
			must(t, err)
			partial := filepath.Join(c.dir, image.Serial+partialSuffix)
			must(t, os.Rename(image.Path, partial))
			if test.writing {
				unlock, err := c.lock(t.Context(), image.Serial)
				must(t, err)
				defer unlock()
			}
			must(t, c.Collect())
			if _, err := os.Stat(partial); (err == nil) != test.want {
				t.Errorf("%v, want it there: %v", err, test.want)
			}
		})
	}
}

func TestDirectories(t *testing.T) {
	for name, test := range map[string]struct {
		mounts []*types.Mount
		want   []string
		refuse string
	}{
		"overlay": {
			mounts: []*types.Mount{{Type: "overlay", Options: []string{"index=off", "upperdir=/9/fs", "lowerdir=/3/fs:/2/fs:/1/fs"}}},
			want:   []string{"/1/fs", "/2/fs", "/3/fs"},
		},
		"one directory": {
			mounts: []*types.Mount{{Type: "bind", Source: "/1/fs", Options: []string{"rbind", "rw"}}},
			want:   []string{"/1/fs"},
		},
		"another file system": {mounts: []*types.Mount{{Type: "zfs"}}, refuse: "use the snapshotter overlayfs"},
		"nothing":             {refuse: "0 mounts"},
		"no lower layers":     {mounts: []*types.Mount{{Type: "overlay"}}, refuse: "without lowerdir"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Directories(test.mounts)
			if test.refuse != "" {
				if err == nil || !strings.Contains(err.Error(), test.refuse) {
					t.Fatalf("error %v, want one with %q", err, test.refuse)
				}
				return
			}
			must(t, err)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
