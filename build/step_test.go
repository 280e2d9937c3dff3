// Package build tests the scripts beside it.
package build

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestStep(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log", "step.log")
	tests := map[string]struct {
		command string
		status  int
		want    []string
		not     []string
	}{
		"works": {"echo chatter", 0, []string{"  … etcd\n", "  ✓ etcd "}, []string{"chatter", "\r"}},
		"fails": {
			"for i in $(seq 100); do echo line $i; done; echo the reason >&2; exit 3", 3,
			[]string{"  … etcd\n", "  ✗ etcd ", log + " ends with:\n", "line 100\nthe reason\n"},
			[]string{"line 50\n", "✓"},
		},
		"a part of it fails": {"cat /nonexistent | cat; echo not reached", 1, []string{"✗", "/nonexistent"}, []string{"not reached"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "./step.sh", "etcd", log, test.command)
			out, err := cmd.CombinedOutput()
			if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if status := cmd.ProcessState.ExitCode(); status != test.status {
				t.Errorf("exit status %d, want %d", status, test.status)
			}
			for _, want := range test.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("output lacks %q:\n%s", want, out)
				}
			}
			for _, not := range test.not {
				if strings.Contains(string(out), not) {
					t.Errorf("output has %q:\n%s", not, out)
				}
			}
		})
	}
}

// TestStepOnTerminal watches the clock of a step that ends only when it was seen.
func TestStepOnTerminal(t *testing.T) {
	dir := t.TempDir()
	seen := filepath.Join(dir, "seen")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "script", "--quiet", "--return", "--command",
		"./step.sh etcd "+dir+"/log 'until [ -e "+seen+" ]; do sleep 0.1; done'", "/dev/null")
	cmd.Env = append(os.Environ(), "MAKEFLAGS=")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all []string
	running := regexp.MustCompile(`… etcd .* [1-9][0-9]*s$`) // the clock may miss a second
	lines := bufio.NewScanner(out)
	lines.Split(splitAt('\r'))
	for lines.Scan() {
		all = append(all, lines.Text())
		if running.MatchString(lines.Text()) {
			if err := os.WriteFile(seen, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %q", err, all)
	}
	if screen := strings.Join(all, "\r"); !strings.Contains(screen, "\r\033[K  ✓ etcd ") {
		t.Errorf("the clock's line does not give way to the result: %q", screen)
	}
}

// splitAt splits at a byte.
func splitAt(separator byte) bufio.SplitFunc {
	return func(data []byte, atEOF bool) (advance int, token []byte, err error) {
		if i := strings.IndexByte(string(data), separator); i >= 0 {
			return i + 1, data[:i], nil
		}
		if atEOF && len(data) > 0 {
			return len(data), data, nil
		}
		return 0, nil, nil
	}
}
