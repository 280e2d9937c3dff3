//go:build hyper

package hyper

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/directvolume"
)

// tool runs a program of the system.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// image makes a disk image of 64 MiB.
func (n *node) image(name string) string {
	n.t.Helper()
	path := n.write(name, "")
	must(n.t, os.Truncate(path, 64<<20))
	return path
}

// fileDisk makes a disk with ext4 in a file.
func (n *node) fileDisk(name string) map[string]any {
	n.t.Helper()
	path := n.image(name)
	tool(n.t, "mkfs.ext4", "-q", path)
	return map[string]any{"driver": "file", "filename": path}
}

// csiTarget is where the kubelet asks a CSI driver to publish a volume.
func (p *pod) csiTarget(volume string) string {
	return p.path("kubelet/pods", p.config.Metadata.Uid, "volumes/kubernetes.io~csi", volume, "mount")
}

func (n *node) directVolumes() directvolume.Store { return directvolume.New(n.path("direct-volumes")) }

// publish does what a CSI driver does, and returns the target path.
func (p *pod) publish(volume string, v directvolume.Volume) string {
	p.t.Helper()
	target := p.csiTarget(volume)
	must(p.t, p.directVolumes().Publish(target, v))
	return target
}

func (p *pod) unpublish(target string) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), testTimeout)
	defer cancel()
	return p.directVolumes().Unpublish(ctx, target)
}

func (p *pod) mounting(name, target, at string, command ...string) *cri.ContainerConfig {
	config := p.containerConfig(name, command...)
	config.Mounts = []*cri.Mount{{ContainerPath: at, HostPath: target}}
	return config
}

// refusedStart tries to start a container, and returns why it does not.
func (p *pod) refusedStart(config *cri.ContainerConfig) string {
	p.t.Helper()
	id := p.create(config)
	_, err := p.runtime.StartContainer(p.t.Context(), &cri.StartContainerRequest{ContainerId: id})
	if err == nil {
		p.t.Fatalf("container %s starts", config.Metadata.Name)
	}
	return err.Error()
}

func (p *pod) expectRefusal(config *cri.ContainerConfig, want string) {
	p.t.Helper()
	if got := p.refusedStart(config); !strings.Contains(got, want) {
		p.t.Errorf("container %s: %q, want %q in it", config.Metadata.Name, got, want)
	}
}

func (p *pod) removeContainer(id string) {
	p.t.Helper()
	_, err := p.runtime.StopContainer(p.t.Context(), &cri.StopContainerRequest{ContainerId: id})
	must(p.t, err)
	_, err = p.runtime.RemoveContainer(p.t.Context(), &cri.RemoveContainerRequest{ContainerId: id})
	must(p.t, err)
}

// machineHas reports whether a QEMU of this node has a file open whose path contains part.
func (n *node) machineHas(part string) bool {
	for _, pid := range n.processes() {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, f := range files {
			path, _ := os.Readlink(f)
			if strings.Contains(cmdline(pid), "qemu-system") && strings.Contains(path, part) {
				return true
			}
		}
	}
	return false
}

