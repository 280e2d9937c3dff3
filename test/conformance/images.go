package conformance

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"k8s.io/client-go/util/cert"
)

// registry is where the tests are told that their images are. Nothing is pulled from it.
const registry = "localhost"

// repoList is what the tests' environment variable KUBE_TEST_REPO_LIST names: it moves the
// images that WriteImages can make to registry, and leaves the others where they are.
const repoList = "promoterE2eRegistry: " + registry + "\ngcRegistry: " + registry + "\ngcEtcdRegistry: " + registry + "\n"

// standIn is an image that does what a test expects of Kubernetes' own one, made from
// one of the project's.
type standIn struct {
	base    string
	files   []tar.Header // in a layer of their own
	text    map[string]string
	keyPair bool // a certificate and its key are in the layer as well, as localhost.crt and localhost.key
	config  func(*v1.Config)
}

// standIns are by the base name of the image that each of them stands for. A spec that
// needs more of an image than its stand-in has is excluded.
var standIns = map[string]standIn{
	"pause": {base: "pause"},
	"busybox": {base: "busybox", files: []tar.Header{
		{Name: "bin/sysctl", Typeflag: tar.TypeSymlink, Linkname: "/bin/busybox"},
		{Name: "etc/passwd", Mode: 0o644},
		{Name: "etc/group", Mode: 0o644},
	}, text: map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
		"etc/group":  "root:x:0:\ndaemon:x:1:\nwheel:x:10:root\nnogroup:x:65534:\n",
	}},
	"nonroot": {base: "busybox", config: func(c *v1.Config) { c.User = "1234" }},
	// Its own is Alpine with some tools; these are what the specs in focus use of them.
	"agnhost": {base: "agnhost", keyPair: true, files: []tar.Header{
		{Name: "bin/bash", Mode: 0o755},
		{Name: "usr/bin/curl", Mode: 0o755},
		{Name: "agnhost-2", Typeflag: tar.TypeSymlink, Linkname: "agnhost"},
		{Name: "etc/passwd", Mode: 0o644},
		{Name: "etc/group", Mode: 0o644},
	}, text: map[string]string{
		"bin/bash":     "#!/bin/sh\n# bash [OPTION]... [SCRIPT]\nexec sh \"$@\"\n",
		"usr/bin/curl": "#!/bin/sh\n# curl [OPTION]... URL\nfor url; do :; done\nexec wget -q -O - \"$url\"\n",
		"etc/passwd":   "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n",
		"etc/group":    "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n",
	}},
	"nginx": {
		base: "busybox", files: []tar.Header{{Name: "www/index.html", Mode: 0o644}},
		text: map[string]string{"www/index.html": "<title>Welcome to nginx!</title>\n"},
		// Arguments that were meant for another image do not keep it from starting.
		config: func(c *v1.Config) {
			c.Entrypoint, c.Cmd = []string{"sh", "-c", "exec httpd -f -p 80 -h /www"}, nil
		},
	},
	"nonewprivs": {
		base: "busybox", files: []tar.Header{{Name: "usr/local/bin/nnp", Mode: 0o6755}},
		config: func(c *v1.Config) { c.Cmd = []string{"nnp"} },
	},
}

// WriteImages writes an archive of stand-ins for those of the named images that there are
// stand-ins for. bin is where the programs, and the project's images, were built.
func WriteImages(bin, archive string, names []string) error {
	images := map[name.Reference]v1.Image{}
	for _, n := range names {
		repository, _, _ := strings.Cut(n, ":")
		s, known := standIns[path.Base(repository)]
		if !known || !strings.HasPrefix(n, registry+"/") {
			continue
		}
		tag, err := name.NewTag(n)
		if err != nil {
			return err
		}
		if images[tag], err = s.image(bin); err != nil {
			return fmt.Errorf("stand-in for %s: %w", n, err)
		}
	}
	return tarball.MultiRefWriteToFile(archive, images)
}

func (s standIn) image(bin string) (v1.Image, error) {
	image, err := tarball.ImageFromPath(filepath.Join(bin, "images", s.base+".tar"), nil)
	if err != nil {
		return nil, fmt.Errorf("%w: run `make images`", err)
	}
	if len(s.files) > 0 {
		layer, err := s.layer(bin)
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	if s.config == nil {
		return image, nil
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config := file.Config.DeepCopy()
	s.config(config)
	return mutate.Config(image, *config)
}

func (s standIn) layer(bin string) (v1.Layer, error) {
	files, texts := slices.Clone(s.files), map[string]string{}
	maps.Copy(texts, s.text)
	if s.keyPair {
		certificate, key, err := cert.GenerateSelfSignedCertKey("localhost", nil, nil)
		if err != nil {
			return nil, err
		}
		for name, text := range map[string][]byte{"localhost.crt": certificate, "localhost.key": key} {
			files, texts[name] = append(files, tar.Header{Name: name, Mode: 0o644}), string(text)
		}
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range files {
		text, here := texts[h.Name]
		if !here && h.Typeflag != tar.TypeSymlink {
			program, err := os.ReadFile(filepath.Join(bin, path.Base(h.Name)))
			if err != nil {
				return nil, fmt.Errorf("%w: run `make e2e-programs`", err)
			}
			text = string(program)
		}
		h.Size = int64(len(text))
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := w.Write([]byte(text)); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return static.NewLayer(out.Bytes(), types.DockerUncompressedLayer), nil
}
