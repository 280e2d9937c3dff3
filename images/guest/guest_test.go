package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestOrder(t *testing.T) {
	const listed = `kernel/a.ko:
kernel/b-b.ko: kernel/a.ko
kernel/c.ko: kernel/b-b.ko kernel/a.ko
kernel/d.ko: kernel/lost.ko
kernel/e.ko: kernel/f.ko
kernel/f.ko: kernel/e.ko
`
	deps, err := readDependencies(strings.NewReader(listed))
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		ask  []string
		want []string
		err  string
	}{
		"nothing needed": {ask: []string{"a"}, want: []string{"kernel/a.ko"}},
		"chain":          {ask: []string{"c"}, want: []string{"kernel/a.ko", "kernel/b-b.ko", "kernel/c.ko"}},
		"order asked":    {ask: []string{"b_b", "a"}, want: []string{"kernel/a.ko", "kernel/b-b.ko"}},
		"twice":          {ask: []string{"a", "a"}, want: []string{"kernel/a.ko"}},
		"unknown":        {ask: []string{"z"}, err: "no module z"},
		"lost":           {ask: []string{"d"}, err: "not listed"},
		"circle":         {ask: []string{"e"}, err: "needs itself"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := deps.order(test.ask...)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(test.want, got); d != "" {
				t.Error(d)
			}
		})
	}
	if _, err := readDependencies(strings.NewReader("no colon\n")); err == nil {
		t.Error("a line without a colon is no error")
	}
}

// TestCPIO has busybox's cpio unpack what we packed.
func TestCPIO(t *testing.T) {
	var archive bytes.Buffer
	err := writeCPIO(&archive, tree{
		"init":        {mode: 0o755, data: []byte("#!/bin/sh\n")},
		"a/deep/file": {mode: 0o640, data: bytes.Repeat([]byte{0, 1, 2}, 1001)},
		"a/empty":     {mode: 0o600},
		"link":        {mode: fs.ModeSymlink | 0o777, data: []byte("a/deep")},
		"dev/null":    {mode: fs.ModeDevice | fs.ModeCharDevice | 0o666, device: unix.Mkdev(1, 3)},
	})
	if err != nil {
		t.Fatal(err)
	}
	if archive.Len()%4 != 0 {
		t.Errorf("%d bytes are no multiple of four: nothing could follow", archive.Len())
	}
	dir := t.TempDir()
	unpack := exec.Command("busybox", "cpio", "-i", "-d", "-m", "--quiet")
	unpack.Dir, unpack.Stdin = dir, &archive
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := map[string]string{}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if name == "." {
			return nil
		}
		what := info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			what += " " + string(data[:min(len(data), 10)])
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " " + to
		}
		got[name] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"init":        "-rwxr-xr-x #!/bin/sh\n",
		"a":           "drwxr-xr-x",
		"a/deep":      "drwxr-xr-x",
		"a/deep/file": "-rw-r----- \x00\x01\x02\x00\x01\x02\x00\x01\x02\x00",
		"a/empty":     "-rw------- ",
		"link":        "Lrwxrwxrwx a/deep",
		"dev":         "drwxr-xr-x",
		"dev/null":    "Dcrw-rw-rw-",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for name, bad := range map[string]tree{
		"outside": {"../x": {mode: 0o600}},
		"pipe":    {"x": {mode: fs.ModeNamedPipe}},
	} {
		if err := writeCPIO(&bytes.Buffer{}, bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestSourceVersion(t *testing.T) {
	for name, test := range map[string]struct {
		shown, want string
	}{
		"of its own":   {shown: "Package: crun\nVersion: 1.8.1-1+deb12u1\nSource: crun\n", want: "1.8.1-1+deb12u1"},
		"no source":    {shown: "Package: crun\nVersion: 1.8.1-1\n", want: "1.8.1-1"},
		"built again":  {shown: "Package: crun\nSource: crun (1.8.1-1)\nVersion: 1.8.1-1+b3\n", want: "1.8.1-1"},
		"not known":    {shown: ""},
		"without any":  {shown: "Package: crun\n"},
		"source first": {shown: "Source: crun (2-1)\nPackage: crun\nVersion: 2-1+b1\n", want: "2-1"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := sourceVersion(test.shown)
			if got != test.want || (err == nil) != (test.want != "") {
				t.Errorf("%q, %v; want %q", got, err, test.want)
			}
		})
	}
}
