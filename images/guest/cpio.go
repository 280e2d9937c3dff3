package main

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"

	"golang.org/x/sys/unix"
)

// node is one entry of an initramfs: a directory, a regular file, a symbolic link
// or a character device. Everything belongs to root.
type node struct {
	mode   fs.FileMode // with type bits
	data   []byte      // a file's content, or where a link leads
	device uint64      // unix.Mkdev
}

// tree is what an initramfs unpacks, by path without a leading slash. Parent
// directories that are not listed are made with mode 0755.
type tree map[string]node

// writeCPIO writes the tree as a cpio archive of format newc, the one that Linux unpacks
// (Documentation/driver-api/early-userspace/buffer-format.rst). Equal trees give
// equal archives.
func writeCPIO(w io.Writer, t tree) error {
	whole := tree{}
	for name, n := range t {
		if !fs.ValidPath(name) || name == "." {
			return fmt.Errorf("initramfs: %q is not a path below the root", name)
		}
		whole[name] = n
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, listed := t[dir]; !listed {
				whole[dir] = node{mode: fs.ModeDir | 0o755}
			}
		}
	}
	cw := &cpioWriter{w: w}
	// A directory sorts before what it holds.
	for _, name := range slices.Sorted(maps.Keys(whole)) {
		mode, err := unixMode(whole[name].mode)
		if err != nil {
			return fmt.Errorf("initramfs: %s: %w", name, err)
		}
		cw.entry(name, mode, whole[name])
	}
	cw.entry("TRAILER!!!", 0, node{})
	return cw.err
}

func unixMode(mode fs.FileMode) (uint32, error) {
	m := uint32(mode.Perm())
	switch mode.Type() {
	case 0:
		return m | unix.S_IFREG, nil
	case fs.ModeDir:
		return m | unix.S_IFDIR, nil
	case fs.ModeSymlink:
		return m | unix.S_IFLNK, nil
	case fs.ModeDevice | fs.ModeCharDevice:
		return m | unix.S_IFCHR, nil
	}
	return 0, fmt.Errorf("no entries of type %s", mode.Type())
}

// cpioWriter keeps the first error.
type cpioWriter struct {
	w     io.Writer
	inode int
	err   error
}

func (c *cpioWriter) entry(name string, mode uint32, n node) {
	links := 1
	if mode&unix.S_IFMT == unix.S_IFDIR {
		links = 2
	}
	c.inode++
	const zero = 0
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, zero /*uid*/, zero /*gid*/, links, zero /*mtime*/, len(n.data), zero, zero, /*device*/
		unix.Major(n.device), unix.Minor(n.device), len(name)+1, zero /*check*/)
	c.padded([]byte(header + name + "\x00"))
	c.padded(n.data)
}

// padded writes b and zeros up to a multiple of four bytes: headers and contents
// begin at one.
func (c *cpioWriter) padded(b []byte) {
	if c.err != nil {
		return
	}
	if _, c.err = c.w.Write(b); c.err != nil {
		return
	}
	_, c.err = c.w.Write(make([]byte, -len(b)&3))
}
