package network

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// cluster stands for the API server: it agrees on who holds which Block, by name.
type cluster struct {
	mu     sync.Mutex
	blocks map[string]claimed
}

type claimed struct {
	network, node string
	block         netip.Prefix
}

// registry is the cluster as one node sees it. What it knows without asking may
// be behind: stale lists what it has not heard of yet.
type registry struct {
	*cluster
	node  string
	stale bool
	fail  error
	// reserved is what the node shall avoid, and broken what it claimed of it all the same.
	reserved, broken []netip.Prefix
}

func (r *registry) Taken(network string) []netip.Prefix {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []netip.Prefix
	for _, c := range r.blocks {
		if c.network == network && (!r.stale || c.node == r.node) {
			out = append(out, c.block)
		}
	}
	return out
}

func (r *registry) Claim(_ context.Context, network string, block netip.Prefix) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return r.fail
	}
	name := BlockName(network, block)
	if c, ok := r.blocks[name]; ok && c.node != r.node {
		return ErrTaken
	}
	r.blocks[name] = claimed{network, r.node, block}
	if slices.ContainsFunc(r.reserved, block.Overlaps) {
		r.broken = append(r.broken, block)
	}
	return nil
}

func newCluster() *cluster { return &cluster{blocks: map[string]claimed{}} }

