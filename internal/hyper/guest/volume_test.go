//go:build linux

package guest

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// entry is one of an archive.
type entry struct {
	name, data, link string
	kind             byte // 0: what link and a slash at the end say
	mode             int64
	uid              int
}

func pack(t testing.TB, entries ...entry) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{
			Name: e.name, Linkname: e.link, Size: int64(len(e.data)), Mode: e.mode, Uid: e.uid, Gid: e.uid,
			Typeflag: e.kind, ModTime: time.Unix(1_000_000, 0),
		}
		switch {
		case h.Typeflag != 0:
		case e.link != "":
			h.Typeflag = tar.TypeSymlink
		case e.name == "." || strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		default:
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// list describes what is below dir, or the file that dir is.
func list(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := fmt.Sprintf("%s %d", info.Mode(), info.Sys().(*syscall.Stat_t).Uid)
		switch info.Mode().Type() {
		case 0:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += " " + string(data)
		case fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " -> " + to
		}
		name, err := filepath.Rel(dir, path)
		found[name] = what
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestVolumeTree(t *testing.T) {
	for name, test := range map[string]struct {
		before, archive []entry
		want            map[string]string
	}{
		"new": {
			archive: []entry{
				{name: "./", mode: 0o2770, uid: 7},
				{name: "..v1/", mode: 0o750},
				{name: "..v1/key", data: "value", mode: 0o440, uid: 7},
				{name: "..data", link: "..v1"},
				{name: "key", link: "..data/key"},
			},
			want: map[string]string{
				".": "dgrwxrwx--- 7", "..v1": "drwxr-x--- 0", "..v1/key": "-r--r----- 7 value",
				"..data": "Lrwxrwxrwx 0 -> ..v1", "key": "Lrwxrwxrwx 0 -> ..data/key",
			},
		},
		"update": {
			before:  []entry{{name: "."}, {name: "..v1/old", data: "1"}, {name: "..data", link: "..v1"}, {name: "old", link: "..data/old"}},
			archive: []entry{{name: "."}, {name: "..data", link: "..v2"}, {name: "new", link: "..data/new"}, {name: "..v2/new", data: "2"}},
			want: map[string]string{
				".": "drwxr-xr-x 0", "..v2": "drwxr-xr-x 0", "..v2/new": "-rwxr-xr-x 0 2",
				"..data": "Lrwxrwxrwx 0 -> ..v2", "new": "Lrwxrwxrwx 0 -> ..data/new",
			},
		},
		"types change": {
			before:  []entry{{name: "."}, {name: "a/x/y", data: "1"}, {name: "b", data: "1"}, {name: "c", link: "a"}, {name: "d/e", data: "1"}},
			archive: []entry{{name: "."}, {name: "a", data: "2"}, {name: "b/f", data: "2"}, {name: "c/f", data: "2"}, {name: "d", link: "a"}},
			want: map[string]string{
				".": "drwxr-xr-x 0", "a": "-rwxr-xr-x 0 2", "b": "drwxr-xr-x 0", "b/f": "-rwxr-xr-x 0 2",
				"c": "drwxr-xr-x 0", "c/f": "-rwxr-xr-x 0 2", "d": "Lrwxrwxrwx 0 -> a",
			},
		},
		"nothing left": {
			before:  []entry{{name: "."}, {name: "a/x/y", data: "1"}},
			archive: []entry{{name: ".", mode: 0o1777}},
			want:    map[string]string{".": "dtrwxrwxrwx 0"},
		},
		"links out lead nowhere for us": {
			before:  []entry{{name: "."}, {name: "out", link: "../../outside"}},
			archive: []entry{{name: "."}, {name: "out/file", data: "in"}},
			want:    map[string]string{".": "drwxr-xr-x 0", "out": "drwxr-xr-x 0", "out/file": "-rwxr-xr-x 0 in"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			outside := filepath.Join(dir, "outside")
			if err := os.Mkdir(outside, 0o755); err != nil {
				t.Fatal(err)
			}
			v := newVolumes(filepath.Join(dir, "volumes"), 0)
			if err := os.Mkdir(v.dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if test.before != nil {
				if err := v.apply("v", pack(t, test.before...)); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := v.apply("v", pack(t, test.archive...)); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(test.want, list(t, filepath.Join(v.dir, "v"))); d != "" {
					t.Error(d)
				}
			}
			if d := cmp.Diff(map[string]string{".": "drwxr-xr-x 0"}, list(t, outside)); d != "" {
				t.Error("something was written outside of the volume:", d)
			}
		})
	}
}

// TestVolumeRefused: what is refused leaves the links where they led, and nothing
// outside.
func TestVolumeRefused(t *testing.T) {
	truncated := pack(t, entry{name: "."}, entry{name: "key", link: "..v2"}, entry{name: "..v2", data: strings.Repeat("x", 4096)})
	truncated.Truncate(2048)
	for name, archive := range map[string]io.Reader{
		"empty":         &bytes.Buffer{},
		"garbage":       strings.NewReader(strings.Repeat("garbage ", 1000)),
		"truncated":     truncated,
		"parent":        pack(t, entry{name: "."}, entry{name: "../x", data: "1"}),
		"hidden parent": pack(t, entry{name: "."}, entry{name: "a/../../x", data: "1"}),
		"absolute":      pack(t, entry{name: "."}, entry{name: "/x", data: "1"}),
		"hard link":     pack(t, entry{name: "."}, entry{name: "x", link: "/etc/passwd", kind: tar.TypeLink}),
		"device":        pack(t, entry{name: "."}, entry{name: "x", kind: tar.TypeChar}),
		"our names":     pack(t, entry{name: "."}, entry{name: stageName, data: "1"}),
	} {
		t.Run(name, func(t *testing.T) {
			v := newVolumes(t.TempDir(), 0)
			if err := v.apply("v", pack(t, entry{name: "."}, entry{name: "..v1", data: "1"}, entry{name: "key", link: "..v1"})); err != nil {
				t.Fatal(err)
			}
			if err := v.apply("v", archive); !errors.As(err, new(badRequestError)) {
				t.Errorf("error %v, want one of the request", err)
			}
			if data, err := os.ReadFile(filepath.Join(v.dir, "v", "key")); string(data) != "1" {
				t.Errorf("key holds %q (%v)", data, err)
			}
			if d := cmp.Diff([]string{"v"}, names(t, v.dir)); d != "" {
				t.Error(d)
			}
		})
	}
	for _, name := range []string{"", ".", "..", "a/b", "../x", strings.Repeat("x", 300)} {
		v := newVolumes(t.TempDir(), 0)
		if err := v.apply(name, pack(t, entry{name: "."})); !errors.As(err, new(badRequestError)) {
			t.Errorf("a volume of the name %q: %v", name, err)
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestVolumeFile: a bind mount of the file sees the new content.
func TestVolumeFile(t *testing.T) {
	v := newVolumes(t.TempDir(), 0)
	file := filepath.Join(v.dir, "v")
	var mounted *os.File // as a bind mount keeps it
	for _, data := range []string{"a long text", "short", ""} {
		if err := v.apply("v", pack(t, entry{name: ".", data: data, kind: tar.TypeReg, mode: 0o640, uid: 5})); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(map[string]string{".": "-rw-r----- 5 " + data}, list(t, file)); d != "" {
			t.Error(d)
		}
		if mounted == nil {
			var err error
			if mounted, err = os.Open(file); err != nil {
				t.Fatal(err)
			}
			defer mounted.Close()
		}
		seen, err := io.ReadAll(io.NewSectionReader(mounted, 0, 1<<10))
		if err != nil || string(seen) != data {
			t.Errorf("the mounted file holds %q (%v), want %q", seen, err, data)
		}
	}
	if d := cmp.Diff([]string{"v"}, names(t, v.dir)); d != "" {
		t.Error(d)
	}
	two := pack(t, entry{name: ".", data: "x", kind: tar.TypeReg}, entry{name: "more", data: "y"})
	if err := v.apply("v", two); !errors.As(err, new(badRequestError)) {
		t.Errorf("a file and more: %v", err)
	}
	if err := v.apply("tree", pack(t, entry{name: "."})); err != nil {
		t.Fatal(err)
	}
	if err := v.apply("tree", pack(t, entry{name: ".", kind: tar.TypeReg})); !errors.As(err, new(badRequestError)) {
		t.Errorf("a tree becomes a file: %v", err)
	}
}

func TestVolumeScratch(t *testing.T) {
	v := newVolumes(t.TempDir(), 0)
	t.Cleanup(func() {
		for _, name := range []string{"plain", "sized"} {
			if err := v.remove(name); err != nil {
				t.Error(err)
			}
		}
		if left := names(t, v.dir); len(left) > 1 {
			t.Errorf("left: %q", left)
		}
	})
	for name, size := range map[string]int64{"plain": 0, "sized": 16 << 10} {
		if err := v.scratch(name, size, pack(t, entry{name: ".", mode: 0o2777, uid: 3})); err != nil {
			t.Fatal(err)
		}
		mine := filepath.Join(v.dir, name, "mine")
		if err := os.WriteFile(mine, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := v.scratch(name, size, &bytes.Buffer{}); err != nil {
			t.Error(err)
		}
		if d := cmp.Diff(map[string]string{".": "dgrwxrwxrwx 3", "mine": "-rw------- 0 "}, list(t, filepath.Join(v.dir, name))); d != "" {
			t.Error(d)
		}
		err := os.WriteFile(mine, make([]byte, 32<<10), 0o600)
		if full := errors.Is(err, syscall.ENOSPC); full != (size > 0) {
			t.Errorf("%s: 32 KiB written: %v", name, err)
		}
		if err := v.apply(name, pack(t, entry{name: "."})); !errors.As(err, new(badRequestError)) {
			t.Errorf("%s: an archive over what is the containers': %v", name, err)
		}
	}
	if err := v.apply("archived", pack(t, entry{name: "."}, entry{name: "key", data: "1"})); err != nil {
		t.Fatal(err)
	}
	if err := v.scratch("archived", 0, &bytes.Buffer{}); err == nil {
		t.Error("a volume becomes scratch")
	}
	if len(list(t, filepath.Join(v.dir, "archived"))) != 2 {
		t.Error("a refused request emptied a volume")
	}
}

func TestVolumeDirectories(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "outside"), 0o755); err != nil {
		t.Fatal(err)
	}
	v := newVolumes(filepath.Join(dir, "volumes"), 0)
	if err := os.Mkdir(v.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := v.scratch("v", 0, &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.remove("v"); err != nil {
			t.Error(err)
		}
	})
	root := filepath.Join(v.dir, "v")
	if err := os.Symlink("../../outside", filepath.Join(root, "out")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "file"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := v.directories("v", pack(t, entry{name: "a/", mode: 0o2750, uid: 4}, entry{name: "a/b/c/"}, entry{name: "file/"})); err != nil {
			t.Fatal(err)
		}
		// What the containers change stays so.
		if err := os.Chmod(filepath.Join(root, "a/b/c"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for name, archive := range map[string]io.Reader{
		"through a link": pack(t, entry{name: "out/x/"}),
		"parent":         pack(t, entry{name: "../x/"}),
		"a file":         pack(t, entry{name: "x", data: "1"}),
		"garbage":        strings.NewReader(strings.Repeat("garbage ", 1000)),
	} {
		if err := v.directories("v", archive); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := v.directories("none", pack(t, entry{name: "x/"})); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a volume that is not there: %v", err)
	}
	want := map[string]string{
		".": "drwxrwxrwx 0", "a": "dgrwxr-x--- 4", "a/b": "dgrwxr-xr-x 0", "a/b/c": "drwx------ 0",
		"file": "-rw------- 0 mine", "out": "Lrwxrwxrwx 0 -> ../../outside",
	}
	if d := cmp.Diff(want, list(t, root)); d != "" {
		t.Error(d)
	}
	if left := names(t, filepath.Join(dir, "outside")); len(left) > 0 {
		t.Errorf("outside of the volume: %q", left)
	}
}