// TestDirectVolume: a disk outlives its pods, and is one pod's at a time.
func TestDirectVolume(t *testing.T) {
	n := newNode(t)
	disk := directvolume.Volume{Disk: n.fileDisk("disk.img"), FileSystem: "ext4", Options: []string{"noatime"}}
	p := n.run(n.podConfig("writer"))
	target := p.publish("data", disk)
	// As the kubelet does for a fsGroup, and for a subPath.
	must(t, os.Chown(target, 0, 2000))
	must(t, os.Chmod(target, 0o2770|fs.ModeSetgid))
	part := n.path("kubelet/pods/writer-uid/volume-subpaths/data/part/0")
	must(t, os.MkdirAll(target+"/a/b", 0o770))
	must(t, os.MkdirAll(part, 0o755))
	must(t, syscall.Mount(target+"/a/b", part, "", syscall.MS_BIND, ""))
	t.Cleanup(func() { _ = syscall.Unmount(part, syscall.MNT_DETACH) })

	plain := p.mounting("plain", target, "/data", "sleep", "1000")
	plain.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
	plain.Linux.SecurityContext.SupplementalGroups = []int64{2000}
	c := p.startContainer(plain)
	reader := p.mounting("reader", target, "/data", "sleep", "1000")
	reader.Mounts[0].Readonly = true
	r := p.startContainer(reader)
	s := p.startContainer(p.mounting("part", part, "/part", "sleep", "1000"))

	p.exec(c, "sh", "-c", "echo shared > /data/file; mkdir /data/dir")
	p.exec(s, "sh", "-c", "echo in a part > /part/x")
	if got := p.exec(r, "sh", "-c", "cat /data/file /data/a/b/x; stat -c %g /data/file; touch /data/y 2>&1 | grep -o Read-only; grep ' /data ' /proc/mounts | cut -d' ' -f3"); got !=
		"shared\nin a part\n2000\nRead-only\next4" {
		t.Errorf("the other container sees %q", got)
	}
	if entries, err := os.ReadDir(target + "/a/b"); err != nil || len(entries) != 0 {
		t.Errorf("on the node: %v, %v; want nothing", entries, err)
	}

	other := n.run(n.podConfig("other"))
	otherTarget := other.publish("data", disk)
	other.expectRefusal(other.mounting("main", otherTarget, "/data", "true"), "in use: by another virtual machine")

	// Nobody syncs what is written last.
	p.exec(c, "sh", "-c", "dd if=/dev/zero of=/data/big bs=1M count=20 2>/dev/null; echo last words > /data/last")
	must(t, syscall.Unmount(part, syscall.MNT_DETACH))
	p.remove()
	must(t, p.unpublish(target))
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the target path: %v, want none", err)
	}
	// It was unmounted: there is nothing to recover.
	if got := tool(t, "dumpe2fs", "-h", n.path("disk.img")); strings.Contains(got, "needs_recovery") {
		t.Error("the guest has not unmounted the file system")
	}

	begin := time.Now()
	o := other.startContainer(other.mounting("again", otherTarget, "/data", "sleep", "1000"))
	t.Logf("container with a disk in %s", time.Since(begin).Round(time.Millisecond))
	if got := other.exec(o, "sh", "-c", "cat /data/last; stat -c %s /data/big"); got != "last words\n20971520" {
		t.Errorf("the next pod reads %q", got)
	}

	// The machine is killed while it writes.
	other.exec(o, "sh", "-c", "echo precious > /data/precious; sync")
	other.exec(o, "sh", "-c", "(while :; do dd if=/dev/zero of=/data/noise bs=64k count=100; rm /data/noise; done) >/dev/null 2>&1 &")
	for _, pid := range n.processes() {
		if strings.Contains(cmdline(pid), "qemu-system") {
			must(t, syscall.Kill(pid, syscall.SIGKILL))
		}
	}
	n.eventually("the container has ended", func() bool { return other.status(o).State == cri.ContainerState_CONTAINER_EXITED })
	other.remove()
	must(t, other.unpublish(otherTarget))

	last := n.run(n.podConfig("last"))
	lastTarget := last.publish("data", disk)
	l := last.startContainer(last.mounting("main", lastTarget, "/data", "sleep", "1000"))
	if got := last.exec(l, "cat", "/data/precious"); got != "precious" {
		t.Errorf("after the kill: %q", got)
	}

	// The disk is taken from a machine that goes on.
	hurried, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := n.directVolumes().Unpublish(hurried, lastTarget); err == nil || !strings.Contains(err.Error(), "still uses it") {
		t.Errorf("unpublish while a container uses it: %v", err)
	}
	if !n.machineHas("disk.img") {
		t.Error("the machine has lost a disk that is in use")
	}
	last.removeContainer(l)
	must(t, last.unpublish(lastTarget))
	if n.machineHas("disk.img") {
		t.Error("the machine still has the disk")
	}
	tool(t, "e2fsck", "-f", "-n", n.path("disk.img"))
	last.remove()
	n.nothingLeft()
}

