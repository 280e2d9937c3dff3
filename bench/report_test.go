package main

import (
	"strings"
	"testing"
)

func TestPrint(t *testing.T) {
	fast, err := row("same node", "throughput", "Gbit/s",
		newSide("tenant", []float64{12, 12, 12}), newSide("default", []float64{10, 12, 15}), &Target{AtLeast: true, Value: 1})
	if err != nil {
		t.Fatal(err)
	}
	memory := Row{
		Group: "node agent", Metric: "memory per Network", Unit: "KB", Ours: newSide("h8s-node", []float64{150}),
		Target: &Target{Value: 200}, Verdict: "met", Note: "after a garbage collection",
	}
	r := Report{Version: "v0", Rows: []Row{fast, memory}, Errors: []string{"section start: no pods"}}
	var out strings.Builder
	r.print(&out)
	for _, want := range []string{
		"same node   throughput          12.0 Gbit/s  12.0 default  1.00 (0.84–1.16)  ≥ 1.00×   met",
		"node agent  memory per Network  150 KB                                       ≤ 200 KB  met",
		"after a garbage collection",
		"not measured: section start: no pods",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
}

func TestNumber(t *testing.T) {
	tests := map[string]struct {
		v    float64
		want string
	}{
		"large":  {1234.56, "1235"},
		"medium": {12.345, "12.3"},
		"small":  {1.2345, "1.23"},
		"tiny":   {0.012, "0.01"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := number(tc.v); got != tc.want {
				t.Errorf("number(%v) = %q, want %q", tc.v, got, tc.want)
			}
		})
	}
}
