package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(in ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range in {
		out = append(out, addr(s))
	}
	return out
}

func testRecords() Records {
	r := Records{
		Services: []Service{
			{Namespace: "shop", Name: "web", ClusterIPs: addrs("10.96.1.1"), Ports: []Port{{"http", "TCP", 80}, {"", "TCP", 81}, {"metrics", "UDP", 9}}},
			{Namespace: "shop", Name: "dual", ClusterIPs: addrs("10.96.1.2", "fd00::2")},
			{Namespace: "shop", Name: "db", Headless: true},
			{Namespace: "shop", Name: "empty", Headless: true},
			{Namespace: "shop", Name: "out", ExternalName: "WWW.example.com"},
			{Namespace: "shop", Name: "alias", ExternalName: "web.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "other", ExternalName: "web.globex.svc.cluster.local"},
			{Namespace: "shop", Name: "loop", ExternalName: "loop.shop.svc.cluster.local"},
			{Namespace: "shop", Name: "broken", ExternalName: "fails.example.com"},
			{Namespace: "shop", Name: "many", Headless: true},
		},
		Endpoints: []Endpoint{
			{Namespace: "shop", Service: "db", Address: addr("10.0.0.5"), Hostname: "db-0", Ports: []Port{{"sql", "TCP", 5432}}, Ready: true},
			{Namespace: "shop", Service: "db", Address: addr("10.0.0.6"), Ports: []Port{{"sql", "TCP", 5433}}, Ready: true},
			{Namespace: "shop", Service: "db", Address: addr("10.0.0.7"), Hostname: "db-2", Ready: false},
			{Namespace: "shop", Service: "empty", Address: addr("10.0.0.8"), Ready: false},
			{Namespace: "shop", Service: "web", Address: addr("10.0.0.9"), Ready: true},
		},
		Pods:    []Pod{{"shop", addr("10.0.0.5")}, {"shop", addr("fd00::5")}},
		Reverse: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00::/64")},
	}
	for i := range 100 {
		r.Endpoints = append(r.Endpoints, Endpoint{Namespace: "shop", Service: "many", Address: netip.AddrFrom4([4]byte{10, 0, 9, byte(i)}), Ready: true})
	}
	return r
}

type forwardFunc func(context.Context, *dns.Msg) (*dns.Msg, error)

func (f forwardFunc) Exchange(ctx context.Context, q *dns.Msg) (*dns.Msg, error) { return f(ctx, q) }

func rr(s string) dns.RR {
	r, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return r
}

// outside is what the test's internet knows; any name under the cluster's domain must not get there.
func outside(t *testing.T) Forwarder {
	return forwardFunc(func(_ context.Context, q *dns.Msg) (*dns.Msg, error) {
		name := dns.CanonicalName(q.Question[0].Name)
		if strings.HasSuffix(name, "cluster.local.") || strings.HasSuffix(name, ".0.10.in-addr.arpa.") {
			t.Errorf("%s was asked outside", name)
		}
		reply := new(dns.Msg)
		reply.SetReply(q)
		switch {
		case name == "fails.example.com.":
			return nil, errors.New("no resolver")
		case name == "www.example.com." && q.Question[0].Qtype == dns.TypeA:
			reply.Answer = []dns.RR{rr("www.example.com. 60 IN A 203.0.113.1")}
		case name == "1.113.0.203.in-addr.arpa.":
			reply.Answer = []dns.RR{rr("1.113.0.203.in-addr.arpa. 60 IN PTR www.example.com.")}
		default:
			reply.Rcode = dns.RcodeNameError
		}
		return reply, nil
	})
}

func texts(in []dns.RR) []string {
	var out []string
	for _, r := range in {
		out = append(out, strings.Join(strings.Fields(r.String()), " "))
	}
	slices.Sort(out)
	return out
}

func query(name string, qtype uint16) *dns.Msg {
	q := new(dns.Msg)
	q.SetQuestion(name, qtype)
	return q
}

func TestAnswers(t *testing.T) {
	s := NewServer("cluster.local", outside(t))
	s.SetZone(NewZone("Cluster.Local.", testRecords()))
	nx, nodata := dns.RcodeNameError, dns.RcodeSuccess
	for name, tc := range map[string]struct {
		name  string
		qtype uint16
		rcode int
		want  []string
		extra []string
		soa   string // zone of the SOA; with it comes no answer
	}{
		"service":                {name: "web.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"web.shop.svc.cluster.local. 5 IN A 10.96.1.1"}},
		"service, case as asked": {name: "WeB.shop.SVC.cluster.LOCAL.", qtype: dns.TypeA, want: []string{"WeB.shop.SVC.cluster.LOCAL. 5 IN A 10.96.1.1"}},
		"service, no AAAA":       {name: "web.shop.svc.cluster.local.", qtype: dns.TypeAAAA, rcode: nodata, soa: "cluster.local."},
		"service, no MX":         {name: "web.shop.svc.cluster.local.", qtype: dns.TypeMX, rcode: nodata, soa: "cluster.local."},
		"dual stack A":           {name: "dual.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"dual.shop.svc.cluster.local. 5 IN A 10.96.1.2"}},
		"dual stack AAAA":        {name: "dual.shop.svc.cluster.local.", qtype: dns.TypeAAAA, want: []string{"dual.shop.svc.cluster.local. 5 IN AAAA fd00::2"}},
		"dual stack ANY":         {name: "dual.shop.svc.cluster.local.", qtype: dns.TypeANY, want: []string{"dual.shop.svc.cluster.local. 5 IN A 10.96.1.2", "dual.shop.svc.cluster.local. 5 IN AAAA fd00::2"}},
		"SRV": {
			name: "_http._tcp.web.shop.svc.cluster.local.", qtype: dns.TypeSRV,
			want:  []string{"_http._tcp.web.shop.svc.cluster.local. 5 IN SRV 0 100 80 web.shop.svc.cluster.local."},
			extra: []string{"web.shop.svc.cluster.local. 5 IN A 10.96.1.1"},
		},
		"SRV of UDP":              {name: "_metrics._udp.web.shop.svc.cluster.local.", qtype: dns.TypeSRV, want: []string{"_metrics._udp.web.shop.svc.cluster.local. 5 IN SRV 0 100 9 web.shop.svc.cluster.local."}, extra: []string{"web.shop.svc.cluster.local. 5 IN A 10.96.1.1"}},
		"SRV, wrong protocol":     {name: "_http._udp.web.shop.svc.cluster.local.", qtype: dns.TypeSRV, rcode: nx, soa: "cluster.local."},
		"SRV, no such port":       {name: "_ftp._tcp.web.shop.svc.cluster.local.", qtype: dns.TypeSRV, rcode: nx, soa: "cluster.local."},
		"SRV's name has no A":     {name: "_http._tcp.web.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nodata, soa: "cluster.local."},
		"between the names":       {name: "_tcp.web.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nodata, soa: "cluster.local."},
		"namespace":               {name: "shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nodata, soa: "cluster.local."},
		"endpoint of no headless": {name: "10-0-0-9.web.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"headless":                {name: "db.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"db.shop.svc.cluster.local. 5 IN A 10.0.0.5", "db.shop.svc.cluster.local. 5 IN A 10.0.0.6"}},
		"headless by hostname":    {name: "db-0.db.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"db-0.db.shop.svc.cluster.local. 5 IN A 10.0.0.5"}},
		"headless by address":     {name: "10-0-0-6.db.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"10-0-0-6.db.shop.svc.cluster.local. 5 IN A 10.0.0.6"}},
		"headless, not ready":     {name: "db-2.db.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"headless without any":    {name: "empty.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"headless SRV": {
			name: "_sql._tcp.db.shop.svc.cluster.local.", qtype: dns.TypeSRV,
			want: []string{
				"_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 100 5432 db-0.db.shop.svc.cluster.local.",
				"_sql._tcp.db.shop.svc.cluster.local. 5 IN SRV 0 100 5433 10-0-0-6.db.shop.svc.cluster.local.",
			},
			extra: []string{"10-0-0-6.db.shop.svc.cluster.local. 5 IN A 10.0.0.6", "db-0.db.shop.svc.cluster.local. 5 IN A 10.0.0.5"},
		},
		"external name":                   {name: "out.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"out.shop.svc.cluster.local. 5 IN CNAME www.example.com.", "www.example.com. 60 IN A 203.0.113.1"}},
		"external name, CNAME only":       {name: "out.shop.svc.cluster.local.", qtype: dns.TypeCNAME, want: []string{"out.shop.svc.cluster.local. 5 IN CNAME www.example.com."}},
		"external name in the cluster":    {name: "alias.shop.svc.cluster.local.", qtype: dns.TypeA, want: []string{"alias.shop.svc.cluster.local. 5 IN CNAME web.shop.svc.cluster.local.", "web.shop.svc.cluster.local. 5 IN A 10.96.1.1"}},
		"external name of another tenant": {name: "other.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, want: []string{"other.shop.svc.cluster.local. 5 IN CNAME web.globex.svc.cluster.local."}, soa: "cluster.local."},
		"external name that fails":        {name: "broken.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: dns.RcodeServerFailure, want: []string{"broken.shop.svc.cluster.local. 5 IN CNAME fails.example.com."}},
		"pod":                             {name: "10-0-0-5.shop.pod.cluster.local.", qtype: dns.TypeA, want: []string{"10-0-0-5.shop.pod.cluster.local. 5 IN A 10.0.0.5"}},
		"pod IPv6":                        {name: "fd00--5.shop.pod.cluster.local.", qtype: dns.TypeAAAA, want: []string{"fd00--5.shop.pod.cluster.local. 5 IN AAAA fd00::5"}},
		"pod that is none":                {name: "10-0-0-6.shop.pod.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"version":                         {name: "dns-version.cluster.local.", qtype: dns.TypeTXT, want: []string{`dns-version.cluster.local. 5 IN TXT "1.1.0"`}},
		"domain":                          {name: "cluster.local.", qtype: dns.TypeSOA, want: []string{"cluster.local. 5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5"}},
		"domain has no A":                 {name: "cluster.local.", qtype: dns.TypeA, rcode: nodata, soa: "cluster.local."},
		"another tenant's":                {name: "web.globex.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"another tenant's namespace":      {name: "globex.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"the cluster's own":               {name: "kube-dns.kube-system.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"search path's attempt":           {name: "www.example.com.shop.svc.cluster.local.", qtype: dns.TypeA, rcode: nx, soa: "cluster.local."},
		"PTR of service":                  {name: "1.1.96.10.in-addr.arpa.", qtype: dns.TypePTR, want: []string{"1.1.96.10.in-addr.arpa. 5 IN PTR web.shop.svc.cluster.local."}},
		"PTR of service IPv6":             {name: mustReverse("fd00::2"), qtype: dns.TypePTR, want: []string{mustReverse("fd00::2") + " 5 IN PTR dual.shop.svc.cluster.local."}},
		"PTR of endpoint":                 {name: "5.0.0.10.IN-addr.arpa.", qtype: dns.TypePTR, want: []string{"5.0.0.10.IN-addr.arpa. 5 IN PTR db-0.db.shop.svc.cluster.local."}},
		"PTR, other type":                 {name: "1.1.96.10.in-addr.arpa.", qtype: dns.TypeA, rcode: nodata, soa: "1.1.96.10.in-addr.arpa."},
		"PTR in our range, nobody":        {name: "200.0.0.10.in-addr.arpa.", qtype: dns.TypePTR, rcode: nx, soa: "0.10.in-addr.arpa."},
		"PTR in the service range":        {name: "10.0.96.10.in-addr.arpa.", qtype: dns.TypePTR, rcode: nx, soa: "10.in-addr.arpa."},
		"PTR, part of a name":             {name: "0.0.10.in-addr.arpa.", qtype: dns.TypePTR, rcode: nodata, soa: "0.10.in-addr.arpa."},
		"PTR IPv6 in our range":           {name: mustReverse("fd00::99"), qtype: dns.TypePTR, rcode: nx, soa: "0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa."},
		"PTR outside":                     {name: "1.113.0.203.in-addr.arpa.", qtype: dns.TypePTR, want: []string{"1.113.0.203.in-addr.arpa. 60 IN PTR www.example.com."}},
		"outside":                         {name: "www.example.com.", qtype: dns.TypeA, want: []string{"www.example.com. 60 IN A 203.0.113.1"}},
		"outside, no such name":           {name: "nothing.example.com.", qtype: dns.TypeA, rcode: nx},
		"outside, resolver fails":         {name: "fails.example.com.", qtype: dns.TypeA, rcode: dns.RcodeServerFailure},
		"zone transfer":                   {name: "cluster.local.", qtype: dns.TypeAXFR, rcode: dns.RcodeRefused},
	} {
		t.Run(name, func(t *testing.T) {
			q := query(tc.name, tc.qtype)
			got := s.reply(q)
			if got.Rcode != tc.rcode {
				t.Errorf("code %s, want %s", dns.RcodeToString[got.Rcode], dns.RcodeToString[tc.rcode])
			}
			if diff := cmp.Diff(tc.want, texts(got.Answer)); diff != "" {
				t.Errorf("answer: %s", diff)
			}
			if diff := cmp.Diff(tc.extra, texts(got.Extra)); diff != "" {
				t.Errorf("additional: %s", diff)
			}
			zone := ""
			if len(got.Ns) == 1 && got.Ns[0].Header().Rrtype == dns.TypeSOA {
				zone = got.Ns[0].Header().Name
			}
			if zone != tc.soa {
				t.Errorf("SOA of %q, want %q", zone, tc.soa)
			}
			if got.Id != q.Id || !got.Response || got.Question[0] != q.Question[0] {
				t.Errorf("not a reply to the query: %v", got)
			}
			if _, err := got.Pack(); err != nil {
				t.Errorf("cannot be sent: %v", err)
			}
		})
	}
	t.Run("a loop of aliases ends", func(t *testing.T) {
		if got := s.reply(query("loop.shop.svc.cluster.local.", dns.TypeA)); got.Rcode != dns.RcodeServerFailure {
			t.Errorf("%v", got)
		}
	})
}

func mustReverse(a string) string {
	s, err := dns.ReverseAddr(a)
	if err != nil {
		panic(err)
	}
	return s
}

func TestOddQueries(t *testing.T) {
	s := NewServer("cluster.local", outside(t))
	if got := s.reply(query("web.shop.svc.cluster.local.", dns.TypeA)); got.Rcode != dns.RcodeServerFailure {
		t.Errorf("before the first zone: %v", got)
	}
	s.SetZone(NewZone("cluster.local", testRecords()))
	for name, tc := range map[string]struct {
		change func(*dns.Msg)
		rcode  int
	}{
		"no question":     {func(q *dns.Msg) { q.Question = nil }, dns.RcodeFormatError},
		"two questions":   {func(q *dns.Msg) { q.Question = append(q.Question, q.Question[0]) }, dns.RcodeFormatError},
		"class CHAOS":     {func(q *dns.Msg) { q.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		"update":          {func(q *dns.Msg) { q.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"EDNS version 1":  {func(q *dns.Msg) { q.SetEdns0(1232, false); q.IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
		"no recursion":    {func(q *dns.Msg) { q.RecursionDesired = false; q.Question[0].Name = "www.example.com." }, dns.RcodeRefused},
		"local, the same": {func(q *dns.Msg) { q.RecursionDesired = false }, dns.RcodeSuccess},
	} {
		q := query("web.shop.svc.cluster.local.", dns.TypeA)
		tc.change(q)
		if got := s.reply(q); got.Rcode != tc.rcode {
			t.Errorf("%s: %s", name, dns.RcodeToString[got.Rcode])
		}
	}
	t.Run("another domain keeps cluster.local inside", func(t *testing.T) {
		s := NewServer("tenant.test", outside(t))
		s.SetZone(NewZone("tenant.test", testRecords()))
		if got := s.reply(query("web.shop.svc.cluster.local.", dns.TypeA)); got.Rcode != dns.RcodeNameError {
			t.Errorf("%v", got)
		}
		if got := s.reply(query("web.shop.svc.tenant.test.", dns.TypeA)); len(got.Answer) != 1 {
			t.Errorf("%v", got)
		}
	})
	t.Run("no forwarder", func(t *testing.T) {
		s := NewServer("cluster.local", nil)
		s.SetZone(NewZone("cluster.local", testRecords()))
		if got := s.reply(query("www.example.com.", dns.TypeA)); got.Rcode != dns.RcodeRefused {
			t.Errorf("%v", got)
		}
	})
}

func TestAnswersAreShuffled(t *testing.T) {
	z := NewZone("cluster.local", testRecords())
	first := map[string]bool{}
	for range 200 {
		first[z.lookup("db.shop.svc.cluster.local.", dns.TypeA).records[0].String()] = true
	}
	if len(first) != 2 {
		t.Errorf("always first: %v", first)
	}
}

// serve runs a Server on loopback until the test ends.
func serve(t *testing.T, s *Server) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, pc, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

func TestServe(t *testing.T) {
	s := NewServer("cluster.local", outside(t))
	s.SetZone(NewZone("cluster.local", testRecords()))
	at := serve(t, s)
	for name, tc := range map[string]struct {
		net       string
		edns      uint16
		name      string
		truncated bool
		max       int
	}{
		"UDP":                   {net: "udp", name: "web.shop.svc.cluster.local.", max: 512},
		"TCP":                   {net: "tcp", name: "web.shop.svc.cluster.local.", max: 512},
		"UDP, too long":         {net: "udp", name: "many.shop.svc.cluster.local.", truncated: true, max: 512},
		"UDP, too long for any": {net: "udp", edns: 65000, name: "many.shop.svc.cluster.local.", truncated: true, max: maxUDP},
		"UDP, tiny buffer":      {net: "udp", edns: 100, name: "many.shop.svc.cluster.local.", truncated: true, max: 512},
		"TCP, long":             {net: "tcp", edns: 512, name: "many.shop.svc.cluster.local.", max: 65535},
		"UDP with EDNS":         {net: "udp", edns: 1232, name: "web.shop.svc.cluster.local.", max: maxUDP},
		"UDP, outside":          {net: "udp", edns: 1232, name: "www.example.com.", max: maxUDP},
	} {
		t.Run(name, func(t *testing.T) {
			q := query(tc.name, dns.TypeA)
			if tc.edns != 0 {
				q.SetEdns0(tc.edns, false)
			}
			c := &dns.Client{Net: tc.net, Timeout: 10 * time.Second, UDPSize: 65535}
			got, _, err := c.Exchange(q, at)
			if err != nil {
				t.Fatal(err)
			}
			got.Compress = true // as it came
			packed, err := got.Pack()
			if err != nil {
				t.Fatal(err)
			}
			if got.Truncated != tc.truncated || len(packed) > tc.max || len(got.Answer) == 0 && !tc.truncated {
				t.Errorf("truncated %v, %d bytes, %d answers", got.Truncated, len(packed), len(got.Answer))
			}
			if (got.IsEdns0() != nil) != (tc.edns != 0) {
				t.Errorf("EDNS in the answer: %v", got.IsEdns0())
			}
		})
	}
}

func TestSetZoneWhileServing(t *testing.T) {
	s := NewServer("cluster.local", nil)
	zones := [2]*Zone{}
	for i := range zones {
		zones[i] = NewZone("cluster.local", Records{Services: []Service{{Namespace: "n", Name: "s", ClusterIPs: addrs(fmt.Sprintf("10.96.0.%d", i+1))}}})
	}
	s.SetZone(zones[0])
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 1000 {
			s.SetZone(zones[i%2])
		}
	}()
	for range 1000 {
		if got := s.reply(query("s.n.svc.cluster.local.", dns.TypeA)); len(got.Answer) != 1 {
			t.Fatalf("%v", got)
		}
	}
	<-done
}

func TestForwarder(t *testing.T) {
	resolver := func(rcode int, text string, calls *atomic.Int32) string {
		mux := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			calls.Add(1)
			m := new(dns.Msg)
			m.SetReply(q)
			m.Rcode = rcode
			if text != "" {
				for i := range 100 {
					m.Answer = append(m.Answer, &dns.A{Hdr: header(q.Question[0].Name, dns.TypeA), A: net.IPv4(203, 0, 113, byte(i))})
				}
			}
			if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
				m.Truncate(512)
			}
			w.WriteMsg(m)
		})
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		for _, srv := range []*dns.Server{{PacketConn: pc, Handler: mux}, {Listener: l, Handler: mux}} {
			go srv.ActivateAndServe()
		}
		t.Cleanup(func() { pc.Close(); l.Close() })
		return l.Addr().String()
	}
	var good, bad atomic.Int32
	works, fails := resolver(dns.RcodeSuccess, "many", &good), resolver(dns.RcodeServerFailure, "", &bad)
	refused := "127.0.0.1:1"
	for name, tc := range map[string]struct {
		resolvers []string
		rcode     int
		answers   int
		err       bool
	}{
		"long answer by TCP":     {resolvers: []string{works}, answers: 100},
		"second after a failure": {resolvers: []string{fails, works}, answers: 100},
		"second after nobody":    {resolvers: []string{refused, works}, answers: 100},
		"all fail":               {resolvers: []string{refused, fails}, rcode: dns.RcodeServerFailure},
		"nobody there":           {resolvers: []string{refused}, err: true},
		"none configured":        {err: true},
	} {
		t.Run(name, func(t *testing.T) {
			q := query("www.example.com.", dns.TypeA)
			got, err := NewForwarder(func() []string { return tc.resolvers }).Exchange(t.Context(), q)
			if (err != nil) != tc.err {
				t.Fatalf("%v", err)
			}
			if err == nil && (got.Rcode != tc.rcode || len(got.Answer) != tc.answers) {
				t.Errorf("%s, %d answers", dns.RcodeToString[got.Rcode], len(got.Answer))
			}
		})
	}
	t.Run("resolv.conf that changes", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		if r, err := NewResolvConf(path); err == nil {
			t.Fatalf("without a file: %v", r.Resolvers())
		}
		write := func(content string) {
			t.Helper()
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write("search example.com\nnameserver " + fails + "\n")
		conf, err := NewResolvConf(filepath.Join(t.TempDir(), "none"), path)
		if err != nil {
			t.Fatal(err)
		}
		forward := NewForwarder(conf.Resolvers)
		rcode := func() int {
			t.Helper()
			got, err := forward.Exchange(t.Context(), query("www.example.com.", dns.TypeA))
			if err != nil {
				t.Fatal(err)
			}
			return got.Rcode
		}
		if got := rcode(); got != dns.RcodeServerFailure {
			t.Errorf("before: %s", dns.RcodeToString[got])
		}
		write("nameserver " + works + "\n")
		if got := rcode(); got != dns.RcodeSuccess {
			t.Errorf("after a change: %s", dns.RcodeToString[got])
		}
		write("") // as in the middle of a write
		if got := rcode(); got != dns.RcodeSuccess {
			t.Errorf("with an empty file: %s", dns.RcodeToString[got])
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if got := rcode(); got != dns.RcodeSuccess {
			t.Errorf("without the file: %s", dns.RcodeToString[got])
		}
		write("nameserver 192.0.2.1\nnameserver fd00::1\nnameserver [fd00::1]:5353\n")
		if got, want := conf.Resolvers(), []string{"192.0.2.1", "fd00::1", "[fd00::1]:5353"}; !slices.Equal(got, want) {
			t.Errorf("resolvers are %v, want %v", got, want)
		}
	})
	t.Run("through the server, by UDP, truncated", func(t *testing.T) {
		s := NewServer("cluster.local", NewForwarder(func() []string { return []string{works} }))
		s.SetZone(NewZone("cluster.local", Records{}))
		at := serve(t, s)
		got, _, err := (&dns.Client{Timeout: 10 * time.Second}).Exchange(query("www.example.com.", dns.TypeA), at)
		if err != nil || !got.Truncated {
			t.Errorf("%v, %v", got, err)
		}
		got, _, err = (&dns.Client{Net: "tcp", Timeout: 10 * time.Second}).Exchange(query("www.example.com.", dns.TypeA), at)
		if err != nil || len(got.Answer) != 100 {
			t.Errorf("%v, %v", got, err)
		}
	})
}

func TestFloodOfOneNetworkIsBounded(t *testing.T) {
	release := make(chan struct{})
	entered := make(chan struct{}, maxForwards)
	s := NewServer("cluster.local", forwardFunc(func(ctx context.Context, q *dns.Msg) (*dns.Msg, error) {
		entered <- struct{}{}
		<-release
		return new(dns.Msg).SetReply(q), nil
	}))
	s.SetZone(NewZone("cluster.local", testRecords()))
	done := make(chan int, maxForwards)
	for range maxForwards {
		go func() { done <- s.reply(query("www.example.com.", dns.TypeA)).Rcode }()
	}
	for range maxForwards {
		<-entered
	}
	if got := s.reply(query("www.example.com.", dns.TypeA)); got.Rcode != dns.RcodeServerFailure {
		t.Errorf("one too many: %s", dns.RcodeToString[got.Rcode])
	}
	if got := s.reply(query("web.shop.svc.cluster.local.", dns.TypeA)); len(got.Answer) != 1 {
		t.Errorf("the cluster's names suffer: %v", got)
	}
	close(release)
	for range maxForwards {
		if rcode := <-done; rcode != dns.RcodeSuccess {
			t.Error(dns.RcodeToString[rcode])
		}
	}
}
