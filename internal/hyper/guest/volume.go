//go:build linux

package guest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxEntries bounds what an archive may name: kubelet's volumes are small.
	maxEntries = 1 << 17
	// stageName is the name of what is not complete yet: of one file at a time. It does not
	// contain the name to come, which may be as long as names can be.
	stageName = ".h8s-stage"
)

// volumes are the pod's volumes that come from the host as archives, or begin empty.
type volumes struct {
	dir   string
	limit int64 // bytes in a volume for which no size was asked; 0: half of the memory

	mu        sync.Mutex
	scratched map[string]bool
}

func newVolumes(dir string, limit int64) *volumes {
	return &volumes{dir: dir, limit: limit, scratched: map[string]bool{}}
}

// apply makes a volume hold what the archive holds: see package guestapi. If it fails,
// symbolic links still lead to what they led to.
func (v *volumes) apply(name string, archive io.Reader) error {
	if err := checkName("volume", name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.scratched[name] {
		return badRequest("volume %s belongs to the containers", name)
	}
	if err := v.applyLocked(name, archive); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return nil
}

func (v *volumes) applyLocked(name string, archive io.Reader) error {
	r := tar.NewReader(archive)
	first, err := r.Next()
	if errors.Is(err, io.EOF) {
		return badRequest("the archive is empty; an empty volume has an entry for its root")
	}
	if err != nil {
		return badRequestError{err}
	}
	all, err := os.OpenRoot(v.dir)
	if err != nil {
		return err
	}
	defer all.Close()
	if first.Typeflag == tar.TypeReg && path.Clean(first.Name) == "." {
		return applyFile(all, name, r, first)
	}
	if err := all.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	root, err := all.OpenRoot(name)
	if err != nil {
		return err
	}
	defer root.Close()
	return applyTree(root, r, first)
}

// applyFile writes a volume that is a file. Bind mounts keep the inode, so a file that
// is there is written in place, once all of the new content is here.
func applyFile(all *os.Root, name string, r *tar.Reader, h *tar.Header) error {
	stage := stageName
	if err := writeStage(all, stage, r, h); err != nil {
		return err
	}
	defer func() { _ = all.Remove(stage) }() // unless it has its name
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		return badRequest("something follows the file that is the volume (%v)", err)
	}
	info, err := all.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return all.Rename(stage, name)
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return badRequest("the volume is no file, and cannot become one")
	}
	from, err := all.Open(stage)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := all.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	n, err := io.Copy(to, from)
	if err == nil {
		err = to.Truncate(n)
	}
	if err = errors.Join(err, to.Close()); err != nil {
		return err
	}
	return setAttributes(all, name, h)
}

// applyTree makes root hold what the archive holds.
func applyTree(root *os.Root, r *tar.Reader, h *tar.Header) error {
	named := map[string]bool{".": true} // with all parents
	var links, dirs []*tar.Header
	for err := error(nil); ; h, err = r.Next() {
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return badRequestError{err}
		}
		name, err := entryName(h.Name)
		if err != nil {
			return err
		}
		h.Name = name
		for p := name; p != "."; p = path.Dir(p) {
			named[p] = true
		}
		if len(named) > maxEntries {
			return badRequest("the archive has more than %d entries", maxEntries)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if err := ensureDir(root, name); err != nil {
				return err
			}
			dirs = append(dirs, h)
		case tar.TypeReg:
			err = ensureDir(root, path.Dir(name))
			if err == nil {
				err = placeFile(root, name, r, h)
			}
		case tar.TypeSymlink:
			links = append(links, h)
		default:
			err = badRequest("%s: there are no entries of type %q", name, h.Typeflag)
		}
		if err != nil {
			return err
		}
	}
	for _, l := range links {
		if err := ensureDir(root, path.Dir(l.Name)); err != nil {
			return err
		}
		if err := placeLink(root, l); err != nil {
			return err
		}
	}
	if err := removeOthers(root, ".", named); err != nil {
		return err
	}
	// Last, as all of this has changed their times.
	for _, d := range dirs {
		if err := setAttributes(root, d.Name, d); err != nil {
			return err
		}
	}
	return nil
}

// entryName is a clean path inside the volume.
func entryName(name string) (string, error) {
	clean := path.Clean(name)
	if !fs.ValidPath(clean) || strings.Contains(clean, "\x00") {
		return "", badRequest("%q leads out of the volume", name)
	}
	if path.Base(clean) == stageName {
		return "", badRequest("%q: this name is ours", name)
	}
	return clean, nil
}

// ensureDir makes name a directory, and its parents; what is there and is none goes.
func ensureDir(root *os.Root, name string) error {
	if name == "." {
		return nil
	}
	info, err := root.Lstat(name)
	if err == nil && info.IsDir() {
		return nil
	}
	if err := ensureDir(root, path.Dir(name)); err != nil {
		return err
	}
	if err := root.RemoveAll(name); err != nil {
		return err
	}
	return root.Mkdir(name, 0o755)
}

func placeFile(root *os.Root, name string, r io.Reader, h *tar.Header) error {
	stage := path.Join(path.Dir(name), stageName)
	if err := writeStage(root, stage, r, h); err != nil {
		return err
	}
	return replace(root, stage, name)
}

