package main

import (
	"strings"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	tests := map[string]struct {
		data    string
		want    cpuTime
		wantErr bool
	}{
		"complete":       {"cpu  100 1 20 300 40 5 6 7 50 0\ncpu0 1 2\n", cpuTime{1390 * time.Millisecond, 4790 * time.Millisecond}, false},
		"of one CPU":     {"cpu0 100 1 20 300 40 5 6 7 0 0\n", cpuTime{}, true},
		"too short":      {"cpu 1 2 3\n", cpuTime{}, true},
		"not a number":   {"cpu 1 2 3 x 5 6 7 8\n", cpuTime{}, true},
		"nothing at all": {"", cpuTime{}, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseStat(tc.data)
			if (err != nil) != tc.wantErr {
				t.Fatalf("error %v, want one: %v", err, tc.wantErr)
			}
			if got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestOthers(t *testing.T) {
	tests := map[string]struct {
		share float64
		want  string
	}{
		"quiet":   {0.05, "others took 5% of its CPU time"},
		"loaded":  {0.5, "THE MACHINE WAS LOADED: others took 50%"},
		"unknown": {-1, "not known"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := (Machine{Others: tc.share}).others(); !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want %q in it", got, tc.want)
			}
		})
	}
}
