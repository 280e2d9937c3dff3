package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// content is what an image consists of.
type content struct {
	layers []tree
	config v1.Config
}

// image assembles the content. Equal contents give images with equal digests.
func (c content) image(architecture string) (v1.Image, error) {
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		OS: "linux", Architecture: architecture, Created: v1.Time{Time: epoch}, Config: c.config,
		RootFS: v1.RootFS{Type: "layers"},
	})
	if err != nil {
		return nil, err
	}
	for _, t := range c.layers {
		layer, err := t.layer()
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// ensureArchive makes path the docker archive of img under tag and reports whether it had to write it.
// The archive appears whole or not at all.
func ensureArchive(path string, tag name.Tag, img v1.Image) (written bool, err error) {
	if archived(path, tag, img) {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return false, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if err := tarball.Write(tag, img, tmp); err != nil {
		return false, fmt.Errorf("write %s: %w", tmp.Name(), err)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return false, err
	}
	if err := tmp.Close(); err != nil {
		return false, err
	}
	return true, os.Rename(tmp.Name(), path)
}

// archived reports whether path is an archive of img already. The name of the configuration is the
// digest of all layers' contents and all settings, so nothing else has to be compared.
func archived(path string, tag name.Tag, img v1.Image) bool {
	old, err := tarball.ImageFromPath(path, &tag)
	if err != nil {
		return false // missing or damaged: write it
	}
	have, err := old.ConfigName()
	if err != nil {
		return false
	}
	want, err := img.ConfigName()
	return err == nil && have == want
}
