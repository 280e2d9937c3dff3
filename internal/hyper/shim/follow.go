package shim

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/log"
)

const (
	// followEvery is how often volumes are looked at. The kubelet itself takes up to a
	// minute to write a change; watches (inotify) are few on a node.
	followEvery = time.Second
	// sendTimeout bounds the transfer of a volume.
	sendTimeout = time.Minute
)

// volumes are those that the guest has.
type volumes struct {
	guest sender

	mu   sync.Mutex
	sent map[string]*sent // by name
}

// sender talks to the guest; guest does.
type sender interface {
	send(ctx context.Context, method, path string, body io.Reader) error
}

type sent struct {
	volume
	fingerprint string
	failing     bool // and it was said
}

func newVolumes(g sender) *volumes { return &volumes{guest: g, sent: map[string]*sent{}} }

// ensure makes the guest have a volume, and the part of it that is to be mounted from
// onNode.
func (v *volumes) ensure(ctx context.Context, wanted volume, onNode string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.sent[wanted.name] == nil {
		now := &sent{volume: wanted}
		now.sub = ""
		if err := v.put(ctx, now); err != nil {
			return err
		}
		v.sent[wanted.name] = now
	}
	if wanted.sub == "" || wanted.kind != scratch {
		return nil
	}
	return v.send(ctx, http.MethodPatch, wanted, func(w io.Writer) error { return wanted.directories(w, onNode) })
}

func (v *volumes) put(ctx context.Context, s *sent) error {
	if s.kind == followed {
		// Before it is read: what changes meanwhile is then seen to have changed.
		var err error
		if s.fingerprint, err = fingerprint(s.source); err != nil {
			return err
		}
	}
	return v.send(ctx, http.MethodPut, s.volume, s.archive)
}

func (v *volumes) send(ctx context.Context, method string, to volume, archive func(io.Writer) error) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	path := "/v1/volumes/" + to.name
	if to.kind == scratch && method == http.MethodPut {
		path += "?scratch="
		if to.size > 0 {
			path += strconv.FormatInt(to.size, 10)
		}
	}
	r, w := io.Pipe()
	defer r.Close()
	go func() { _ = w.CloseWithError(archive(w)) }()
	if err := v.guest.send(ctx, method, path, r); err != nil {
		return fmt.Errorf("volume %s: %w", to.name, err)
	}
	return nil
}

// follow sends again what has changed on the node, until ctx is done.
func (v *volumes) follow(ctx context.Context) {
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			v.update(ctx)
		}
	}
}

func (v *volumes) update(ctx context.Context) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range v.sent {
		if s.kind != followed {
			continue
		}
		now, err := fingerprint(s.source)
		if err == nil && now == s.fingerprint {
			continue
		}
		if err == nil {
			err = v.put(ctx, s)
		}
		if err != nil {
			// Tried again at the next look. A pod that is being removed loses its volumes first.
			s.fingerprint = ""
			if !s.failing && ctx.Err() == nil {
				log.L.WithError(err).Warn("a volume's change does not reach the guest")
			}
		}
		s.failing = err != nil
	}
}
