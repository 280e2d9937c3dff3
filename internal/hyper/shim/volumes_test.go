package shim

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const podDir = "/var/lib/kubelet/pods/u1"

func TestClassify(t *testing.T) {
	// As in a node of its own, where the kubelet's directory is a part of another file
	// system, and two volumes are file systems of their own.
	mountinfo := `30 1 8:1 / / rw - ext4 /dev/vda rw
31 30 8:1 /nodes/n1/kubelet /var/lib/kubelet rw - ext4 /dev/vda rw
32 31 0:50 / ` + podDir + `/volumes/kubernetes.io~empty-dir/mem rw - tmpfs tmpfs rw
33 31 0:51 / ` + podDir + `/volumes/kubernetes.io~secret/key rw - tmpfs tmpfs rw
34 31 0:50 /a\040b ` + podDir + `/volume-subpaths/mem/main/0 rw - tmpfs tmpfs rw
35 31 0:51 /..1/file ` + podDir + `/volume-subpaths/key/main/1 rw - tmpfs tmpfs rw
36 31 8:1 /nodes/n1/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/disk/x/y ` + podDir + `/volume-subpaths/disk/main/2 rw - ext4 /dev/vda rw
37 31 8:1 /etc ` + podDir + `/volume-subpaths/host/main/3 rw - ext4 /dev/vda rw
38 31 8:1 /nodes/n1/kubelet/pods/u2/volumes/kubernetes.io~empty-dir/disk/x ` + podDir + `/volume-subpaths/other/main/4 rw - ext4 /dev/vda rw
39 31 8:1 /nodes/n1/kubelet/pods/u1/volumes/kubernetes.io~csi/d/mount/x/y ` + podDir + `/volume-subpaths/d/main/5 rw - ext4 /dev/vda rw
40 31 8:1 /nodes/n1/kubelet/pods/u1/volumes/kubernetes.io~csi/d/vol_data.json ` + podDir + `/volume-subpaths/d/main/6 rw - ext4 /dev/vda rw
`
	csiDisk := diskSerial("vol", podDir+"/volumes/kubernetes.io~csi/d/mount")
	mounts, err := parseMounts(strings.NewReader(mountinfo))
	if err != nil {
		t.Fatal(err)
	}
	c := classifier{podDir: podDir, container: "abc", mounts: func() ([]mountpoint, error) { return mounts, nil }}
	for name, test := range map[string]struct {
		source string
		kind   volumeKind
		path   string
		refuse string
	}{
		"ConfigMap":              {source: podDir + "/volumes/kubernetes.io~configmap/c", kind: followed, path: "/run/h8s/volumes/configmap.c"},
		"Secret":                 {source: podDir + "/volumes/kubernetes.io~secret/c", kind: followed, path: "/run/h8s/volumes/secret.c"},
		"token":                  {source: podDir + "/volumes/kubernetes.io~projected/t", kind: followed, path: "/run/h8s/volumes/projected.t"},
		"hosts":                  {source: podDir + "/etc-hosts", kind: followed, path: "/run/h8s/volumes/etc-hosts"},
		"termination message":    {source: podDir + "/containers/main/01", kind: reported},
		"VOLUME of the image":    {source: "/var/lib/containerd/x/containers/abc/volumes/0f", kind: copied},
		"VOLUME of another":      {source: "/var/lib/containerd/x/containers/abd/volumes/0f", refuse: "hostPath"},
		"hostPath":               {source: "/etc", refuse: "hostPath (/etc)"},
		"another pod's":          {source: "/var/lib/kubelet/pods/u2/etc-hosts", refuse: "hostPath"},
		"upwards":                {source: podDir + "/../u2/etc-hosts", refuse: "hostPath"},
		"the pod's directory":    {source: podDir, refuse: "kind"},
		"CSI":                    {source: podDir + "/volumes/kubernetes.io~csi/d/mount", kind: disked, path: "/run/h8s/disks/" + csiDisk},
		"beside CSI":             {source: podDir + "/volumes/kubernetes.io~csi/d/vol_data.json", refuse: "kind"},
		"NFS":                    {source: podDir + "/volumes/kubernetes.io~nfs/d", refuse: "volume d is mounted on the node"},
		"subPath of CSI":         {source: podDir + "/volume-subpaths/d/main/5", kind: disked, path: "/run/h8s/disks/" + csiDisk + "/x/y"},
		"subPath beside CSI":     {source: podDir + "/volume-subpaths/d/main/6", refuse: "not for this runtime"},
		"subPath in disk":        {source: podDir + "/volume-subpaths/disk/main/2", kind: scratch, path: "/run/h8s/volumes/empty-dir.disk/x/y"},
		"subPath in memory":      {source: podDir + "/volume-subpaths/mem/main/0", kind: scratch, path: "/run/h8s/volumes/empty-dir.mem/a b"},
		"subPath of a Secret":    {source: podDir + "/volume-subpaths/key/main/1", kind: copied},
		"subPath of a hostPath":  {source: podDir + "/volume-subpaths/host/main/3", refuse: "not for this runtime"},
		"subPath of another pod": {source: podDir + "/volume-subpaths/other/main/4", refuse: "not for this runtime"},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := c.classify(test.source)
			if test.refuse != "" {
				if err == nil || !strings.Contains(err.Error(), test.refuse) {
					t.Fatalf("%+v, error %v, want one with %q", v, err, test.refuse)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if v.kind != test.kind || (test.path != "" && v.path() != test.path) {
				t.Errorf("kind %d at %s, want %d at %s", v.kind, v.path(), test.kind, test.path)
			}
		})
	}
}

