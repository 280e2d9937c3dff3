package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"h8s.io/hypernetes/test/e2e/probe"
)

// fqdn of one of the tenant's Services.
func (tn tenant) fqdn(service string) string { return service + "." + tn.ns + ".svc.cluster.local" }

// reverse is the name whose PTR record an address has.
func reverse(ip string) string {
	a := netip.MustParseAddr(ip).As4()
	return fmt.Sprintf("%d.%d.%d.%d.in-addr.arpa", a[3], a[2], a[1], a[0])
}

// differs says how an answer differs from what is wanted: rcode, and the data in
// any order. Priority and weight of SRV records are free; their data is port and target.
func differs(q probe.Query, a probe.Answer, rcode string, data ...string) error {
	if q.Type == "SRV" {
		for i, d := range a.Data {
			if f := strings.Fields(d); len(f) == 4 {
				a.Data[i] = f[2] + " " + f[3]
			}
		}
	}
	got, want := slices.Sorted(slices.Values(a.Data)), slices.Sorted(slices.Values(data))
	if a.Rcode != rcode || !slices.Equal(got, want) {
		return fmt.Errorf("%s %s: %s %q, want %s %q", q.Type, q.Name, a.Rcode, got, rcode, want)
	}
	return nil
}

// eventuallyAnswer waits until the name server says exactly this.
func (s shop) eventuallyAnswer(t testing.TB, q probe.Query, rcode string, data ...string) {
	t.Helper()
	eventually(t, func() error {
		return differs(q, s.ask(t, "client", q)[0], rcode, data...)
	})
}

