package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWaitForLock(t *testing.T) {
	tests := map[string]func(t *testing.T, path string, first *os.File){
		"the lock is let go": func(_ *testing.T, _ string, first *os.File) { first.Close() },
		"its file is removed": func(t *testing.T, path string, first *os.File) {
			t.Helper()
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
			first.Close()
		},
	}
	for name, release := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "lock")
			first, held, err := lockFile(path)
			if err != nil || held {
				t.Fatalf("held = %t, %v", held, err)
			}
			defer first.Close()
			if _, held, err := lockFile(path); err != nil || !held {
				t.Fatalf("somebody else: held = %t, %v", held, err)
			}
			brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if _, err := waitForLock(brief, path); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("waiting in vain: %v", err)
			}
			got := make(chan error, 1)
			go func() {
				f, err := waitForLock(t.Context(), path)
				if err == nil {
					defer f.Close()
					if _, held, err1 := lockFile(path); err1 != nil || !held {
						err = errors.Join(errors.New("the lock that was waited for is not held"), err1)
					}
				}
				got <- err
			}()
			release(t, path, first)
			select {
			case err := <-got:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(30 * time.Second):
				t.Error("nobody gets the lock")
			}
		})
	}
}
