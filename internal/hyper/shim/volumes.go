package shim

import (
	"archive/tar"
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// volumeKind says how the guest gets what a bind mount of the node holds.
type volumeKind int

const (
	// scratch begins empty, is the guest's alone, and is shared by the pod's containers.
	scratch volumeKind = iota
	// copied is sent once.
	copied
	// followed is sent, and sent again when it changes on the node.
	followed
	// reported is a file that is sent, and whose content comes back when the container has
	// ended: its termination message.
	reported
	// disked is a disk that the guest mounts, see package directvolume. Its source is the
	// path at which the CSI driver has published it.
	disked
)

// volume is a volume of the guest.
type volume struct {
	name string
	kind volumeKind
	// source is the directory or file on the node. A scratch volume has its mode and
	// owner; without one, everybody may write to it.
	source string
	// sub is the path inside the volume that is mounted (subPath), or empty.
	sub string
	// content, if not nil, is what a file of the shim's own making holds.
	content []byte
	// size bounds a scratch volume in bytes; 0: the guest's memory does.
	size int64
}

// path is where the volume, or the part of it that is mounted, is in the guest.
func (v volume) path() string {
	if v.kind == disked {
		return path.Join(guestapi.DiskDir, v.name, v.sub)
	}
	return path.Join(guestapi.VolumeDir, v.name, v.sub)
}

// classifier knows a pod's directories on the node.
type classifier struct {
	podDir    string // the kubelet's, such as /var/lib/kubelet/pods/<uid>
	container string // containerd's ID of the container
	mounts    func() ([]mountpoint, error)
}

// kubelet's names of volume plugins, as directories have them.
const (
	emptyDirPlugin = "kubernetes.io~empty-dir"
	csiPlugin      = "kubernetes.io~csi"
	// csiTarget is where a CSI volume is, below its directory.
	csiTarget = "mount"
)

var followedPlugins = []string{
	"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api",
}

// imageVolume matches the directory that containerd fills with what an image has at
// a VOLUME, for one container.
var imageVolume = regexp.MustCompile(`/containers/([0-9a-f]+)/volumes/([0-9a-f]+)$`)

// classify tells what a bind mount's source is. It refuses what is not the pod's own.
func (c classifier) classify(source string) (volume, error) {
	if m := imageVolume.FindStringSubmatch(source); m != nil && m[1] == c.container {
		return volume{name: nameOf("image", source), kind: copied, source: source}, nil
	}
	rel, err := filepath.Rel(c.podDir, source)
	if err != nil || !filepath.IsLocal(rel) {
		return volume{}, refusal("hostPath (" + source + ") is not for this runtime: the pod is a virtual machine, which has no part in the node's files")
	}
	parts := strings.Split(rel, "/")
	switch {
	case rel == "etc-hosts":
		return volume{name: "etc-hosts", kind: followed, source: source}, nil
	case parts[0] == "containers" && len(parts) == 3:
		return volume{name: nameOf("termination", c.container+source), kind: reported, source: source}, nil
	case parts[0] == "volumes" && parts[1] == csiPlugin && (len(parts) != 4 || parts[3] != csiTarget):
	case parts[0] == "volumes" && len(parts) >= 3:
		return pluginVolume(parts[1], parts[2], source)
	case parts[0] == "volume-subpaths" && len(parts) == 4:
		return c.subPath(source)
	}
	return volume{}, refusal("the mount " + source + " is of a kind that this runtime does not know")
}

// nodeMount is why a volume is refused.
func nodeMount(name string) error {
	return refusal("volume " + name + " is mounted on the node, and the pod is a virtual machine, which takes no mounts of the node: " +
		"use a CSI driver that publishes disks to virtual machines, or volumeMode: Block")
}

func pluginVolume(plugin, name, source string) (volume, error) {
	switch {
	case plugin == emptyDirPlugin:
		size, err := tmpfsSize(source)
		return volume{name: "empty-dir." + name, kind: scratch, source: source, size: size}, err
	case slices.Contains(followedPlugins, plugin):
		_, short, _ := strings.Cut(plugin, "~")
		return volume{name: short + "." + name, kind: followed, source: source}, nil
	case plugin == csiPlugin:
		return volume{name: diskSerial("vol", source), kind: disked, source: source}, nil
	default:
		return volume{}, nodeMount(name)
	}
}

// subPath finds out of which volume the kubelet has bind-mounted a part.
func (c classifier) subPath(source string) (volume, error) {
	mounts, err := c.mounts()
	if err != nil {
		return volume{}, err
	}
	i := slices.IndexFunc(mounts, func(m mountpoint) bool { return m.target == source })
	if i < 0 {
		return volume{}, fmt.Errorf("%s is not a mount, as the kubelet makes it for a subPath", source)
	}
	part := mounts[i]
	// The volume is a file system of its own (medium: Memory, and what the kubelet
	// keeps in tmpfs), …
	for _, m := range mounts {
		rel, err := filepath.Rel(m.root, part.root)
		if m.device == part.device && err == nil && filepath.IsLocal(rel) {
			if v, ok := c.partOf(m.target, rel, source); ok {
				return v, nil
			}
		}
	}
	// … or a directory of the one that holds the pod's directory, of which the mount may
	// show another part than the kubelet's path does.
	if _, rel, ok := strings.Cut(part.root, "/pods/"+filepath.Base(c.podDir)+"/"); ok {
		if v, ok := c.partOf(c.podDir, rel, source); ok {
			return v, nil
		}
	}
	return volume{}, refusal("the subPath mount " + source + " is of a volume that is not for this runtime")
}

// partOf is the volume to which dir/rel belongs, if that is one of the pod's.
func (c classifier) partOf(dir, rel, source string) (volume, bool) {
	inPod, err := filepath.Rel(c.podDir, filepath.Join(dir, rel))
	if err != nil || !filepath.IsLocal(inPod) {
		return volume{}, false
	}
	parts := strings.SplitN(inPod, "/", 4)
	if len(parts) < 3 || parts[0] != "volumes" {
		return volume{}, false
	}
	if parts[1] != emptyDirPlugin && parts[1] != csiPlugin {
		// Parts of ConfigMaps and their like do not follow the original: Kubernetes says so.
		return volume{name: nameOf("subpath", source), kind: copied, source: source}, slices.Contains(followedPlugins, parts[1])
	}
	source, sub := filepath.Join(c.podDir, parts[0], parts[1], parts[2]), ""
	if len(parts) == 4 {
		sub = parts[3]
	}
	if parts[1] == csiPlugin {
		var ok bool
		if sub, ok = strings.CutPrefix(sub+"/", csiTarget+"/"); !ok {
			return volume{}, false
		}
		source, sub = filepath.Join(source, csiTarget), strings.TrimSuffix(sub, "/")
	}
	v, err := pluginVolume(parts[1], parts[2], source)
	v.sub = sub
	return v, err == nil
}

// diskSerial is the serial number of a volume's disk. SCSI has room for 20 characters.
func diskSerial(kind, key string) string {
	sum := sha256.Sum256([]byte(key))
	return kind + "-" + hex.EncodeToString(sum[:8])
}

func nameOf(kind, key string) string {
	sum := sha256.Sum256([]byte(key))
	return kind + "." + hex.EncodeToString(sum[:8])
}

// tmpfsSize is the size of the tmpfs that is mounted at dir (emptyDir with medium:
// Memory), or 0 if it is none.
func tmpfsSize(dir string) (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // who sends it will say so
	}
	if err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if st.Type != unix.TMPFS_MAGIC {
		return 0, nil
	}
	return int64(st.Blocks) * st.Bsize, nil
}

