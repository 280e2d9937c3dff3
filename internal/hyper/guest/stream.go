//go:build linux

package guest

import (
	"net"
	"sync"
)

// streams is a net.Listener that accepts the channel's streams of one kind.
type streams struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newStreams() *streams {
	return &streams{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// handle is a channel.Handler. It takes no argument.
func (s *streams) handle(string) (func(net.Conn), error) {
	return func(c net.Conn) {
		select {
		case s.conns <- c:
		case <-s.closed:
			c.Close()
		}
	}, nil
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (s *streams) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// Addr implements net.Listener.
func (s *streams) Addr() net.Addr { return &net.UnixAddr{Net: "unix", Name: "channel"} }
