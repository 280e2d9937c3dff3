package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// libraryDirs is where Debian's dynamic loader looks when nothing else is configured.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
	"/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// closure adds to t a dynamically linked program of the host with the loader and every library that it
// needs, all at the paths where the loader will look for them.
func closure(t tree, name, missing string) error {
	f, err := program(name, missing)
	if err != nil {
		return err
	}
	t[name] = f
	loader, needed, err := linkage(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if loader != "" {
		if t[loader], err = program(loader, "the loader of "+name); err != nil {
			return err
		}
	}
	for len(needed) > 0 {
		soname := needed[0]
		needed = needed[1:]
		library, err := find(soname)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, have := t[library]; have || filepath.Base(loader) == soname {
			continue
		}
		if t[library], err = read(library, 0o644, "a library of "+name); err != nil {
			return err
		}
		_, more, err := linkage(library)
		if err != nil {
			return fmt.Errorf("%s: %w", library, err)
		}
		needed = append(needed, more...)
	}
	return nil
}

// linkage reads which loader an ELF file asks for and which libraries it needs.
func linkage(name string) (loader string, needed []string, err error) {
	f, err := elf.Open(name)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		raw := make([]byte, p.Filesz)
		if _, err := p.ReadAt(raw, 0); err != nil {
			return "", nil, err
		}
		loader = strings.TrimRight(string(raw), "\x00")
	}
	needed, err = f.ImportedLibraries()
	return loader, needed, err
}

func find(soname string) (string, error) {
	for _, dir := range libraryDirs {
		name := filepath.Join(dir, soname)
		if _, err := os.Stat(name); err == nil {
			return name, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("library %s is not in %s", soname, strings.Join(libraryDirs, ", "))
}