// mountpoint is a line of /proc/self/mountinfo.
type mountpoint struct{ device, root, target string }

// ownMounts reads the process's mounts.
func ownMounts() ([]mountpoint, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMounts(f)
}

func parseMounts(r io.Reader) ([]mountpoint, error) {
	var mounts []mountpoint
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 5 {
			return nil, fmt.Errorf("mountinfo: a line of %d fields", len(f))
		}
		mounts = append(mounts, mountpoint{device: f[2], root: unescape(f[3]), target: unescape(f[4])})
	}
	return mounts, lines.Err()
}

var octal = regexp.MustCompile(`\\[0-7]{3}`)

// unescape undoes what proc_pid_mountinfo(5) does to blanks.
func unescape(s string) string {
	return octal.ReplaceAllStringFunc(s, func(o string) string {
		n, err := strconv.ParseUint(o[1:], 8, 8)
		if err != nil {
			return o
		}
		return string([]byte{byte(n)})
	})
}

// fingerprint changes when what a volume's source holds may have changed. The kubelet
// replaces the link ..data when it has written the new content of a ConfigMap and its
// like; other files it writes in place.
func fingerprint(source string) (string, error) {
	if target, err := os.Readlink(filepath.Join(source, "..data")); err == nil {
		return target, nil
	}
	info, err := os.Stat(source)
	if err != nil {
		return "", err
	}
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d %d %d.%d", st.Ino, st.Size, st.Ctim.Sec, st.Ctim.Nsec), nil
}

// archive writes a volume's content as package guestapi wants it.
func (v volume) archive(w io.Writer) error {
	out := tar.NewWriter(w)
	var err error
	switch {
	case v.content != nil:
		err = out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: ".", Mode: 0o644, Size: int64(len(v.content))})
		if err == nil {
			_, err = out.Write(v.content)
		}
	case v.kind == scratch && v.source == "":
		err = out.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: ".", Mode: 0o1777})
	case v.kind == scratch:
		err = addEntry(out, v.source, ".", true)
	default:
		err = addTree(out, v.source)
	}
	return errors.Join(err, out.Close())
}

func addTree(out *tar.Writer, source string) error {
	return filepath.WalkDir(source, func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(source, name)
		if err != nil {
			return err
		}
		return addEntry(out, name, rel, rel == ".")
	})
}

// addEntry adds one file. What is no regular file, directory or symbolic link is left out. The
// root may be a link to the volume.
func addEntry(out *tar.Writer, file, name string, root bool) error {
	flags := unix.O_NOFOLLOW
	if root {
		flags = 0
	}
	info, err := os.Lstat(file)
	if root {
		info, err = os.Stat(file)
	}
	if err != nil {
		return err
	}
	link := ""
	switch {
	case info.Mode().IsRegular(), info.IsDir():
	case info.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		return nil
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name, header.Uname, header.Gname = name, "", ""
	if !info.Mode().IsRegular() {
		return out.WriteHeader(header)
	}
	f, err := os.OpenFile(file, os.O_RDONLY|flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err = io.CopyN(out, f, header.Size)
	return err
}

// directories is the archive of a directory inside a volume, and its parents, with the
// mode and owner that it has on the node.
func (v volume) directories(w io.Writer, onNode string) error {
	info, err := os.Stat(onNode)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	out := tar.NewWriter(w)
	for i := range len(v.sub) + 1 {
		if i < len(v.sub) && v.sub[i] != '/' {
			continue
		}
		err := out.WriteHeader(&tar.Header{
			Typeflag: tar.TypeDir, Name: v.sub[:i], Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		})
		if err != nil {
			return err
		}
	}
	return out.Close()
}
