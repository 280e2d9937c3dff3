package portal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes of ctnetlink that the netlink package lacks.
const (
	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaFilterReplyFlags = 2
	ctaFilterIPSrc      = 1 << 0
)

// matchFlow is a filter for flows in user space.
type matchFlow func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f matchFlow) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool { return f(flow) }

func addrOf(ip []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// flushFlows deletes the flows that match.
func flushFlows(h *netlink.Handle, match matchFlow) error {
	if _, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, match); err != nil {
		return fmt.Errorf("flush connections: %w", err)
	}
	return nil
}

// flushPrefix deletes the flows from and to a range.
func flushPrefix(h *netlink.Handle, p netip.Prefix) error {
	return flushFlows(h, func(f *netlink.ConntrackFlow) bool {
		return p.Contains(addrOf(f.Forward.SrcIP)) || p.Contains(addrOf(f.Reverse.SrcIP))
	})
}

// flushAddr deletes the flows from and to an address, so that the next pod that gets it inherits none. The kernel
// does the search; n and h are sockets in the same namespace.
func flushAddr(n *netfilter, h *netlink.Handle, addr netip.Addr) error {
	for _, side := range []struct{ tuple, flags int }{
		{nl.CTA_TUPLE_ORIG, ctaFilterOrigFlags},
		{nl.CTA_TUPLE_REPLY, ctaFilterReplyFlags}, // the source of answers is the destination, after DNAT
	} {
		req := n.request(unix.NFNL_SUBSYS_CTNETLINK, nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK)
		tuple := nl.NewRtAttr(unix.NLA_F_NESTED|side.tuple, nil)
		tuple.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil).AddRtAttr(nl.CTA_IP_V4_SRC, addr.AsSlice())
		req.AddData(tuple)
		filter := nl.NewRtAttr(unix.NLA_F_NESTED|ctaFilter, nil)
		for _, flags := range []int{ctaFilterOrigFlags, ctaFilterReplyFlags} {
			var v uint32
			if flags == side.flags {
				v = ctaFilterIPSrc
			}
			filter.AddRtAttr(flags, binary.NativeEndian.AppendUint32(nil, v))
		}
		req.AddData(filter)
		_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, unix.EOPNOTSUPP) {
			// Kernels before 6.12 filter dumps, not deletions.
			return flushPrefix(h, netip.PrefixFrom(addr, addr.BitLen()))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("flush connections of %v: %w", addr, err)
		}
	}
	return nil
}

// flushStaleUDP deletes the UDP flows through Services to endpoints that are gone: UDP has no end by which conntrack
// would notice. It compares with the kernel rather than with an earlier Spec, so that it is right after a restart, too.
func (p *portal) flushStaleUDP(all []Service) error {
	type path struct{ service, endpoint netip.AddrPort }
	live := map[path]bool{}
	for _, s := range services(all) {
		if s.Protocol == "udp" {
			for _, ep := range s.Endpoints {
				live[path{netip.AddrPortFrom(s.ClusterIP, s.Port), ep}] = true
			}
		}
	}
	return flushFlows(p.link, func(f *netlink.ConntrackFlow) bool {
		if f.Forward.Protocol != unix.IPPROTO_UDP {
			return false
		}
		to := netip.AddrPortFrom(addrOf(f.Forward.DstIP), f.Forward.DstPort)
		by := netip.AddrPortFrom(addrOf(f.Reverse.SrcIP), f.Reverse.SrcPort)
		// Only Services translate destinations in a portal.
		return to != by && !live[path{to, by}]
	})
}
