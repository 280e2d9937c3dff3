package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

// step is one part of a longer job that a person watches.
type step struct {
	name string
	// logs are the files to look into when the step fails; the first that says
	// anything is shown.
	logs []string
	run  func(ctx context.Context) error
}

const logTail = 20

// loggedError is an error that some logs explain better than those of its step.
type loggedError struct {
	error
	logs []string
}

func (e *loggedError) Unwrap() error { return e.error }

// withLog says which logs explain an error.
func withLog(err error, logs ...string) error { return &loggedError{err, logs} }

// runSteps runs the steps one after the other and shows each with the time it
// takes: on a terminal while it runs, elsewhere a line when it starts and one when
// it is done.
func runSteps(ctx context.Context, out io.Writer, terminal bool, steps []step) error {
	for _, s := range steps {
		began := time.Now()
		stop := func() {}
		if terminal {
			stop = showElapsed(out, s.name, began)
		} else {
			fmt.Fprintf(out, "  … %s\n", s.name)
		}
		err := s.run(ctx)
		stop()
		elapsed := time.Since(began).Seconds()
		if err == nil {
			fmt.Fprintf(out, "  ✓ %-28s %5.1fs\n", s.name, elapsed)
			continue
		}
		fmt.Fprintf(out, "  ✗ %-28s %5.1fs\n", s.name, elapsed)
		logs := s.logs
		if better := new(loggedError); errors.As(err, &better) {
			logs = append(slices.Clone(better.logs), logs...)
		}
		for _, log := range logs {
			if tail := tailOf(log, logTail); tail != "" {
				fmt.Fprintf(out, "\n%s ends with:\n%s\n", log, tail)
				break
			}
		}
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

// showElapsed keeps one line of the terminal up to date until it is stopped.
func showElapsed(out io.Writer, name string, began time.Time) (stop func()) {
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(100 * time.Millisecond)
		defer ticker.Stop()
		for {
			fmt.Fprintf(out, "\r  … %-28s %5.1fs", name, time.Since(began).Seconds())
			select {
			case <-done:
				fmt.Fprint(out, "\r\033[K")
				return
			case <-ticker.C:
			}
		}
	}()
	return func() {
		close(done)
		<-stopped
	}
}

// tailOf returns the last lines of a file, or nothing if it cannot be read.
func tailOf(path string, lines int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const window = 64 << 10
	if info, err := f.Stat(); err == nil && info.Size() > window {
		if _, err := f.Seek(-window, io.SeekEnd); err != nil {
			return ""
		}
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	all := strings.Split(string(bytes.TrimRight(data, "\n")), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
