package tap

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

const testTimeout = 20 * time.Second

// Two namespaces, joined by a veth as a network plugin would: the pod's, with eth0 and
// a default route by a gateway with a permanent neighbour entry, and its peer's.
type lab struct {
	pod, peer         netns.NsHandle
	podPath           string
	podMAC, peerMAC   net.HardwareAddr
	podLinks, peerNet *netlink.Handle
}

const (
	labMTU = 1390
	podIP  = "10.1.2.3"
	peerIP = "169.254.1.1"
)

func newLab(t *testing.T) lab {
	t.Helper()
	l := lab{pod: newNamespace(t), peer: newNamespace(t)}
	l.podPath = fmt.Sprintf("/proc/self/fd/%d", int(l.pod))
	l.podLinks, l.peerNet = newHandle(t, l.pod), newHandle(t, l.peer)
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: podInterface, MTU: labMTU}, PeerName: "peer",
		PeerMTU: labMTU, PeerNamespace: netlink.NsFd(l.peer),
	}
	must(t, l.podLinks.LinkAdd(veth))
	eth, err := l.podLinks.LinkByName(podInterface)
	must(t, err)
	peer, err := l.peerNet.LinkByName("peer")
	must(t, err)
	l.podMAC, l.peerMAC = eth.Attrs().HardwareAddr, peer.Attrs().HardwareAddr
	must(t, l.podLinks.LinkSetUp(eth))
	must(t, l.peerNet.LinkSetUp(peer))
	must(t, l.podLinks.AddrAdd(eth, addr(t, podIP+"/32")))
	must(t, l.peerNet.AddrAdd(peer, addr(t, peerIP+"/32")))
	must(t, l.podLinks.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Dst: addr(t, peerIP+"/32").IPNet, Scope: netlink.SCOPE_LINK}))
	must(t, l.podLinks.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.ParseIP(peerIP)}))
	must(t, l.podLinks.NeighAdd(&netlink.Neigh{
		LinkIndex: eth.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(peerIP), HardwareAddr: l.peerMAC,
	}))
	must(t, l.peerNet.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Dst: addr(t, podIP+"/32").IPNet, Scope: netlink.SCOPE_LINK}))
	return l
}

func TestOpenDescribesTheInterface(t *testing.T) {
	l := newLab(t)
	tap, err := Open(l.podPath)
	must(t, err)
	defer tap.Close()
	want := guestapi.Link{
		Name: podInterface, HardwareAddr: l.podMAC.String(), MTU: labMTU,
		Addresses: []netip.Prefix{netip.MustParsePrefix(podIP + "/32")},
		Routes: []guestapi.Route{
			{Destination: netip.MustParsePrefix(peerIP + "/32"), ScopeLink: true},
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr(peerIP)},
		},
		Neighbours: []guestapi.Neighbour{{Address: netip.MustParseAddr(peerIP), HardwareAddr: l.peerMAC.String()}},
	}
	if diff := cmp.Diff(want, tap.Link, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("the link (-want +got):\n%s", diff)
	}
	link, err := l.podLinks.LinkByName(tapName)
	must(t, err)
	if link.Attrs().MTU != labMTU {
		t.Errorf("the tap's MTU is %d, want %d", link.Attrs().MTU, labMTU)
	}
}

