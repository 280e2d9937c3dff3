//go:build linux

package guest

import (
	"context"
	"io"
	"net"
	"strconv"
	"time"
)

// dialTimeout bounds a connection to the loopback.
const dialTimeout = 10 * time.Second

// dialLoopback is the channel.Handler of channel.Dial.
func dialLoopback(argument string) (func(net.Conn), error) {
	port, err := strconv.ParseUint(argument, 10, 16)
	if err != nil || port == 0 {
		return nil, badRequest("%q is no TCP port", argument)
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	var conn net.Conn
	for _, address := range []string{"127.0.0.1", "::1"} {
		var failed error
		if conn, failed = new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(address, argument)); failed == nil {
			return func(stream net.Conn) { relay(stream, conn.(*net.TCPConn)) }, nil
		}
		if err == nil {
			err = failed // of the address that most use
		}
	}
	return nil, err
}

// relay carries both directions until both have ended, each on its own.
func relay(stream net.Conn, conn *net.TCPConn) {
	defer conn.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(conn, stream)
		_ = conn.CloseWrite()
	}()
	_, _ = io.Copy(stream, conn)
	stream.Close() // for our direction alone
	<-done
}
