package main

import (
	"fmt"
	"math"
	"slices"
)

// quantile is the q-quantile (0 ≤ q ≤ 1) of samples, linear between neighbours;
// NaN if there are none.
func quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(samples))
	at := q * float64(len(sorted)-1)
	low, high := int(math.Floor(at)), int(math.Ceil(at))
	return sorted[low] + (at-float64(low))*(sorted[high]-sorted[low])
}

func median(samples []float64) float64 { return quantile(samples, 0.5) }

// Ratio compares two sides over interleaved rounds.
type Ratio struct {
	// Median of the rounds' own ratios: what slows the machine down for the
	// length of a round slows both sides down.
	Median float64 `json:"median"`
	P10    float64 `json:"p10"`
	P90    float64 `json:"p90"`
	// Single says that there are no rounds to take a spread from.
	Single bool `json:"single,omitempty"`
}

// compare pairs the rounds of both sides; ours and peer were measured one right
// after the other.
func compare(ours, peer []float64) (Ratio, error) {
	if len(ours) == 0 || len(ours) != len(peer) {
		return Ratio{}, fmt.Errorf("%d rounds against %d: every round must have both sides", len(ours), len(peer))
	}
	ratios := make([]float64, len(ours))
	for i := range ours {
		if peer[i] == 0 {
			return Ratio{}, fmt.Errorf("round %d: the peer's value is 0", i+1)
		}
		ratios[i] = ours[i] / peer[i]
	}
	return Ratio{
		Median: median(ratios),
		P10:    quantile(ratios, 0.1),
		P90:    quantile(ratios, 0.9),
		Single: len(ratios) == 1,
	}, nil
}

// Target is what a ratio, or an absolute value, should be.
type Target struct {
	// AtLeast is true for throughput and rates, false for what should be small.
	AtLeast bool    `json:"atLeast"`
	Value   float64 `json:"value"`
}

func (t Target) met(v float64) bool {
	if t.AtLeast {
		return v >= t.Value
	}
	return v <= t.Value
}

// verdict says whether the median meets the target, and if not, whether some of
// the rounds did.
func (t Target) verdict(r Ratio) string {
	best := r.P10
	if t.AtLeast {
		best = r.P90
	}
	switch {
	case t.met(r.Median):
		return "met"
	case !r.Single && t.met(best):
		return "missed, within spread"
	default:
		return "missed"
	}
}
