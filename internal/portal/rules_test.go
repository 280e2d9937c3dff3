package portal

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/knftables"
)

var update = flag.Bool("update", false, "write testdata/*.nft anew")

func TestRules(t *testing.T) {
	vip := netip.MustParseAddr("10.96.1.1")
	base := Spec{ID: 5, CIDR: networkCIDR, Blocks: prefixes("10.0.0.16/28"), ServiceCIDRs: []netip.Prefix{serviceCIDR}}
	with := func(change func(*Spec)) *ruleset {
		s := base
		change(&s)
		return portalRules(s, clusterDNS)
	}
	for name, r := range map[string]*ruleset{
		"portal-closed": with(func(*Spec) {}),
		"portal-open": with(func(s *Spec) {
			s.Egress = Egress{Internet: true, APIServer: true, APIServers: endpoints("172.31.0.1:6443", "[fd00::1]:6443")}
		}),
		"portal-services": with(func(s *Spec) {
			s.Services = []Service{
				{Name: "shop/web:http", ClusterIP: vip, Protocol: "TCP", Port: 80, Endpoints: endpoints("10.0.1.17:8080", "10.0.0.17:80", "10.0.0.17:80")},
				{Name: "shop/web:http again", ClusterIP: vip, Protocol: "tcp", Port: 80},
				{Name: "shop/dns", ClusterIP: vip, Protocol: "UDP", Port: 53, Endpoints: endpoints("10.0.0.18:53"), AffinityTimeout: 3 * time.Hour},
				{Name: "shop/empty", ClusterIP: netip.MustParseAddr("10.97.0.1"), Protocol: "SCTP", Port: 9},
				{Name: "shop/v6", ClusterIP: netip.MustParseAddr("fd00::1"), Protocol: "tcp", Port: 80, Endpoints: endpoints("[fd00::2]:80")},
				{Name: "shop/unheard", ClusterIP: vip, Protocol: "dccp", Port: 80, Endpoints: endpoints("10.0.0.17:80")},
			}
		}),
		"guard": guardRules(Guard{
			NodeIPs:        []netip.Addr{netip.MustParseAddr("172.31.0.2"), netip.MustParseAddr("172.31.0.1")},
			Infrastructure: prefixes("10.96.0.0/16", "10.244.0.0/16", "10.96.0.0/24", "fd00::/64"),
			APIServers:     []netip.AddrPort{apiServer},
		}, netip.MustParseAddr("172.31.0.1"), "eth0", 4789),
	} {
		t.Run(name, func(t *testing.T) {
			tx := knftables.NewFake(knftables.InetFamily, table).NewTransaction()
			r.write(tx, objects{})
			file := filepath.Join("testdata", name+".nft")
			if *update {
				if err := os.WriteFile(file, []byte(tx.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), tx.String()); diff != "" {
				t.Errorf("%s (-want +got), go test -update accepts it:\n%s", file, diff)
			}
		})
	}
}

func TestRulesAreStable(t *testing.T) {
	render := func(r *ruleset) string {
		tx := knftables.NewFake(knftables.InetFamily, table).NewTransaction()
		r.write(tx, objects{})
		return tx.String()
	}
	a := Service{ClusterIP: netip.MustParseAddr("10.96.0.1"), Protocol: "tcp", Port: 1, Endpoints: endpoints("10.0.0.17:80", "10.0.0.18:80")}
	b := Service{ClusterIP: netip.MustParseAddr("10.96.0.2"), Protocol: "udp", Port: 1, Endpoints: endpoints("10.0.0.18:80", "10.0.0.17:80")}
	reversed := a
	reversed.Endpoints = endpoints("10.0.0.18:80", "10.0.0.17:80")
	s := Spec{CIDR: networkCIDR, Blocks: prefixes("10.0.0.16/28")}
	s.Services = []Service{a, b}
	one := render(portalRules(s, clusterDNS))
	s.Services = []Service{b, reversed}
	if diff := cmp.Diff(one, render(portalRules(s, clusterDNS))); diff != "" {
		t.Errorf("the order of what comes in matters:\n%s", diff)
	}
}

func TestDisjoint(t *testing.T) {
	got := disjoint(prefixes("10.0.1.0/24", "10.0.0.0/8", "192.168.0.0/16", "10.0.0.0/8", "192.168.0.1/32", "fd00::/8", "1.2.3.4/32"))
	want := prefixes("1.2.3.4/32", "10.0.0.0/8", "192.168.0.0/16")
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}
