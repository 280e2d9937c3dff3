//go:build linux

package guest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// FuzzVolume applies an archive to a directory beside which there is another: that one
// stays as it is, whatever the archive names.
func FuzzVolume(f *testing.F) {
	for _, entries := range [][]entry{
		{{name: "."}, {name: "..1/"}, {name: "..1/key", data: "value"}, {name: "..data", link: "..1"}, {name: "key", link: "..data/key"}},
		{{name: ".", data: "a file", kind: '0'}},
		{{name: "../beside/x", data: "x"}, {name: "/beside/y", data: "y"}},
		{{name: "out", link: "../beside"}, {name: "out/x", data: "x"}},
		{{name: "out", link: "/"}, {name: "out", data: "x"}},
		{{name: "hard", link: "../beside/kept", kind: '1'}},
	} {
		f.Add(pack(f, entries...).Bytes())
	}
	f.Fuzz(func(t *testing.T, archive []byte) {
		top := t.TempDir()
		beside := filepath.Join(top, "beside")
		if err := os.Mkdir(beside, 0o755); err != nil {
			t.Fatal(err)
		}
		kept := filepath.Join(beside, "kept")
		if err := os.WriteFile(kept, []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
		v := newVolumes(filepath.Join(top, "volumes"), 0)
		if err := os.Mkdir(v.dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = v.apply("v", bytes.NewReader(archive))
		_ = v.apply("v", bytes.NewReader(archive)) // now it finds what it has left
		_ = v.directories("v", bytes.NewReader(archive))
		_ = v.remove("v")
		if text, err := os.ReadFile(kept); err != nil || string(text) != "kept" {
			t.Errorf("the file beside the volumes is %q (%v)", text, err)
		}
		var found []string
		for _, dir := range []string{top, beside} {
			err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
				if path != "." {
					found = append(found, path)
				}
				if d.IsDir() && path != "." {
					return fs.SkipDir
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		if len(found) != 3 { // beside, volumes; kept
			t.Errorf("left: %v", found)
		}
		if left, err := os.ReadDir(v.dir); err != nil || len(left) > 0 {
			t.Errorf("left of the volume: %v (%v)", left, err)
		}
	})
}
