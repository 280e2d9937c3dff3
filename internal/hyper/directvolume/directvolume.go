// Package directvolume is how a CSI driver gives a disk to a pod that is a virtual
// machine, instead of mounting it on the node: NodePublishVolume writes down which disk
// stands at its target path, the pod's shim finds it there when a container mounts the
// path, plugs the disk in and lets the guest mount it. NodeUnpublishVolume takes the
// record away, and returns when no machine has the disk.
//
// The kubelet sees an empty directory at the target path. What it does to that, the guest
// does to the volume: a fsGroup, and a subPath's directories. It sees no usage; a driver that
// wants to report some has to ask elsewhere.
//
// A volume with volumeMode: Block has no directory but a device at its target path, which
// the kubelet and containerd insist on. A driver that has one on the node need not do
// anything here: the shim gives the guest that very device. A driver that has none puts
// another in its place that nobody uses, such as a loop device of one sector, and a record
// with it.
package directvolume

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// DefaultDir is where the records are. A reboot, which no machine survives, takes them away
// if it is below /run.
const DefaultDir = "/run/h8s/direct-volumes"

// Volume is a disk that stands at a target path.
type Volume struct {
	// Disk says where the content is, as QEMU's BlockdevOptions of a protocol node:
	//
	//	{"driver": "file", "filename": "/…"}
	//	{"driver": "host_device", "filename": "/dev/…"}
	//	{"driver": "nbd", "server": {"type": "unix", "path": "/…"}, "export": "…"}
	//	{"driver": "nbd", "server": {"type": "inet", "host": "…", "port": "…"}}
	//	{"driver": "rbd", …}
	//
	// Files and devices are opened by the shim, as root. QEMU itself connects to servers, in
	// the node's network namespace.
	Disk map[string]any `json:"disk"`
	// FileSystem is what the disk holds: ext4 or xfs. The driver has made it. Empty: the
	// volume is a block device.
	FileSystem string `json:"fileSystem,omitempty"`
	// Options are the guest's mount options.
	Options []string `json:"options,omitempty"`
	// ReadOnly keeps the guest from writing to the disk. A disk that can be written is
	// one machine's at a time, which is checked for files and devices.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// fileSystems are those that guests mount.
var fileSystems = []string{"ext4", "xfs"}

func (v Volume) validate() error {
	if driver, _ := v.Disk["driver"].(string); driver == "" {
		return errors.New("disk.driver is missing: name a protocol driver of QEMU, such as file, host_device, nbd or rbd")
	}
	if v.FileSystem != "" && !slices.Contains(fileSystems, v.FileSystem) {
		return fmt.Errorf("a guest does not mount file systems of type %q; use one of %s", v.FileSystem, strings.Join(fileSystems, ", "))
	}
	return nil
}

// record is the file.
type record struct {
	Target string `json:"target"`
	Volume
}

// Store is a directory of records, which processes share.
type Store struct{ dir string }

// New makes no directory: that is done when the first record is written.
func New(dir string) Store { return Store{dir} }

const (
	recordSuffix = ".json"
	lockSuffix   = ".lock"
	// releasePoll is how often Unpublish looks whether the disk was let go.
	releasePoll = 100 * time.Millisecond
)

// path is the record's file without its suffix.
func (s Store) path(target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(s.dir, hex.EncodeToString(sum[:16]))
}

// clean resolves what leads to the target, as containerd does before the shim sees it. The
// target itself may not be there.
func clean(target string) (string, error) {
	if !filepath.IsAbs(target) {
		return "", fmt.Errorf("target path %q: it has to be absolute", target)
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(target))
	if errors.Is(err, fs.ErrNotExist) {
		return filepath.Clean(target), nil
	}
	return filepath.Join(dir, filepath.Base(target)), err
}

// Publish writes down which disk stands at a target path, and makes the directory there
// for a volume with a file system. It is idempotent; another volume at the same path is
// refused. A crash leaves the record or none.
func (s Store) Publish(target string, v Volume) error {
	if err := s.publish(target, v); err != nil {
		return fmt.Errorf("publish a disk at %s: %w", target, err)
	}
	return nil
}

func (s Store) publish(target string, v Volume) error {
	if err := v.validate(); err != nil {
		return err
	}
	if _, err := clean(target); err != nil {
		return err
	}
	if v.FileSystem != "" {
		if err := os.MkdirAll(target, 0o750); err != nil {
			return err
		}
	}
	target, err := clean(target) // now that there is what may lead to it
	if err != nil {
		return err
	}
	text, err := json.Marshal(record{target, v})
	if err != nil {
		return err
	}
	have, err := os.ReadFile(s.path(target) + recordSuffix)
	if err == nil {
		if string(have) != string(text) {
			return errors.New("another disk stands there; unpublish that first")
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	// The record may hold what gives access to the disk.
	return renameio.WriteFile(s.path(target)+recordSuffix, text, 0o600)
}

// Unpublish removes what Publish has written and made, and waits until the machine that has
// the disk lets it go: the shim of a running pod does so once no container uses the volume.
// It is idempotent.
func (s Store) Unpublish(ctx context.Context, target string) error {
	if err := s.unpublish(ctx, target); err != nil {
		return fmt.Errorf("unpublish the disk at %s: %w", target, err)
	}
	return nil
}

func (s Store) unpublish(ctx context.Context, target string) error {
	target, err := clean(target)
	if err != nil {
		return err
	}
	if err := os.Remove(s.path(target) + recordSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	lock := s.path(target) + lockSuffix
	f, err := os.OpenFile(lock, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist): // no machine has ever had it
	case err != nil:
		return err
	default:
		defer f.Close()
		if err := await(ctx, f); err != nil {
			return err
		}
		if err := os.Remove(lock); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return removeEmpty(target)
}

// await locks a file that a machine has locked.
func await(ctx context.Context, f *os.File) error {
	ticker := time.NewTicker(releasePoll)
	defer ticker.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("a virtual machine still uses it; end the pod's containers: %w", context.Cause(ctx))
		}
	}
}

// removeEmpty removes the target's directory, in which the kubelet may have made directories
// for subPaths. Whatever else is there, or is mounted there, is not ours, and stays.
func removeEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeEmpty(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it is to be an empty directory: %w", err)
	}
	return nil
}

// Attachment is a machine's use of a volume.
type Attachment struct {
	Volume
	record string
	lock   *os.File
}

// Attach finds the disk at a target path for a machine, and lasts until Release or until the
// process ends. It fails with ErrNotExist if there is none.
func (s Store) Attach(target string) (*Attachment, error) {
	target, err := clean(target)
	if err != nil {
		return nil, err
	}
	path := s.path(target)
	if _, err := read(path + recordSuffix); err != nil {
		return nil, err // without a lock file for what is no volume of ours
	}
	lock, err := os.OpenFile(path+lockSuffix, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("the disk at %s is being unpublished: %w", target, err)
	}
	// Locked first: who removes the record after this waits for us.
	v, err := read(path + recordSuffix)
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &Attachment{Volume: v, record: path + recordSuffix, lock: lock}, nil
}

func read(name string) (Volume, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return Volume{}, err
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return Volume{}, fmt.Errorf("%s: %w", name, err)
	}
	return r.Volume, r.validate()
}

// Unpublished reports whether the disk is to be let go.
func (a *Attachment) Unpublished() bool {
	_, err := os.Stat(a.record)
	return errors.Is(err, fs.ErrNotExist)
}

// Release tells that the machine has let the disk go.
func (a *Attachment) Release() error { return a.lock.Close() }
