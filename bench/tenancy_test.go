package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The suite runs with a handful of tenants: what it prints of them says nothing, but
// that it measures all that it should does not depend on how many there are.
func TestTenancySuite(t *testing.T) {
	dir := t.TempDir()
	o := options{
		suite: tenancySuite, bin: "../bin", root: "..", out: filepath.Join(dir, "out.json"), plots: filepath.Join(dir, "plots"), output: "table",
		rounds: 1, adds: 1, starts: 1, bursts: 1, pods: 1, tenants: 3, only: []string{"tenants", "without", "deletion"},
	}
	if err := run(o); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(o.out)
	if err != nil {
		t.Fatal(err)
	}
	var report Report
	if err := json.Unmarshal(data, &report); err != nil {
		t.Fatal(err)
	}
	rows := map[string]float64{}
	for _, r := range report.Rows {
		rows[r.Metric] = r.Ours.Median
	}
	for _, metric := range []string{
		"Ready p99", "Ready with its namespaces p99", "namespace p99", "controller's requests per tenant",
		"restart to converged", "requests of a restart", "GET by a member, p50", "deletion of all", "controller's requests per deleted tenant",
	} {
		if rows[metric] <= 0 {
			t.Errorf("%s = %v", metric, rows[metric])
		}
	}
	plots, err := filepath.Glob(filepath.Join(o.plots, "*.svg"))
	if err != nil || len(plots) != len(report.Curves) || len(plots) == 0 {
		t.Errorf("%d plots of %d curves, %v", len(plots), len(report.Curves), err)
	}
	o.from, o.plots = o.out, filepath.Join(dir, "again")
	if err := run(o); err != nil {
		t.Errorf("the plots once more: %v", err)
	}
}

func TestCheckpoints(t *testing.T) {
	for name, tt := range map[string]struct {
		tenants int
		want    []int
	}{
		"many": {1000, []int{0, 100, 250, 500, 750, 1000}},
		"few":  {5, []int{0, 2, 3, 5}},
		"two":  {2, []int{0, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			got := checkpoints(tt.tenants)
			if len(got) != len(tt.want) {
				t.Fatalf("%v, want %v", got, tt.want)
			}
			for i := range got {
				if got[i] != tt.want[i] {
					t.Errorf("%v, want %v", got, tt.want)
				}
			}
		})
	}
}

func TestSlope(t *testing.T) {
	s := Series{X: []float64{0, 1, 2, 3}, Y: []float64{5, 7, 9, 11}}
	if got := s.slope(); got != 2 {
		t.Errorf("slope of 5+2x is %v", got)
	}
}

func TestTicks(t *testing.T) {
	for name, tt := range map[string]struct {
		end  float64
		n    int
		want float64
	}{"thousand": {1000, 8, 200}, "small": {0.43, 5, 0.1}, "nothing": {0, 5, 1}, "exact": {10, 5, 2}} {
		t.Run(name, func(t *testing.T) {
			if got := tickStep(tt.end, tt.n); got != tt.want {
				t.Errorf("%v, want %v", got, tt.want)
			}
		})
	}
	if got := tickLabel(0.3, 0.1); got != "0.3" {
		t.Errorf("label %q", got)
	}
}

// A plot is well-formed, has its names as they are, and draws every value.
func TestPlot(t *testing.T) {
	c := Curve{File: "f", Title: "a < b & c", X: "tenants", Y: "ms", Target: 2, Series: []Series{
		{Name: "p50", X: []float64{0, 500, 1000}, Y: []float64{0, 1, 4}},
		{Name: "p99", X: []float64{0, 1000}, Y: []float64{2, 3}},
	}}
	var out strings.Builder
	if err := c.svg(&out); err != nil {
		t.Fatal(err)
	}
	var texts []string
	dots := 0
	for decoder := xml.NewDecoder(strings.NewReader(out.String())); ; {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch token := token.(type) {
		case xml.CharData:
			texts = append(texts, string(token))
		case xml.StartElement:
			if token.Name.Local == "circle" {
				dots++
			}
		}
	}
	if dots != 5 {
		t.Errorf("%d dots, want 5", dots)
	}
	for _, want := range []string{"a < b & c", "tenants", "ms", "p50", "p99", "target", "1000", "4"} {
		if !strings.Contains(strings.Join(texts, "\n"), want) {
			t.Errorf("no text %q in the plot", want)
		}
	}
	// The highest value is at the top, the last at the right end.
	if !strings.Contains(out.String(), `cx="704.0" cy="74.0"`) {
		t.Errorf("no dot at the top right:\n%s", out.String())
	}
	if err := (Curve{Series: []Series{{X: []float64{1}}}}).svg(io.Discard); err == nil {
		t.Error("a series with a place and no value is plotted")
	}
}

func TestProcessStat(t *testing.T) {
	parent, own, _, err := processStat(os.Getpid())
	if err != nil || parent != os.Getppid() || own < 0 {
		t.Errorf("parent %d, time %v, %v; the parent is %d", parent, own, err, os.Getppid())
	}
}
