package probe

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Query is one DNS question to the pod's name server; the name is absolute.
type Query struct {
	Name string `json:"name"`
	// Type is A, SRV, …; LOOKUP asks the resolver of the C library's kind, which honours /etc/resolv.conf.
	Type string `json:"type"`
	TCP  bool   `json:"tcp,omitempty"`
}

// Answer is the response code (NOERROR, NXDOMAIN, …) and the answers' data as in a zone file.
type Answer struct {
	Rcode string   `json:"rcode"`
	Data  []string `json:"data,omitempty"`
	// Late says that there was none in time.
	Late bool `json:"late,omitempty"`
}

// failed is what stands in for the answer that there is not.
func failed(err error) Answer {
	return Answer{Rcode: "failed: " + err.Error(), Late: kind(err) == "timeout"}
}

func (q Query) ask(ctx context.Context) Answer {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if q.Type == "LOOKUP" {
		r := net.Resolver{PreferGo: true}
		addrs, err := r.LookupHost(ctx, q.Name)
		if err != nil {
			return failed(err)
		}
		return Answer{Rcode: "NOERROR", Data: addrs}
	}
	server, err := nameserver()
	if err != nil {
		return failed(err)
	}
	m := new(dns.Msg).SetQuestion(dns.Fqdn(q.Name), dns.StringToType[q.Type])
	c := dns.Client{Timeout: 2 * time.Second}
	if q.TCP {
		c.Net = "tcp"
	}
	var resp *dns.Msg
	for range datagrams {
		if resp, _, err = c.ExchangeContext(ctx, m, net.JoinHostPort(server, "53")); err == nil {
			break
		}
	}
	if err != nil {
		return failed(err)
	}
	a := Answer{Rcode: dns.RcodeToString[resp.Rcode]}
	for _, rr := range resp.Answer {
		a.Data = append(a.Data, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return a
}

func nameserver() (string, error) {
	f, err := os.Open("/etc/resolv.conf")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) == 2 && fields[0] == "nameserver" {
			return fields[1], nil
		}
	}
	return "", fmt.Errorf("/etc/resolv.conf names no nameserver")
}
