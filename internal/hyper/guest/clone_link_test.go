//go:build hyper

package guest_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/tap"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// TestLinkOfClone: the link is up when a template is saved, and still no frame with the template's
// hardware address, or an address made of it, leaves the pod of a clone. A guest that boots goes
// the same way.
func TestLinkOfClone(t *testing.T) {
	c := config(t, 256<<20)
	template := saveWithCard(t, c)
	six := netip.MustParsePrefix("fd00:250::2/64")
	for name, test := range map[string]struct {
		template string
		six      []netip.Prefix
		sysctls  map[string]string
		want     int // addresses of IPv6
	}{
		"clone":                       {template: template},
		"clone with an IPv6 address":  {template: template, six: []netip.Prefix{six}, want: 2}, // one of its own, too
		"clone whose pod wishes IPv6": {template: template, sysctls: map[string]string{"net.ipv6.conf.all.disable_ipv6": "0"}, want: 1},
		"boot":                        {},
	} {
		t.Run(name, func(t *testing.T) {
			pod := newPodNetwork(t)
			link := pod.tap.Link
			own, err := net.ParseMAC(link.HardwareAddr)
			if err != nil {
				t.Fatal(err)
			}
			c := c
			c.Template, c.NIC = test.template, &vm.NIC{Tap: pod.tap.File, HardwareAddr: own}
			m := start(t, c)
			text := func(file string) string {
				t.Helper()
				return strings.TrimSpace(string(m.must("GET", "/v1/files?path="+file, nil)))
			}

			before, err := net.ParseMAC(text("/sys/class/net/eth0/address"))
			if err != nil {
				t.Fatal(err)
			}
			if cloned := test.template != ""; cloned == bytes.Equal(before, own) {
				t.Errorf("before the set-up the card's address is %s; the pod's is %s", before, own)
			}
			var flags uint32
			if _, err := fmt.Sscan(text("/sys/class/net/eth0/flags"), &flags); err != nil || flags&unix.IFF_UP == 0 {
				t.Errorf("before the set-up the card is down: flags %#x (%v)", flags, err)
			}
			pod.whoHas(t, "10.250.0.2") // not the guest, yet
			check(t, "IPv6 addresses before the set-up", sixes(text("/proc/net/if_inet6")), 0)

			link.Addresses = append(link.Addresses, test.six...)
			m.must("POST", "/v1/setup", guestapi.Setup{
				Hostname: "clone", Time: time.Now(), Entropy: bytes.Repeat([]byte{1}, 32),
				Sysctls: test.sysctls, Links: []guestapi.Link{link},
			})
			check(t, "address", text("/sys/class/net/eth0/address"), own.String())
			check(t, "MTU", text("/sys/class/net/eth0/mtu"), fmt.Sprint(podMTU))
			addresses := text("/proc/net/if_inet6")
			check(t, "IPv6 addresses", sixes(addresses), test.want)
			if !bytes.Equal(before, own) && strings.Contains(addresses, hex.EncodeToString(interfaceID(before))) {
				t.Errorf("it has an address of the template's: %s", addresses)
			}
			pod.awaitReply(t, "10.250.0.2", own)
			for _, frame := range pod.frames {
				if !bytes.Equal(before, own) && (bytes.Contains(frame, before) || bytes.Contains(frame, interfaceID(before))) {
					t.Errorf("a frame tells of the template's address %s:\n%s", before, hex.Dump(frame))
					break // there may be many
				}
			}
		})
	}
}

// saveWithCard saves a template of a machine that has a network card.
func saveWithCard(t testing.TB, c vm.Config) (dir string) {
	t.Helper()
	c.NIC = &vm.NIC{}
	return saveTemplate(t, c)
}

// sixes is how many addresses of eth0 are in if_inet6 of proc(5).
func sixes(ifInet6 string) int { return strings.Count(ifInet6, "eth0") }

// interfaceID is what IPv6 makes of a hardware address (RFC 4291, appendix A).
func interfaceID(a net.HardwareAddr) []byte {
	return []byte{a[0] ^ 2, a[1], a[2], 0xff, 0xfe, a[3], a[4], a[5]}
}

const podMTU = 1400

// podNetwork is a pod's network namespace, and the node's end of the pod's interface.
type podNetwork struct {
	tap    *tap.Tap
	node   net.HardwareAddr
	socket int
	frames [][]byte // that have come out of the pod
}

func newPodNetwork(t testing.TB) *podNetwork {
	t.Helper()
	p := &podNetwork{socket: -1}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- p.open()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.tap.Close()
		unix.Close(p.socket)
	})
	return p
}

// open moves the calling thread into the namespace that it makes.
func (p *podNetwork) open() error {
	ns, err := netns.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", MTU: podMTU}, PeerName: "node"}); err != nil {
		return err
	}
	node, err := netlink.LinkByName("node")
	if err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 250, 0, 2), Mask: net.CIDRMask(24, 32)}}
	if err := errors.Join(netlink.LinkSetUp(node), netlink.LinkSetUp(eth), netlink.AddrAdd(eth, address)); err != nil {
		return err
	}
	p.node = node.Attrs().HardwareAddr
	// Before there is a guest.
	if p.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	everything := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(p.socket, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: node.Attrs().Index}); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(p.socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return err
	}
	p.tap, err = tap.Open("/proc/thread-self/ns/net")
	return err
}

// whoHas asks who has an address (RFC 826).
func (p *podNetwork) whoHas(t *testing.T, address string) {
	t.Helper()
	frame := bytes.Repeat([]byte{0xff}, 6) // to all
	frame = append(frame, p.node...)
	frame = append(frame, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1) // ARP; of Ethernet and IPv4, a request
	frame = append(frame, p.node...)
	frame = append(frame, 10, 250, 0, 1)
	frame = append(frame, 0, 0, 0, 0, 0, 0)
	frame = append(frame, net.ParseIP(address).To4()...)
	if _, err := unix.Write(p.socket, frame); err != nil {
		t.Fatal(err)
	}
}

// awaitReply asks who has an address until it is told that the owner does.
func (p *podNetwork) awaitReply(t *testing.T, address string, owner net.HardwareAddr) {
	t.Helper()
	reply := append([]byte{0, 2}, owner...) // a reply, the sender's addresses
	reply = append(reply, net.ParseIP(address).To4()...)
	p.whoHas(t, address)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		frame := make([]byte, 2048)
		n, from, err := unix.Recvfrom(p.socket, frame, 0)
		switch l, _ := from.(*unix.SockaddrLinklayer); {
		case errors.Is(err, unix.EAGAIN):
			p.whoHas(t, address)
			continue
		case errors.Is(err, unix.EINTR), err == nil && l != nil && l.Pkttype == unix.PACKET_OUTGOING: // that is ours
			continue
		case err != nil:
			t.Fatal(err)
		}
		p.frames = append(p.frames, frame[:n])
		if n >= 42 && bytes.Equal(frame[12:14], []byte{0x08, 0x06}) && bytes.Equal(frame[20:32], reply) {
			return
		}
	}
	t.Errorf("%s does not tell that it has %s; it has sent %d frames", owner, address, len(p.frames))
}
