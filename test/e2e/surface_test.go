package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"k8s.io/client-go/tools/clientcmd"
)

// TestStatus reads `h8s status -o json`, which scripts do: its fields are a promise.
func TestStatus(t *testing.T) {
	type node struct {
		Name, Address, PodCIDR string
		Ready                  bool
		PID                    int
		Root                   string
	}
	type report struct {
		Name                                                   string
		Running, Ready, Complete, Product                      bool
		Server, Subnet, Gateway, StateDir, Kubeconfig, Problem string
		Nodes                                                  []node
	}
	var status report
	awaitCluster(t)
	eventually(t, func() error {
		out, err := h8sOutput(time.Minute, "status", "--name", cluster.cluster, "-o", "json")
		if err != nil {
			return fmt.Errorf("h8s status: %w: %s", err, out)
		}
		decoder := json.NewDecoder(strings.NewReader(out))
		decoder.DisallowUnknownFields()
		status = report{}
		if err := decoder.Decode(&status); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if status.Name != cluster.cluster || !status.Running || !status.Ready || !status.Complete || !status.Product || status.Problem != "" {
			return fmt.Errorf("status: %s", out)
		}
		return nil
	})
	config, err := clientcmd.LoadFromFile(status.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range config.Clusters {
		if c.Server != status.Server {
			t.Errorf("server is %s, in the kubeconfig %s", status.Server, c.Server)
		}
	}
	subnet, err := netip.ParsePrefix(status.Subnet)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range status.Nodes {
		names = append(names, n.Name)
		if address, err := netip.ParseAddr(n.Address); err != nil || !subnet.Contains(address) || !n.Ready {
			t.Errorf("node: %+v, %v", n, err)
		}
		want := kubectl(t, admin, "get", "node", n.Name, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address} {.spec.podCIDR}`)
		if got := n.Address + " " + n.PodCIDR; got != want {
			t.Errorf("node %s is %s, and the API server says %s", n.Name, got, want)
		}
		if init, err := nodeInit(n.Name); err != nil || init.pid != n.PID {
			t.Errorf("PID of node %s is %d, want %d, %v", n.Name, n.PID, init.pid, err)
		}
		if _, err := os.Stat(filepath.Join(n.Root, "run", "containerd")); err != nil || !strings.HasPrefix(n.Root, status.StateDir) {
			t.Errorf("root of node %s: %v", n.Name, err)
		}
	}
	if diff := cmp.Diff(nodes(t), names); diff != "" {
		t.Errorf("nodes (- want, + got):\n%s", diff)
	}
	if out, err := h8sOutput(time.Minute, "status", "--name", cluster.cluster); err != nil || !strings.Contains(out, status.Server) {
		t.Errorf("h8s status: %v: %s", err, out)
	}
	if out, err := h8sOutput(time.Minute, "status", "--name", "nobody"); err == nil || !strings.Contains(out, "`h8s up --name nobody` makes it") {
		t.Errorf("status of no cluster: %v: %s", err, out)
	}
}

func TestVersion(t *testing.T) {
	text, err := h8sOutput(time.Minute, "version")
	version, ok := strings.CutPrefix(strings.TrimSpace(text), "h8s ")
	if err != nil || !ok || version == "" {
		t.Errorf("h8s version: %v: %q", err, text)
	}
	out, err := h8sOutput(time.Minute, "version", "-o", "json")
	var decoded struct{ Version string }
	if err != nil || json.Unmarshal([]byte(out), &decoded) != nil || decoded.Version != version {
		t.Errorf("h8s version -o json: %v: %s, want %q", err, out, version)
	}
}

// TestKubeconfig: a User gets a certificate that is hers, and short-lived.
func TestKubeconfig(t *testing.T) {
	apply(t, admin, `
{apiVersion: h8s.io/v1alpha1, kind: User, metadata: {name: carol}}
---
{apiVersion: h8s.io/v1alpha1, kind: User, metadata: {name: dave}, spec: {disabled: true}}
`)
	t.Cleanup(func() { _, _ = try(admin, "delete", "user", "carol", "dave", "--ignore-not-found") })
	for test, groups := range map[string][]string{"without groups": nil, "with groups": {"sales", "team:a"}} {
		t.Run(test, func(t *testing.T) {
			args := []string{"kubeconfig", "--name", cluster.cluster, "--user", "carol"}
			for _, g := range groups {
				args = append(args, "--group", g)
			}
			out, err := h8sOutput(time.Minute, args...)
			if err != nil {
				t.Fatalf("h8s %v: %v: %s", args, err, out)
			}
			config, err := clientcmd.Load([]byte(out))
			if err != nil {
				t.Fatal(err)
			}
			user := config.AuthInfos[config.Contexts[config.CurrentContext].AuthInfo]
			block, _ := pem.Decode(user.ClientCertificateData)
			if block == nil {
				t.Fatal("no certificate")
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			got := slices.Sorted(slices.Values(cert.Subject.Organization))
			if cert.Subject.CommonName != "carol" || !slices.Equal(got, groups) {
				t.Errorf("the certificate is for %s", cert.Subject)
			}
			if left := time.Until(cert.NotAfter); left > time.Hour || left < 50*time.Minute {
				t.Errorf("the certificate is valid for %s more", left)
			}
			var who struct {
				Status struct {
					UserInfo struct {
						Username string
						Groups   []string
					}
				}
			}
			answer := kubectl(t, admin, "--kubeconfig="+manifest(t, out), "auth", "whoami", "-o", "json")
			if err := json.Unmarshal([]byte(answer), &who); err != nil {
				t.Fatal(err)
			}
			want := append(slices.Clone(groups), "system:authenticated")
			if u := who.Status.UserInfo; u.Username != "carol" || !slices.Equal(slices.Sorted(slices.Values(u.Groups)), slices.Sorted(slices.Values(want))) {
				t.Errorf("kubectl auth whoami: %+v", u)
			}
		})
	}
	if left := kubectl(t, admin, "get", "csr", "-o", "name"); strings.Contains(left, "h8s-user-") {
		t.Errorf("certificate requests are left: %s", left)
	}
	for want, args := range map[string][]string{
		`there is no User "nobody"`:     {"--user", "nobody"},
		`the User "dave" is disabled`:   {"--user", "dave"},
		"not an operator's to give":     {"--user", "carol", "--group", "system:masters"},
		"--group needs --user":          {"--group", "sales"},
		`"nobody"; ` + "`h8s up --name": {"--name", "nobody"},
	} {
		out, err := h8sOutput(time.Minute, append([]string{"kubeconfig", "--name", cluster.cluster}, args...)...)
		if err == nil || !strings.Contains(out, want) || strings.Contains(out, "PRIVATE KEY") {
			t.Errorf("h8s kubeconfig %v: %v, and does not say %q: %s", args, err, want, out)
		}
	}
}

// TestImageLoad loads a user's own image in both formats and runs it on each node.
func TestImageLoad(t *testing.T) {
	dir := t.TempDir()
	for format, write := range map[string]func(t *testing.T, path, ref string, image v1.Image){
		"docker": writeDockerArchive, "oci": writeOCIArchive,
	} {
		t.Run(format, func(t *testing.T) {
			ref := "localhost/loaded-" + format + ":v1"
			archive := filepath.Join(dir, format+".tar")
			write(t, archive, ref, smallImage(t, format))
			for range 2 { // again is no error
				if out, err := h8sOutput(6*time.Minute, "image", "load", "--name", cluster.cluster, archive); err != nil {
					t.Fatalf("h8s image load: %v: %s", err, out)
				}
			}
			for _, node := range nodes(t) {
				pod := "loaded-" + format + "-" + node
				apply(t, admin, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: default}
spec:
  nodeName: %s
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
  - {name: c, image: %q, imagePullPolicy: Never}
`, pod, node, ref))
				t.Cleanup(func() { _, _ = try(admin, "delete", "pod", pod, "-n", "default", "--ignore-not-found", "--wait=false") })
				kubectl(t, admin, "wait", "-n", "default", "--for=jsonpath={.status.phase}=Succeeded", "pod/"+pod, "--timeout=4m")
				if log := kubectl(t, admin, "logs", "-n", "default", pod); strings.TrimSpace(log) != "this is "+format {
					t.Errorf("on node %s the image says %q", node, log)
				}
			}
		})
	}

	whole, err := os.ReadFile(filepath.Join(dir, "docker.tar"))
	if err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{"truncated.tar": whole[:len(whole)/2], "text.tar": []byte("hello"), "empty.tar": nil} {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := h8sOutput(6*time.Minute, "image", "load", "--name", cluster.cluster, path)
		if err == nil || !strings.Contains(out, path+" is not a whole docker or OCI archive") {
			t.Errorf("%s: %v: %s", file, err, out)
		}
	}
	missing := filepath.Join(dir, "missing.tar")
	if out, err := h8sOutput(6*time.Minute, "image", "load", "--name", cluster.cluster, missing); err == nil || !strings.Contains(out, "open "+missing+": no such file") {
		t.Errorf("a file that is not there: %v: %s", err, out)
	}
}

// smallImage is busybox that says what it is.
func smallImage(t *testing.T, what string) v1.Image {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "layer.tar")
	writeTar(t, path, map[string][]byte{"busybox": busybox})
	layer, err := tarball.LayerFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config.Entrypoint = []string{"/busybox", "echo", "this is " + what}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

func writeDockerArchive(t *testing.T, path, ref string, image v1.Image) {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(path, tag, image); err != nil {
		t.Fatal(err)
	}
}

// writeOCIArchive writes what the OCI image specification calls an image layout, in a tar file.
func writeOCIArchive(t *testing.T, path, ref string, image v1.Image) {
	t.Helper()
	dir := t.TempDir()
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(image, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": ref})); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err == nil {
			files[rel], err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	writeTar(t, path, files)
}

func writeTar(t *testing.T, path string, files map[string][]byte) {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}
