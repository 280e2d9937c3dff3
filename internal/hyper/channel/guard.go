package channel

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
)

// guard is a guest's half of a session as the host may take it: frames of yamux that
// neither open a stream nor ask for an answer. For each of those frames yamux would keep
// something, without a bound while the guest reads nothing.
type guard struct {
	io.ReadWriteCloser
	frames Frames
	header [headerSize]byte
	end    atomic.Pointer[error] // why there is nothing more to read
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
		n, err = 0, refused
	}
	if err != nil {
		g.end.CompareAndSwap(nil, &err)
	}
	return n, err
}

func (g *guard) look(b []byte) error {
	return g.frames.Scan(b, g.header[:], func() (payload uint32, err error) {
		kind, flags, length := g.header[1], binary.BigEndian.Uint16(g.header[2:]), binary.BigEndian.Uint32(g.header[8:])
		switch {
		case g.header[0] != 0 || kind > typeGoAway:
			return 0, fmt.Errorf("the guest sends what is no frame: %x", g.header)
		case flags&flagSYN != 0:
			return 0, fmt.Errorf("the guest asks for what only the host may: %x", g.header)
		case kind == typeData && length > windowSize:
			return 0, fmt.Errorf("the guest sends %d bytes where %d are allowed", length, windowSize)
		case kind == typeData:
			return length, nil
		}
		return 0, nil
	})
}
