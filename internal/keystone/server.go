package keystone

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"
)

// Server is a Keystone with a life of its own, as tests want it: on a free port of
// 127.0.0.1, in a directory that Close removes.
type Server struct {
	*Keystone
	stop  context.CancelCauseFunc
	ended chan struct{}
}

var errStopped = errors.New("stopped")

// StartServer starts a Keystone and waits until it answers. Tokens live for lifetime;
// 0 means DefaultTokenLifetime. The caller closes it.
func StartServer(ctx context.Context, lifetime time.Duration) (*Server, error) {
	dir, err := os.MkdirTemp("", "h8s-keystone-")
	if err != nil {
		return nil, err
	}
	s := &Server{}
	address, err := freePort(ctx)
	if err == nil {
		s.Keystone, err = Prepare(ctx, Options{Dir: dir, Address: address, TokenLifetime: lifetime})
	}
	if err == nil {
		err = s.Start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, nil
}

// freePort is one that nobody listens on now.
func freePort(ctx context.Context) (netip.AddrPort, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("find a free port: %w", err)
	}
	defer listener.Close()
	return netip.ParseAddrPort(listener.Addr().String())
}

// Start starts a Keystone that was stopped, at the same address and with the same
// database, and waits until it answers.
func (s *Server) Start(ctx context.Context) error {
	run, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	s.stop, s.ended = stop, make(chan struct{})
	wait, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		defer close(s.ended)
		if err := s.Run(run); !errors.Is(err, errStopped) {
			cancel(err)
		}
	}()
	if err := s.Await(wait); err != nil {
		s.Stop()
		return errors.Join(context.Cause(wait), err)
	}
	return nil
}

// SetTokenLifetime counts for tokens that are issued after the next Start.
func (s *Server) SetTokenLifetime(ctx context.Context, lifetime time.Duration) error {
	opts := s.opts
	opts.TokenLifetime = lifetime
	k, err := Prepare(ctx, opts)
	if err != nil {
		return err
	}
	s.Keystone = k
	return nil
}

// Stop ends Keystone and returns when nothing of it runs: connections are refused.
// Stopping it twice is no error.
func (s *Server) Stop() {
	s.stop(errStopped)
	<-s.ended
}

// Close stops Keystone and removes its files.
func (s *Server) Close() error {
	s.Stop()
	return os.RemoveAll(s.opts.Dir)
}
