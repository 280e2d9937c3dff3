package shim

import (
	"context"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// disks are the layers that a machine has.
type disks struct {
	mu  sync.Mutex
	all map[string]*disk // by serial
}

type disk struct {
	mu      sync.Mutex // held while it is attached
	mounted bool
}

func (d *disks) get(serial string) *disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all == nil {
		d.all = map[string]*disk{}
	}
	if d.all[serial] == nil {
		d.all[serial] = &disk{}
	}
	return d.all[serial]
}

// attachLayers makes the guest mount layer directories, the lowest first, and returns
// their serials. Containers of one image share them.
func (p *pod) attachLayers(ctx context.Context, dirs []string) ([]string, error) {
	serials := make([]string, len(dirs))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(4)
	for i, dir := range dirs {
		group.Go(func() (err error) {
			serials[i], err = p.attachLayer(ctx, dir)
			return err
		})
	}
	return serials, group.Wait()
}

func (p *pod) attachLayer(ctx context.Context, dir string) (serial string, err error) {
	image, err := p.cache.Ensure(ctx, dir)
	if err != nil {
		return "", err
	}
	d := p.disks.get(image.Serial)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mounted {
		return image.Serial, nil
	}
	err = p.vm.AddDisk(ctx, vm.Disk{
		Serial: image.Serial, ReadOnly: true,
		Backend: map[string]any{"driver": "file", "filename": image.Path},
	})
	if err != nil {
		return "", err
	}
	err = p.mountDisk(ctx, image.Serial)
	d.mounted = err == nil
	return image.Serial, err
}

// mountDisk tries again for a while: the guest's kernel lists a disk a moment before it
// can be opened.
func (p *pod) mountDisk(ctx context.Context, serial string) error {
	patience, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	for {
		err := p.guest.call(ctx, http.MethodPut, "/v1/disks/"+serial, guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-patience.Done():
			return err
		}
	}
}
