package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// writeImage writes a docker archive of an image that differs by env.
func writeImage(t *testing.T, path, env string) {
	t.Helper()
	image, err := mutate.Config(empty.Image, v1.Config{Env: []string{env}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, name.MustParseReference("localhost/h8s:latest"), image); err != nil {
		t.Fatal(err)
	}
}

// TestInstallable changes one file after the other of what a cluster is made from.
func TestInstallable(t *testing.T) {
	dir := t.TempDir()
	bin, chart := filepath.Join(dir, "bin"), filepath.Join(dir, "deploy", "h8s")
	self, err := os.Executable() // any Go program
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range imageNames(true) {
		writeImage(t, filepath.Join(bin, "images", name+".tar"), "A=1")
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(name, program string) {
		t.Helper()
		path := filepath.Join(bin, name)
		_ = os.Remove(path)
		if err := os.Symlink(program, path); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range nodeProgramNames {
		link(name, self)
	}
	write(filepath.Join(chart, "Chart.yaml"), "name: h8s\n")
	write(filepath.Join(chart, "templates", "node.yaml"), "kind: DaemonSet\n")
	c := testConfig(t, 1)
	c.BinDir = bin
	first, err := c.installable(true)
	if err != nil {
		t.Fatal(err)
	}

	other, err := exec.LookPath("go") // another Go program
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name     string
		change   func()
		outdated []string
		replaced []string
	}{
		{"nothing", func() {}, nil, nil},
		{"same image again", func() { writeImage(t, filepath.Join(bin, "images", "h8s.tar"), "A=1") }, nil, nil},
		{"a test image", func() { writeImage(t, filepath.Join(bin, "images", "busybox.tar"), "A=2") }, []string{"image busybox"}, nil},
		{"a program", func() { link("kubelet", other) }, []string{"image busybox"}, []string{"kubelet"}},
		{"a template", func() { write(filepath.Join(chart, "templates", "node.yaml"), "kind: Deployment\n") }, []string{"the chart or its values", "image busybox"}, []string{"kubelet"}},
		// The image's tag is in the chart's values.
		{"the product", func() { writeImage(t, filepath.Join(bin, "images", "h8s.tar"), "A=2") }, []string{"the chart or its values", "image busybox", "image h8s"}, []string{"kubelet"}},
	}
	for _, test := range tests { // one change on top of the other
		t.Run(test.name, func(t *testing.T) {
			test.change()
			now, err := c.installable(true)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.outdated, first.outdated(now)); diff != "" {
				t.Errorf("outdated (- want, + got):\n%s", diff)
			}
			if diff := cmp.Diff(test.replaced, first.replaced(now)); diff != "" {
				t.Errorf("replaced (- want, + got):\n%s", diff)
			}
		})
	}

	for name, path := range map[string]string{"a damaged image": filepath.Join(bin, "images", "h8s.tar"), "a program that is none": filepath.Join(bin, "kubelet")} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(path)
			write(path, "damaged")
			if _, err := c.installable(true); err == nil || !strings.Contains(err.Error(), "which `make ") {
				t.Errorf("error = %v", err)
			}
			writeImage(t, filepath.Join(bin, "images", "h8s.tar"), "A=1")
		})
	}
}

func TestImageTag(t *testing.T) {
	for id, want := range map[string]string{
		"sha256:0123456789abcdef0123456789abcdef": "0123456789ab",
		"sha256:0123": "0123",
	} {
		if got := imageTag(id); got != want {
			t.Errorf("imageTag(%q) = %q, want %q", id, got, want)
		}
	}
}

// TestHonours: an existing cluster does not become another one, and `h8s up` says so.
func TestHonours(t *testing.T) {
	bin, other := t.TempDir(), t.TempDir()
	link := filepath.Join(t.TempDir(), "bin")
	if err := os.Symlink(bin, link); err != nil {
		t.Fatal(err)
	}
	c := testConfig(t, 2)
	c.BinDir, c.Resolvers = bin, []string{"192.0.2.1:53"}
	c.Keystone, c.KeystonePrefix = true, "os-east:"
	tests := map[string]struct {
		options UpOptions
		want    string // empty: no error
	}{
		"nothing is asked":          {UpOptions{BinDir: bin, Product: true}, ""},
		"what it is":                {UpOptions{BinDir: link, Nodes: 2, Resolvers: []string{"192.0.2.1:53"}, Product: true}, ""},
		"more nodes":                {UpOptions{BinDir: bin, Nodes: 3, Product: true}, "has 2 nodes and that cannot change: say --nodes 2"},
		"another resolver":          {UpOptions{BinDir: bin, Resolvers: []string{"192.0.2.2:53"}}, "uses the resolvers 192.0.2.1:53 and that cannot change: leave --resolver out"},
		"other programs":            {UpOptions{BinDir: other}, "not those in " + other},
		"a directory that is not":   {UpOptions{BinDir: "/nonexistent"}, "no such file"},
		"another prefix":            {UpOptions{BinDir: bin, Keystone: true, KeystonePrefix: "os-west:"}, "has a Keystone whose names begin with os-east: and that cannot change: leave --keystone-prefix out"},
		"its prefix":                {UpOptions{BinDir: bin, Keystone: true, KeystonePrefix: "os-east:", Product: true}, ""},
		"the product to be removed": {UpOptions{BinDir: bin}, "leave --no-product out"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := c.honours(test.options, installed{Product: strings.HasPrefix(test.want, "leave --no-product")})
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q", err, test.want)
			}
		})
	}
}
