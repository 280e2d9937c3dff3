package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ErrTaken is what a Registry returns for a Block that another node holds.
var ErrTaken = errors.New("the Block is held by another node")

// Registry is where all nodes agree on who holds which Block.
type Registry interface {
	// Taken returns Blocks of the Network that are held, as far as is known:
	// it may be behind, since Claim has the last word.
	Taken(network string) []netip.Prefix
	// Claim makes this node the holder of the Block, or returns ErrTaken.
	// Claiming a Block that this node already holds succeeds.
	Claim(ctx context.Context, network string, block netip.Prefix) error
}

// Ledger is what one node knows about addresses: the Blocks it holds and the
// addresses in use. It is safe for concurrent use.
type Ledger struct {
	registry Registry
	now      func() time.Time

	// claiming is held while a Block is chosen and claimed: one claim of a node
	// at a time, or two Networks could be given the same range.
	claiming sync.Mutex

	mu       sync.Mutex
	pools    map[string]*pool
	reserved []netip.Prefix
}

// pool is one Network's share of the Ledger.
type pool struct {
	cidr   netip.Prefix
	blocks map[netip.Prefix]*heldBlock
	used   map[netip.Addr]bool
	// free is a queue: addresses are taken from its head and come back at its
	// tail, so that the one least recently used is reused first.
	free []netip.Addr
}

type heldBlock struct {
	used      int
	idleSince time.Time
	retired   bool
}

// NewLedger returns a Ledger without Blocks that claims new ones in registry.
func NewLedger(registry Registry, now func() time.Time) *Ledger {
	return &Ledger{registry: registry, now: now, pools: map[string]*pool{}}
}

// Avoid sets the ranges from which no Block may be claimed.
func (l *Ledger) Avoid(reserved []netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved = slices.Clone(reserved)
}

// Hold notes that this node holds block of the Network. It refuses a Block that
// is none of the Network's, or that overlaps with one held for another Network.
// To hold a Block twice changes nothing; a retired Block comes back to use.
func (l *Ledger) Hold(network string, cidr, block netip.Prefix) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if block.Bits() != BlockBits(cidr) || block != block.Masked() || !cidr.Overlaps(block) {
		return fmt.Errorf("%s is not a Block of Network %s (%s): delete the Block", block, network, cidr)
	}
	for name, p := range l.pools {
		if name == network {
			continue
		}
		for held := range p.blocks {
			if held.Overlaps(block) {
				return fmt.Errorf("Block %s of Network %s overlaps with Block %s of Network %s on this node: delete the Block that has no pods", block, network, held, name)
			}
		}
	}
	p := l.pools[network]
	if p == nil {
		p = &pool{cidr: cidr, blocks: map[netip.Prefix]*heldBlock{}, used: map[netip.Addr]bool{}}
		l.pools[network] = p
	}
	if p.cidr != cidr {
		return fmt.Errorf("Network %s has Blocks of %s on this node and is now %s: delete its Blocks and pods", network, p.cidr, cidr)
	}
	b := p.blocks[block]
	if b != nil && !b.retired {
		return nil
	}
	p.blocks[block] = &heldBlock{idleSince: l.now()}
	p.free = append(p.free, addresses(p.cidr, block)...)
	return nil
}

// Reserve marks an address as in use. It is how records of an earlier run come
// back.
func (l *Ledger) Reserve(network string, addr netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil || p.block(addr) == nil {
		return fmt.Errorf("address %s of Network %s is in no Block of this node", addr, network)
	}
	i := slices.Index(p.free, addr)
	if i < 0 {
		return fmt.Errorf("address %s of Network %s is in use already", addr, network)
	}
	p.free = slices.Delete(p.free, i, i+1)
	p.take(addr)
	return nil
}

// Allocate gives out an address of the Network, and claims another Block if
// those held have none left. An *ExhaustedError says that there is none to claim.
func (l *Ledger) Allocate(ctx context.Context, network string, cidr netip.Prefix) (netip.Addr, error) {
	if addr, ok := l.next(network); ok {
		return addr, nil
	}
	l.claiming.Lock()
	defer l.claiming.Unlock()
	for {
		// Another caller may have claimed while this one waited.
		if addr, ok := l.next(network); ok {
			return addr, nil
		}
		if err := l.claim(ctx, network, cidr); err != nil {
			return netip.Addr{}, err
		}
	}
}

func (l *Ledger) next(network string) (netip.Addr, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil || len(p.free) == 0 {
		return netip.Addr{}, false
	}
	addr := p.free[0]
	p.free = p.free[1:]
	p.take(addr)
	return addr, true
}

// claim needs l.claiming.
func (l *Ledger) claim(ctx context.Context, network string, cidr netip.Prefix) error {
	taken := l.registry.Taken(network)
	for {
		block, ok := NextBlock(cidr, slices.Concat(taken, l.unclaimable()))
		if !ok {
			return l.exhausted(network, cidr)
		}
		err := l.registry.Claim(ctx, network, block)
		if errors.Is(err, ErrTaken) {
			taken = append(taken, block)
			continue
		}
		if err != nil {
			return fmt.Errorf("claim Block %s of Network %s: %w", block, network, err)
		}
		return l.Hold(network, cidr, block)
	}
}

