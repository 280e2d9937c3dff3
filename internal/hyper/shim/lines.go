package shim

import (
	"bufio"
	"io"
)

// lineReader reads lines of a bounded length.
type lineReader struct{ scanner *bufio.Scanner }

func newLineReader(r io.Reader, limit int) *lineReader {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 512), limit)
	return &lineReader{s}
}

// next returns a line, which is valid until the next call, or io.EOF.
func (l *lineReader) next() ([]byte, error) {
	if l.scanner.Scan() {
		return l.scanner.Bytes(), nil
	}
	if err := l.scanner.Err(); err != nil {
		return nil, err
	}
	return nil, io.EOF
}
