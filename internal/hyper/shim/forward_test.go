package shim

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// testTimeout bounds every wait; it is far more than any of them takes.
const testTimeout = 60 * time.Second

// namespace is a network namespace whose loopback is up. A process holds it, so it cannot outlive the test.
type namespace struct {
	handle netns.NsHandle
	path   string
	pid    int
}

func newNamespace(t *testing.T) namespace {
	t.Helper()
	holder := exec.Command("sleep", "infinity")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	ended := make(chan struct{})
	go func() {
		runtime.LockOSThread() // Pdeathsig is about the thread: it has to live as long as the holder
		started <- holder.Start()
		_ = holder.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill()
		<-ended
	})
	path := fmt.Sprintf("/proc/%d/ns/net", holder.Process.Pid)
	handle, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = handle.Close() })
	ns := namespace{handle: handle, path: path, pid: holder.Process.Pid}
	nl := ns.netlink(t)
	lo, err := nl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	return ns
}

func (n namespace) netlink(t *testing.T) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(n.handle)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// do runs f in the namespace.
func (n namespace) do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(n.handle); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// dial connects from inside the namespace.
func (n namespace) dial(address string) (conn net.Conn, err error) {
	err = n.do(func() error {
		conn, err = net.DialTimeout("tcp4", address, 5*time.Second)
		return err
	})
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(testTimeout))
	}
	return conn, err
}

// refused tells that a connection does not lead anywhere: it is refused, or reset before it carries anything.
func (n namespace) refused(t *testing.T, address string) {
	t.Helper()
	conn, err := n.dial(address)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatalf("%s: %v", address, err)
	}
	defer conn.Close()
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%s: read %d bytes, error %v, want a reset", address, n, err)
	}
}

func (n namespace) tables(t *testing.T) []string {
	t.Helper()
	nft, err := nftables.New(nftables.WithNetNSFd(int(n.handle)))
	if err != nil {
		t.Fatal(err)
	}
	tables, err := nft.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, table := range tables {
		names = append(names, table.Name)
	}
	return names
}

// echoPort is the one port of fakeSandbox that answers: "port 7: " and whatever it is sent.
const echoPort = 7

type fakeSandbox struct{}

func (fakeSandbox) dial(port uint16) (io.ReadWriteCloser, error) {
	if port != echoPort {
		return nil, errors.New("connection refused")
	}
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		_, _ = fmt.Fprintf(theirs, "port %d: ", port)
		_, _ = io.Copy(theirs, theirs)
	}()
	return ours, nil
}

func TestForwarder(t *testing.T) {
	pod, outside := newNamespace(t), newNamespace(t)
	f, err := newForwarder(pod.path, fakeSandbox{})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		f.serve()
		close(served)
	}()
	own := port(f.listener.Addr())
	attackFrom(t, outside, pod)

	for name, address := range map[string]string{"localhost": "127.0.0.1:7", "another loopback address": "127.9.9.9:7"} {
		t.Run("reaches the port: "+name, func(t *testing.T) {
			conn, err := pod.dial(address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len("port 7: hello"))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "port 7: hello" {
				t.Fatalf("got %q, %v", got, err)
			}
		})
	}
	t.Run("a closed port is refused", func(t *testing.T) { pod.refused(t, "127.0.0.1:8") })
	t.Run("the listener itself is refused", func(t *testing.T) { pod.refused(t, fmt.Sprintf("127.0.0.1:%d", own)) })
	t.Run("other addresses are left alone", func(t *testing.T) {
		if _, err := pod.dial("10.9.9.2:7"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("error %v, want connection refused", err)
		}
	})
	t.Run("another link does not reach it", func(t *testing.T) {
		// An ordinary listener on the loopback address shows that only the rules are in the way.
		var control net.Listener
		if err := pod.do(func() (err error) {
			control, err = net.Listen("tcp4", "127.0.0.1:0")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer control.Close()
		conn, err := outside.dial(control.Addr().String())
		if err != nil {
			t.Fatalf("the attack does not work even without rules: %v", err)
		}
		conn.Close()
		var dropped net.Error
		if _, err := outside.dial(fmt.Sprintf("127.0.0.1:%d", own)); !errors.As(err, &dropped) || !dropped.Timeout() {
			t.Errorf("dial the listener: error %v, want no answer at all", err)
		}
		if _, err := outside.dial(fmt.Sprintf("127.0.0.1:%d", echoPort)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial a forwarded port: error %v, want connection refused by the kernel", err)
		}
	})
	t.Run("close leaves nothing", func(t *testing.T) {
		conn, err := pod.dial("127.0.0.1:7")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.ReadFull(conn, make([]byte, len("port 7: "))); err != nil {
			t.Fatal(err)
		}
		f.close()
		<-served
		if n, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("read %d bytes from a connection that should have ended", n)
		}
		if tables := pod.tables(t); len(tables) > 0 {
			t.Errorf("tables left: %v", tables)
		}
		pod.refused(t, "127.0.0.1:7")
	})
}

// attackFrom gives two namespaces a link and does everything to make the victim's loopback address reachable
// over it: routes to 127.0.0.1 on one side, route_localnet on both.
func attackFrom(t *testing.T, attacker, victim namespace) {
	t.Helper()
	a, v := attacker.netlink(t), victim.netlink(t)
	if err := a.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "veth"}, PeerName: "veth", PeerNamespace: netlink.NsFd(int(victim.handle)),
	}); err != nil {
		t.Fatal(err)
	}
	for address, nl := range map[string]*netlink.Handle{"10.9.9.1/24": a, "10.9.9.2/24": v} {
		link, err := nl.LinkByName("veth")
		if err != nil {
			t.Fatal(err)
		}
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(nl.AddrAdd(link, addr), nl.LinkSetUp(link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range []namespace{attacker, victim} {
		if err := ns.do(func() error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/all/route_localnet", []byte("1"), 0)
		}); err != nil {
			t.Fatal(err)
		}
	}
	lo, err := a.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	local, err := netlink.ParseAddr("127.0.0.1/8")
	if err != nil {
		t.Fatal(err)
	}
	link, err := a.LinkByName("veth")
	if err != nil {
		t.Fatal(err)
	}
	_, all, _ := net.ParseCIDR("127.0.0.0/8")
	if err := errors.Join(
		a.AddrDel(lo, local),
		a.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: net.IPv4(10, 9, 9, 2), Src: net.IPv4(10, 9, 9, 1)}),
	); err != nil {
		t.Fatal(err)
	}
}

func TestForwarderRefusesTheNodesNamespace(t *testing.T) {
	_, err := newForwarder("/proc/self/ns/net", fakeSandbox{})
	if err == nil || !strings.Contains(err.Error(), "node's network namespace") {
		t.Fatalf("error %v, want a refusal", err)
	}
}
