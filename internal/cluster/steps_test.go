package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRunSteps(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(log, []byte(strings.Repeat("before\n", 100)+"the reason\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ran := ""
	steps := []step{
		{"first", nil, func(context.Context) error { ran += "1"; return nil }},
		{"second", []string{log + ".missing", log, "/etc/passwd"}, func(context.Context) error { ran += "2"; return errors.New("broken") }},
		{"third", nil, func(context.Context) error { ran += "3"; return nil }},
	}
	for name, terminal := range map[string]bool{"terminal": true, "pipe": false} {
		t.Run(name, func(t *testing.T) {
			ran = ""
			var out bytes.Buffer
			err := runSteps(t.Context(), &out, terminal, steps)
			if err == nil || err.Error() != "second: broken" {
				t.Errorf("error = %v", err)
			}
			if ran != "12" {
				t.Errorf("ran %s", ran)
			}
			for _, want := range []string{"✓ first", "✗ second", log, "the reason"} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, out.String())
				}
			}
			if n := strings.Count(out.String(), "before"); n != logTail-1 {
				t.Errorf("%d lines of the log before its last, want %d", n, logTail-1)
			}
			if strings.Contains(out.String(), "  … first\n") == terminal {
				t.Errorf("terminal %t, and a step's start has a line of its own: %q", terminal, out.String())
			}
			if strings.Contains(out.String(), "\r") != terminal {
				t.Errorf("terminal %t, output %q", terminal, out.String())
			}
		})
	}
}

// A step that knows which of its logs explains the failure has that one shown.
func TestRunStepsShowsTheLogOfTheError(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "n1.log"), filepath.Join(dir, "n2.log")
	for path, text := range map[string]string{first: "n1 is well\n", second: "n2 is ill\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	err := runSteps(t.Context(), &out, false, []step{{"start nodes", []string{first}, func(context.Context) error {
		return fmt.Errorf("wrapped: %w", withLog(errors.New("n2 is not ready"), second))
	}}})
	if err == nil || err.Error() != "start nodes: wrapped: n2 is not ready" {
		t.Errorf("error = %v", err)
	}
	if !strings.Contains(out.String(), second+" ends with:\nn2 is ill") || strings.Contains(out.String(), "n1 is well") {
		t.Errorf("output:\n%s", out.String())
	}
}
