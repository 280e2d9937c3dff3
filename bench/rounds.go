package main

import (
	"context"
	"fmt"
)

// variant is one side of a comparison. A round's values are by metric.
type variant struct {
	name    string
	measure func(ctx context.Context, round int) (map[string]float64, error)
}

// rounds are the values of many rounds, by variant and metric.
type rounds map[string]map[string][]float64

// interleave measures every variant once in every round. Who is first changes
// from round to round, so that nobody always follows the same neighbour.
func interleave(ctx context.Context, n int, variants []variant) (rounds, error) {
	result := rounds{}
	for _, v := range variants {
		result[v.name] = map[string][]float64{}
	}
	for round := range n {
		for i := range variants {
			if err := context.Cause(ctx); err != nil {
				return nil, err
			}
			v := variants[(round+i)%len(variants)]
			values, err := v.measure(ctx, round)
			if err != nil {
				return nil, fmt.Errorf("round %d of %s: %w", round+1, v.name, err)
			}
			for metric, value := range values {
				result[v.name][metric] = append(result[v.name][metric], value)
			}
		}
	}
	return result, nil
}

func (r rounds) side(variant, metric string) Side { return newSide(variant, r[variant][metric]) }
