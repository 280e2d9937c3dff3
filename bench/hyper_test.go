package main

import (
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSections(t *testing.T) {
	tests := map[string]struct {
		o       options
		want    []string
		wantErr string
	}{
		"all of hyper":         {options{suite: hyperSuite}, []string{"resume", "sandbox", "start", "burst", "work", "memory"}, ""},
		"in the suite's order": {options{suite: productSuite, only: []string{"memory", "cni"}}, []string{"cni", "memory"}, ""},
		"another suite's":      {options{suite: productSuite, only: []string{"resume"}}, nil, `no section "resume" in suite product`},
		"no such suite":        {options{suite: "x"}, nil, `no suite "x"`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			sections, err := tc.o.sections()
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("error %v, want %q", err, tc.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range sections {
				got = append(got, s.name)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("sections (-want +got)\n%s", d)
			}
		})
	}
}

func TestWithoutTemplates(t *testing.T) {
	tests := map[string]struct{ before, during string }{
		"no file":             {"", "templates: false\n"},
		"other settings stay": {"accel: tcg\n# a comment\n", "accel: tcg\ntemplates: false\n"},
		"templates are on":    {"templates: true\n", "templates: false\n"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := shimConfig{filepath.Join(t.TempDir(), "h8s", "hyper.yaml")}
			if tc.before != "" {
				if err := os.MkdirAll(filepath.Dir(c.path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(c.path, []byte(tc.before), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			restore, err := c.withoutTemplates()
			if err != nil {
				t.Fatal(err)
			}
			during, err := os.ReadFile(c.path)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.during, string(during)); d != "" {
				t.Errorf("while machines boot (-want +got)\n%s", d)
			}
			if err := restore(); err != nil {
				t.Fatal(err)
			}
			after, err := os.ReadFile(c.path)
			if tc.before == "" {
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the file is still there: %q, %v", after, err)
				}
				return
			}
			if d := cmp.Diff(tc.before, string(after)); d != "" {
				t.Errorf("afterwards (-want +got)\n%s", d)
			}
		})
	}
}

func TestParseWork(t *testing.T) {
	const complete = "size 2000000 0\nread 10.5 10.75\nagain 11 11.5\nwrite 12 13\nmd5 13 15.5\nfloat 16 17\ncalls 18 18.25\n"
	tests := map[string]struct {
		out     string
		want    map[string]float64
		wantErr bool
	}{
		"complete": {complete, map[string]float64{
			"read": 8, "again": 4, "write": 67.108864, "md5": 2.5, "float": 1, "calls": 0.25,
		}, false},
		"a piece is missing":    {strings.Replace(complete, "md5 13 15.5\n", "", 1), nil, true},
		"the size is missing":   {strings.Replace(complete, "size 2000000 0\n", "", 1), nil, true},
		"a clock that stands":   {strings.Replace(complete, "13 15.5", "13 13", 1), nil, true},
		"something else":        {"sh: dd: not found\n", nil, true},
		"no number":             {strings.Replace(complete, "15.5", "x", 1), nil, true},
		"nothing was printed":   {"", nil, true},
		"the clock was no time": {strings.Replace(complete, "13 15.5", " ", 1), nil, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got := map[string]float64{}
			err := parseWork(tc.out, got)
			if (err != nil) != tc.wantErr {
				t.Fatalf("error %v, want one: %v", err, tc.wantErr)
			}
			if tc.want == nil {
				return
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("values (-want +got)\n%s", d)
			}
		})
	}
}

func TestEstimateKVM(t *testing.T) {
	one := func(v float64) Side { return newSide(kindClone, []float64{v}) }
	cpu, err := row(cpuGroup, cpuInteger, "s", one(5), newSide(kindRunc, []float64{1}), nil)
	if err != nil {
		t.Fatal(err)
	}
	rows := []Row{
		absolute(resumeGroup, resumeAnswers, "ms", one(80), nil),
		absolute(resumeGroup, resumeRunning, "ms", one(30), nil),
		absolute(resumeGroup, resumeSetUp, "ms", one(100), nil),
		absolute(sandboxGroup, sandboxReady, "ms", one(300), nil),
		cpu,
	}
	got, ok := estimateKVM(rows)
	// 150 ms are the guest's: 30 of them are left, and the other 150.
	if !ok || math.Abs(got.Ours.Median-180) > 1e-9 {
		t.Errorf("estimate %v (%v), want 180", got.Ours.Median, ok)
	}
	if got.Verdict != "missed on paper" || !strings.Contains(got.Note, "nothing was measured with KVM") {
		t.Errorf("verdict %q, note %q: it must say that it is an estimate", got.Verdict, got.Note)
	}
	for i := range rows {
		lacking := append(append([]Row{}, rows[:i]...), rows[i+1:]...)
		if got, ok := estimateKVM(lacking); ok {
			t.Errorf("without %q it still estimates %v", rows[i].Metric, got.Ours.Median)
		}
	}
}

func TestAbsolute(t *testing.T) {
	for name, tc := range map[string]struct {
		samples []float64
		target  *Target
		want    string
	}{
		"no target":     {[]float64{80}, nil, ""},
		"met":           {[]float64{60}, &Target{Value: 70}, "met"},
		"missed":        {[]float64{80}, &Target{Value: 70}, "missed"},
		"within spread": {[]float64{60, 80, 90}, &Target{Value: 70}, "missed, within spread"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := absolute("g", "m", "ms", newSide("x", tc.samples), tc.target); got.Verdict != tc.want {
				t.Errorf("verdict %q, want %q", got.Verdict, tc.want)
			}
		})
	}
	r := Report{Rows: []Row{absolute("clone", "resume", "ms", newSide("x", []float64{10, 20, 30}), nil)}}
	var out strings.Builder
	r.print(&out)
	if want := "20.0 ms (12.0–28.0)"; !strings.Contains(out.String(), want) {
		t.Errorf("the table lacks %q:\n%s", want, out.String())
	}
}
