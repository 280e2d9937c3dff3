package controller

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/internal/tenancy"
)

// infrastructure knows which addresses the cluster needs for itself.
type infrastructure struct {
	reader client.Reader
	fixed  []tenancy.Range
}

func fixedRanges(opts Options) ([]tenancy.Range, error) {
	ranges := tenancy.Reserved()
	for _, r := range []struct {
		what  string
		cidrs []string
	}{{"Services of the cluster", opts.ServiceCIDRs}, {"pods of the default network", opts.PodCIDRs}, {"infrastructure of the cluster", opts.InfrastructureCIDRs}} {
		more, err := tenancy.ParseRanges(r.what, r.cidrs...)
		if err != nil {
			return nil, err
		}
		ranges = append(ranges, more...)
	}
	return ranges, nil
}

// ranges are the cluster's own ranges as of now. What a Node or ServiceCIDR
// says that cannot be read is left out: the API server has validated it.
func (i infrastructure) ranges(ctx context.Context) ([]tenancy.Range, error) {
	ranges := slices.Clone(i.fixed)
	add := func(what string, cidrs ...string) {
		if more, err := tenancy.ParseRanges(what, cidrs...); err == nil {
			ranges = append(ranges, more...)
		}
	}
	var services networkingv1.ServiceCIDRList
	if err := i.reader.List(ctx, &services); err != nil {
		return nil, fmt.Errorf("list ServiceCIDRs: %w", err)
	}
	for _, s := range services.Items {
		add("Services of the cluster", s.Spec.CIDRs...)
	}
	var nodes corev1.NodeList
	if err := i.reader.List(ctx, &nodes); err != nil {
		return nil, fmt.Errorf("list Nodes: %w", err)
	}
	for _, n := range nodes.Items {
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
				add("address of node "+n.Name, a.Address)
			}
		}
		for _, c := range n.Spec.PodCIDRs {
			add("pods of the default network on node "+n.Name, c)
		}
	}
	return dropCovered(ranges), nil
}

// dropCovered leaves out ranges that lie within another one: the nodes' parts of
// the default network would only repeat the whole of it in messages.
func dropCovered(ranges []tenancy.Range) []tenancy.Range {
	var out []tenancy.Range
	for i, r := range ranges {
		covered := slices.ContainsFunc(ranges[:i], func(o tenancy.Range) bool {
			return o.Prefix.Bits() <= r.Prefix.Bits() && o.Prefix.Contains(r.Prefix.Addr())
		})
		if !covered {
			out = append(out, r)
		}
	}
	return out
}
