package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"h8s.io/hypernetes/images/linkage"
)

// file is one entry of a tree: a directory, a symbolic link, or a regular file.
type file struct {
	mode fs.FileMode // type bits say which of the three it is
	data []byte
	link string
}

// tree is a file system by absolute path. Parent directories that are not listed exist with mode 0755.
type tree map[string]file

func dir(mode fs.FileMode) file                  { return file{mode: fs.ModeDir | mode} }
func symlink(target string) file                 { return file{mode: fs.ModeSymlink | 0o777, link: target} }
func text(content string) file                   { return file{mode: 0o644, data: []byte(content)} }
func program(name, missing string) (file, error) { return read(name, 0o755, missing) }

// read takes a file of the host. If it is not there the error ends with what to do about it.
func read(name string, mode fs.FileMode, missing string) (file, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return file{}, fmt.Errorf("%w: %s", err, missing)
	}
	return file{mode: mode, data: data}, nil
}

// epoch is every entry's modification time: a layer depends on what is in it, not on when it was made.
var epoch = time.Unix(0, 0).UTC()

// layer writes the tree as an uncompressed layer. Equal trees give equal bytes: entries are sorted and
// carry neither the time nor the owner of the files they came from.
func (t tree) layer() (v1.Layer, error) {
	all := maps.Clone(t)
	for name := range t {
		for parent := path.Dir(name); parent != "/"; parent = path.Dir(parent) {
			if _, listed := all[parent]; !listed {
				all[parent] = dir(0o755)
			}
		}
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f := all[name]
		header := &tar.Header{
			Typeflag: tar.TypeReg, Name: name[1:], Linkname: f.link, Size: int64(len(f.data)),
			Mode: int64(f.mode.Perm()), ModTime: epoch, Format: tar.FormatUSTAR,
		}
		if f.mode&fs.ModeSticky != 0 {
			header.Mode |= 0o1000
		}
		switch f.mode.Type() {
		case fs.ModeDir:
			header.Typeflag, header.Name = tar.TypeDir, header.Name+"/"
		case fs.ModeSymlink:
			header.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write(f.data); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return static.NewLayer(out.Bytes(), types.DockerUncompressedLayer), nil
}

// closure adds to t a dynamically linked program of the host with the loader and every library that it
// needs, all at the paths where the loader will look for them.
func closure(t tree, name, missing string) error {
	f, err := program(name, missing)
	if err != nil {
		return err
	}
	t[name] = f
	loader, libraries, err := linkage.Closure(name)
	if err != nil {
		return err
	}
	if loader != "" {
		if t[loader], err = program(loader, "the loader of "+name); err != nil {
			return err
		}
	}
	for _, library := range libraries {
		if t[library], err = read(library, 0o644, "a library of "+name); err != nil {
			return err
		}
	}
	return nil
}
