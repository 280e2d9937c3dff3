// Command runner is `make test`: it runs every kind of test there is, one after
// the other, shows what runs and for how long, prints the whole output of what
// failed and the reason of each skip, and ends with the first words of each failure
// and one line of totals.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// suite is one command. A Go suite's tests are counted one by one, any other
// command counts as one test.
type suite struct {
	name string
	dir  string // relative to the repository's root; "" is the root
	argv []string
	goes bool // the command is `go test`, without -json
	// asked says that it runs only when it is asked for: it takes too long.
	asked bool
	// late matches what a test says that has only waited in vain for something to become
	// ready. Such tests get a second attempt, see again; nil for a suite without.
	late *regexp.Regexp
}

func suites() []suite {
	unit := []string{"go", "test", "-race", "-timeout=15m", "./api/...", "./internal/...", "./cmd/...", "./images/...", "./bench/...", "./build/...", "./test/runner/...", "./test/conformance/..."}
	return []suite{
		{name: "generated code", argv: []string{"./test/generated.sh"}},
		{name: "lint", argv: []string{"make", "--no-print-directory", "lint"}},
		{name: "unit and kernel", argv: unit, goes: true},
		{name: "gVisor shim", dir: "upstream/gvisor", argv: []string{"go", "test", "-race", "-timeout=10m", "./shim/..."}, goes: true},
		{name: "cluster", argv: []string{"go", "test", "-count=1", "-timeout=60m", "./test/e2e/..."}, goes: true, late: regexp.MustCompile(`--for=condition=Ready .*: timed out waiting for the condition`)},
		{name: "hyper", argv: []string{"go", "test", "-tags=hyper", "-p=1", "-parallel=6", "-timeout=30m", "./internal/hyper/vm", "./internal/hyper/guest", "./internal/hyper/layers", "./test/hyper"}, goes: true},
		{name: "conformance", argv: []string{"go", "test", "-tags=hyper", "-timeout=3h", "./test/conformance"}, goes: true, asked: true},
	}
}

type totals struct {
	passed, failed, skipped int
	failures                []string // each failed test and the first that it said
	flaky                   []string // the same of tests that passed at the second attempt
	said                    []string // all that failed tests said, and those that have subtests which failed
}

// fail counts a failure that no test has said itself.
func (t *totals) fail(said string) {
	t.failed++
	t.failures, t.said = append(t.failures, said), append(t.said, said)
}

func (t *totals) add(other totals) {
	t.passed += other.passed
	t.failed += other.failed
	t.skipped += other.skipped
	t.failures = append(t.failures, other.failures...)
	t.flaky = append(t.flaky, other.flaky...)
}

