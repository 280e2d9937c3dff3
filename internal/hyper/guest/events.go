//go:build linux

package guest

import (
	"context"
	"slices"
	"sync"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// maxEvents is how many events are remembered; the oldest are forgotten first.
const maxEvents = 1024

// eventLog remembers what happened, so that it does not matter when the host begins
// to listen.
type eventLog struct {
	mu      sync.Mutex
	first   int // number of log[0]
	log     []guestapi.Event
	changed chan struct{} // closed with the next event
}

func newEvents() *eventLog { return &eventLog{changed: make(chan struct{})} }

// add tells all listeners. The same event is told once.
func (e *eventLog) add(event guestapi.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if slices.Contains(e.log, event) {
		return
	}
	if len(e.log) == maxEvents {
		e.log = slices.Delete(e.log, 0, 1)
		e.first++
	}
	e.log = append(e.log, event)
	close(e.changed)
	e.changed = make(chan struct{})
}

// from returns the events whose number is at least n, the number that the next one
// will have, and a channel that is closed when it comes.
func (e *eventLog) from(n int) ([]guestapi.Event, int, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	i := min(max(n-e.first, 0), len(e.log))
	return slices.Clone(e.log[i:]), e.first + len(e.log), e.changed
}

// listen calls tell for each event, the past ones included, until it fails or ctx ends.
func (e *eventLog) listen(ctx context.Context, tell func(guestapi.Event) error) error {
	next := 0
	for {
		fresh, n, changed := e.from(next)
		for _, event := range fresh {
			if err := tell(event); err != nil {
				return err
			}
		}
		next = n
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