// fakeGuest keeps the names and contents of the last archive of each volume.
type fakeGuest struct {
	got  map[string]map[string]string
	puts int
	err  error
}

func (g *fakeGuest) send(_ context.Context, method, path string, body io.Reader) error {
	if g.err != nil {
		return g.err
	}
	g.puts++
	files := map[string]string{}
	for r := tar.NewReader(body); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		text, _ := io.ReadAll(r)
		files[h.Name] = string(text) + h.Linkname
	}
	if g.got == nil {
		g.got = map[string]map[string]string{}
	}
	g.got[method+" "+strings.TrimPrefix(path, "/v1/volumes/")] = files
	return nil
}

func TestVolumeFollows(t *testing.T) {
	source := t.TempDir()
	write := func(version, text string) {
		must(t, os.Mkdir(filepath.Join(source, version), 0o755))
		must(t, os.WriteFile(filepath.Join(source, version, "key"), []byte(text), 0o644))
		must(t, os.Symlink(version, filepath.Join(source, "..tmp")))
		must(t, os.Rename(filepath.Join(source, "..tmp"), filepath.Join(source, "..data")))
	}
	write("..1", "one")
	guest := &fakeGuest{}
	v := newVolumes(guest)
	vol := volume{name: "v", kind: followed, source: source}
	must(t, v.ensure(t.Context(), vol, source))
	must(t, v.ensure(t.Context(), vol, source)) // of another container
	v.update(t.Context())
	want := map[string]string{".": "", "..1": "", "..1/key": "one", "..data": "..1"}
	if diff := cmp.Diff(want, guest.got["PUT v"]); diff != "" || guest.puts != 1 {
		t.Errorf("%d transfers, (-want +got):\n%s", guest.puts, diff)
	}
	write("..2", "two")
	guest.err = errors.New("no")
	v.update(t.Context())
	guest.err = nil
	v.update(t.Context()) // tried again
	v.update(t.Context())
	if got := guest.got["PUT v"]["..2/key"]; got != "two" || guest.puts != 2 {
		t.Errorf("after a change: %q, %d transfers", got, guest.puts)
	}
}

func TestScratchVolume(t *testing.T) {
	source := t.TempDir()
	must(t, os.WriteFile(filepath.Join(source, "of the node"), nil, 0o644))
	guest := &fakeGuest{}
	v := newVolumes(guest)
	must(t, v.ensure(t.Context(), volume{name: "s", kind: scratch, source: source, sub: "a/b", size: 7}, source))
	if diff := cmp.Diff([]string{"PATCH s", "PUT s?scratch=7"}, slices.Sorted(maps.Keys(guest.got))); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{".": ""}, guest.got["PUT s?scratch=7"]); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"a": "", "a/b": ""}, guest.got[http.MethodPatch+" s"]); diff != "" {
		t.Error(diff)
	}
}

func TestFileVolume(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.WriteFile(link+"ed", []byte("text"), 0o644))
	must(t, os.Symlink(link+"ed", link))
	for name, v := range map[string]volume{
		"of the node": {kind: copied, source: link},
		"our own":     {kind: copied, content: []byte("text")},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			must(t, v.archive(&b))
			r := tar.NewReader(&b)
			h, err := r.Next()
			must(t, err)
			text, _ := io.ReadAll(r)
			if h.Name != "." || h.Typeflag != tar.TypeReg || string(text) != "text" {
				t.Errorf("%q of type %q: %q", h.Name, h.Typeflag, text)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
