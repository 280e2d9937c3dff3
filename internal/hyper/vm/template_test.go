//go:build hyper

package vm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// save saves a template whose guest keeps a word.
func save(t testing.TB, c Config, word string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "template")
	saveInto(t, c, dir, word)
	return dir
}

func saveInto(t testing.TB, c Config, dir, word string) {
	t.Helper()
	err := SaveTemplate(deadline(t), c, dir, func(_ context.Context, channel io.ReadWriteCloser) error {
		_, err := ask(channel, bufio.NewReader(channel), "keep "+word)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestClone(t *testing.T) {
	c := config(t)
	c.NIC = &NIC{}
	c.Template = save(t, c, "template")
	var clones []*guest
	for i := range 2 {
		c.NIC = testNIC(t)
		g := boot(t, c)
		clones = append(clones, g)
		if got := g.ask("kept"); got != "template" {
			t.Errorf("clone %d has %q of the template", i, got)
		}
		g.ask("keep %d", i)
		if got := g.ask("address"); got != templateAddr.String() {
			t.Errorf("address of the card: %s", got)
		}
	}
	for i, g := range clones {
		if got := g.ask("kept"); got != fmt.Sprint(i) {
			t.Errorf("clone %d has %q", i, got)
		}
		g.ask("echo hello")
	}
	testDisks(t, clones[0])
	clones[1].say("panic")
	<-clones[1].Done()
	if err := clones[1].Err(); !errors.Is(err, ErrPanicked) {
		t.Errorf("the clone ended with %v, want %v", err, ErrPanicked)
	}
}

func TestTemplateIsReplaced(t *testing.T) {
	c := config(t)
	c.Template = save(t, c, "old")
	old := boot(t, c)
	saveInto(t, c, c.Template, "new")
	if got := boot(t, c).ask("kept"); got != "new" {
		t.Errorf("a clone of the new template has %q", got)
	}
	if got := old.ask("kept"); got != "old" {
		t.Errorf("the clone of the old template has %q", got)
	}
	onlyTemplate(t, filepath.Dir(c.Template))
}

// onlyTemplate fails the test when there is anything but a template in dir.
func onlyTemplate(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 || entries[0].Name() != ".template.lock" || entries[1].Name() != "template" {
		t.Errorf("beside the template: %v", entries)
	}
}

func TestSaveAtTheSameTime(t *testing.T) {
	c := config(t)
	dir := filepath.Join(t.TempDir(), "template")
	// What a process that was killed has left.
	if err := os.MkdirAll(filepath.Join(partialName(dir), memoryFile), 0o700); err != nil {
		t.Fatal(err)
	}
	var (
		saved atomic.Int32
		all   sync.WaitGroup
	)
	for range 3 {
		all.Go(func() {
			err := SaveTemplate(deadline(t), c, dir, func(_ context.Context, channel io.ReadWriteCloser) error {
				saved.Add(1)
				_, err := ask(channel, bufio.NewReader(channel), "echo hello")
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := saved.Load(); n != 1 {
		t.Errorf("it was saved %d times", n)
	}
	onlyTemplate(t, filepath.Dir(dir))
	c.Template = dir
	boot(t, c).ask("echo hello")
}

func TestSaveFails(t *testing.T) {
	c := config(t)
	dir := save(t, c, "kept")
	unready := errors.New("unready")
	err := SaveTemplate(deadline(t), c, dir, func(context.Context, io.ReadWriteCloser) error { return unready })
	if !errors.Is(err, unready) {
		t.Errorf("error %v, want %v", err, unready)
	}
	ctx, cancel := context.WithCancel(deadline(t))
	err = SaveTemplate(ctx, c, dir, func(_ context.Context, channel io.ReadWriteCloser) error {
		defer cancel()
		_, err := ask(channel, bufio.NewReader(channel), "echo hello")
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}
	onlyTemplate(t, filepath.Dir(dir))
	c.Template = dir
	if got := boot(t, c).ask("kept"); got != "kept" {
		t.Errorf("a clone has %q of the template that was there before", got)
	}
}

func TestTemplateDoesNotFit(t *testing.T) {
	c := config(t)
	c.Template = save(t, c, "template")
	edit := func(name string, f func([]byte) []byte) func(t *testing.T, c *Config) {
		return func(t *testing.T, c *Config) {
			path := filepath.Join(c.Template, name)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	copyOf := func(t *testing.T, path string) string {
		other := filepath.Join(t.TempDir(), "copy")
		text, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(other, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		return other
	}
	for name, change := range map[string]func(t *testing.T, c *Config){
		"memory":     func(_ *testing.T, c *Config) { c.Memory *= 2 },
		"processors": func(_ *testing.T, c *Config) { c.CPUs++ },
		"card":       func(t *testing.T, c *Config) { c.NIC = testNIC(t) },
		"kernel":     func(t *testing.T, c *Config) { c.Kernel = copyOf(t, c.Kernel) },
		"initrd":     func(t *testing.T, c *Config) { c.Initrd = copyOf(t, c.Initrd) },
		"boot": edit(manifestFile, func(text []byte) []byte {
			boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
			return bytes.Replace(text, bytes.TrimSpace(boot), []byte("other"), 1)
		}),
		"manifest": edit(manifestFile, func(text []byte) []byte { return text[:len(text)/2] }),
		"no state": func(t *testing.T, c *Config) {
			if err := os.Remove(filepath.Join(c.Template, stateFile)); err != nil {
				t.Fatal(err)
			}
		},
		"short memory": edit(memoryFile, func(text []byte) []byte { return text[:len(text)/2] }),
	} {
		t.Run(name, func(t *testing.T) {
			c := c
			original := c.Template
			c.Template = filepath.Join(t.TempDir(), "template")
			if err := os.CopyFS(c.Template, os.DirFS(original)); err != nil {
				t.Fatal(err)
			}
			change(t, &c)
			v, err := Start(deadline(t), c)
			if err == nil {
				v.Kill()
				t.Fatal("it starts")
			}
			if !errors.Is(err, ErrTemplate) {
				t.Errorf("error %v, want %v", err, ErrTemplate)
			}
		})
	}
	// A state that is damaged is found by QEMU alone.
	t.Run("short state", func(t *testing.T) {
		c := c
		edit(stateFile, func(text []byte) []byte { return text[:len(text)/2] })(t, &c)
		if v, err := Start(deadline(t), c); err == nil {
			v.Kill()
			t.Fatal("it starts")
		} else if !errors.Is(err, ErrTemplate) {
			t.Errorf("error %v, want %v", err, ErrTemplate)
		}
	})
}

// A clone that gives memory back must not take it from the template, which other
// clones share.
func TestCloneGivesMemoryBack(t *testing.T) {
	const used = 64 << 20
	c := config(t)
	c.Memory = 4 * used
	c.Template = filepath.Join(t.TempDir(), "template")
	err := SaveTemplate(deadline(t), c, c.Template, func(_ context.Context, channel io.ReadWriteCloser) error {
		_, err := ask(channel, bufio.NewReader(channel), fmt.Sprintf("hold %d", used))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	before := fileSum(t, filepath.Join(c.Template, memoryFile))
	g := boot(t, c)
	g.ask("release")
	g.ask("fill %d", 2*used)
	full := memoryOf(t, g.Pid(), "Private_Dirty")
	eventually(t, "the clone gives memory back", func() (bool, string) {
		now := memoryOf(t, g.Pid(), "Private_Dirty")
		return now < full-used*3/2, fmt.Sprintf("it had %d bytes, and has %d", full, now)
	})
	if after := fileSum(t, filepath.Join(c.Template, memoryFile)); after != before {
		t.Error("the clone has changed its template")
	}
	if got := boot(t, c).ask("held"); got != fmt.Sprint(used) {
		t.Errorf("another clone has %s bytes of the template, want %d", got, used)
	}
}

func fileSum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// memoryOf is how many bytes of memory of this kind a process has: see smaps in proc(5).
func memoryOf(t testing.TB, pid int, kind string) (bytes int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var n int
		if _, err := fmt.Sscanf(line, kind+": %d kB", &n); err == nil {
			return n << 10
		}
	}
	t.Fatalf("no %s in %s", kind, text)
	return 0
}

// eventually waits until ok.
func eventually(t testing.TB, what string, f func() (ok bool, state string)) {
	t.Helper()
	var state string
	for ctx := deadline(t); ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		var ok bool
		if ok, state = f(); ok {
			return
		}
	}
	t.Fatalf("%s: not so: %s", what, state)
}

func testNIC(t testing.TB) *NIC {
	t.Helper()
	tap, err := unconnectedTap()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return &NIC{Tap: tap, HardwareAddr: []byte{2, 0, 0, 0, 0, 2}}
}
