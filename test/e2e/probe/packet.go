package probe

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Packet is an IP packet with a source that the sender chose: a UDP datagram, or,
// without ports, one of another protocol.
type Packet struct {
	// Protocol is the number of the IP protocol whose header, if it has one, the
	// payload begins with; 0 stands for UDP.
	Protocol    uint8          `json:"protocol,omitempty"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Payload     []byte         `json:"payload"`
	// Interface and Gateway, if set, make it an Ethernet frame that leaves by the
	// interface, to that hardware address: what a process with the pod's own
	// packet socket could do. Otherwise it is a raw IP packet.
	Interface string `json:"interface,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	// Hardware is the frame's source; if empty, the interface's own address.
	Hardware string `json:"hardware,omitempty"`
	// Ethertype, if set, says what the payload is: then the frame has no IP header.
	Ethertype uint16 `json:"ethertype,omitempty"`
}

func send(packets []Packet) error {
	for i, p := range packets {
		var err error
		if p.Interface != "" {
			err = p.frame()
		} else {
			err = p.raw()
		}
		if err != nil {
			return fmt.Errorf("packet %d from %s: %w", i, p.Source, err)
		}
	}
	return nil
}

func (p Packet) raw() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_HDRINCL, 1); err != nil {
		return fmt.Errorf("IP_HDRINCL: %w", err)
	}
	return unix.Sendto(fd, p.IP(), 0, &unix.SockaddrInet4{Addr: p.Destination.Addr().As4()})
}

func (p Packet) frame() error {
	link, err := net.InterfaceByName(p.Interface)
	if err != nil {
		return err
	}
	to, err := net.ParseMAC(p.Gateway)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	from := link.HardwareAddr
	if p.Hardware != "" {
		if from, err = net.ParseMAC(p.Hardware); err != nil {
			return err
		}
	}
	ethertype, payload := p.Ethertype, p.Payload
	switch {
	case ethertype != 0:
	case p.Source.Addr().Is6():
		ethertype, payload = unix.ETH_P_IPV6, p.IP()
	default:
		ethertype, payload = unix.ETH_P_IP, p.IP()
	}
	frame := binary.BigEndian.AppendUint16(append(append([]byte{}, to...), from...), ethertype)
	return unix.Sendto(fd, append(frame, payload...), 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: htons(ethertype), Halen: 6, Addr: [8]byte(append(to, 0, 0))})
}

// IP is the packet with its IP header and, if it is IPv4's, UDP header.
func (p Packet) IP() []byte {
	if p.Source.Addr().Is6() {
		src, dst := p.Source.Addr().As16(), p.Destination.Addr().As16()
		head := []byte{0x60, 0, 0, 0, 0, byte(len(p.Payload)), p.Protocol, 255} //nolint:gosec // payloads are small
		return append(append(append(head, src[:]...), dst[:]...), p.Payload...)
	}
	if p.Protocol == 0 {
		return p.ipv4(unix.IPPROTO_UDP, p.udp())
	}
	return p.ipv4(p.Protocol, p.Payload)
}

func (p Packet) udp() []byte {
	src, dst := p.Source.Addr().As4(), p.Destination.Addr().As4()
	udp := make([]byte, 8, 8+len(p.Payload))
	binary.BigEndian.PutUint16(udp[0:], p.Source.Port())
	binary.BigEndian.PutUint16(udp[2:], p.Destination.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(p.Payload))) //nolint:gosec // payloads are small
	udp = append(udp, p.Payload...)
	pseudo := append(append(append([]byte{}, src[:]...), dst[:]...), 0, unix.IPPROTO_UDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], checksum(append(pseudo, udp...)))
	return udp
}

func (p Packet) ipv4(protocol byte, payload []byte) []byte {
	src, dst := p.Source.Addr().As4(), p.Destination.Addr().As4()
	ip := make([]byte, 20, 20+len(payload))
	ip[0], ip[8], ip[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(payload))) //nolint:gosec // payloads are small
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return append(ip, payload...)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		if i+1 < len(b) {
			sum += uint32(b[i])<<8 | uint32(b[i+1])
		} else {
			sum += uint32(b[i]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum) //nolint:gosec // folded above
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// capture prints what arrives or leaves on an interface, as "source → destination: payload".
func capture(ctx context.Context, out io.Writer, name, mark, end string) error {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(htons(unix.ETH_P_ALL)))
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: htons(unix.ETH_P_ALL)}); err != nil {
		return err
	}
	wait := unix.NsecToTimeval(200e6)
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	fmt.Fprintln(out, "ready")
	buf := make([]byte, 1<<16)
	for ctx.Err() == nil {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		frame := buf[:n]
		i := bytes.Index(frame, []byte(mark))
		if i < 0 {
			continue
		}
		var src, dst net.IP
		if n >= 34 {
			src, dst = net.IP(frame[26:30]), net.IP(frame[30:34])
		}
		fmt.Fprintf(out, "%s → %s: %s\n", src, dst, frame[i:])
		if bytes.Contains(frame, []byte(end)) {
			return nil
		}
	}
	return ctx.Err()
}
