package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// baseImages are needed by any cluster, with the product or without.
var baseImages = []string{"pause", "busybox", "agnhost"}

const productImage = "h8s"

// imageNames are the images that `h8s up` loads.
func imageNames(product bool) []string {
	if product {
		return append(slices.Clone(baseImages), productImage)
	}
	return baseImages
}

// imageArchive is where an image was built, beside the programs.
func (c *Config) imageArchive(name string) string {
	return filepath.Join(c.BinDir, "images", name+".tar")
}

// loadImages loads the images that were built with the programs.
func (b *bringUp) loadImages(ctx context.Context) error {
	for _, name := range imageNames(b.opts.Product) {
		if err := b.loadImage(ctx, b.imageArchive(name)); err != nil {
			return err
		}
	}
	if !b.opts.Product {
		return nil
	}
	latest := "localhost/" + productImage + ":latest"
	return b.onEveryContainerd(ctx, "images", "tag", "--force", latest, "localhost/"+productImage+":"+imageTag(b.images[productImage]))
}

// LoadImage loads a docker or OCI archive into every node of a running cluster.
func LoadImage(ctx context.Context, name, archive string) error {
	c, err := loadRunning(name)
	if err != nil {
		return err
	}
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("load image: %w", err)
	}
	f.Close()
	if err := c.loadImage(ctx, archive); err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("most likely %s is not a whole docker or OCI archive, as `docker save --output FILE.tar IMAGE` writes: %w", archive, err)
		}
		return err
	}
	return nil
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
	if err := c.onEveryContainerd(ctx, "images", "import", archive); err != nil {
		return fmt.Errorf("load %s: %w", archive, err)
	}
	return nil
}

// onEveryContainerd runs ctr against the containerd of each node.
func (c *Config) onEveryContainerd(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range c.Nodes {
		g.Go(func() error {
			log := c.state().programLog(n.Name, "containerd")
			socket := c.state().node(n.Name, containerdSocket)
			if err := waitDial(ctx, "unix", socket); err != nil {
				return withLog(fmt.Errorf("reach containerd of node %s: %w", n.Name, err), log)
			}
			ctr := exec.CommandContext(ctx, filepath.Join(c.BinDir, "ctr"), append([]string{"--address", socket, "--namespace", "k8s.io"}, args...)...)
			if out, err := ctr.CombinedOutput(); err != nil {
				return withLog(fmt.Errorf("on node %s: %w: %s", n.Name, errors.Join(ctx.Err(), err), strings.TrimSpace(string(out))), log)
			}
			return nil
		})
	}
	return g.Wait()
}
