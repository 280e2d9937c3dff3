package channel

// Frames follows a stream of frames, each a header of one size and the payload that it
// announces. The zero value is at the beginning of the first.
type Frames struct {
	have    int    // of the header's bytes
	payload uint32 // bytes that are to come
}

// Scan goes on with what comes next in the stream. header keeps what there is of one, and
// is the same each time. Whenever it is complete, announced says how many bytes of payload
// follow; an error ends the scan.
func (f *Frames) Scan(b, header []byte, announced func() (payload uint32, err error)) error {
	for len(b) > 0 {
		if f.payload > 0 {
			skip := min(uint32(len(b)), f.payload)
			f.payload -= skip
			b = b[skip:]
			continue
		}
		n := copy(header[f.have:], b)
		f.have += n
		b = b[n:]
		if f.have < len(header) {
			return nil
		}
		f.have = 0
		var err error
		if f.payload, err = announced(); err != nil {
			return err
		}
	}
	return nil
}
