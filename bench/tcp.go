package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// The measuring tool: blocking sockets, one thread at each end, pinned to different
// CPUs. No Go scheduler or poller is on the path, and where the kernel happens to
// put threads does not decide a round.

const (
	// benchPort is where the far end of a measurement listens.
	benchPort = 7000
	// ioTimeout bounds every call on a socket.
	ioTimeout = 5 * time.Second
	// warmUp is left out of throughput: windows grow, caches fill.
	warmUp = 300 * time.Millisecond
)

// place is where one end of a measurement runs.
type place struct {
	netns string
	addr  netip.Addr
}

func (p place) port() netip.AddrPort { return netip.AddrPortFrom(p.addr, benchPort) }

// tcpSocket makes a socket in the calling thread's namespace.
func tcpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make socket: %w", err)
	}
	timeout := unix.NsecToTimeval(ioTimeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout),
	)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set socket options: %w", err)
	}
	return fd, nil
}

// listen opens a listener in the calling thread's namespace.
func listen(at netip.AddrPort) (int, error) {
	fd, err := tcpSocket()
	if err != nil {
		return -1, err
	}
	err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	if err == nil {
		err = unix.Listen(fd, 128)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", at, err)
	}
	return fd, nil
}

// dial connects from the calling thread's namespace.
func dial(to netip.AddrPort) (int, error) {
	fd, err := tcpSocket()
	if err != nil {
		return -1, err
	}
	if err := again(func() error {
		return unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
	}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("connect to %s: %w", to, err)
	}
	return fd, nil
}

// again calls f until no signal interrupts it; the runtime sends its own.
func again(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func read(fd int, buf []byte) (n int, err error) {
	err = again(func() error { n, err = unix.Read(fd, buf); return err })
	return n, err
}

func write(fd int, buf []byte) error {
	return again(func() error { _, err := unix.Write(fd, buf); return err })
}

func accept(fd int) (conn int, err error) {
	err = again(func() error { conn, _, err = unix.Accept4(fd, unix.SOCK_CLOEXEC); return err })
	if err != nil {
		return -1, fmt.Errorf("accept: %w", err)
	}
	return conn, unix.SetsockoptInt(conn, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

// converse runs server, with a listening socket, on one thread in to, and client on
// another in from.
func converse(from, to place, server func(listener int) error, client func() error) error {
	listening := make(chan int, 1)
	served := onThread(func() error {
		defer close(listening)
		if err := errors.Join(pin(1), enterNetns(to.netns)); err != nil {
			return err
		}
		listener, err := listen(to.port())
		if err != nil {
			return err
		}
		defer unix.Close(listener)
		listening <- listener
		return server(listener)
	})
	listener, ok := <-listening
	if !ok {
		return <-served
	}
	err := <-onThread(func() error {
		if err := errors.Join(pin(0), enterNetns(from.netns)); err != nil {
			return err
		}
		return client()
	})
	if err != nil {
		// Nobody will connect any more.
		_ = unix.Shutdown(listener, unix.SHUT_RDWR)
	}
	return errors.Join(err, <-served)
}

// pin binds the calling thread to one of the machine's CPUs.
func pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu % runtime.NumCPU())
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pin thread to CPU %d: %w", cpu, err)
	}
	return nil
}

// throughput sends over one TCP connection for d and returns Gbit/s as received.
func throughput(from, to place, target netip.AddrPort, d time.Duration) (float64, error) {
	var gbits float64
	err := converse(from, to, func(listener int) error {
		conn, err := accept(listener)
		if err != nil {
			return err
		}
		defer unix.Close(conn)
		buf := make([]byte, 256<<10)
		var start time.Time
		var received int
		opened := time.Now()
		for {
			n, err := read(conn, buf)
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			switch {
			case n == 0 && start.IsZero():
				return errors.New("the connection ended before the measurement began")
			case n == 0:
				gbits = float64(received) * 8 / 1e9 / time.Since(start).Seconds()
				return nil
			case !start.IsZero():
				received += n
			case time.Since(opened) >= warmUp:
				start = time.Now()
			}
		}
	}, func() error {
		conn, err := dial(target)
		if err != nil {
			return err
		}
		defer unix.Close(conn)
		buf := make([]byte, 128<<10)
		for end := time.Now().Add(warmUp + d); time.Now().Before(end); {
			if err := write(conn, buf); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		}
		return nil
	})
	return gbits, err
}

// latency sends one byte to and fro over one connection for d and returns every
// round trip in microseconds.
func latency(from, to place, target netip.AddrPort, d time.Duration) ([]float64, error) {
	var trips []float64
	err := converse(from, to, func(listener int) error {
		conn, err := accept(listener)
		if err != nil {
			return err
		}
		defer unix.Close(conn)
		buf := make([]byte, 1)
		for {
			n, err := read(conn, buf)
			if err != nil || n == 0 {
				return err
			}
			if err := write(conn, buf); err != nil {
				return err
			}
		}
	}, func() error {
		conn, err := dial(target)
		if err != nil {
			return err
		}
		defer unix.Close(conn)
		buf := make([]byte, 1)
		for end := time.Now().Add(d); ; {
			start := time.Now()
			if start.After(end) {
				return nil
			}
			if err := write(conn, buf); err != nil {
				return fmt.Errorf("send request: %w", err)
			}
			n, err := read(conn, buf)
			if err != nil || n == 0 {
				return fmt.Errorf("wait for reply (%d bytes): %w", n, err)
			}
			trips = append(trips, float64(time.Since(start).Nanoseconds())/1e3)
		}
	})
	return trips, err
}

// connectRate opens n connections one after the other, each up to the first byte
// from the far end, and returns how many that is per second.
func connectRate(from, to place, target netip.AddrPort, n int) (float64, error) {
	var rate float64
	err := converse(from, to, func(listener int) error {
		buf := []byte{1}
		for range n {
			conn, err := accept(listener)
			if err != nil {
				return err
			}
			err = write(conn, buf)
			if err == nil {
				_, err = read(conn, buf) // until the client closes
			}
			unix.Close(conn)
			if err != nil && !errors.Is(err, unix.ECONNRESET) {
				return err
			}
		}
		return nil
	}, func() error {
		buf := make([]byte, 1)
		start := time.Now()
		for range n {
			fd, err := dial(target)
			if err != nil {
				return err
			}
			k, err := read(fd, buf)
			// Closed by a reset: the port can be used again at once.
			err = errors.Join(err, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			unix.Close(fd)
			if err != nil || k == 0 {
				return fmt.Errorf("wait for the first byte (%d bytes): %w", k, err)
			}
		}
		rate = float64(n) / time.Since(start).Seconds()
		return nil
	})
	return rate, err
}

// reachable waits until target answers: what makes it so was asked for, but takes
// effect at its own pace.
func reachable(ctx context.Context, from, to place, target netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return poll(ctx, 200*time.Millisecond, func() error {
		_, err := connectRate(from, to, target, 1)
		return err
	})
}

// poll calls f until it succeeds; when the context ends first, the error says what
// f said last before that.
func poll(ctx context.Context, interval time.Duration, f func() error) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	var last error
	for {
		err := f()
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		case <-ticker.C:
		}
	}
}