// writeStage writes a file whole, under a name that is not its own yet.
func writeStage(root *os.Root, stage string, r io.Reader, h *tar.Header) error {
	if err := root.RemoveAll(stage); err != nil {
		return err
	}
	f, err := root.OpenFile(stage, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err == nil {
		err = setAttributes(root, stage, h)
	}
	if err != nil {
		_ = root.Remove(stage)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return badRequestError{err}
	}
	return err
}

func placeLink(root *os.Root, h *tar.Header) error {
	if have, err := root.Readlink(h.Name); err != nil || have != h.Linkname {
		stage := path.Join(path.Dir(h.Name), stageName)
		if err := root.RemoveAll(stage); err != nil {
			return err
		}
		if err := root.Symlink(h.Linkname, stage); err != nil {
			return err
		}
		if err := replace(root, stage, h.Name); err != nil {
			return err
		}
	}
	return root.Lchown(h.Name, h.Uid, h.Gid)
}

// replace gives stage its name; a directory that has it goes.
func replace(root *os.Root, stage, name string) error {
	if info, err := root.Lstat(name); err == nil && info.IsDir() {
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return root.Rename(stage, name)
}

// removeOthers removes what is below dir and not named.
func removeOthers(root *os.Root, dir string, named map[string]bool) error {
	entries, err := readDir(root, dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name())
		switch {
		case !named[name]:
			err = root.RemoveAll(name)
		case e.IsDir():
			err = removeOthers(root, name, named)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func readDir(root *os.Root, dir string) ([]fs.DirEntry, error) {
	d, err := root.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

// setAttributes sets owner, mode and time of a file or directory. The owner comes
// first: changing it takes setuid bits away.
func setAttributes(root *os.Root, name string, h *tar.Header) error {
	if err := root.Chown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if err := root.Chmod(name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	if h.ModTime.Unix() <= 0 {
		return nil
	}
	return root.Chtimes(name, time.Time{}, h.ModTime)
}

// scratch makes a volume that begins empty and is the containers' from then on. It holds
// size bytes at most, or half of what the containers have. The archive may hold one entry, the root's
// mode and owner. It is idempotent: a volume that is there stays as it is.
func (v *volumes) scratch(name string, size int64, archive io.Reader) error {
	if err := checkName("volume", name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.scratched[name] {
		return nil
	}
	attributes, err := scratchAttributes(archive)
	if err != nil {
		return err
	}
	target := filepath.Join(v.dir, name)
	if err := os.Mkdir(target, 0o755); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	if size == 0 {
		size = v.limit
	}
	if err := setUpScratch(target, size, attributes); err != nil {
		return errors.Join(fmt.Errorf("volume %s: %w", name, err), clearVolume(target))
	}
	v.scratched[name] = true
	return nil
}

// scratchAttributes reads what the archive says of the root; most may use it if it says
// nothing.
func scratchAttributes(archive io.Reader) (*tar.Header, error) {
	h, err := tar.NewReader(archive).Next()
	switch {
	case errors.Is(err, io.EOF):
		return &tar.Header{Typeflag: tar.TypeDir, Name: ".", Mode: 0o777}, nil
	case err != nil:
		return nil, badRequestError{err}
	case h.Typeflag != tar.TypeDir || path.Clean(h.Name) != ".":
		return nil, badRequest("a scratch volume's archive holds its root alone, not %q", h.Name)
	}
	return h, nil
}

// sizeOption bounds a tmpfs, which takes half of the memory by itself.
func sizeOption(size int64) string {
	if size <= 0 {
		return ""
	}
	return fmt.Sprintf("size=%d", size)
}

func setUpScratch(target string, size int64, attributes *tar.Header) error {
	// Always a file system of its own: one that is full is full for nobody else.
	if err := unix.Mount("scratch", target, "tmpfs", unix.MS_NODEV, sizeOption(size)); err != nil {
		return err
	}
	root, err := os.OpenRoot(target)
	if err != nil {
		return err
	}
	defer root.Close()
	return setAttributes(root, ".", attributes)
}

// directories makes the directories that an archive names where nothing is yet; what is
// there stays as it is.
func (v *volumes) directories(name string, archive io.Reader) error {
	if err := checkName("volume", name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := addDirectories(filepath.Join(v.dir, name), archive); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return nil
}

// addDirectories makes the directories below dir that an archive names, where nothing is yet.
func addDirectories(dir string, archive io.Reader) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	r := tar.NewReader(archive)
	for n := 0; ; n++ {
		h, err := r.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return badRequestError{err}
		case h.Typeflag != tar.TypeDir || n == maxEntries:
			return badRequest("%s: only directories, and at most %d, can be added", h.Name, maxEntries)
		}
		if err := addDir(root, h); err != nil {
			return err
		}
	}
}

func addDir(root *os.Root, h *tar.Header) error {
	name, err := entryName(h.Name)
	if err != nil {
		return err
	}
	if name == "." {
		return nil
	}
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Mkdir(name, 0o755); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	return setAttributes(root, name, h)
}

// remove removes a volume. It is idempotent.
func (v *volumes) remove(name string) error {
	if err := checkName("volume", name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.scratched, name)
	return clearVolume(filepath.Join(v.dir, name))
}

func clearVolume(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return os.RemoveAll(target)
}
