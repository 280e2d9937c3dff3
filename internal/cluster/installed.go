package cluster

import (
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/mod/sumdb/dirhash"
)

// installed is what a cluster was completed with. It is written at the end of
// `h8s up`, and the next one compares it with what would be installed then.
type installed struct {
	Product bool `json:"product"`
	Demo    bool `json:"demo"`
	// Images are the IDs of the images that `h8s up` loads, by name.
	Images map[string]string `json:"images,omitempty"`
	// Chart is a digest of the chart and its values; empty without the product.
	Chart string `json:"chart,omitempty"`
	// Programs are the build IDs of the programs that run as long as a node does,
	// as they were when the supervisor started.
	Programs map[string]string `json:"programs,omitempty"`
}

// readInstalled says what the cluster was completed with; ok is false if it never was.
func (c *Config) readInstalled() (i installed, ok bool) {
	data, err := os.ReadFile(c.state().readyFile())
	if err != nil || json.Unmarshal(data, &i) != nil {
		return installed{}, false
	}
	return i, true
}

func (c *Config) writeInstalled(i installed) error {
	data, err := json.MarshalIndent(i, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(c.state().readyFile(), append(data, '\n'), 0o644)
}

// installable is what `h8s up` would install into the cluster now.
func (c *Config) installable(product bool) (installed, error) {
	now := installed{Product: product, Images: map[string]string{}, Programs: map[string]string{}}
	for _, name := range imageNames(product) {
		id, err := imageID(c.imageArchive(name))
		if err != nil {
			return now, fmt.Errorf("read image %s, which `make images` builds: %w", name, err)
		}
		now.Images[name] = id
	}
	for _, name := range nodeProgramNames {
		id, err := buildID(filepath.Join(c.BinDir, name))
		if err != nil {
			return now, fmt.Errorf("read program %s, which `make build` builds: %w", name, err)
		}
		now.Programs[name] = id
	}
	if !product {
		return now, nil
	}
	var err error
	now.Chart, err = chartDigest(c, now.Images[productImage])
	return now, err
}

// outdated names what has changed since it was installed.
func (i installed) outdated(now installed) []string {
	var changed []string
	if now.Chart != "" && now.Chart != i.Chart {
		changed = append(changed, "the chart or its values")
	}
	for _, name := range slices.Sorted(maps.Keys(now.Images)) {
		if now.Images[name] != i.Images[name] {
			changed = append(changed, "image "+name)
		}
	}
	return changed
}

// replaced names the programs that run although others are in their place now.
func (i installed) replaced(now installed) []string {
	var changed []string
	for _, name := range slices.Sorted(maps.Keys(now.Programs)) {
		if was := i.Programs[name]; was != "" && was != now.Programs[name] {
			changed = append(changed, name)
		}
	}
	return changed
}

// nodeProgramNames are the programs that run as long as a node does.
var nodeProgramNames = []string{
	"h8s", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "containerd",
}

// imageID is the ID of the one image in a docker archive: the digest of its
// configuration, which holds those of its layers.
func imageID(archive string) (string, error) {
	manifest, err := tarball.LoadManifest(func() (io.ReadCloser, error) { return os.Open(archive) })
	if err != nil {
		return "", err
	}
	if len(manifest) != 1 {
		return "", fmt.Errorf("%s holds %d images, want one", archive, len(manifest))
	}
	return manifest[0].Config, nil
}

// imageTag makes the tag of an image from its ID, so that pods of another build
// have another image.
func imageTag(id string) string {
	hexadecimal := strings.TrimPrefix(id, "sha256:")
	return hexadecimal[:min(12, len(hexadecimal))]
}

// chartDigest is a digest of all that Helm makes the cluster's objects from.
func chartDigest(c *Config, imageID string) (string, error) {
	dir, err := chartDir(c.BinDir)
	if err != nil {
		return "", err
	}
	files, err := dirhash.HashDir(dir, "", dirhash.Hash1)
	if err != nil {
		return "", fmt.Errorf("read the chart %s: %w", dir, err)
	}
	values, err := valuesFor(c, imageTag(imageID))
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte(files+"\n"), values...))
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// buildID is what Go's linker wrote into a program: another for every other
// content.
func buildID(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", err
	}
	defer f.Close()
	section := f.Section(".note.go.buildid")
	if section == nil {
		return "", errors.New(program + " has no Go build ID")
	}
	note, err := section.Data()
	if err != nil {
		return "", err
	}
	// Three words (the lengths of name and content, the type), the name "Go\0\0".
	const header = 16
	if len(note) < header {
		return "", errors.New(program + " has a damaged Go build ID")
	}
	return strings.TrimRight(string(note[header:]), "\x00"), nil
}