// TestRemoteDisk: QEMU itself speaks to the server; the node's kernel has no part in it.
func TestRemoteDisk(t *testing.T) {
	n := newNode(t)
	image := n.fileDisk("disk.img")["filename"].(string)
	socket := n.path("nbd.sock")
	serve := func(t *testing.T) {
		server := exec.Command("qemu-storage-daemon",
			"--blockdev", "driver=file,node-name=disk,filename="+image,
			"--nbd-server", "addr.type=unix,addr.path="+socket,
			"--export", "type=nbd,id=export,node-name=disk,name=data,writable=on")
		server.Stderr = os.Stderr
		must(t, server.Start())
		t.Cleanup(func() {
			_ = server.Process.Kill()
			_ = server.Wait()
		})
	}
	serve(t)
	n.eventually("the server listens", func() bool {
		_, err := os.Stat(socket)
		return err == nil
	})
	disk := directvolume.Volume{FileSystem: "ext4", Disk: map[string]any{
		"driver": "nbd", "server": map[string]any{"type": "unix", "path": socket}, "export": "data",
	}}
	for _, name := range []string{"first", "second"} {
		p := n.run(n.podConfig(name))
		target := p.publish("data", disk)
		c := p.startContainer(p.mounting("main", target, "/data", "sleep", "1000"))
		p.exec(c, "sh", "-c", "echo "+name+" >> /data/log")
		if got := p.exec(c, "cat", "/data/log"); !strings.HasSuffix(got, name) || (name == "second") != strings.HasPrefix(got, "first\n") {
			t.Errorf("%s: %q", name, got)
		}
		p.remove()
		must(t, p.unpublish(target))
	}
	p := n.run(n.podConfig("nobody"))
	disk.Disk["server"] = map[string]any{"type": "unix", "path": n.path("nobody.sock")}
	p.expectRefusal(p.mounting("main", p.publish("data", disk), "/data", "true"), "no such file")
	p.remove()
	n.nothingLeft()
}

// loop makes a block device of a file.
func (n *node) loop(image string) string {
	n.t.Helper()
	device := tool(n.t, "losetup", "--find", "--show", image)
	n.t.Cleanup(func() { tool(n.t, "losetup", "--detach", device) })
	return device
}

// blockVolume makes what the kubelet makes of a volume with volumeMode: Block.
func (p *pod) blockVolume(plugin, name, device string) string {
	p.t.Helper()
	link := p.path("kubelet/pods", p.config.Metadata.Uid, "volumeDevices/kubernetes.io~"+plugin, name)
	must(p.t, os.MkdirAll(filepath.Dir(link), 0o755))
	must(p.t, os.Symlink(device, link))
	return link
}

func (p *pod) withDevice(name, link, at, permissions string, command ...string) *cri.ContainerConfig {
	config := p.containerConfig(name, command...)
	config.Devices = []*cri.Device{{HostPath: link, ContainerPath: at, Permissions: permissions}}
	return config
}

