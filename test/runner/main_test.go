package main

import (
	"io"
	"reflect"
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
