package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// unusedFor is how long a template is kept that nobody clones.
	unusedFor = 24 * time.Hour
	// maxSize is how much of the disk all templates take, in bytes: those that were cloned
	// last are kept.
	maxSize = 4 << 30
	// startsLock is held, shared, by everybody who uses a template's files.
	startsLock = ".lock"
)

// Templates are a node's templates: for each owner, one of each size. Owners share no
// memory. Processes may use the same directory at the same time.
type Templates struct {
	// Dir is made when it is needed.
	Dir string
	// Ready is as in SaveTemplate.
	Ready func(context.Context, io.ReadWriteCloser) error
	// Cgroup is called with the process ID of a QEMU that boots a template, as that of
	// Config is for the clone.
	Cgroup func(pid int) error
}

// Clone starts c as a clone of the owner's template of its size. If there is none that
// fits, it boots one: of those who want the same, one does, and the others wait for it.
// ctx bounds both. The owner is the name of a directory.
func (t Templates) Clone(ctx context.Context, owner string, c Config) (*VM, error) {
	var err error
	if c.Template, err = t.dir(owner, c); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(t.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of templates: %w", err)
	}
	unlock, err := lock(ctx, filepath.Join(t.Dir, startsLock), unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := Start(ctx, c)
	if errors.Is(err, ErrTemplate) {
		if err := t.save(ctx, c); err != nil {
			return nil, err
		}
		v, err = Start(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	now := time.Now()
	_ = os.Chtimes(c.Template, now, now) // at worst it is collected, and made again
	return v, nil
}

func (t Templates) dir(owner string, c Config) (string, error) {
	if owner == "" || owner[0] == '.' || !filepath.IsLocal(owner) || filepath.Base(owner) != owner {
		return "", fmt.Errorf("the owner %q of a template is not the name of a directory", owner)
	}
	return filepath.Join(t.Dir, owner, fmt.Sprintf("%dcpu-%dMi", c.CPUs, c.Memory>>20)), nil
}

// Discard removes the owner's template of c's size, whose clones are of no use; those that
// run keep it. It is idempotent.
func (t Templates) Discard(owner string, c Config) error {
	dir, err := t.dir(owner, c)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("discard a template: %w", err)
	}
	return nil
}

func (t Templates) save(ctx context.Context, c Config) error {
	dir := c.Template
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("directory of templates: %w", err)
	}
	c.ID, c.Cgroup = "template", t.Cgroup
	if c.NIC != nil {
		c.NIC = &NIC{}
	}
	return SaveTemplate(ctx, c, dir, t.Ready)
}

// Collect removes the templates that nobody has cloned for a day or that are too many,
// and what is left of those whose making was interrupted. It waits until nobody clones
// any. Machines that are clones of a template keep it, as they have it open.
func (t Templates) Collect(ctx context.Context) error {
	if err := t.collect(ctx, unusedFor, maxSize); err != nil {
		return fmt.Errorf("remove unused templates: %w", err)
	}
	return nil
}

func (t Templates) collect(ctx context.Context, unused time.Duration, size int64) error {
	unlock, err := lock(ctx, filepath.Join(t.Dir, startsLock), unix.LOCK_EX)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nobody has made one
	}
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := filepath.Glob(filepath.Join(t.Dir, "*", "*"))
	if err != nil {
		return err
	}
	type template struct {
		dir  string
		used time.Time
		size int64
	}
	var templates []template
	var errs []error
	for _, path := range entries {
		info, err := os.Lstat(path)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !strings.HasPrefix(filepath.Base(path), "."):
			taken, err := diskUsage(path)
			errs = append(errs, err)
			templates = append(templates, template{path, info.ModTime(), taken})
		default:
			// A lock, or what was made under it: nobody who clones holds it now.
			errs = append(errs, os.RemoveAll(path))
		}
	}
	slices.SortFunc(templates, func(a, b template) int { return cmp.Compare(b.used.UnixNano(), a.used.UnixNano()) })
	for _, k := range templates {
		if size -= k.size; size < 0 || time.Since(k.used) > unused {
			errs = append(errs, os.RemoveAll(k.dir))
			if err := os.Remove(filepath.Dir(k.dir)); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// diskUsage is what the files of a directory take of the disk, in bytes.
func diskUsage(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, e := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, e.Name()), &st); err != nil {
			return 0, err
		}
		sum += st.Blocks * 512
	}
	return sum, nil
}
