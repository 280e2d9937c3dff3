package main

import (
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
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
			want: totals{failed: 1, failures: []string{"A/one: a_test.go:7: one and one is three"}},
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
	script := func(first, second string) suite {
		say := func(event string) string {
			return `{"Action":"run","Package":"p","Test":"TestA/b"}` + "\n" + event + "\n"
		}
		failed := func(said string) string {
			return say(`{"Action":"output","Package":"p","Test":"TestA/b","Output":"    a_test.go:7: ` + said + `\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestA/b"}`)
		}
		events := map[string]string{"": say(`{"Action":"pass","Package":"p","Test":"TestA/b"}`)}
		dir := t.TempDir()
		for i, said := range []string{first, second} {
			content, ok := events[said]
			if !ok {
				content = failed(said)
			}
			if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i)), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// go, as the runner starts it; the second attempt is the one that has a -run.
		fake := `#!/bin/sh
case "$*" in *'-run=^(TestA)$'*) cat ` + dir + `/1 ;; *-run*) exit 3 ;; *) cat ` + dir + `/0 ;; esac
`
		if err := os.WriteFile(filepath.Join(dir, "go"), []byte(fake), 0o700); err != nil { //nolint:gosec // it is to be executed
			t.Fatal(err)
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		return suite{name: "s", argv: []string{"go", "test", "./..."}, goes: true, late: regexp.MustCompile("still after")}
	}
	const late, wrong = "still after 4m0s: no pod", "the secret was read"
	cases := map[string]struct {
		first, second string
		want          totals
	}{
		"it passes":                {first: "", second: wrong, want: totals{passed: 1}},
		"late, then it passes":     {first: late, second: "", want: totals{passed: 1, flaky: []string{"TestA/b: a_test.go:7: " + late}}},
		"late twice":               {first: late, second: late, want: totals{failed: 1, failures: []string{"TestA/b: a_test.go:7: " + late}}},
		"wrong is not forgiven":    {first: wrong, second: "", want: totals{failed: 1, failures: []string{"TestA/b: a_test.go:7: " + wrong}}},
		"late, and wrong after it": {first: late, second: wrong, want: totals{failed: 1, failures: []string{"TestA/b: a_test.go:7: " + wrong}}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir()) // where the logs go
			if got := runAll(t.Context(), []suite{script(c.first, c.second)}, ""); !reflect.DeepEqual(got, c.want) {
				t.Errorf("runAll() = %+v, want %+v", got, c.want)
			}
		})
	}
}
