package dns

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

const (
	// specVersion is the version of the Kubernetes DNS specification that a Zone follows.
	specVersion = "1.1.0"
	// ttl of all records, in seconds, and for how long a name may be remembered not to exist. Endpoints move.
	ttl = 5
)

// Zone is an immutable snapshot of all names of one Network.
type Zone struct {
	domain  string // canonical: lower case, with the last dot
	names   map[string]*name
	reverse []netip.Prefix
	ptr     map[netip.Addr][]string
}

// name is what one name has. A name with nothing below it and nothing in it does not exist.
type name struct {
	addrs []netip.Addr
	srv   []target
	alias string
	txt   string
}

type target struct {
	port uint16
	host string
}

// NewZone builds the Zone of domain, such as cluster.local. It is pure.
func NewZone(domain string, r Records) *Zone {
	z := &Zone{
		domain:  dns.CanonicalName(domain),
		names:   map[string]*name{},
		reverse: slices.Clone(r.Reverse),
		ptr:     map[netip.Addr][]string{},
	}
	z.at("")
	z.at("dns-version").txt = specVersion
	headless := map[string]bool{}
	for _, s := range r.Services {
		base := s.Name + "." + s.Namespace + ".svc"
		switch {
		case s.ExternalName != "":
			z.at(base).alias = dns.CanonicalName(s.ExternalName)
		case s.Headless:
			// It has the names of its endpoints; without any it does not exist.
			headless[base] = true
		default:
			z.addAddrs(base, s.ClusterIPs...)
			for _, a := range s.ClusterIPs {
				z.addPTR(a, base)
			}
			for _, p := range s.Ports {
				z.addSRV(base, p, base)
			}
		}
	}
	for _, e := range r.Endpoints {
		base := e.Service + "." + e.Namespace + ".svc"
		if !e.Ready || !headless[base] || !e.Address.IsValid() {
			continue
		}
		label := e.Hostname
		if label == "" {
			label = dashed(e.Address)
		}
		own := label + "." + base
		z.addAddrs(base, e.Address)
		z.addAddrs(own, e.Address)
		z.addPTR(e.Address, own)
		for _, p := range e.Ports {
			z.addSRV(base, p, own)
		}
	}
	for _, p := range r.Pods {
		if p.Address.IsValid() {
			z.addAddrs(dashed(p.Address)+"."+p.Namespace+".pod", p.Address)
		}
	}
	return z
}

// dashed is an address as a label.
func dashed(a netip.Addr) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(a.Unmap().String())
}

func (z *Zone) fqdn(relative string) string {
	if relative == "" {
		return z.domain
	}
	return strings.ToLower(relative) + "." + z.domain
}

// at returns the entry of a name relative to the domain; it and its ancestors exist from then on.
func (z *Zone) at(relative string) *name {
	fqdn := z.fqdn(relative)
	if n := z.names[fqdn]; n != nil {
		return n
	}
	if _, parent, ok := strings.Cut(relative, "."); ok {
		z.at(parent)
	}
	n := &name{}
	z.names[fqdn] = n
	return n
}

func (z *Zone) addAddrs(relative string, addrs ...netip.Addr) {
	n := z.at(relative)
	for _, a := range addrs {
		if a = a.Unmap(); a.IsValid() && !slices.Contains(n.addrs, a) {
			n.addrs = append(n.addrs, a)
		}
	}
}

func (z *Zone) addPTR(a netip.Addr, relative string) {
	a = a.Unmap()
	if host := z.fqdn(relative); !slices.Contains(z.ptr[a], host) {
		z.ptr[a] = append(z.ptr[a], host)
	}
}

func (z *Zone) addSRV(base string, p Port, host string) {
	if p.Name == "" {
		return
	}
	n := z.at("_" + p.Name + "._" + strings.ToLower(p.Protocol) + "." + base)
	if t := (target{p.Number, z.fqdn(host)}); !slices.Contains(n.srv, t) {
		n.srv = append(n.srv, t)
	}
}

// owns says whether a canonical name is in the domain.
func (z *Zone) owns(fqdn string) bool { return dns.IsSubDomain(z.domain, fqdn) }

// answer is what a Zone knows about a question.
type answer struct {
	rcode   int
	records []dns.RR
	extra   []dns.RR
	// alias is where the answer goes on, "" if it ends here.
	alias string
	// soa is the zone in which the name or its type is missing, "" if nothing is.
	soa string
}

