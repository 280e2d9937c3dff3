package conformance

import (
	"archive/tar"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestAgnhostStandIn holds without a cluster: what is added to our own image does what the specs use it for.
func TestAgnhostStandIn(t *testing.T) {
	dir := t.TempDir()
	layer, err := standIns["agnhost"].layer("")
	if err != nil {
		t.Fatal(err)
	}
	stream, err := layer.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeSymlink {
			continue
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(h.Name)), text, h.FileInfo().Mode()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "localhost.crt"), filepath.Join(dir, "localhost.key")); err != nil {
		t.Error(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "bash"), "-c", "echo \"$1\"", "name", "two  words").CombinedOutput()
	if err != nil || string(out) != "two  words\n" {
		t.Errorf("bash prints %q, %v", out, err)
	}
}
