package main

import (
	"os"
	"testing"
)

func TestParseRollup(t *testing.T) {
	tests := map[string]struct {
		data    string
		want    memory
		wantErr bool
	}{
		"complete": {
			"5581-7ffc ---p 00000000 00:00 0 [rollup]\nRss:  884 kB\nPss:  385 kB\nPss_Dirty:  68 kB\nAnonymous:  60 kB\n",
			memory{884, 385, 60},
			false,
		},
		"a field is missing": {"x\nRss: 884 kB\nPss: 385 kB\n", memory{}, true},
		"another unit":       {"x\nRss: 884 MB\nPss: 385 kB\nAnonymous: 60 kB\n", memory{}, true},
		"not a number":       {"x\nRss: many kB\nPss: 385 kB\nAnonymous: 60 kB\n", memory{}, true},
		"empty":              {"", memory{}, true},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseRollup(tc.data)
			if (err != nil) != tc.wantErr {
				t.Fatalf("error %v, want one: %v", err, tc.wantErr)
			}
			if got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestParseRollupOfThisProcess(t *testing.T) {
	data, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		t.Fatal(err)
	}
	m, err := parseRollup(string(data))
	if err != nil {
		t.Fatal(err)
	}
	if m.pss <= 0 || m.pss > m.rss {
		t.Errorf("PSS %v KB of RSS %v KB", m.pss, m.rss)
	}
}
