package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	tests := map[string]struct{ previous, ran, want time.Duration }{
		"the first time":        {0, time.Millisecond, minBackoff},
		"again at once":         {minBackoff, time.Millisecond, 2 * minBackoff},
		"again and again":       {maxBackoff, time.Millisecond, maxBackoff},
		"almost at the limit":   {maxBackoff - 1, time.Millisecond, maxBackoff},
		"after a long good run": {maxBackoff, healthyAfter, minBackoff},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := backoff(test.previous, test.ran); got != test.want {
				t.Errorf("backoff = %v, want %v", got, test.want)
			}
		})
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// patience with a busy machine, where a deadline is not what is tested.
const patience = 2 * time.Minute

// cleanUp runs f when the test is over, whose own context has ended by then.
func cleanUp(t *testing.T, f func(ctx context.Context) error) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := f(ctx); err != nil {
			t.Error(err)
		}
	})
}

func script(t *testing.T, dir, name, body string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
}

// A runner starts programs when what they need is there, and again whenever they end, however they do.
func TestRunner(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "ready")
	script(t, dir, "crashes", "echo crashes >> "+dir+"/trace; exit 3")
	script(t, dir, "killed", "echo killed >> "+dir+"/trace; kill -9 $$")
	script(t, dir, "after", "echo after >> "+dir+"/trace; exec sleep 1000")
	var out bytes.Buffer
	reaper := newReaper()
	r := &runner{reaper: reaper, binDir: dir, logDir: filepath.Join(dir, "log"), env: os.Environ(), log: slog.New(slog.NewTextHandler(&out, nil))}

	ctx, cancel := context.WithCancel(testContext(t))
	reaped, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(reaped)
		reaper.run(ctx)
	}()
	go func() {
		defer close(done)
		r.run(ctx, []program{{name: "crashes"}, {name: "killed"}, {name: "after", needs: []endpoint{{"unix", socket}}}})
	}()
	trace := func() string {
		data, _ := os.ReadFile(filepath.Join(dir, "trace"))
		return string(data)
	}
	err := poll(ctx, time.Millisecond, func() error {
		if s := trace(); strings.Count(s, "crashes") < 3 || strings.Count(s, "killed") < 3 {
			return fmt.Errorf("trace so far: %q", s)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(trace(), "after") {
		t.Error("a program started before what it needs was ready")
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	err = poll(ctx, time.Millisecond, func() error {
		if !strings.Contains(trace(), "after") {
			return errors.New("the program that waited has not started")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	<-done
	<-reaped // or it would take what others wait for: killChildren, and the next tests
	for _, want := range []string{"exit status 3", "killed by signal 9"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, out.String())
		}
	}
	killChildren(t, "sleep")
}

// killChildren ends what the test's runner left: as PID 1 it would have taken its
// children with it.
func killChildren(t *testing.T, name string) {
	t.Helper()
	statuses, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, status := range statuses {
		data, err := os.ReadFile(status)
		if err != nil || !strings.Contains(string(data), fmt.Sprintf("PPid:\t%d\n", os.Getpid())) || !strings.HasPrefix(string(data), "Name:\t"+name+"\n") {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(filepath.Base(filepath.Dir(status)), "%d", &pid); err != nil {
			t.Fatal(err)
		}
		child, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := child.Wait(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpenLogPutsLargeLogsAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x", "program.log")
	f, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(maxLog + 1); err != nil {
		t.Fatal(err)
	}
	g, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if info, err := g.Stat(); err != nil || info.Size() != 0 {
		t.Errorf("new log has %v bytes, %v", info.Size(), err)
	}
	if _, err := os.Stat(path + ".old"); err != nil {
		t.Error(err)
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, held, err := lockFile(path)
	if err != nil || held {
		t.Fatalf("first: held %t, %v", held, err)
	}
	if _, held, err := lockFile(path); err != nil || !held {
		t.Errorf("second: held %t, %v", held, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.Close()
	g, held, err := lockFile(path)
	if err != nil || held {
		t.Fatalf("after it was removed: held %t, %v", held, err)
	}
	g.Close()
}
