package channel

import (
	"encoding/binary"
	"fmt"
	"io"
)

// guard is a guest's half of a session as the host may take it: frames of yamux that
// neither open a stream nor ask for an answer. For each of those frames yamux would keep
// something, without a bound while the guest reads nothing.
type guard struct {
	io.ReadWriteCloser
	header  [headerSize]byte
	have    int    // of the header's bytes
	payload uint32 // bytes of the frame's that are to come
}

// Of yamux's frames: https://github.com/hashicorp/yamux/blob/master/spec.md
const (
	headerSize = 12
	typeData   = 0
	typeGoAway = 3
	flagSYN    = 1
)

// Read implements io.Reader. It returns an error, and nothing of what was read, when
// there is a frame that the guest may not send.
func (g *guard) Read(b []byte) (int, error) {
	n, err := g.ReadWriteCloser.Read(b)
	if refused := g.look(b[:n]); refused != nil {
		return 0, refused
	}
	return n, err
}

func (g *guard) look(b []byte) error {
	for len(b) > 0 {
		if g.payload > 0 {
			skip := min(uint32(len(b)), g.payload)
			g.payload -= skip
			b = b[skip:]
			continue
		}
		n := copy(g.header[g.have:], b)
		g.have += n
		b = b[n:]
		if g.have < headerSize {
			return nil
		}
		g.have = 0
		kind, flags, length := g.header[1], binary.BigEndian.Uint16(g.header[2:]), binary.BigEndian.Uint32(g.header[8:])
		switch {
		case g.header[0] != 0 || kind > typeGoAway:
			return fmt.Errorf("the guest sends what is no frame: %x", g.header)
		case flags&flagSYN != 0:
			return fmt.Errorf("the guest asks for what only the host may: %x", g.header)
		case kind == typeData && length > windowSize:
			return fmt.Errorf("the guest sends %d bytes where %d are allowed", length, windowSize)
		case kind == typeData:
			g.payload = length
		}
	}
	return nil
}