// WithoutClaims runs f while no Block is being claimed, so that f sees every
// Block either in the Registry and here, or in neither.
func (l *Ledger) WithoutClaims(f func()) {
	l.claiming.Lock()
	defer l.claiming.Unlock()
	f()
}

// unclaimable returns every range that this node must not claim.
func (l *Ledger) unclaimable() []netip.Prefix {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := slices.Clone(l.reserved)
	for _, p := range l.pools {
		for block := range p.blocks {
			out = append(out, block)
		}
	}
	return out
}

// Free takes an address back. To free one that is not in use changes nothing.
func (l *Ledger) Free(network string, addr netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil || !p.used[addr] {
		return
	}
	delete(p.used, addr)
	p.free = append(p.free, addr)
	b := p.block(addr)
	b.used--
	if b.used == 0 {
		b.idleSince = l.now()
	}
}

// Retire takes a Block out of use, so that it can be given back to the cluster:
// no address is given out of it, yet its range is not claimed again until Drop.
// It reports false, and changes nothing, if an address is in use.
func (l *Ledger) Retire(network string, block netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil || p.blocks[block] == nil {
		return true
	}
	if p.blocks[block].used > 0 {
		return false
	}
	p.blocks[block].retired = true
	p.free = slices.DeleteFunc(p.free, block.Contains)
	return true
}

// Drop forgets a retired Block. Others may hold it from now on.
func (l *Ledger) Drop(network string, block netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil || p.blocks[block] == nil || !p.blocks[block].retired {
		return
	}
	delete(p.blocks, block)
	if len(p.blocks) == 0 {
		delete(l.pools, network)
	}
}

// Blocks returns the Blocks of the Network that are in use by this node, sorted;
// retired ones are left out.
func (l *Ledger) Blocks(network string) []netip.Prefix {
	return l.blocks(network, func(b *heldBlock) bool { return !b.retired })
}

// Retired returns the Blocks of the Network that wait for Drop, sorted.
func (l *Ledger) Retired(network string) []netip.Prefix {
	return l.blocks(network, func(b *heldBlock) bool { return b.retired })
}

// Idle returns the Blocks of the Network without an address in use for at least
// grace, sorted.
func (l *Ledger) Idle(network string, grace time.Duration) []netip.Prefix {
	limit := l.now().Add(-grace)
	return l.blocks(network, func(b *heldBlock) bool {
		return !b.retired && b.used == 0 && !b.idleSince.After(limit)
	})
}

func (l *Ledger) blocks(network string, keep func(*heldBlock) bool) []netip.Prefix {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.pools[network]
	if p == nil {
		return nil
	}
	var out []netip.Prefix
	for prefix, b := range p.blocks {
		if keep(b) {
			out = append(out, prefix)
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// Networks returns the names of the Networks of which this node holds Blocks, sorted.
func (l *Ledger) Networks() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]string, 0, len(l.pools))
	for name := range l.pools {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// InUse returns how many addresses of the Network this node has given out.
func (l *Ledger) InUse(network string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.pools[network]; p != nil {
		return len(p.used)
	}
	return 0
}

func (p *pool) take(addr netip.Addr) {
	p.used[addr] = true
	p.block(addr).used++
}

func (p *pool) block(addr netip.Addr) *heldBlock {
	block, err := addr.Prefix(BlockBits(p.cidr))
	if err != nil {
		return nil
	}
	return p.blocks[block]
}

// ExhaustedError says that this node can give out no more addresses of a Network.
type ExhaustedError struct {
	Network string
	CIDR    netip.Prefix
	// Blocks of the whole Network; of these, held by this node and by others.
	// The rest overlaps with what this node holds for other Networks.
	Blocks, Here, Elsewhere int
	// InUse of the Addresses in the Blocks that this node holds.
	InUse, Addresses int
}

// Error tells a pod's owner what is full and what to do.
func (e *ExhaustedError) Error() string {
	if e.Here == e.Blocks {
		return fmt.Sprintf("Network %s (%s) is exhausted: %d of %d addresses are in use; delete pods, or use another Network", e.Network, e.CIDR, e.InUse, e.Addresses)
	}
	msg := fmt.Sprintf("Network %s (%s) is exhausted on this node: %d of %d addresses held here are in use", e.Network, e.CIDR, e.InUse, e.Addresses)
	if e.Elsewhere > 0 {
		msg += fmt.Sprintf("; other nodes hold %d of its %d Blocks", e.Elsewhere, e.Blocks)
	}
	if shadowed := e.Blocks - e.Here - e.Elsewhere; shadowed > 0 {
		msg += fmt.Sprintf("; %d of its %d Blocks overlap with ranges that this node uses otherwise", shadowed, e.Blocks)
	}
	return msg + "; delete pods, or use another Network"
}

func (l *Ledger) exhausted(network string, cidr netip.Prefix) error {
	taken := l.registry.Taken(network)
	l.mu.Lock()
	defer l.mu.Unlock()
	e := &ExhaustedError{Network: network, CIDR: cidr, Blocks: blocksIn(cidr)}
	held := map[netip.Prefix]bool{}
	if p := l.pools[network]; p != nil {
		e.Here = len(p.blocks)
		e.InUse = len(p.used)
		for block := range p.blocks {
			held[block] = true
			e.Addresses += len(addresses(cidr, block))
		}
	}
	for _, block := range taken {
		if !held[block] {
			e.Elsewhere++
		}
	}
	return e
}
