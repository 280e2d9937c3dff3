package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestCount(t *testing.T) {
	cases := map[string]struct {
		events string
		want   totals
	}{
		"leaves are counted, parents are not": {
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"run","Package":"p","Test":"A/two"}
{"Action":"skip","Package":"p","Test":"A/two"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}
`,
			want: totals{passed: 1, skipped: 1},
		},
		"a failed subtest fails once": {
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"output","Package":"p","Test":"A/one","Output":"=== RUN   A/one\n"}
{"Action":"output","Package":"p","Test":"A/one","Output":"    a_test.go:7: one and one is three\n"}
{"Action":"output","Package":"p","Test":"A/one","Output":"    a_test.go:8: more\n"}
{"Action":"fail","Package":"p","Test":"A/one"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}
`,
			want: totals{
				failed: 1, failures: []string{"A/one: a_test.go:7: one and one is three"},
				said: []string{"    a_test.go:7: one and one is three", "    a_test.go:8: more"},
			},
		},
		"who did not end beside one that failed": {
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:7: late\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"B"}
{"Action":"run","Package":"p","Test":"B/one"}
{"Action":"fail","Package":"p"}
`,
			want: totals{
				failed: 2, failures: []string{"A: a_test.go:7: late", "B/one: it did not end"},
				said: []string{"    a_test.go:7: late", "B/one: it did not end"},
			},
		},
		"what is wrong after the tests, beside one that failed": {
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:7: late\n"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Output":"FAIL\n"}
{"Action":"output","Package":"p","Output":"after the tests: a link is left\n"}
{"Action":"fail","Package":"p"}
`,
			want: totals{
				failed: 2, failures: []string{"A: a_test.go:7: late", "p: after the tests: a link is left"},
				said: []string{"    a_test.go:7: late", "p: after the tests: a link is left"},
			},
		},
		"a package that does not build fails": {
			events: `{"Action":"build-output","ImportPath":"p","Output":"syntax error\n"}
{"Action":"fail","Package":"p"}
`,
			want: totals{failed: 1, failures: []string{"p: "}},
		},
		"a parent that fails by itself": {
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}
`,
			want: totals{passed: 1, failed: 1, failures: []string{"A: "}},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if got := count(strings.NewReader(c.events), io.Discard, time.Now()); !reflect.DeepEqual(got, c.want) {
				t.Errorf("count() = %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestRunAll(t *testing.T) {
	// A suite that interrupts the run as ^C would, and ends well.
	interrupt := suite{name: "interrupted", argv: []string{"sh", "-c", "kill -INT $PPID; trap 'exit 0' INT; while :; do sleep 0.01; done"}}
	ok, bad := suite{name: "ok", argv: []string{"true"}}, suite{name: "bad", argv: []string{"false"}}
	cases := map[string]struct {
		suites []suite
		only   string
		want   totals
	}{
		"each is counted": {suites: []suite{ok, bad, ok}, want: totals{passed: 2, failed: 1, failures: []string{"bad: exit status 1"}}},
		"only some":       {suites: []suite{ok, bad}, only: "o", want: totals{passed: 1}},
		"after an interrupt nothing passes": {
			suites: []suite{ok, interrupt, ok, bad}, only: "",
			want: totals{passed: 1, failed: 3, failures: []string{"interrupted: interrupted", "ok: interrupted", "bad: interrupted"}},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir()) // where the logs go
			ctx, stop := signal.NotifyContext(t.Context(), os.Interrupt)
			defer stop()
			if got := runAll(ctx, c.suites, c.only); !reflect.DeepEqual(got, c.want) {
				t.Errorf("runAll() = %+v, want %+v", got, c.want)
			}
		})
	}
}

// TestAgain: only lateness gets a second attempt, and only one.
func TestAgain(t *testing.T) {
	events := func(tests map[string]string) string {
		var all strings.Builder
		for _, test := range slices.Sorted(maps.Keys(tests)) {
			fmt.Fprintf(&all, `{"Action":"run","Package":"p","Test":%q}`+"\n", test)
			action := "pass"
			for _, said := range strings.Split(tests[test], "; ") {
				if said != "" {
					fmt.Fprintf(&all, `{"Action":"output","Package":"p","Test":%q,"Output":"    a_test.go:7: %s\n"}`+"\n", test, said)
					action = "fail"
				}
			}
			fmt.Fprintf(&all, `{"Action":%q,"Package":"p","Test":%q}`+"\n", action, test)
		}
		return all.String()
	}
	const late, wrong = "not ready in time", "the secret was read"
	failure := func(test, said string) string { return test + ": a_test.go:7: " + said }
	cases := map[string]struct {
		first, second map[string]string // what each test says; the second attempt is of TestA
		want          totals
	}{
		"it passes":                {first: map[string]string{"TestA": ""}, want: totals{passed: 1}},
		"late, then it passes":     {first: map[string]string{"TestA": late, "TestB": ""}, second: map[string]string{"TestA": ""}, want: totals{passed: 2, flaky: []string{failure("TestA", late)}}},
		"late twice":               {first: map[string]string{"TestA": late}, second: map[string]string{"TestA": late}, want: totals{failed: 1, failures: []string{failure("TestA", late), failure("TestA", late)}}},
		"wrong is not forgiven":    {first: map[string]string{"TestA": wrong}, want: totals{failed: 1, failures: []string{failure("TestA", wrong)}}},
		"late, and wrong after it": {first: map[string]string{"TestA": late}, second: map[string]string{"TestA": wrong}, want: totals{failed: 1, failures: []string{failure("TestA", late), failure("TestA", wrong)}}},
		"late and wrong at once":   {first: map[string]string{"TestA": late + "; " + wrong}, want: totals{failed: 1, failures: []string{failure("TestA", late)}}},
		"another is wrong":         {first: map[string]string{"TestA": late, "TestB": wrong}, want: totals{failed: 2, failures: []string{failure("TestA", late), failure("TestB", wrong)}}},
		"no test runs then":        {first: map[string]string{"TestA": late}, second: map[string]string{}, want: totals{failed: 2, failures: []string{failure("TestA", late), "s again: no test ran"}}},
		"three are no accident": {
			first: map[string]string{"TestA": late, "TestB": late, "TestC": late},
			want:  totals{failed: 3, failures: []string{failure("TestA", late), failure("TestB", late), failure("TestC", late)}},
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Chdir(t.TempDir()) // where the logs go
			// go, as the runner starts it; what nobody should start ends badly.
			script := "#!/bin/sh\ncase \"$*\" in *'-run=^(TestA)$'*) cat " + dir + "/second ;; *-run*) exit 3 ;; *) cat " + dir + "/first ;; esac\n"
			files := map[string]string{"go": script, "first": events(c.first)}
			if c.second != nil {
				files["second"] = events(c.second)
			}
			for file, content := range files {
				if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o700); err != nil { //nolint:gosec // one is to be executed
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			got := runAll(t.Context(), []suite{{name: "s", argv: []string{"go", "test", "./..."}, goes: true, late: regexp.MustCompile(late)}}, "")
			if got.said = nil; !reflect.DeepEqual(got, c.want) {
				t.Errorf("runAll() = %+v, want %+v", got, c.want)
			}
		})
	}
}
