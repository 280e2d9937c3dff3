package shim

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/log"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// dialer connects to a TCP port on the loopback address inside a sandbox.
type dialer interface {
	dial(port uint16) (io.ReadWriteCloser, error)
}

// dialFunc is a function as a dialer.
type dialFunc func(port uint16) (io.ReadWriteCloser, error)

func (f dialFunc) dial(port uint16) (io.ReadWriteCloser, error) { return f(port) }

// forwarder serves connections that processes in a sandbox's network namespace make to 127.0.0.0/8 and passes
// them to the same port inside the sandbox. containerd makes such connections for kubectl port-forward; without
// this they would end in the kernel's network stack, where no application of the sandbox listens.
//
// Nobody else gets in: the rules redirect only what originates in the namespace, a connection that
// was not redirected is refused, and packets for the listener from any other link are dropped. In the
// namespace are the node's own processes and the sandbox's, which gains nothing but its own ports.
type forwarder struct {
	namespace netns.NsHandle
	listener  *net.TCPListener
	sandbox   dialer

	mu    sync.Mutex
	conns map[io.Closer]struct{} // nil when closed
}

// newForwarder listens in the network namespace at path. It leaves nothing there if it fails.
func newForwarder(path string, sandbox dialer) (_ *forwarder, err error) {
	namespace, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open the pod's network namespace %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = namespace.Close()
		}
	}()
	own, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("open the shim's network namespace: %w", err)
	}
	defer own.Close()
	if own.Equal(namespace) {
		return nil, fmt.Errorf("%s is the node's network namespace: its loopback stays the node's", path)
	}
	listener, err := listenIn(namespace)
	if err != nil {
		return nil, fmt.Errorf("listen in the pod's network namespace %s: %w", path, err)
	}
	if err := redirectLoopback(namespace, port(listener.Addr())); err != nil {
		_ = listener.Close()
		return nil, fmt.Errorf("redirect loopback connections in the pod's network namespace %s: %w", path, err)
	}
	return &forwarder{namespace: namespace, listener: listener, sandbox: sandbox, conns: map[io.Closer]struct{}{}}, nil
}

// serve accepts connections until close.
func (f *forwarder) serve() {
	for {
		conn, err := f.listener.AcceptTCP()
		switch {
		case err == nil:
			go f.forward(conn)
		case errors.Is(err, net.ErrClosed):
			return
		default:
			log.L.WithError(err).Warn("accept a connection to the pod's loopback address")
		}
	}
}

// close ends all connections and removes what newForwarder made.
func (f *forwarder) close() {
	_ = f.listener.Close()
	f.mu.Lock()
	conns := f.conns
	f.conns = nil
	f.mu.Unlock()
	for c := range conns {
		_ = c.Close()
	}
	if err := restore(f.namespace); err != nil {
		log.L.WithError(err).Warn("remove the redirection of loopback connections; it ends with the network namespace")
	}
	_ = f.namespace.Close()
}

// track makes close end c, too, and reports whether close has not been called yet.
func (f *forwarder) track(c io.Closer) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conns == nil {
		return false
	}
	f.conns[c] = struct{}{}
	return true
}

// release closes c.
func (f *forwarder) release(c io.Closer) {
	f.mu.Lock()
	delete(f.conns, c)
	f.mu.Unlock()
	_ = c.Close()
}

func (f *forwarder) forward(conn *net.TCPConn) {
	defer f.release(conn)
	if !f.track(conn) {
		return
	}
	app, err := f.connect(conn)
	if err != nil {
		log.L.WithError(err).Debug("refuse a connection to the pod's loopback address")
		_ = conn.SetLinger(0) // a reset, the closest to "connection refused" that is left
		return
	}
	defer f.release(app)
	if !f.track(app) {
		return
	}
	// Neither containerd nor the sandbox's proxy uses half-closed connections: the end of one direction is
	// the end of both.
	ended := make(chan struct{}, 2)
	for dst, src := range map[io.Writer]io.Reader{conn: app, app: conn} {
		go func() {
			_, _ = io.Copy(dst, src)
			ended <- struct{}{}
		}()
	}
	<-ended
}

func (f *forwarder) connect(conn *net.TCPConn) (io.ReadWriteCloser, error) {
	wanted, err := originalPort(conn)
	if err != nil {
		return nil, fmt.Errorf("it was not redirected: %w", err)
	}
	if wanted == port(f.listener.Addr()) {
		return nil, errors.New("it was not redirected")
	}
	return f.sandbox.dial(wanted)
}

func port(addr net.Addr) uint16 { return uint16(addr.(*net.TCPAddr).Port) }

// listenIn listens on a port of the loopback address of another network namespace.
func listenIn(namespace netns.NsHandle) (*net.TCPListener, error) {
	type result struct {
		listener *net.TCPListener
		err      error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, in the namespace it entered
		if err := netns.Set(namespace); err != nil {
			done <- result{err: err}
			return
		}
		listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		done <- result{listener, err}
	}()
	r := <-done
	return r.listener, r.err
}

// soOriginalDst is SO_ORIGINAL_DST of linux/netfilter_ipv4.h.
const soOriginalDst = 80

// originalPort is the port that the client connected to before its connection was redirected.
func originalPort(conn *net.TCPConn) (uint16, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var port uint16
	var sockErr error
	if err := raw.Control(func(fd uintptr) {
		// The answer is a struct sockaddr_in; of the types that x/sys can ask for, this one is as large.
		addr, err := unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst)
		if err != nil {
			sockErr = os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err)
			return
		}
		port = uint16(addr.Multiaddr[2])<<8 | uint16(addr.Multiaddr[3])
	}); err != nil {
		return 0, err
	}
	return port, sockErr
}
