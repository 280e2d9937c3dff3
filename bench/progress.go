package main

import (
	"fmt"
	"io"
	"time"
)

// progress tells a person what is going on, and since when.
type progress struct {
	out   io.Writer
	began time.Time
}

func newProgress(out io.Writer) *progress { return &progress{out: out, began: time.Now()} }

func (p *progress) elapsed() time.Duration { return time.Since(p.began) }

// say prints one line with the time since the start of the run.
func (p *progress) say(format string, args ...any) {
	s := int(p.elapsed().Seconds())
	fmt.Fprintf(p.out, "[%2d:%02d] %s\n", s/60, s%60, fmt.Sprintf(format, args...))
}
