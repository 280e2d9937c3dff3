// Package network holds what a Network is, apart from any cluster or kernel:
// how its CIDR is cut into Blocks, which Block a node may claim, which address a
// pod gets, and the record of who has which address.
//
// Two rules keep the rest of the product simple, and everything here serves
// them. Blocks of one Network never overlap, whichever nodes hold them, so that
// an address is given out once. Blocks that one node holds never overlap,
// whichever Networks they belong to, so that the node can reach its own pods by
// address alone.
package network

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

const (
	// blockBits is the length of a Block's prefix: 16 addresses waste little
	// on a node with few pods, and rarely need a second claim.
	blockBits = 28
	// maxBlockBits still leaves a Block of a small Network with four addresses.
	maxBlockBits = 30
	// MaxID is the highest number of a Network: a VXLAN network identifier has 24 bits.
	MaxID = 1<<24 - 1
)

// BlockBits returns the prefix length of all Blocks of a Network: 28, or more in
// a Network smaller than /24, so that several nodes can still hold one each.
func BlockBits(cidr netip.Prefix) int {
	if cidr.Bits() <= 24 {
		return blockBits
	}
	return min(cidr.Bits()+4, maxBlockBits)
}

// BlockName returns the name of a Block, such as acme-10-0-3-16. It is a
// function of Network and address alone: whoever creates it first holds it.
func BlockName(network string, block netip.Prefix) string {
	return network + "-" + strings.ReplaceAll(block.Addr().String(), ".", "-")
}

// NextBlock returns the lowest Block of cidr that overlaps with none of avoid,
// and whether there is one.
func NextBlock(cidr netip.Prefix, avoid []netip.Prefix) (netip.Prefix, bool) {
	avoid = slices.Clone(avoid)
	slices.SortFunc(avoid, func(a, b netip.Prefix) int { return cmp.Compare(first(a), first(b)) })

	bits := BlockBits(cidr)
	size := uint64(1) << (32 - bits)
	start := first(cidr)
	for _, p := range avoid {
		if !p.Addr().Is4() || last(p) < start {
			continue
		}
		if start+size-1 < first(p) {
			break // sorted: nothing after p can reach back to start
		}
		start = (last(p)/size + 1) * size
	}
	if start+size-1 > last(cidr) {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(toAddr(start), bits), true
}

// addresses returns the addresses of block that pods of the Network may have:
// all but the first and the last of the Network's CIDR.
func addresses(cidr, block netip.Prefix) []netip.Addr {
	lowest, highest := first(cidr)+1, last(cidr)-1
	var out []netip.Addr
	for a := max(first(block), lowest); a <= min(last(block), highest); a++ {
		out = append(out, toAddr(a))
	}
	return out
}

// blocksIn returns how many Blocks a Network has.
func blocksIn(cidr netip.Prefix) int { return 1 << (BlockBits(cidr) - cidr.Bits()) }

// first and last return the ends of an IPv4 prefix; 64 bits leave room to step
// past 255.255.255.255.
func first(p netip.Prefix) uint64 {
	if !p.Addr().Is4() {
		return 0
	}
	a := p.Masked().Addr().As4()
	return uint64(binary.BigEndian.Uint32(a[:]))
}

func last(p netip.Prefix) uint64 { return first(p) + 1<<(32-p.Bits()) - 1 }

func toAddr(n uint64) netip.Addr {
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], uint32(n))
	return netip.AddrFrom4(a)
}