// lookup answers from the domain. owner is the name as it was asked.
func (z *Zone) lookup(owner string, qtype uint16) answer {
	n := z.names[dns.CanonicalName(owner)]
	if n == nil {
		return answer{rcode: dns.RcodeNameError, soa: z.domain}
	}
	var out answer
	if n.alias != "" {
		out.records = []dns.RR{&dns.CNAME{Hdr: header(owner, dns.TypeCNAME), Target: n.alias}}
		if qtype != dns.TypeCNAME && qtype != dns.TypeANY {
			out.alias = n.alias
		}
		return out
	}
	if has(qtype, dns.TypeA) || has(qtype, dns.TypeAAAA) {
		out.records = addresses(owner, n.addrs, qtype)
	}
	if has(qtype, dns.TypeSRV) {
		for _, t := range n.srv {
			out.records = append(out.records, &dns.SRV{Hdr: header(owner, dns.TypeSRV), Weight: 100, Port: t.port, Target: t.host})
			if host := z.names[t.host]; host != nil {
				out.extra = append(out.extra, addresses(t.host, host.addrs, dns.TypeANY)...)
			}
		}
		out.extra = unique(out.extra)
	}
	if has(qtype, dns.TypeTXT) && n.txt != "" {
		out.records = append(out.records, &dns.TXT{Hdr: header(owner, dns.TypeTXT), Txt: []string{n.txt}})
	}
	if has(qtype, dns.TypeSOA) && dns.CanonicalName(owner) == z.domain {
		out.records = append(out.records, soa(z.domain))
	}
	if len(out.records) == 0 {
		out.soa = z.domain
	}
	// Clients take the first one: spread them.
	rand.Shuffle(len(out.records), func(i, j int) { out.records[i], out.records[j] = out.records[j], out.records[i] })
	return out
}

// lookupReverse answers for a name under in-addr.arpa or ip6.arpa; false if it is not this Zone's.
func (z *Zone) lookupReverse(owner string, qtype uint16) (answer, bool) {
	asked, ok := parseReverse(dns.CanonicalName(owner))
	if !ok {
		return answer{}, false
	}
	if asked.IsSingleIP() {
		if hosts := z.ptr[asked.Addr()]; len(hosts) > 0 {
			var out answer
			if has(qtype, dns.TypePTR) {
				for _, h := range hosts {
					out.records = append(out.records, &dns.PTR{Hdr: header(owner, dns.TypePTR), Ptr: h})
				}
			} else {
				out.soa = reverseName(asked)
			}
			return out, true
		}
	}
	for _, p := range z.reverse {
		if p.Bits() <= asked.Bits() && p.Contains(asked.Addr()) {
			rcode := dns.RcodeNameError
			for a := range z.ptr {
				if asked.Contains(a) {
					rcode = dns.RcodeSuccess // there are names below it
				}
			}
			return answer{rcode: rcode, soa: reverseName(p)}, true
		}
	}
	return answer{}, false
}

// parseReverse is the range that a reverse name stands for: a whole address, or less.
func parseReverse(fqdn string) (netip.Prefix, bool) {
	v4, four := strings.CutSuffix(fqdn, ".in-addr.arpa.")
	v6, six := strings.CutSuffix(fqdn, ".ip6.arpa.")
	var b []byte
	switch {
	case four:
		labels := strings.Split(v4, ".")
		if len(labels) > 4 {
			return netip.Prefix{}, false
		}
		b = make([]byte, 4)
		for i, l := range labels {
			var n int
			for _, c := range []byte(l) {
				if c < '0' || c > '9' || n > 255 {
					return netip.Prefix{}, false
				}
				n = n*10 + int(c-'0')
			}
			if l == "" || n > 255 {
				return netip.Prefix{}, false
			}
			b[len(labels)-1-i] = byte(n)
		}
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(b)), 8*len(labels)), true
	case six:
		labels := strings.Split(v6, ".")
		if len(labels) > 32 {
			return netip.Prefix{}, false
		}
		b = make([]byte, 16)
		for i, l := range labels {
			n := strings.Index("0123456789abcdef", l)
			if len(l) != 1 || n < 0 {
				return netip.Prefix{}, false
			}
			at := len(labels) - 1 - i
			b[at/2] |= byte(n) << (4 * (1 - at%2))
		}
		return netip.PrefixFrom(netip.AddrFrom16([16]byte(b)), 4*len(labels)), true
	}
	return netip.Prefix{}, false
}

// reverseName is the longest reverse name that covers a range.
func reverseName(p netip.Prefix) string {
	full, err := dns.ReverseAddr(p.Addr().String())
	if err != nil {
		return "."
	}
	step, total := 8, 4
	if p.Addr().Is6() {
		step, total = 4, 32
	}
	labels := strings.SplitAfter(full, ".")
	return strings.Join(labels[total-p.Bits()/step:], "")
}

func has(qtype, t uint16) bool { return qtype == t || qtype == dns.TypeANY }

func header(owner string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: owner, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
}

func addresses(owner string, addrs []netip.Addr, qtype uint16) []dns.RR {
	var out []dns.RR
	for _, a := range addrs {
		switch {
		case a.Is4() && has(qtype, dns.TypeA):
			out = append(out, &dns.A{Hdr: header(owner, dns.TypeA), A: a.AsSlice()})
		case a.Is6() && has(qtype, dns.TypeAAAA):
			out = append(out, &dns.AAAA{Hdr: header(owner, dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	return out
}

func unique(in []dns.RR) []dns.RR {
	seen := map[string]bool{}
	return slices.DeleteFunc(in, func(r dns.RR) bool {
		key := r.String()
		defer func() { seen[key] = true }()
		return seen[key]
	})
}

func soa(zone string) dns.RR {
	prefix := zone
	if zone == "." {
		prefix = ""
	}
	return &dns.SOA{
		Hdr: header(zone, dns.TypeSOA), Ns: "ns.dns." + prefix, Mbox: "hostmaster." + prefix,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}