func (s shop) testDNS(t *testing.T) {
	one, two, web := s.ip(t, "one"), s.ip(t, "two"), s.clusterIP(t, "web")
	dashed := func(ip string) string { return strings.ReplaceAll(ip, ".", "-") }
	api := kubectl(t, admin, "get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
	headless := s.fqdn("headless") + "."
	table := map[string]struct {
		query probe.Query
		rcode string
		data  []string
	}{
		"Service":                      {probe.Query{Name: s.fqdn("web"), Type: "A"}, "NOERROR", []string{web}},
		"Service, over TCP":            {probe.Query{Name: s.fqdn("web"), Type: "A", TCP: true}, "NOERROR", []string{web}},
		"Service, upper case":          {probe.Query{Name: strings.ToUpper(s.fqdn("web")), Type: "A"}, "NOERROR", []string{web}},
		"Service, no such type":        {probe.Query{Name: s.fqdn("web"), Type: "AAAA"}, "NOERROR", nil},
		"Service, no endpoints":        {probe.Query{Name: s.fqdn("none"), Type: "A"}, "NOERROR", []string{s.clusterIP(t, "none")}},
		"Service, PTR":                 {probe.Query{Name: reverse(web), Type: "PTR"}, "NOERROR", []string{s.fqdn("web") + "."}},
		"SRV":                          {probe.Query{Name: "_http._tcp." + s.fqdn("web"), Type: "SRV"}, "NOERROR", []string{"80 " + s.fqdn("web") + "."}},
		"SRV, second port":             {probe.Query{Name: "_more._tcp." + s.fqdn("web"), Type: "SRV"}, "NOERROR", []string{"81 " + s.fqdn("web") + "."}},
		"SRV, UDP":                     {probe.Query{Name: "_udp._udp." + s.fqdn("web"), Type: "SRV"}, "NOERROR", []string{"80 " + s.fqdn("web") + "."}},
		"SRV, wrong protocol":          {probe.Query{Name: "_http._udp." + s.fqdn("web"), Type: "SRV"}, "NXDOMAIN", nil},
		"SRV, no such port":            {probe.Query{Name: "_https._tcp." + s.fqdn("web"), Type: "SRV"}, "NXDOMAIN", nil},
		"headless":                     {probe.Query{Name: s.fqdn("headless"), Type: "A"}, "NOERROR", []string{one, two}},
		"headless, SRV":                {probe.Query{Name: "_http._tcp." + s.fqdn("headless"), Type: "SRV"}, "NOERROR", []string{"8080 one." + headless, "8081 two." + headless}},
		"headless, pod":                {probe.Query{Name: "two." + s.fqdn("headless"), Type: "A"}, "NOERROR", []string{two}},
		"headless, no such pod":        {probe.Query{Name: "three." + s.fqdn("headless"), Type: "A"}, "NXDOMAIN", nil},
		"headless, PTR":                {probe.Query{Name: reverse(one), Type: "PTR"}, "NOERROR", []string{"one." + headless}},
		"headless, empty":              {probe.Query{Name: s.fqdn("strict-headless"), Type: "A"}, "NXDOMAIN", nil},
		"no such Service":              {probe.Query{Name: s.fqdn("nothing"), Type: "A"}, "NXDOMAIN", nil},
		"no such namespace":            {probe.Query{Name: "web.nowhere.svc.cluster.local", Type: "A"}, "NXDOMAIN", nil},
		"kubernetes.default":           {probe.Query{Name: "kubernetes.default.svc.cluster.local", Type: "A"}, "NOERROR", []string{api}},
		"kubernetes, SRV":              {probe.Query{Name: "_https._tcp.kubernetes.default.svc.cluster.local", Type: "SRV"}, "NOERROR", []string{"443 kubernetes.default.svc.cluster.local."}},
		"version of the specification": {probe.Query{Name: "dns-version.cluster.local", Type: "TXT"}, "NOERROR", []string{`"1.1.0"`}},
		// As a program resolves: through the search path of /etc/resolv.conf.
		"short name":               {probe.Query{Name: "web", Type: "LOOKUP"}, "NOERROR", []string{web}},
		"with namespace":           {probe.Query{Name: "web." + s.ns, Type: "LOOKUP"}, "NOERROR", []string{web}},
		"with namespace and svc":   {probe.Query{Name: "web." + s.ns + ".svc", Type: "LOOKUP"}, "NOERROR", []string{web}},
		"pod, short":               {probe.Query{Name: "two.headless", Type: "LOOKUP"}, "NOERROR", []string{two}},
		"kubernetes, short":        {probe.Query{Name: "kubernetes.default", Type: "LOOKUP"}, "NOERROR", []string{api}},
		"ExternalName, as address": {probe.Query{Name: "outside", Type: "LOOKUP"}, "NOERROR", []string{outsideAddress}},
		"ExternalName, CNAME":      {probe.Query{Name: s.fqdn("outside"), Type: "CNAME"}, "NOERROR", []string{outsideName + "."}},
		"pod by address":           {probe.Query{Name: dashed(one) + "." + s.ns + ".pod.cluster.local", Type: "A"}, "NOERROR", []string{one}},
	}
	var queries []probe.Query
	var names []string
	for name, tc := range table {
		names, queries = append(names, name), append(queries, tc.query)
	}
	for _, from := range []string{"client", "two"} {
		eventually(t, func() error { // the node's portal hears of endpoints by watches
			var errs []error
			for i, a := range s.ask(t, from, queries...) {
				tc := table[names[i]]
				if err := differs(tc.query, a, tc.rcode, tc.data...); err != nil {
					errs = append(errs, fmt.Errorf("%s, from %s: %w", names[i], from, err))
				}
			}
			return errors.Join(errs...)
		})
	}
	// With the tools of a pod, which have resolvers of their own.
	eventually(t, func() error {
		if out, err := s.sh("client", "wget -q -O - http://web/hostname"); err != nil || out != "one" && out != "two" {
			return fmt.Errorf("wget http://web/hostname: %q, %w", out, err)
		}
		if out, err := s.sh("client", "nslookup "+s.fqdn("web")); err != nil || !strings.Contains(out, web) {
			return fmt.Errorf("nslookup: %s %w", out, err)
		}
		return nil
	})
}

// testForeignNames asks for all the names and addresses that another tenant has,
// and the operator: for this tenant they do not exist. For their owner they do.
func (s shop) testForeignNames(t *testing.T) {
	secret, clusterIP := s.rival.ip(t, "secret"), s.rival.clusterIP(t, "secret")
	dashed := strings.ReplaceAll(secret, ".", "-")
	headless := s.rival.fqdn("secret-headless")
	for rivalQuery, data := range map[probe.Query]string{
		{Name: s.rival.fqdn("secret"), Type: "A"}: clusterIP,
		{Name: headless, Type: "A"}:               secret,
		{Name: "secret." + headless, Type: "A"}:   secret,
		{Name: reverse(clusterIP), Type: "PTR"}:   s.rival.fqdn("secret") + ".",
	} {
		if err := differs(rivalQuery, s.rival.ask(t, "secret", rivalQuery)[0], "NOERROR", data); err != nil {
			t.Errorf("control: for its owner: %v", err)
		}
	}

	queries := []probe.Query{
		{Name: s.rival.fqdn("secret"), Type: "A"},
		{Name: s.rival.fqdn("secret"), Type: "AAAA"},
		{Name: s.rival.fqdn("secret"), Type: "ANY"},
		{Name: s.rival.fqdn("secret"), Type: "A", TCP: true},
		{Name: "_http._tcp." + s.rival.fqdn("secret"), Type: "SRV"},
		{Name: headless, Type: "A"},
		{Name: "secret." + headless, Type: "A"},
		{Name: "_http._tcp." + headless, Type: "SRV"},
		{Name: dashed + "." + s.rival.ns + ".pod.cluster.local", Type: "A"},
		{Name: s.rival.ns + ".svc.cluster.local", Type: "A"}, // that the namespace exists is nobody's business
		{Name: reverse(clusterIP), Type: "PTR"},
		{Name: reverse(unusedServiceIP), Type: "PTR"},
	}
	// An address of the rival's that this tenant has too is this tenant's.
	mine := []string{s.ip(t, "one"), s.ip(t, "two"), s.ip(t, "client")}
	if !slices.Contains(mine, secret) {
		queries = append(queries, probe.Query{Name: reverse(secret), Type: "PTR"})
	}
	for line := range strings.Lines(kubectl(t, admin, "get", "services", "-n", "kube-system", "-o", `jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}`)) {
		queries = append(queries, probe.Query{Name: strings.TrimSpace(line) + ".kube-system.svc.cluster.local", Type: "A"})
	}
	for line := range strings.Lines(kubectl(t, admin, "get", "services", "-n", "h8s-system", "-o", `jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}`)) {
		queries = append(queries, probe.Query{Name: strings.TrimSpace(line) + ".h8s-system.svc.cluster.local", Type: "A"})
	}
	for i, a := range s.ask(t, "client", queries...) {
		if err := differs(queries[i], a, "NXDOMAIN"); err != nil {
			t.Errorf("LEAK: %v", err)
		}
	}
	// An alias leads no further than the name itself.
	s.run(t, service("alias", "type: ExternalName, externalName: "+s.rival.fqdn("secret")))
	s.eventuallyAnswer(t, probe.Query{Name: s.fqdn("alias"), Type: "CNAME"}, "NOERROR", s.rival.fqdn("secret")+".")
	if a := s.ask(t, "client", probe.Query{Name: s.fqdn("alias"), Type: "LOOKUP"})[0]; a.Rcode == "NOERROR" {
		t.Errorf("LEAK: an alias of the rival's Service resolves to %v", a.Data)
	}
	eventually(t, func() error {
		out, err := s.sh("client", "nslookup "+s.rival.fqdn("secret"))
		if strings.Contains(out, clusterIP) {
			t.Fatalf("LEAK: nslookup of the rival's Service: %s", out)
		}
		if !strings.Contains(out, "NXDOMAIN") {
			return fmt.Errorf("nslookup of the rival's Service: %s, %w", out, err)
		}
		return nil
	})
}

// testOutsideNames: what is no name of the cluster is asked of the host's resolvers.
func (s shop) testOutsideNames(t *testing.T) {
	for _, tcp := range []bool{false, true} {
		for q, want := range map[probe.Query][]string{
			{Name: outsideName, Type: "A", TCP: tcp}:                 {"NOERROR", outsideAddress},
			{Name: outsideName, Type: "AAAA", TCP: tcp}:              {"NOERROR"},
			{Name: "nonexistent.example.com", Type: "A", TCP: tcp}:   {"NXDOMAIN"},
			{Name: "nonexistent.cluster.local", Type: "A", TCP: tcp}: {"NXDOMAIN"},
		} {
			s.eventuallyAnswer(t, q, want[0], want[1:]...)
		}
	}
	s.eventuallyAnswer(t, probe.Query{Name: outsideName, Type: "LOOKUP"}, "NOERROR", outsideAddress)
}
