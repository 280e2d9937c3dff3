// Command images builds the project's container images from programs of this machine, without a
// registry and without a container engine, as docker archives that `h8s image load` and
// `ctr images import` take. Equal programs give equal images; an archive that is right already stays.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
)

func main() {
	bin := flag.String("bin", "bin", "directory of the built programs")
	out := flag.String("out", "bin/images", "directory for the archives")
	all := slices.Sorted(maps.Keys(catalog))
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: images [--bin DIR] [--out DIR] [%s]...\n", strings.Join(all, "|"))
		flag.PrintDefaults()
	}
	flag.Parse()
	names := flag.Args()
	if len(names) == 0 {
		names = all
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed := buildAll(ctx, names, *bin, *out)
	stop()
	if failed != nil {
		fmt.Fprintln(os.Stderr, failed)
		os.Exit(1)
	}
}

// buildAll builds what it can, and tells at the end what it could not.
func buildAll(ctx context.Context, names []string, bin, out string) (failed error) {
	for _, n := range names {
		start := time.Now()
		written, err := build(ctx, n, bin, out)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("image %s: %w", n, err))
			continue
		}
		state := "unchanged"
		if written {
			state = "built"
		}
		fmt.Printf("  image %-28s %4.0fs  %s\n", n, time.Since(start).Seconds(), state)
	}
	return failed
}

// build makes the archive of one image and reports whether it was written.
func build(ctx context.Context, image, bin, out string) (bool, error) {
	gather, known := catalog[image]
	if !known {
		return false, fmt.Errorf("there is no such image; there are %s", strings.Join(slices.Sorted(maps.Keys(catalog)), ", "))
	}
	c, err := gather(ctx, bin)
	if err != nil {
		return false, err
	}
	img, err := c.image(runtime.GOARCH)
	if err != nil {
		return false, err
	}
	tag, err := name.NewTag("localhost/" + image + ":latest")
	if err != nil {
		return false, err
	}
	return ensureArchive(filepath.Join(out, image+".tar"), tag, img)
}
