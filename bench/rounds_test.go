package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestInterleave(t *testing.T) {
	var order []string
	side := func(name string) variant {
		return variant{name, func(_ context.Context, round int) (map[string]float64, error) {
			order = append(order, fmt.Sprint(name, round))
			return map[string]float64{"m": float64(round)}, nil
		}}
	}
	got, err := interleave(t.Context(), 3, []variant{side("a"), side("b")})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"a0", "b0", "b1", "a1", "a2", "b2"}, order); d != "" {
		t.Errorf("order (-want +got)\n%s", d)
	}
	want := rounds{"a": {"m": {0, 1, 2}}, "b": {"m": {0, 1, 2}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("values (-want +got)\n%s", d)
	}
}

func TestInterleaveEnds(t *testing.T) {
	broken := errors.New("broken")
	fails := variant{"a", func(context.Context, int) (map[string]float64, error) { return nil, broken }}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := map[string]struct {
		ctx  context.Context
		want error
	}{
		"a measurement fails": {t.Context(), broken},
		"the context ends":    {cancelled, context.Canceled},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := interleave(tc.ctx, 3, []variant{fails}); !errors.Is(err, tc.want) {
				t.Errorf("error %v, want %v", err, tc.want)
			}
		})
	}
}