func main() {
	only := flag.String("only", "", "run only the suites whose name contains this")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	all := runAll(ctx, suites(), *only)
	stop()
	for _, f := range all.flaky {
		fmt.Printf("FLAKY, see to it: %s\n", f)
	}
	for _, f := range all.failures {
		fmt.Printf("failed: %s\n", f)
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", all.passed, all.failed, all.skipped)
	if all.failed > 0 || all.passed == 0 {
		os.Exit(1)
	}
}

// runAll runs the suites whose name contains only. An interrupt fails those that
// it keeps from running, too: what was not tested has not passed.
func runAll(ctx context.Context, suites []suite, only string) totals {
	var all totals
	for _, s := range suites {
		switch {
		case !strings.Contains(s.name, only), s.asked && only != s.name:
		case ctx.Err() != nil:
			all.add(failure(s, time.Now(), errInterrupted))
		default:
			all.add(again(ctx, s, run(ctx, s)))
		}
	}
	return all
}

var errInterrupted = errors.New("interrupted")

// again gives tests that have only waited in vain for something to become ready a second
// attempt, with a cluster of their own: that all of Kubernetes is once slow on two
// processors says little of the product, and twice is no accident. If one test of the
// suite has failed otherwise, as by a wrong answer, a leak or a time that the product
// promises, or has not ended, or if more than two were late, nothing is repeated. What
// passes then is not hidden: the first attempt's output stands where it was, and its test
// in the last lines.
func again(ctx context.Context, s suite, first totals) totals {
	if s.late == nil || first.failed == 0 || ctx.Err() != nil {
		return first
	}
	for _, said := range first.said {
		if !s.late.MatchString(said) {
			return first
		}
	}
	var tests []string
	for _, f := range first.failures {
		test, said, _ := strings.Cut(f, ": ")
		top, _, _ := strings.Cut(test, "/")
		if !strings.HasPrefix(top, "Test") || said == "" {
			return first
		}
		if !slices.Contains(tests, top) {
			tests = append(tests, top)
		}
	}
	if len(tests) > 2 {
		return first
	}
	fmt.Printf("=== %s: late: %s: a second attempt\n\n", s.name, strings.Join(tests, ", "))
	s.name += " again"
	s.argv = append(slices.Clone(s.argv), "-timeout=25m", "-run=^("+strings.Join(tests, "|")+")$")
	switch second := run(ctx, s); {
	case second.failed > 0:
		first.failed, first.failures = second.failed, append(first.failures, second.failures...)
	case second.passed == 0:
		first.add(failure(s, time.Now(), errors.New("no test ran")))
	default:
		first.passed, first.flaky = first.passed+first.failed, first.failures
		first.failed, first.failures = 0, nil
	}
	return first
}

// run executes one suite and reports it on standard output.
func run(ctx context.Context, s suite) totals {
	start := time.Now()
	argv := s.argv
	if s.goes {
		argv = append([]string{"go", "test", "-json"}, argv[2:]...)
	}
	fmt.Printf("=== %s: %s\n", s.name, strings.Join(s.argv, " "))

	events, err := record(s)
	if err != nil {
		return failure(s, start, err)
	}
	defer events.Close()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = s.dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	out, err := cmd.StdoutPipe()
	if err != nil {
		return failure(s, start, err)
	}
	errOut := &tail{limit: 1 << 16}
	cmd.Stderr = errOut
	if err := cmd.Start(); err != nil {
		return failure(s, start, err)
	}

	var t totals
	if s.goes {
		t = count(io.TeeReader(out, events), os.Stdout, start)
	} else {
		_, _ = io.Copy(errOut, out)
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		err = errInterrupted // also of a command that ends well when it is told to end
	}
	switch {
	case err != nil && t.failed == 0:
		fmt.Print(errOut.String())
		return failure(s, start, err)
	case err == nil && !s.goes:
		t.passed = 1
	}
	fmt.Printf("=== %s: %d passed, %d failed, %d skipped (%s)\n\n", s.name, t.passed, t.failed, t.skipped, elapsed(start))
	return t
}

// record makes the file that keeps every event of a suite: it tells how long each subtest took.
func record(s suite) (*os.File, error) {
	const dir = "bin/log"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return os.Create(filepath.Join(dir, "test-"+strings.ReplaceAll(s.name, " ", "-")+".json"))
}

func failure(s suite, start time.Time, err error) totals {
	fmt.Printf("=== %s: FAILED: %v (%s)\n\n", s.name, err, elapsed(start))
	return totals{failed: 1, failures: []string{fmt.Sprintf("%s: %v", s.name, err)}}
}

func elapsed(start time.Time) time.Duration { return time.Since(start).Round(time.Second) }

// event is one line of `go test -json` (see `go doc test2json`).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

// long is how many seconds a test takes that has a line of its own: whoever waits
// sees that something moves, and later where the time went.
const long = 5

// afterwards begins what a package's TestMain prints of what it has found wrong when the
// tests were over: it counts, whichever tests have failed.
const afterwards = "after the tests: "

// count reads events, prints a line for each package and each long test, and the output of each test
// that failed or was skipped, and counts leaf tests: a test that has subtests is
// counted only if it failed without any of them failing.
func count(r io.Reader, w io.Writer, start time.Time) totals {
	var t totals
	type key struct{ pkg, test string }
	output := map[key]*strings.Builder{}
	hasChild := map[key]bool{}
	childFailed := map[key]bool{}
	running := map[key]bool{}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		var e event
		if len(line) > 0 && json.Unmarshal(line, &e) != nil {
			fmt.Fprintf(w, "%s", line)
		}
		k := key{e.Package, e.Test}
		parent := key{e.Package, ""}
		if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
			parent.test = e.Test[:i]
		}
		switch e.Action {
		case "run":
			hasChild[parent] = true
			running[k] = true
		case "build-output":
			fmt.Fprint(w, e.Output)
		case "output":
			if output[k] == nil {
				output[k] = &strings.Builder{}
			}
			output[k].WriteString(e.Output)
		case "pass", "fail", "skip":
			out := ""
			if b := output[k]; b != nil {
				out = b.String()
			}
			delete(output, k)
			delete(running, k)
			if e.Action == "fail" {
				if e.Test != "" {
					childFailed[parent] = true
					t.said = append(t.said, messages.FindAllString(out, -1)...)
				}
				fmt.Fprintf(w, "--- FAIL %s %s [%s]\n%s", e.Package, e.Test, elapsed(start), out)
			}
			leaf := !hasChild[k]
			if e.Test == "" && e.Action == "fail" && childFailed[k] {
				for r := range running { // it died, or its time was over
					if r.pkg == k.pkg && !hasChild[r] {
						t.fail(r.test + ": it did not end")
					}
				}
				for _, found := range wrongAfterwards.FindAllString(out, -1) {
					t.fail(e.Package + ": " + found)
				}
			}
			switch {
			case e.Test == "" && e.Action == "fail" && !childFailed[k]:
				t.failed++ // did not build, panicked or timed out
				t.failures = append(t.failures, e.Package+": "+firstWords(out))
			case e.Test == "" && e.Action == "pass":
				fmt.Fprintf(w, "ok   %s (%.1fs)\n", e.Package, e.Elapsed)
			case e.Test == "":
			case e.Action == "pass" && e.Elapsed >= long && !strings.Contains(e.Test, "/"):
				fmt.Fprintf(w, "     %s (%.0fs) [%s]\n", e.Test, e.Elapsed, elapsed(start))
			}
			switch {
			case e.Test == "":
			case e.Action == "fail" && (leaf || !childFailed[k]):
				t.failed++
				t.failures = append(t.failures, e.Test+": "+firstWords(out))
			case e.Action == "pass" && leaf:
				t.passed++
			case e.Action == "skip" && leaf:
				t.skipped++
				fmt.Fprintf(w, "--- SKIP %s %s\n%s", e.Package, e.Test, out)
			}
		}
		if errors.Is(err, io.EOF) {
			return t
		}
		if err != nil {
			fmt.Fprintf(w, "reading test output: %v\n", err)
			t.failed++
			return t
		}
	}
}

// firstWords returns the first message of a failed test's output.
func firstWords(output string) string {
	const limit = 400
	message := messages.FindString(output)
	if len(message) > limit {
		message = message[:limit] + "…"
	}
	return strings.ToValidUTF8(strings.TrimSpace(message), "")
}

// messages matches what t.Error and its kind print, wrongAfterwards what TestMain does.
var (
	messages        = regexp.MustCompile(`(?m)^\s+\w+\.go:\d+: .*$`)
	wrongAfterwards = regexp.MustCompile(`(?m)^` + afterwards + `.*$`)
)

// tail keeps the last bytes that were written to it.
type tail struct {
	mu    sync.Mutex
	limit int
	buf   []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.limit; over > 0 {
		t.buf = t.buf[over:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
