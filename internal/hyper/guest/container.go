//go:build linux

package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// layersLink leads to guestapi.DiskDir.
const layersLink = "/l"

// containers are the bundles.
type containers struct {
	dir, layers string
	limit       int64 // bytes that a container can write to its root; 0: half of the memory

	mu sync.Mutex
}

func newContainers(dir, layers string, limit int64) *containers {
	return &containers{dir: dir, layers: layers, limit: limit}
}

// make makes a bundle with its root. It is idempotent; a bundle that is there stays as
// it is.
func (c *containers) make(id string, container guestapi.Container) (err error) {
	if err := checkName("container", id); err != nil {
		return err
	}
	if len(container.Layers) == 0 {
		return badRequest("container %s has no layers", id)
	}
	bundle := filepath.Join(c.dir, id)
	config, err := c.guestSpec(container, id)
	if err != nil {
		return badRequest("container %s: specification: %w", id, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// It is the last to be written.
	if _, err := os.Stat(filepath.Join(bundle, "config.json")); err == nil {
		return nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("container %s: %w", id, err), c.clear(bundle))
		}
	}()
	root, writes := filepath.Join(bundle, "rootfs"), filepath.Join(bundle, "writes")
	for _, dir := range []string{bundle, root, writes} {
		if err := os.Mkdir(dir, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	// What is written is in the memory of the container that writes, and dies with it.
	if err := unix.Mount("writes", writes, "tmpfs", 0, strings.TrimSuffix("mode=0755,"+sizeOption(c.limit), ",")); err != nil {
		return fmt.Errorf("mount %s: %w", writes, err)
	}
	var lower []string
	for _, l := range slices.Backward(container.Layers) {
		if err := checkName("layer", l); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(c.layers, l)); err != nil {
			return badRequest("layer %s is not mounted", l)
		}
		lower = append(lower, filepath.Join(layersLink, l))
	}
	upper, work := filepath.Join(writes, "upper"), filepath.Join(writes, "work")
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	// overlayfs shows the upper directory's attributes as the root's.
	if err := copyAttributes(filepath.Join(c.layers, container.Layers[len(container.Layers)-1]), upper); err != nil {
		return err
	}
	options := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + upper + ",workdir=" + work
	if len(options) >= os.Getpagesize() {
		return badRequest("%d layers are too many", len(lower))
	}
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	staged := filepath.Join(bundle, ".config.json")
	if err := os.WriteFile(staged, config, 0o600); err != nil {
		return err
	}
	return os.Rename(staged, filepath.Join(bundle, "config.json"))
}

// remove removes a bundle and its root. It is idempotent.
func (c *containers) remove(id string) error {
	if err := checkName("container", id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.clear(filepath.Join(c.dir, id)); err != nil {
		return fmt.Errorf("container %s: %w", id, err)
	}
	return nil
}

func (c *containers) clear(bundle string) error {
	for _, name := range []string{"rootfs", "writes"} {
		target := filepath.Join(bundle, name)
		for {
			err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				break // nothing is mounted there (any more)
			}
			if err != nil {
				return fmt.Errorf("unmount %s: %w", target, err)
			}
		}
	}
	return os.RemoveAll(bundle)
}

func copyAttributes(from, to string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	if err := os.Chown(to, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	return unix.Chmod(to, stat.Mode&0o7777)
}

// guestSpec is the host's specification with what is the guest's to say: where the
// root is, and a cgroup below the one that leaves PID 1 its share. What it does not
// know it keeps.
func (c *containers) guestSpec(container guestapi.Container, id string) ([]byte, error) {
	var spec map[string]any
	d := json.NewDecoder(bytes.NewReader(container.Spec))
	d.UseNumber()
	if err := d.Decode(&spec); err != nil {
		return nil, err
	}
	root, err := object(spec, "root")
	if err != nil {
		return nil, err
	}
	root["path"] = "rootfs"
	// crun 1.8, Debian's, refuses others. It knows what a kubelet asks for of those.
	spec["ociVersion"] = "1.0.2"
	linux, err := object(spec, "linux")
	if err != nil {
		return nil, err
	}
	linux["cgroupsPath"] = "/" + podCgroup + "/" + id
	for _, d := range container.Devices {
		if err := c.addDevice(linux, d); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	process, err := object(spec, "process")
	if err != nil {
		return nil, err
	}
	// Without one it would have PID 1's; crun takes 0 for none.
	switch n := process["oomScoreAdj"].(type) {
	case nil:
		process["oomScoreAdj"] = 1
	case json.Number:
		if n == "0" {
			process["oomScoreAdj"] = 1
		}
	}
	return json.Marshal(spec)
}

// addDevice adds a disk's node, and the right to use it.
func (c *containers) addDevice(linux map[string]any, d guestapi.Device) error {
	if err := checkName("disk", d.Serial); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(c.layers, d.Serial), &st); err != nil {
		return fmt.Errorf("disk %s: %w", d.Serial, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("disk %s is mounted", d.Serial)
	}
	major, minor := unix.Major(st.Rdev), unix.Minor(st.Rdev)
	resources, err := object(linux, "resources")
	if err != nil {
		return err
	}
	nodes, _ := linux["devices"].([]any)
	linux["devices"] = append(nodes, map[string]any{
		"path": d.Path, "type": "b", "major": major, "minor": minor, "fileMode": d.Mode, "uid": d.UID, "gid": d.GID,
	})
	rules, _ := resources["devices"].([]any)
	resources["devices"] = append(rules, map[string]any{
		"allow": true, "type": "b", "major": major, "minor": minor, "access": d.Access,
	})
	return nil
}

// object returns the object parent[name], made if it is not there.
func object(parent map[string]any, name string) (map[string]any, error) {
	switch v := parent[name].(type) {
	case nil:
		child := map[string]any{}
		if parent == nil {
			return nil, errors.New("it is no object")
		}
		parent[name] = child
		return child, nil
	case map[string]any:
		return v, nil
	}
	return nil, fmt.Errorf("%s is no object", name)
}