// TestBlockDevice: volumes with volumeMode: Block.
func TestBlockDevice(t *testing.T) {
	n := newNode(t)
	image := n.image("raw.img")
	device := n.loop(image)
	p := n.run(n.podConfig("block"))
	link := p.blockVolume("local-volume", "raw", device)

	c := p.startContainer(p.withDevice("writer", link, "/dev/xvda", "rwm", "sleep", "1000"))
	p.exec(c, "sh", "-c", "test -b /dev/xvda && echo from the guest | dd of=/dev/xvda conv=fsync 2>/dev/null")
	r := p.startContainer(p.withDevice("reader", link, "/dev/xvdb", "r", "sleep", "1000"))
	if got := p.exec(r, "sh", "-c", "head -c 14 /dev/xvdb; echo; (echo x > /dev/xvdb) 2>&1 | grep -o 'not permitted'"); got != "from the guest\nnot permitted" {
		t.Errorf("the reader: %q", got)
	}
	content, err := os.ReadFile(image)
	must(t, err)
	if !strings.HasPrefix(string(content), "from the guest\n") {
		t.Errorf("the device begins with %q", content[:14])
	}

	t.Run("in use", func(t *testing.T) {
		other := n.run(n.podConfig("second"))
		link := other.blockVolume("local-volume", "raw", device)
		other.expectRefusal(other.withDevice("main", link, "/dev/xvda", "rwm", "true"), "in use")
		other.remove()
	})
	t.Run("the node's", func(t *testing.T) {
		foreign := n.loop(n.image("foreign.img"))
		p.expectRefusal(p.withDevice("thief", foreign, "/dev/xvda", "rwm", "true"), "volumeMode: Block")
		p.expectRefusal(p.withDevice("null", "/dev/null", "/dev/nothing", "rwm", "true"), "volumeMode: Block")
	})
	t.Run("published", func(t *testing.T) {
		// The node's device stands for a disk that the node does not have.
		placeholder := n.loop(n.image("placeholder.img"))
		link := p.blockVolume("csi", "remote", placeholder)
		disk := n.image("remote.img")
		must(t, n.directVolumes().Publish(placeholder, directvolume.Volume{Disk: map[string]any{"driver": "file", "filename": disk}}))
		c := p.startContainer(p.withDevice("remote", link, "/dev/xvdc", "rwm", "sleep", "1000"))
		p.exec(c, "sh", "-c", "echo elsewhere | dd of=/dev/xvdc conv=fsync 2>/dev/null")
		content, err := os.ReadFile(disk)
		must(t, err)
		if !strings.HasPrefix(string(content), "elsewhere\n") {
			t.Errorf("the disk begins with %q", content[:10])
		}
		p.removeContainer(c)
		must(t, p.unpublish(placeholder))
		if n.machineHas("remote.img") {
			t.Error("the machine still has the disk")
		}
	})

	// The last container takes the device with it.
	p.removeContainer(c)
	if !n.machineHas(device) {
		t.Error("the machine has lost a device that is in use")
	}
	p.removeContainer(r)
	n.eventually("the device is free", func() bool { return !n.machineHas(device) })
	p.remove()
	n.nothingLeft()
}

// TestLayersGo: a layer is in the machine for as long as a container needs it.
func TestLayersGo(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("layers"))
	first := p.startContainer(p.containerConfig("first", "sleep", "1000"))
	second := p.startContainer(p.containerConfig("second", "sleep", "1000"))
	p.removeContainer(first)
	if got := p.exec(second, "echo", "still here"); got != "still here" || !n.machineHas(".erofs") {
		t.Errorf("the second container: %q", got)
	}
	p.removeContainer(second)
	n.eventually("the layers are gone", func() bool { return !n.machineHas(".erofs") })
	if got := p.exec(p.startContainer(p.containerConfig("third", "sleep", "1000")), "echo", "back"); got != "back" {
		t.Errorf("the third container: %q", got)
	}
	p.remove()
	n.nothingLeft()
}

// TestNodeMounts: what is mounted on the node is refused, and the pod's author told what to do.
func TestNodeMounts(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("mounts"))
	for name, plugin := range map[string]string{"csi": "csi/v/mount", "nfs": "nfs/v", "local": "local-volume/v"} {
		target := p.path("kubelet/pods/mounts-uid/volumes/kubernetes.io~" + plugin)
		must(t, os.MkdirAll(target, 0o755))
		p.expectRefusal(p.mounting(name, target, "/data", "true"), "volume v is mounted on the node")
	}
	wrong := p.publish("wrong", directvolume.Volume{Disk: map[string]any{"driver": "file", "filename": n.image("empty.img")}, FileSystem: "ext4"})
	p.expectRefusal(p.mounting("wrong", wrong, "/data", "true"), "mount ext4")
	if n.machineHas("empty.img") {
		t.Error("the machine keeps a disk that it cannot mount")
	}
	p.remove()
	n.nothingLeft()
}