func TestAllocateOrder(t *testing.T) {
	ctx := context.Background()
	l := NewLedger(&registry{cluster: newCluster(), node: "n1"}, time.Now)
	cidr := netip.MustParsePrefix("10.0.0.0/16")
	allocate := func() netip.Addr {
		t.Helper()
		a, err := l.Allocate(ctx, "acme", cidr)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for i := 1; i <= 15; i++ {
		if got, want := allocate().String(), fmt.Sprintf("10.0.0.%d", i); got != want {
			t.Fatalf("got %s, want %s", got, want)
		}
	}
	// What was released first is reused first.
	for _, a := range []string{"10.0.0.9", "10.0.0.3", "10.0.0.3"} {
		l.Free("acme", netip.MustParseAddr(a))
	}
	var got []string
	for range 3 {
		got = append(got, allocate().String())
	}
	if diff := cmp.Diff([]string{"10.0.0.9", "10.0.0.3", "10.0.0.16"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestExhausted(t *testing.T) {
	ctx := context.Background()
	cidr := netip.MustParsePrefix("10.0.0.0/26")
	fill := func(l *Ledger, network string) error {
		for {
			if _, err := l.Allocate(ctx, network, cidr); err != nil {
				return err
			}
		}
	}
	tests := map[string]struct {
		prepare func(c *cluster, l *Ledger)
		want    string
	}{
		"by this node": {
			func(*cluster, *Ledger) {},
			"Network acme (10.0.0.0/26) is exhausted: 62 of 62 addresses are in use; delete pods, or use another Network",
		},
		"by another node": {
			func(c *cluster, _ *Ledger) {
				other := NewLedger(&registry{cluster: c, node: "n2"}, time.Now)
				for range 10 {
					if _, err := other.Allocate(ctx, "acme", cidr); err != nil {
						t.Fatal(err)
					}
				}
			},
			"Network acme (10.0.0.0/26) is exhausted on this node: 51 of 51 addresses held here are in use; other nodes hold 3 of its 16 Blocks; delete pods, or use another Network",
		},
		"by another Network on this node": {
			func(_ *cluster, l *Ledger) {
				if err := fill(l, "globex"); err == nil {
					t.Fatal("no error")
				}
			},
			"Network acme (10.0.0.0/26) is exhausted on this node: 0 of 0 addresses held here are in use; 16 of its 16 Blocks overlap with ranges that this node uses otherwise; delete pods, or use another Network",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			c := newCluster()
			l := NewLedger(&registry{cluster: c, node: "n1"}, time.Now)
			tc.prepare(c, l)
			err := fill(l, "acme")
			var exhausted *ExhaustedError
			if !errors.As(err, &exhausted) {
				t.Fatalf("got %v, want an ExhaustedError", err)
			}
			if diff := cmp.Diff(tc.want, err.Error()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestRetire(t *testing.T) {
	ctx := context.Background()
	clock := time.Unix(1000, 0)
	r := &registry{cluster: newCluster(), node: "n1"}
	l := NewLedger(r, func() time.Time { return clock })
	cidr := netip.MustParsePrefix("10.0.0.0/24")
	addr, err := l.Allocate(ctx, "acme", cidr)
	if err != nil {
		t.Fatal(err)
	}
	block := l.Blocks("acme")[0]
	if l.Retire("acme", block) {
		t.Fatal("retired a Block in use")
	}
	l.Free("acme", addr)
	clock = clock.Add(time.Minute)
	if got := l.Idle("acme", 2*time.Minute); len(got) != 0 {
		t.Fatalf("idle too early: %v", got)
	}
	if got := l.Idle("acme", time.Minute); len(got) != 1 {
		t.Fatalf("not idle: %v", got)
	}
	if !l.Retire("acme", block) {
		t.Fatal("not retired")
	}
	// Its range is still this node's: neither Network gets it.
	for _, network := range []string{"acme", "globex"} {
		a, err := l.Allocate(ctx, network, cidr)
		if err != nil {
			t.Fatal(err)
		}
		if block.Contains(a) {
			t.Errorf("%s got %s of a retired Block", network, a)
		}
	}
	l.Drop("acme", block)
	delete(r.blocks, BlockName("acme", block))
	for {
		a, err := l.Allocate(ctx, "globex", cidr)
		if err != nil {
			t.Fatal(err)
		}
		if block.Contains(a) {
			break
		}
	}
}

func TestHoldRefuses(t *testing.T) {
	acme := netip.MustParsePrefix("10.0.0.0/16")
	tests := map[string]struct {
		network, cidr, block string
	}{
		"a Block of another size":              {"acme", "10.0.0.0/16", "10.0.1.0/24"},
		"a Block outside":                      {"acme", "10.0.0.0/16", "10.1.0.0/28"},
		"another Network's Block on this node": {"globex", "10.0.0.0/25", "10.0.0.8/29"},
		"a CIDR that has changed":              {"acme", "10.0.0.0/8", "10.7.0.0/28"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			l := NewLedger(&registry{cluster: newCluster(), node: "n1"}, time.Now)
			if err := l.Hold("acme", acme, netip.MustParsePrefix("10.0.0.0/28")); err != nil {
				t.Fatal(err)
			}
			if err := l.Hold(tc.network, netip.MustParsePrefix(tc.cidr), netip.MustParsePrefix(tc.block)); err == nil {
				t.Error("no error")
			}
			if got := l.Blocks("acme"); len(got) != 1 {
				t.Errorf("Blocks changed: %v", got)
			}
		})
	}
}

func TestAllocateConcurrently(t *testing.T) {
	ctx := context.Background()
	c := newCluster()
	cidr := netip.MustParsePrefix("10.0.0.0/22")
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		seen = map[netip.Addr]bool{}
	)
	for _, node := range []string{"n1", "n2", "n3"} {
		l := NewLedger(&registry{cluster: c, node: node, stale: true}, time.Now)
		for range 50 {
			wg.Go(func() {
				a, err := l.Allocate(ctx, "acme", cidr)
				mu.Lock()
				defer mu.Unlock()
				if err != nil || seen[a] {
					t.Errorf("got %s, %v", a, err)
				}
				seen[a] = true
			})
		}
	}
	wg.Wait()
}

// node is what the node agent does with a Ledger and a Store, without the kernel.
type node struct {
	name     string
	registry *registry
	store    *Store
	ledger   *Ledger
	cidrs    map[string]netip.Prefix
}

// restart drops what was in memory, and recovers it from the store and the cluster.
func (n *node) restart() error {
	store, err := OpenStore(n.store.dir)
	if err != nil {
		return err
	}
	n.store = store
	n.ledger = NewLedger(n.registry, time.Now)
	n.ledger.Avoid(n.registry.reserved)
	for _, c := range n.registry.blocks {
		if c.node == n.name {
			if err := n.ledger.Hold(c.network, n.cidrs[c.network], c.block); err != nil {
				return err
			}
		}
	}
	records, err := n.store.Load()
	if err != nil {
		return err
	}
	for _, a := range records {
		if err := n.ledger.Reserve(a.Network, a.Address); err != nil {
			return err
		}
	}
	return nil
}

// drawCIDR draws a range as a Network may have it. Most overlap with one that was
// drawn before, small ones are many: collisions and exhaustion are common.
func drawCIDR(t *rapid.T, before []netip.Prefix) netip.Prefix {
	bits := rapid.OneOf(rapid.IntRange(22, 26), rapid.IntRange(8, 26)).Draw(t, "bits")
	// Unicast, and not what a node has for itself.
	address := rapid.Uint32Range(1<<24, 224<<24-1).Draw(t, "address")
	if len(before) > 0 && rapid.IntRange(0, 3).Draw(t, "apart") > 0 {
		near := rapid.SampledFrom(before).Draw(t, "near")
		address = uint32(first(near)) | address&(1<<(32-near.Bits())-1)
	}
	return netip.PrefixFrom(toAddr(uint64(address)), bits).Masked()
}

// TestRules drives random clusters through random lives and checks the package's
// two rules, and that nothing is lost, after every step.
func TestRules(t *testing.T) {
	// Thousands of Networks: each of the clusters has up to twelve. They are many
	// small runs because rapid's own number of checks is a flag of the test program.
	for i := range 6 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(t *rapid.T) { randomLife(t) })
		})
	}
}

func randomLife(t *rapid.T) {
	ctx := context.Background()
	// In memory, if there is such a place: what a disk does is TestStore's business.
	root := "/dev/shm"
	if _, err := os.Stat(root); err != nil {
		root = ""
	}
	dir, err := os.MkdirTemp(root, "h8s-ledger-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)

	cidrs := map[string]netip.Prefix{}
	var networks []string
	var ranges []netip.Prefix
	for i := range rapid.IntRange(1, 12).Draw(t, "networks") {
		name := fmt.Sprintf("net%d", i)
		networks = append(networks, name)
		cidrs[name] = drawCIDR(t, ranges)
		ranges = append(ranges, cidrs[name])
	}
	c := newCluster()
	var nodes []*node
	disks := 0
	join := func(t *rapid.T, name string) {
		disks++
		store, err := OpenStore(fmt.Sprintf("%s/%d", dir, disks))
		if err != nil {
			t.Fatal(err)
		}
		n := &node{name: name, registry: &registry{cluster: c, node: name}, store: store, cidrs: cidrs}
		if err := n.restart(); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	for i := range rapid.IntRange(1, 4).Draw(t, "nodes") {
		join(t, fmt.Sprintf("n%d", i))
	}
	var lost []string                   // names of nodes
	attached := map[string]Attachment{} // what must not be lost, by node/key
	serial := 0

	add := func(t *rapid.T, crash bool) {
		n := rapid.SampledFrom(nodes).Draw(t, "node")
		network := rapid.SampledFrom(networks).Draw(t, "network")
		n.registry.stale = rapid.Bool().Draw(t, "stale")
		for range rapid.IntRange(1, 20).Draw(t, "pods") {
			addr, err := n.ledger.Allocate(ctx, network, cidrs[network])
			var exhausted *ExhaustedError
			if errors.As(err, &exhausted) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if crash {
				break // after a claim, before the record
			}
			serial++
			a := Attachment{ContainerID: fmt.Sprintf("c%d", serial), IfName: "eth0", Network: network, CIDR: cidrs[network], Address: addr}
			if err := n.store.Put(a); err != nil {
				t.Fatal(err)
			}
			attached[n.name+"/"+a.Key()] = a
		}
		if crash {
			if err := n.restart(); err != nil {
				t.Fatal(err)
			}
		}
	}
	release := func(t *rapid.T, crash bool) {
		n := rapid.SampledFrom(nodes).Draw(t, "node")
		for _, network := range networks {
			for _, block := range n.ledger.Idle(network, 0) {
				if !n.ledger.Retire(network, block) {
					t.Fatalf("idle Block %s is in use", block)
				}
				if crash && rapid.Bool().Draw(t, "before deletion") {
					continue
				}
				delete(c.blocks, BlockName(network, block))
				if !crash {
					n.ledger.Drop(network, block)
				}
			}
		}
		if crash {
			if err := n.restart(); err != nil {
				t.Fatal(err)
			}
		}
	}

	t.Repeat(map[string]func(*rapid.T){
		"add":                   func(t *rapid.T) { add(t, false) },
		"add more":              func(t *rapid.T) { add(t, false) },
		"crash while adding":    func(t *rapid.T) { add(t, true) },
		"release":               func(t *rapid.T) { release(t, false) },
		"crash while releasing": func(t *rapid.T) { release(t, true) },
		"delete": func(t *rapid.T) {
			n := rapid.SampledFrom(nodes).Draw(t, "node")
			records, err := n.store.Load()
			if err != nil {
				t.Fatal(err)
			}
			crash := rapid.Bool().Draw(t, "crash")
			for _, a := range records {
				if !rapid.Bool().Draw(t, "delete") {
					continue
				}
				if err := n.store.Delete(a.ContainerID, a.IfName); err != nil {
					t.Fatal(err)
				}
				delete(attached, n.name+"/"+a.Key())
				if !crash {
					n.ledger.Free(a.Network, a.Address)
				}
			}
			if crash {
				if err := n.restart(); err != nil {
					t.Fatal(err)
				}
			}
		},
		"the API server is down": func(t *rapid.T) {
			n := rapid.SampledFrom(nodes).Draw(t, "node")
			network := rapid.SampledFrom(networks).Draw(t, "network")
			n.registry.fail = errors.New("down")
			defer func() { n.registry.fail = nil }()
			if addr, err := n.ledger.Allocate(ctx, network, cidrs[network]); err == nil {
				n.ledger.Free(network, addr)
			}
		},
		"the cluster takes a range": func(t *rapid.T) {
			n := rapid.SampledFrom(nodes).Draw(t, "node")
			var reserved []netip.Prefix
			for range rapid.IntRange(0, 3).Draw(t, "ranges") {
				reserved = append(reserved, drawCIDR(t, ranges))
			}
			n.registry.reserved = reserved
			n.ledger.Avoid(reserved)
		},
		"a node is lost": func(t *rapid.T) {
			if len(nodes) == 1 {
				t.Skip("the last one")
			}
			i := rapid.IntRange(0, len(nodes)-1).Draw(t, "node")
			name := nodes[i].name
			nodes = slices.Delete(nodes, i, i+1)
			lost = append(lost, name)
			maps.DeleteFunc(attached, func(key string, _ Attachment) bool { return strings.HasPrefix(key, name+"/") })
		},
		"the controller reaps": func(*rapid.T) { // its Blocks go some time later
			maps.DeleteFunc(c.blocks, func(_ string, b claimed) bool { return slices.Contains(lost, b.node) })
		},
		"a node joins": func(t *rapid.T) { // with an empty disk; perhaps one of a name that was there
			if len(nodes) == 4 {
				t.Skip("enough")
			}
			name := fmt.Sprintf("m%d", disks)
			if len(lost) > 0 && rapid.Bool().Draw(t, "again") {
				name = rapid.SampledFrom(lost).Draw(t, "name")
				lost = slices.DeleteFunc(lost, func(s string) bool { return s == name })
			}
			join(t, name)
		},
		"": func(t *rapid.T) { checkRules(t, c, nodes, attached) },
	})
}

func checkRules(t *rapid.T, c *cluster, nodes []*node, attached map[string]Attachment) {
	held := slices.Collect(func(yield func(claimed) bool) {
		for _, b := range c.blocks {
			if !yield(b) {
				return
			}
		}
	})
	for i, a := range held {
		for _, b := range held[i+1:] {
			if !a.block.Overlaps(b.block) {
				continue
			}
			if a.node == b.node {
				t.Fatalf("Blocks of one node overlap: %+v, %+v", a, b)
			}
			if a.network == b.network {
				t.Fatalf("Blocks of one Network overlap: %+v, %+v", a, b)
			}
		}
	}
	owners := map[string]string{}
	found := 0
	for _, n := range nodes {
		if len(n.registry.broken) > 0 {
			t.Fatalf("%s claimed %v although it shall avoid %v", n.name, n.registry.broken, n.registry.reserved)
		}
		records, err := n.store.Load()
		if err != nil {
			t.Fatal(err)
		}
		found += len(records)
		perNetwork := map[string]int{}
		for _, a := range records {
			key := n.name + "/" + a.Key()
			if attached[key].Address != a.Address {
				t.Fatalf("%s: recorded %s, was given %s", key, a.Address, attached[key].Address)
			}
			perNetwork[a.Network]++
			id := a.Network + "/" + a.Address.String()
			if other, ok := owners[id]; ok {
				t.Fatalf("%s belongs to %s and %s", id, other, key)
			}
			owners[id] = key
			cidr := n.cidrs[a.Network]
			if first(cidr) == first(netip.PrefixFrom(a.Address, 32)) || last(cidr) == last(netip.PrefixFrom(a.Address, 32)) {
				t.Fatalf("%s is an end of %s", a.Address, cidr)
			}
			if !slices.ContainsFunc(n.ledger.Blocks(a.Network), func(b netip.Prefix) bool {
				return b.Contains(a.Address) && c.blocks[BlockName(a.Network, b)].node == n.name
			}) {
				t.Fatalf("%s holds no Block of %s for %s", n.name, a.Network, a.Address)
			}
		}
		for network := range n.cidrs {
			if got, want := n.ledger.InUse(network), perNetwork[network]; got != want {
				t.Fatalf("%s: %d addresses of %s in use, %d recorded", n.name, got, network, want)
			}
		}
	}
	if found != len(attached) {
		t.Fatalf("%d attachments recorded, %d made", found, len(attached))
	}
}
