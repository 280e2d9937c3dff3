package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// baseImages are needed by any cluster, with the product or without.
var baseImages = []string{"pause", "busybox", "agnhost"}

const productImage = "h8s"

// loadImages loads the images that were built with the programs.
func (b *bringUp) loadImages(ctx context.Context) error {
	names := baseImages
	if b.opts.Product {
		names = append(names[:len(names):len(names)], productImage)
	}
	for _, name := range names {
		archive := filepath.Join(b.BinDir, "images", name+".tar")
		if _, err := os.Stat(archive); err != nil {
			return fmt.Errorf("find image %s, which `make images` builds: %w", name, err)
		}
		if err := b.loadImage(ctx, archive); err != nil {
			return err
		}
	}
	return nil
}

// LoadImage loads a docker or OCI archive into every node of a running cluster.
func LoadImage(ctx context.Context, name, archive string) error {
	c, err := loadRunning(name)
	if err != nil {
		return err
	}
	return c.loadImage(ctx, archive)
}

// loadRunning reads the Config of a cluster that runs.
func loadRunning(name string) (*Config, error) {
	c, err := loadConfig(name)
	if err != nil {
		return nil, err
	}
	running, err := c.running()
	if err != nil {
		return nil, err
	}
	if !running {
		return nil, fmt.Errorf("cluster %q is not running: `h8s up --name %s` starts it again", name, name)
	}
	return c, nil
}

func (c *Config) loadImage(ctx context.Context, archive string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		g.Go(func() error {
			socket := c.state().node(n.Name, containerdSocket)
			if err := waitDial(ctx, "unix", socket); err != nil {
				return fmt.Errorf("reach containerd of node %s: %w", n.Name, err)
			}
			ctr := exec.CommandContext(ctx, filepath.Join(c.BinDir, "ctr"), "--address", socket, "--namespace", "k8s.io", "images", "import", archive)
			if out, err := ctr.CombinedOutput(); err != nil {
				return fmt.Errorf("load %s into node %s: %w: %s", archive, n.Name, errors.Join(ctx.Err(), err), out)
			}
			return nil
		})
	}
	return g.Wait()
}
