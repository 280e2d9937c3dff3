package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// A side's turn in a round is short, and rounds are many: what else the machine does
// changes from second to second, and should meet all sides alike.
const (
	throughputTime = time.Second
	latencyTime    = 500 * time.Millisecond
	connections    = 1500
)

// What the sides of the network measurements are called.
const (
	tenantSide  = "tenant network"
	defaultSide = "default network"
	flannelSide = "flannel layout"
	proxySide   = "kube-proxy nftables"
)

// path is a way from one place to another.
type path struct {
	name     string
	from, to place
	// target is what from connects to: to itself, or a Service in front of it.
	target netip.AddrPort
}

func (p path) variant(connects bool) variant {
	return variant{p.name, func(context.Context, int) (map[string]float64, error) {
		gbits, err := throughput(p.from, p.to, p.target, throughputTime)
		if err != nil {
			return nil, err
		}
		trips, err := latency(p.from, p.to, p.target, latencyTime)
		if err != nil {
			return nil, err
		}
		values := map[string]float64{"throughput": gbits, "p50": quantile(trips, 0.5), "p99": quantile(trips, 0.99)}
		if connects {
			if values["connects"], err = connectRate(p.from, p.to, p.target, connections); err != nil {
				return nil, err
			}
		}
		return values, nil
	}}
}

// measurePaths measures all paths in turns.
func measurePaths(ctx context.Context, n int, connects bool, paths ...path) (rounds, error) {
	var variants []variant
	for _, p := range paths {
		if err := reachable(ctx, p.from, p.to, p.target); err != nil {
			return nil, err
		}
		variants = append(variants, p.variant(connects))
	}
	return interleave(ctx, n, variants)
}

// wanted is a row to make of the values of a round.
type wanted struct {
	label, unit, metric string
	target              *Target
}

func (r rounds) rows(group, ours, peer string, list ...wanted) ([]Row, error) {
	var rows []Row
	for _, w := range list {
		row, err := row(group, w.label, w.unit, r.side(ours, w.metric), r.side(peer, w.metric), w.target)
		if err != nil {
			return rows, err
		}
		rows = append(rows, row)
	}
	return rows, nil
}

func measureNetwork(ctx context.Context, l *lab, o options, p *progress) (rows []Row, err error) {
	p.say("network: starting pods")
	if err := l.ensureFixture(ctx, p); err != nil {
		return nil, err
	}
	near, far := l.nodes[0], l.nodes[1]
	// One pod to measure from, one beside it, one on the other node.
	tenant, err := l.runPlaces(ctx, tenantNamespace, "network", plainRuntime, near, near, far)
	if err != nil {
		return nil, err
	}
	plain, err := l.runPlaces(ctx, defaultNamespace, "network", "", near, near, far)
	if err != nil {
		return nil, err
	}
	overlay, err := layFlannel([]node{near, far})
	defer func() { err = errors.Join(err, overlay.remove()) }()
	if err != nil {
		return nil, err
	}
	comparisons, err := l.comparisons(ctx, tenant, plain, overlay)
	if err != nil {
		return nil, err
	}
	for _, c := range comparisons {
		p.say("network: %s, %d rounds", c.group, o.rounds)
		more, err := c.measure(ctx, o.rounds)
		rows = append(rows, more...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// comparison is the tenant's way against one or more others.
type comparison struct {
	group  string
	tenant path
	peers  []peer
	// connects says to measure the rate of new connections, too.
	connects bool
}

// peer is another way and what is wanted of the comparison with it.
type peer struct {
	path
	rows []wanted
}

func (l *lab) comparisons(ctx context.Context, tenant, plain []place, overlay *flannel) ([]comparison, error) {
	const near, far = 1, 2 // places to measure to
	tenantNear, err := l.exposePod(ctx, tenantNamespace, podName("network", near))
	if err != nil {
		return nil, err
	}
	plainNear, err := l.exposePod(ctx, defaultNamespace, podName("network", near))
	if err != nil {
		return nil, err
	}
	tenantFar, err := l.exposePod(ctx, tenantNamespace, podName("network", far))
	if err != nil {
		return nil, err
	}
	overlayFar, err := l.exposePlace(ctx, defaultNamespace, "flannel", overlay.pods[1], overlay.nodes[1])
	if err != nil {
		return nil, err
	}
	atLeast, atMost := &Target{AtLeast: true, Value: 1}, &Target{Value: 1}
	direct := func(throughput *Target) []wanted {
		return []wanted{
			{"throughput", "Gbit/s", "throughput", throughput},
			{"request latency p50", "µs", "p50", nil},
			{"request latency p99", "µs", "p99", nil},
		}
	}
	service := []wanted{
		{"throughput", "Gbit/s", "throughput", atLeast},
		{"new connections", "1/s", "connects", atLeast},
		{"request latency p50", "µs", "p50", atMost},
		{"request latency p99", "µs", "p99", nil},
	}
	return []comparison{
		{
			group:  "same node",
			tenant: path{tenantSide, tenant[0], tenant[near], tenant[near].port()},
			peers: []peer{
				{path{defaultSide, plain[0], plain[near], plain[near].port()}, direct(atLeast)},
			},
		},
		{
			group:  "across nodes",
			tenant: path{tenantSide, tenant[0], tenant[far], tenant[far].port()},
			peers: []peer{
				{path{flannelSide, overlay.pods[0], overlay.pods[1], overlay.pods[1].port()}, direct(atLeast)},
				// Nothing is encapsulated there: to be known, not to be reached.
				{path{defaultSide, plain[0], plain[far], plain[far].port()}, direct(nil)},
			},
		},
		{
			group:    "Service, same node",
			connects: true,
			tenant:   path{tenantSide, tenant[0], tenant[near], tenantNear},
			peers: []peer{
				{path{proxySide, plain[0], plain[near], plainNear}, service},
			},
		},
		{
			group:    "Service, across nodes",
			connects: true,
			tenant:   path{tenantSide, tenant[0], tenant[far], tenantFar},
			peers: []peer{
				{path{proxySide + ", " + flannelSide, overlay.pods[0], overlay.pods[1], overlayFar}, service},
			},
		},
	}, nil
}

func (c comparison) measure(ctx context.Context, n int) ([]Row, error) {
	paths := []path{c.tenant}
	for _, p := range c.peers {
		paths = append(paths, p.path)
	}
	r, err := measurePaths(ctx, n, c.connects, paths...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.group, err)
	}
	var rows []Row
	for _, p := range c.peers {
		more, err := r.rows(c.group, c.tenant.name, p.name, p.rows...)
		rows = append(rows, more...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}
