package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// forwarder passes DNS queries to the first resolver that answers.
type forwarder struct {
	// resolvers to ask (address:port); those of /etc/resolv.conf if empty, which is
	// read for every query because networks change.
	resolvers []string
	log       *slog.Logger
}

const (
	resolverTimeout = 3 * time.Second
	dnsPort         = 53
)

// ServeDNS implements dns.Handler.
func (f *forwarder) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	defer w.Close()
	answer, err := f.ask(query, w.LocalAddr().Network())
	if err != nil {
		f.log.Warn("DNS query failed", "error", err)
		answer = new(dns.Msg)
		answer.SetRcode(query, dns.RcodeServerFailure)
	}
	if err := w.WriteMsg(answer); err != nil {
		f.log.Warn("DNS answer lost", "error", err)
	}
}

func (f *forwarder) ask(query *dns.Msg, network string) (*dns.Msg, error) {
	resolvers, err := f.upstreams()
	if err != nil {
		return nil, err
	}
	client := &dns.Client{Net: network, Timeout: resolverTimeout}
	var errs []error
	for _, resolver := range resolvers {
		answer, _, err := client.Exchange(query, resolver)
		if err == nil {
			return answer, nil
		}
		errs = append(errs, fmt.Errorf("resolver %s: %w", resolver, err))
	}
	return nil, errors.Join(errs...)
}

func (f *forwarder) upstreams() ([]string, error) {
	if len(f.resolvers) > 0 {
		return f.resolvers, nil
	}
	conf, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return nil, fmt.Errorf("find this machine's resolvers: %w", err)
	}
	if len(conf.Servers) == 0 {
		return nil, errors.New("/etc/resolv.conf names no resolver: pass --resolver to `h8s up`")
	}
	upstreams := make([]string, 0, len(conf.Servers))
	for _, server := range conf.Servers {
		upstreams = append(upstreams, net.JoinHostPort(server, conf.Port))
	}
	return upstreams, nil
}

// serve answers at the given address over UDP and TCP until the context ends.
func (f *forwarder) serve(ctx context.Context, address netip.AddrPort) error {
	var listen net.ListenConfig
	packets, err := listen.ListenPacket(ctx, "udp", address.String())
	if err != nil {
		return fmt.Errorf("listen for DNS queries: %w", err)
	}
	listener, err := listen.Listen(ctx, "tcp", address.String())
	if err != nil {
		packets.Close()
		return fmt.Errorf("listen for DNS queries: %w", err)
	}
	servers := []*dns.Server{
		{PacketConn: packets, Net: "udp", Handler: f},
		{Listener: listener, Net: "tcp", Handler: f},
	}
	failed := make(chan error, len(servers))
	for _, s := range servers {
		go func() { failed <- s.ActivateAndServe() }()
	}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
	}
	// A server that has not started yet cannot be shut down, its socket can.
	packets.Close()
	listener.Close()
	return err
}

// checkDNSPort says who keeps a forwarder from serving at the given address, which
// no link needs to have yet.
func checkDNSPort(ctx context.Context, address netip.Addr) error {
	listen := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		var err error
		return errors.Join(conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) }), err)
	}}
	at := netip.AddrPortFrom(address, dnsPort).String()
	packets, err := listen.ListenPacket(ctx, "udp", at)
	if err == nil {
		packets.Close()
		var listener net.Listener
		if listener, err = listen.Listen(ctx, "tcp", at); err == nil {
			return listener.Close()
		}
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("a program of this machine serves DNS on every address and so takes port %d of %s from the nodes: %w", dnsPort, address, err)
	}
	return err
}

// dnsPortFix says what to do about it.
const dnsPortFix = "find it with `ss -lntup 'sport = 53'` and let it listen on its own addresses only (dnsmasq: bind-interfaces, unbound: interface)"
