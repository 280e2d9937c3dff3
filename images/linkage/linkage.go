// Package linkage finds what a dynamically linked program of this machine needs to run elsewhere.
package linkage

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// libraryDirs is where Debian's dynamic loader looks when nothing else is configured.
var libraryDirs = []string{
	"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu",
	"/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
	"/lib64", "/usr/lib64", "/lib", "/usr/lib",
}

// Closure returns the loader that a program asks for, or "" if it is statically linked, and all libraries
// that it needs, at the paths where the loader will look for them.
func Closure(program string) (loader string, libraries []string, err error) {
	loader, needed, err := linkage(program)
	if err != nil {
		return "", nil, err
	}
	for len(needed) > 0 {
		soname := needed[0]
		needed = needed[1:]
		library, err := find(soname)
		if err != nil {
			return "", nil, fmt.Errorf("%s: %w", program, err)
		}
		if slices.Contains(libraries, library) || filepath.Base(loader) == soname {
			continue
		}
		libraries = append(libraries, library)
		_, more, err := linkage(library)
		if err != nil {
			return "", nil, err
		}
		needed = append(needed, more...)
	}
	return loader, libraries, nil
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
			return "", nil, fmt.Errorf("%s: %w", name, err)
		}
		loader = strings.TrimRight(string(raw), "\x00")
	}
	if needed, err = f.ImportedLibraries(); err != nil {
		return "", nil, fmt.Errorf("%s: %w", name, err)
	}
	return loader, needed, nil
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
