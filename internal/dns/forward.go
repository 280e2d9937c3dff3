package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/miekg/dns"
)

// resolverTimeout is for how long one resolver is waited for before the next is asked.
const resolverTimeout = 2 * time.Second

type forwarder struct{ resolvers func() []string }

// NewForwarder returns a Forwarder that asks resolvers (host or host:port) in order, from the network namespace of
// the process; for every query it asks anew who they are. It is stateless and may serve any number of Servers.
func NewForwarder(resolvers func() []string) Forwarder { return forwarder{resolvers} }

// Exchange asks one resolver after the other until one gives an answer other than a failure of its own; what is too
// long for UDP it asks again by TCP.
func (f forwarder) Exchange(ctx context.Context, query *dns.Msg) (*dns.Msg, error) {
	var failed *dns.Msg
	errs := errors.New("no resolver is configured")
	for i, r := range f.resolvers() {
		if _, _, err := net.SplitHostPort(r); err != nil {
			r = net.JoinHostPort(r, "53")
		}
		reply, err := ask(ctx, r, query)
		switch {
		case err == nil && reply.Rcode != dns.RcodeServerFailure && reply.Rcode != dns.RcodeRefused:
			return reply, nil
		case err == nil:
			failed = reply
		case i == 0:
			errs = err
		default:
			errs = errors.Join(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if failed != nil {
		return failed, nil
	}
	return nil, fmt.Errorf("forward: %w", errs)
}

func ask(ctx context.Context, resolver string, query *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, resolverTimeout)
	defer cancel()
	// Every resolver gets an ID of its own, and a fresh source port with its socket.
	msg := query.Copy()
	msg.Id = dns.Id()
	reply, _, err := (&dns.Client{Net: "udp", UDPSize: maxUDP}).ExchangeContext(ctx, msg, resolver)
	if err == nil && reply.Truncated {
		reply, _, err = (&dns.Client{Net: "tcp"}).ExchangeContext(ctx, msg, resolver)
	}
	if err != nil {
		return nil, fmt.Errorf("resolver %s: %w", resolver, err)
	}
	if len(reply.Question) != 1 || reply.Question[0].Qtype != msg.Question[0].Qtype ||
		dns.CanonicalName(reply.Question[0].Name) != dns.CanonicalName(msg.Question[0].Name) {
		return nil, fmt.Errorf("resolver %s: it answered another question", resolver)
	}
	return reply, nil
}
