package dns

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"
)

const (
	// maxUDP is the largest answer by UDP: it fits in one packet on any path.
	maxUDP = 1232
	// A Network that asks too much fails by itself, not the node: limits on its queries under way and connections.
	maxForwards    = 128
	maxConnections = 128

	maxAliases     = 8
	forwardTimeout = 5 * time.Second
	tcpIdle        = 10 * time.Second
)

// Forwarder resolves what is not in the cluster's domain.
type Forwarder interface {
	Exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error)
}

// Server answers for one Network from the Zone set last; SERVFAIL before the first.
type Server struct {
	domain   string
	forward  Forwarder
	forwards chan struct{}
	zone     atomic.Pointer[Zone]
}

// NewServer returns a Server for domain, such as cluster.local. What lies outside goes to forward; nil: it is refused.
// Nothing under domain or under cluster.local is ever forwarded.
func NewServer(domain string, forward Forwarder) *Server {
	return &Server{domain: dns.CanonicalName(domain), forward: forward, forwards: make(chan struct{}, maxForwards)}
}

// SetZone replaces the Zone at once for all later queries.
func (s *Server) SetZone(z *Zone) { s.zone.Store(z) }

// ServeDNS implements dns.Handler.
func (s *Server) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	limit := dns.MaxMsgSize
	opt := query.IsEdns0()
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		limit = dns.MinMsgSize
		if opt != nil {
			limit = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDP)
		}
	}
	reply := s.reply(query)
	if opt != nil {
		// The extended code goes into the record that SetEdns0 adds.
		reply.Extra = withoutOPT(reply.Extra)
		reply.SetEdns0(maxUDP, opt.Do())
	}
	reply.Compress = true
	reply.Truncate(limit)
	_ = w.WriteMsg(reply) // A client that went away is no concern of ours.
}

func withoutOPT(in []dns.RR) []dns.RR {
	var out []dns.RR
	for _, r := range in {
		if r.Header().Rrtype != dns.TypeOPT {
			out = append(out, r)
		}
	}
	return out
}

// reply makes the whole answer, of any length.
func (s *Server) reply(query *dns.Msg) *dns.Msg {
	reply := new(dns.Msg)
	reply.SetReply(query)
	reply.RecursionAvailable = true
	fail := func(rcode int) *dns.Msg {
		reply.Rcode = rcode
		return reply
	}
	if query.Opcode != dns.OpcodeQuery {
		return fail(dns.RcodeNotImplemented)
	}
	if len(query.Question) != 1 {
		return fail(dns.RcodeFormatError)
	}
	if opt := query.IsEdns0(); opt != nil && opt.Version() != 0 {
		return fail(dns.RcodeBadVers)
	}
	q := query.Question[0]
	if q.Qclass != dns.ClassINET || q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR {
		return fail(dns.RcodeRefused)
	}
	zone := s.zone.Load()
	if zone == nil {
		return fail(dns.RcodeServerFailure)
	}

	for owner, hops := q.Name, 0; ; hops++ {
		if hops > maxAliases {
			return fail(dns.RcodeServerFailure)
		}
		found, ours := s.local(zone, owner, q.Qtype)
		if !ours {
			upstream := s.ask(query, owner)
			reply.Rcode = upstream.Rcode
			reply.Answer = append(reply.Answer, upstream.Answer...)
			reply.Ns, reply.Extra = upstream.Ns, withoutOPT(upstream.Extra)
			reply.AuthenticatedData = upstream.AuthenticatedData && hops == 0
			return reply
		}
		reply.Authoritative = true
		reply.Rcode = found.rcode
		reply.Answer = append(reply.Answer, found.records...)
		reply.Extra = append(reply.Extra, found.extra...)
		if found.soa != "" {
			reply.Ns = []dns.RR{soa(found.soa)}
		}
		if found.alias == "" {
			return reply
		}
		owner = found.alias
	}
}

// local answers what no resolver outside may be asked; false if owner is none of that.
func (s *Server) local(zone *Zone, owner string, qtype uint16) (answer, bool) {
	name := dns.CanonicalName(owner)
	if zone.owns(name) {
		return zone.lookup(owner, qtype), true
	}
	for _, private := range []string{s.domain, "cluster.local."} {
		if dns.IsSubDomain(private, name) {
			return answer{rcode: dns.RcodeNameError, soa: private}, true
		}
	}
	return zone.lookupReverse(owner, qtype)
}

// ask forwards a query for name. It always returns an answer.
func (s *Server) ask(query *dns.Msg, name string) *dns.Msg {
	fail := func(rcode int) *dns.Msg { return &dns.Msg{MsgHdr: dns.MsgHdr{Rcode: rcode}} }
	if s.forward == nil || !query.RecursionDesired {
		return fail(dns.RcodeRefused)
	}
	select {
	case s.forwards <- struct{}{}:
		defer func() { <-s.forwards }()
	default:
		return fail(dns.RcodeServerFailure)
	}
	out := new(dns.Msg)
	out.SetQuestion(name, query.Question[0].Qtype)
	out.CheckingDisabled, out.AuthenticatedData = query.CheckingDisabled, query.AuthenticatedData
	do := false
	if opt := query.IsEdns0(); opt != nil {
		do = opt.Do()
	}
	out.SetEdns0(maxUDP, do)
	ctx, cancel := context.WithTimeout(context.Background(), forwardTimeout)
	defer cancel()
	in, err := s.forward.Exchange(ctx, out)
	if err != nil || in == nil {
		return fail(dns.RcodeServerFailure)
	}
	return in
}

// Serve answers on both sockets until ctx is done or one of them fails, and closes them. Nil when ctx was done.
func (s *Server) Serve(ctx context.Context, pc net.PacketConn, l net.Listener) error {
	servers := []*dns.Server{
		{PacketConn: pc, Handler: s, UDPSize: maxUDP},
		{Listener: netutil.LimitListener(l, maxConnections), Handler: s, IdleTimeout: func() time.Duration { return tcpIdle }},
	}
	ended := make(chan error, len(servers))
	for _, srv := range servers {
		go func() { ended <- srv.ActivateAndServe() }()
	}
	var err error
	running := len(servers)
	select {
	case <-ctx.Done():
	case err = <-ended:
		running--
	}
	// Closing ends a server also if it has not quite begun.
	_ = pc.Close()
	_ = l.Close()
	for range running {
		<-ended //nolint:errcheck // it ended because its socket was closed
	}
	for _, srv := range servers {
		// Connections that are open still; an answer under way may end first.
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		_ = srv.ShutdownContext(stop)
		cancel()
	}
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		err = nil // asked to end
	}
	return err
}
