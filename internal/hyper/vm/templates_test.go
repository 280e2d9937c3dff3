//go:build hyper

package vm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testTemplates are templates whose guests keep how many were saved before them.
func testTemplates(t *testing.T) (_ Templates, saved *atomic.Int32) {
	t.Helper()
	saved = &atomic.Int32{}
	return Templates{
		Dir: filepath.Join(t.TempDir(), "templates"),
		Ready: func(_ context.Context, channel io.ReadWriteCloser) error {
			_, err := ask(channel, bufio.NewReader(channel), fmt.Sprintf("keep %d", saved.Add(1)))
			return err
		},
	}, saved
}

// kept asks a new clone what its template's guest kept.
func (t Templates) kept(tb testing.TB, owner string, c Config) string {
	tb.Helper()
	v, err := t.Clone(deadline(tb), owner, c)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() {
		v.Kill()
		<-v.Done()
		v.Channel().Close()
	}()
	if err := v.AwaitGuest(deadline(tb)); err != nil {
		tb.Fatal(err)
	}
	answer, err := ask(v.Channel(), bufio.NewReader(v.Channel()), "kept")
	if err != nil {
		tb.Fatal(err)
	}
	return answer
}

func TestTemplates(t *testing.T) {
	templates, saved := testTemplates(t)
	var booted, cloned atomic.Int32
	templates.Cgroup = func(int) error { booted.Add(1); return nil }
	c := config(t)
	c.NIC, c.Cgroup = testNIC(t), func(int) error { cloned.Add(1); return nil }
	larger := c
	larger.Memory += 64 << 20
	for _, test := range []struct {
		what, owner string
		c           Config
		want        string
	}{
		{"the first", "red", c, "1"},
		{"of the same owner", "red", c, "1"},
		{"of another owner", "blue", c, "2"},
		{"of another size", "red", larger, "3"},
	} {
		if got := templates.kept(t, test.owner, test.c); got != test.want {
			t.Errorf("a clone, %s: of template %s, want %s", test.what, got, test.want)
		}
	}
	// The host was restarted.
	manifest := filepath.Join(templates.Dir, "blue", "1cpu-192Mi", manifestFile)
	text, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err := os.WriteFile(manifest, bytes.Replace(text, bytes.TrimSpace(boot), []byte("other"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := templates.kept(t, "blue", c); got != "4" {
			t.Errorf("a clone of template %s, want 4: the one before does not fit any more", got)
		}
	}
	if b, c, s := booted.Load(), cloned.Load(), saved.Load(); b != s || c != 6 {
		t.Errorf("%d templates, %d of them in the cgroup for that, and %d clones in theirs, want 4, 4, 6", s, b, c)
	}
	for _, owner := range []string{"", ".", "..", "../red", "red/blue", ".red"} {
		if v, err := templates.Clone(deadline(t), owner, c); err == nil {
			v.Kill()
			t.Errorf("owner %q has a template", owner)
		}
	}
}

func TestTemplatesFail(t *testing.T) {
	templates, _ := testTemplates(t)
	unready := errors.New("unready")
	templates.Ready = func(context.Context, io.ReadWriteCloser) error { return unready }
	if _, err := templates.Clone(deadline(t), "red", config(t)); !errors.Is(err, unready) {
		t.Errorf("error %v, want %v", err, unready)
	}
	if err := os.WriteFile(filepath.Join(templates.Dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := templates.Clone(deadline(t), "file", config(t)); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("error %v, want %v", err, unix.ENOTDIR)
	}
}

// Those who start at the same time wait for one template.
func TestTemplatesAtTheSameTime(t *testing.T) {
	templates, _ := testTemplates(t)
	var all sync.WaitGroup
	for range 3 {
		c := config(t)
		all.Go(func() {
			if got := templates.kept(t, "red", c); got != "1" {
				t.Errorf("a clone of template %s, want 1", got)
			}
		})
	}
	all.Wait()
}

func TestCollect(t *testing.T) {
	const size = 1 << 20
	hour := func(n int) time.Time { return time.Now().Add(time.Duration(-n) * time.Hour) }
	for name, test := range map[string]struct {
		used  map[string]time.Time
		bound int64
		want  []string
	}{
		"all in use":    {map[string]time.Time{"a/1": hour(0), "a/2": hour(1), "b/1": hour(2)}, 10 * size, []string{"a/1", "a/2", "b/1"}},
		"unused":        {map[string]time.Time{"a/1": hour(25), "a/2": hour(23), "b/1": hour(30)}, 10 * size, []string{"a/2"}},
		"too many":      {map[string]time.Time{"a/1": hour(3), "a/2": hour(1), "b/1": hour(2)}, 5 * size / 2, []string{"a/2", "b/1"}},
		"nothing":       {nil, size, nil},
		"interrupted":   {map[string]time.Time{"a/.1": hour(0), "a/.1.lock": hour(0), "a/2": hour(0)}, 10 * size, []string{"a/2"}},
		"one too large": {map[string]time.Time{"a/1": hour(0)}, size / 2, nil},
	} {
		t.Run(name, func(t *testing.T) {
			templates := Templates{Dir: filepath.Join(t.TempDir(), "templates")}
			for template, used := range test.used {
				dir := filepath.Join(templates.Dir, template)
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, memoryFile), make([]byte, size), 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Chtimes(dir, used, used); err != nil {
					t.Fatal(err)
				}
			}
			for range 2 {
				if err := templates.collect(deadline(t), unusedFor, test.bound); err != nil {
					t.Fatal(err)
				}
				left, err := filepath.Glob(filepath.Join(templates.Dir, "*", "*"))
				if err != nil {
					t.Fatal(err)
				}
				for i := range left {
					left[i], _ = filepath.Rel(templates.Dir, left[i])
				}
				if !slices.Equal(left, test.want) {
					t.Errorf("left: %q, want %q", left, test.want)
				}
			}
			owners := map[string]bool{}
			for _, w := range test.want {
				owners[filepath.Dir(w)] = true
			}
			if dirs, _ := filepath.Glob(filepath.Join(templates.Dir, "[a-z]*")); len(dirs) != len(owners) {
				t.Errorf("owners left: %q, want those of %q", dirs, test.want)
			}
		})
	}
}

// A template is not taken from who is about to clone it.
func TestCollectWaits(t *testing.T) {
	templates, _ := testTemplates(t)
	ready := templates.Ready
	templates.Ready = func(ctx context.Context, channel io.ReadWriteCloser) error {
		soon, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		if err := templates.Collect(soon); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("while a template is made: %v, want %v", err, context.DeadlineExceeded)
		}
		return ready(ctx, channel)
	}
	if got := templates.kept(t, "red", config(t)); got != "1" {
		t.Errorf("a clone of template %s, want 1", got)
	}
	if err := templates.Collect(deadline(t)); err != nil {
		t.Error(err)
	}
	if got := templates.kept(t, "red", config(t)); got != "1" {
		t.Errorf("a clone of template %s, want 1: it was used a moment ago", got)
	}
}