// The test plays the guest: what it reads from the tap is what the card would get.
func TestPacketsPassTheStackBy(t *testing.T) {
	l := newLab(t)
	// Before: the namespace's own stack answers for the pod.
	if err := ping(l, testTimeout); err != nil {
		t.Fatalf("the laboratory does not work: %v", err)
	}
	tap, err := Open(l.podPath)
	must(t, err)
	defer tap.Close()

	if err := ping(l, 2*time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the pod's namespace answers although the guest does not: %v", err)
	}

	t.Run("in", func(t *testing.T) {
		send(t, l.peer, "peer", frame(l.podMAC, l.peerMAC, "to the guest"))
		await(t, int(tap.File.Fd()), frame(l.podMAC, l.peerMAC, "to the guest"), vnetHeader)
	})
	t.Run("out", func(t *testing.T) {
		sniffer := packetSocket(t, l.peer, "peer")
		out := frame(l.peerMAC, l.podMAC, "from the guest")
		_, err := unix.Write(int(tap.File.Fd()), append(make([]byte, vnetHeader), out...))
		must(t, err)
		await(t, sniffer, out, 0)
	})
	t.Run("after Remove the stack answers again", func(t *testing.T) {
		must(t, tap.Close())
		must(t, Remove(l.podPath))
		must(t, Remove(l.podPath))
		if err := ping(l, testTimeout); err != nil {
			t.Error(err)
		}
		if _, err := l.podLinks.LinkByName(tapName); !errors.As(err, &netlink.LinkNotFoundError{}) {
			t.Errorf("the tap is still there: %v", err)
		}
	})
}

func TestOpenAgain(t *testing.T) {
	l := newLab(t)
	for range 2 {
		tap, err := Open(l.podPath)
		must(t, err)
		must(t, tap.Close()) // as when its process is killed: the redirection of eth0 stays
	}
}

func TestNoNamespace(t *testing.T) {
	for name, path := range map[string]string{
		"missing": t.TempDir() + "/none",
		"a file":  func() string { p := t.TempDir() + "/file"; must(t, os.WriteFile(p, nil, 0o600)); return p }(),
	} {
		t.Run(name, func(t *testing.T) {
			if err := Remove(path); err != nil {
				t.Error(err)
			}
			if _, err := Open(path); err == nil {
				t.Error("opened")
			}
		})
	}
}

// ping sends datagrams from the peer to a closed port of the pod until it is answered or the
// time is over: a stack that has the address answers with an ICMP error, which the socket reports.
func ping(l lab, patience time.Duration) error {
	var conn net.Conn
	err := inside(l.peer, func() (err error) {
		conn, err = net.Dial("udp4", net.JoinHostPort(podIP, "9"))
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	for end := time.Now().Add(patience); ; {
		if err := conn.SetDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			return err
		}
		_, err := conn.Write([]byte("?"))
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		switch {
		case errors.Is(err, unix.ECONNREFUSED):
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded), time.Now().After(end):
			return err
		}
	}
}

// vnetHeader is the length of struct virtio_net_hdr.
const vnetHeader = 10

// frame is an Ethernet frame of a type for local experiments.
func frame(dst, src net.HardwareAddr, text string) []byte {
	return append(append(append(bytes.Clone(dst), src...), 0x88, 0xb5), text...)
}

func packetSocket(t *testing.T, ns netns.NsHandle, link string) int {
	t.Helper()
	fd := -1
	must(t, inside(ns, func() error {
		iface, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		protocol := uint16(unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8)
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(protocol)); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: iface.Index})
	}))
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func send(t *testing.T, ns netns.NsHandle, link string, frame []byte) {
	t.Helper()
	_, err := unix.Write(packetSocket(t, ns, link), frame)
	must(t, err)
}

// await reads until a frame is the wanted one.
func await(t *testing.T, fd int, want []byte, header int) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	buffer := make([]byte, 1<<16)
	for time.Now().Before(deadline) {
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 200)
		if err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
		if ready == 0 {
			continue
		}
		n, err := unix.Read(fd, buffer)
		must(t, err)
		if n >= header && bytes.HasPrefix(buffer[header:n], want) {
			return
		}
	}
	t.Fatal("the frame did not arrive")
}

func inside(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

func newNamespace(t *testing.T) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		var err error
		ns, err = netns.New()
		done <- err
	}()
	must(t, <-done)
	t.Cleanup(func() { ns.Close() })
	return ns
}

func newHandle(t *testing.T, ns netns.NsHandle) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns)
	must(t, err)
	t.Cleanup(h.Close)
	return h
}

func addr(t *testing.T, text string) *netlink.Addr {
	t.Helper()
	a, err := netlink.ParseAddr(text)
	must(t, err)
	return a
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
