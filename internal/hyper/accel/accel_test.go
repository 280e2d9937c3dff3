package accel

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	boots := func(context.Context) (bool, string, error) { return true, "", nil }
	hangs := func(context.Context) (bool, string, error) { return false, "it hangs", nil }
	breaks := func(context.Context) (bool, string, error) { return false, "", errors.New("no QEMU") }
	for name, tt := range map[string]struct {
		forced      string
		probe       Prober
		want        string
		reason, err string
	}{
		"KVM boots a guest":      {"", boots, KVM, "boots", ""},
		"KVM boots no guest":     {"", hangs, TCG, "it hangs", ""},
		"nothing could be found": {"", breaks, "", "", "no QEMU"},
		"KVM is forced":          {"kvm", hangs, KVM, "forced", ""},
		"TCG is forced":          {"tcg", boots, TCG, "forced", ""},
		"neither":                {"xen", boots, "", "", "say kvm or tcg"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Choose(t.Context(), tt.forced, tt.probe)
			if got.Accelerator != tt.want || !strings.Contains(got.Reason, tt.reason) {
				t.Errorf("chose %+v", got)
			}
			if forced := tt.reason == "forced"; got.Forced() != forced {
				t.Errorf("forced: %t, want %t", got.Forced(), forced)
			}
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir() + "/hyper"
	if _, found, err := Recorded(dir); found || err != nil {
		t.Fatalf("before: %t, %v", found, err)
	}
	for _, want := range []Choice{{TCG, "a"}, {TCG, "a"}, {KVM, "b"}} {
		if err := Record(dir, want); err != nil {
			t.Fatal(err)
		}
		if got, found, err := Recorded(dir); !found || err != nil || got != want {
			t.Fatalf("recorded %+v, %t, %v; want %+v", got, found, err, want)
		}
	}
	if err := os.WriteFile(file(dir), []byte(`{"accelerator":"xen"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, found, err := Recorded(dir); found || err == nil {
		t.Error("an unknown accelerator was accepted")
	}
	if err := Record(dir, Choice{TCG, "a"}); err != nil {
		t.Error("a damaged record is not replaced:", err)
	}
}
