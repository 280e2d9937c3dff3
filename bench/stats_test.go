package main

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

func TestQuantile(t *testing.T) {
	tests := map[string]struct {
		samples []float64
		q, want float64
	}{
		"none":                    {nil, 0.5, math.NaN()},
		"one":                     {[]float64{7}, 0.99, 7},
		"median of odd":           {[]float64{9, 1, 5}, 0.5, 5},
		"median of even":          {[]float64{4, 1, 3, 2}, 0.5, 2.5},
		"smallest":                {[]float64{4, 1, 3}, 0, 1},
		"largest":                 {[]float64{4, 1, 3}, 1, 4},
		"between two neighbours":  {[]float64{0, 10}, 0.9, 9},
		"the input may be sorted": {[]float64{1, 2, 3, 4, 5}, 0.25, 2},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := quantile(tc.samples, tc.q); !cmp.Equal(got, tc.want, cmpopts.EquateNaNs(), cmpopts.EquateApprox(0, 1e-9)) {
				t.Errorf("quantile(%v, %v) = %v, want %v", tc.samples, tc.q, got, tc.want)
			}
		})
	}
}

func TestQuantileOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		samples := rapid.SliceOfN(rapid.Float64Range(-1e6, 1e6), 1, 50).Draw(t, "samples")
		before := append([]float64(nil), samples...)
		p10, p50, p90 := quantile(samples, 0.1), quantile(samples, 0.5), quantile(samples, 0.9)
		if p10 > p50 || p50 > p90 {
			t.Fatalf("p10 %v, p50 %v, p90 %v are out of order", p10, p50, p90)
		}
		if !cmp.Equal(before, samples) {
			t.Fatal("quantile changed its input")
		}
	})
}

func TestCompare(t *testing.T) {
	tests := map[string]struct {
		ours, peer []float64
		want       Ratio
		wantErr    bool
	}{
		"equal":                {[]float64{2, 2, 2}, []float64{2, 2, 2}, Ratio{Median: 1, P10: 1, P90: 1}, false},
		"drift cancels out":    {[]float64{10, 20, 30}, []float64{20, 40, 60}, Ratio{Median: 0.5, P10: 0.5, P90: 0.5}, false},
		"spread":               {[]float64{1, 2, 3}, []float64{1, 1, 1}, Ratio{Median: 2, P10: 1.2, P90: 2.8}, false},
		"one round":            {[]float64{3}, []float64{2}, Ratio{Median: 1.5, P10: 1.5, P90: 1.5, Single: true}, false},
		"a side misses rounds": {[]float64{1, 2}, []float64{1}, Ratio{}, true},
		"nothing":              {nil, nil, Ratio{}, true},
		"peer is zero":         {[]float64{1}, []float64{0}, Ratio{}, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := compare(tc.ours, tc.peer)
			if (err != nil) != tc.wantErr {
				t.Fatalf("error %v, want one: %v", err, tc.wantErr)
			}
			if d := cmp.Diff(tc.want, got, cmpopts.EquateApprox(0, 1e-9)); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
		})
	}
}

func TestVerdict(t *testing.T) {
	tests := map[string]struct {
		target Target
		ratio  Ratio
		want   string
	}{
		"throughput above":            {Target{true, 1}, Ratio{Median: 1.1, P10: 0.9, P90: 1.2}, "met"},
		"throughput exactly":          {Target{true, 1}, Ratio{Median: 1, P10: 0.9, P90: 1.2}, "met"},
		"throughput some rounds":      {Target{true, 1}, Ratio{Median: 0.98, P10: 0.9, P90: 1.02}, "missed, within spread"},
		"throughput below":            {Target{true, 1}, Ratio{Median: 0.8, P10: 0.7, P90: 0.9}, "missed"},
		"time below":                  {Target{false, 1.1}, Ratio{Median: 1.05, P10: 0.9, P90: 1.2}, "met"},
		"time some rounds":            {Target{false, 1.1}, Ratio{Median: 1.2, P10: 1.05, P90: 1.3}, "missed, within spread"},
		"time above":                  {Target{false, 1.1}, Ratio{Median: 1.4, P10: 1.3, P90: 1.5}, "missed"},
		"one value has no spread":     {Target{false, 1}, Ratio{Median: 1.4, P10: 0.3, P90: 2, Single: true}, "missed"},
		"one value may meet it still": {Target{false, 1}, Ratio{Median: 0.4, Single: true}, "met"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := tc.target.verdict(tc.ratio); got != tc.want {
				t.Errorf("verdict %q, want %q", got, tc.want)
			}
		})
	}
}
