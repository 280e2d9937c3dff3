//go:build hyper

package hyper

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// volume makes a volume's directory, as the kubelet does.
func (p *pod) volume(plugin, name string) string {
	p.t.Helper()
	path := p.path("kubelet/pods", p.config.Metadata.Uid, "volumes/kubernetes.io~"+plugin, name)
	must(p.t, os.MkdirAll(path, 0o777))
	must(p.t, os.Chmod(path, 0o777))
	return path
}

// tmpfs mounts one, as the kubelet does for emptyDir with medium: Memory, and for Secrets.
func (n *node) tmpfs(dir, options string) {
	n.t.Helper()
	must(n.t, syscall.Mount("tmpfs", dir, "tmpfs", 0, options))
	n.t.Cleanup(func() { must(n.t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
}

// TestFull: who writes too much is told so, and nothing else happens.
func TestFull(t *testing.T) {
	n := newNode(t)
	config := n.podConfig("full")
	// A small machine: where there is little, ENOSPC has to come before the end of memory.
	config.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 192 << 20}
	p := n.run(config)
	memory, plain := p.volume("empty-dir", "memory"), p.volume("empty-dir", "plain")
	n.tmpfs(memory, "size=8m")
	must(t, os.Chown(memory, 0, 3000)) // fsGroup
	must(t, os.Chmod(memory, 0o777|os.ModeSetgid))
	main := p.containerConfig("main", "sleep", "1000")
	main.Mounts = []*cri.Mount{{ContainerPath: "/memory", HostPath: memory}, {ContainerPath: "/plain", HostPath: plain}}
	c := p.startContainer(main)
	if got := p.exec(c, "sh", "-c", "df -m /memory | tail -1 | awk '{print $2}'; touch /memory/x; stat -c %g /memory/x"); got != "8\n3000" {
		t.Errorf("size and group of the one in memory: %q", got)
	}
	for _, dir := range []string{"/memory", "/plain", "/tmp"} {
		got := p.exec(c, "sh", "-c", "mkdir -p "+dir+"; dd if=/dev/zero of="+dir+"/big bs=1M count=1000 2>&1 | grep -o 'No space left'; rm "+dir+"/big; echo again > "+dir+"/small; cat "+dir+"/small")
		if got != "No space left\nagain" {
			t.Errorf("%s: %q", dir, got)
		}
	}
	if s := p.status(c); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container is %s (%s)", s.State, s.Reason)
	}
	p.remove()
	n.nothingLeft()
}

// TestSecrets: what a Secret may be, and a token that is replaced again and again.
func TestSecrets(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("secrets"))
	secret, token := p.volume("secret", "big"), p.volume("projected", "token")
	n.tmpfs(secret, "")
	n.tmpfs(token, "")
	// As the kubelet's AtomicWriter does.
	write := func(dir, version string, files map[string][]byte, mode os.FileMode) {
		old, _ := os.Readlink(dir + "/..data")
		must(t, os.Mkdir(filepath.Join(dir, version), 0o755))
		for name, data := range files {
			must(t, os.WriteFile(filepath.Join(dir, version, name), data, mode))
			must(t, os.Chmod(filepath.Join(dir, version, name), mode))
		}
		must(t, os.Symlink(version, dir+"/..data_tmp"))
		must(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
		for name := range files {
			_ = os.Symlink("..data/"+name, filepath.Join(dir, name))
		}
		if old != "" {
			must(t, os.RemoveAll(filepath.Join(dir, old)))
		}
	}
	big := make([]byte, 1<<20)
	random := rand.NewChaCha8([32]byte{})
	_, _ = random.Read(big)
	odd := []string{"a b", "ünïcode", "-rf", "dot.dot..", strings.Repeat("n", 253), "$(id)"}
	files := map[string][]byte{"big": big, "empty": {}}
	for _, name := range odd {
		files[name] = []byte(name)
	}
	write(secret, "..2026_1", files, 0o400)
	write(token, "..2026_0", map[string][]byte{"token": []byte("token-0")}, 0o644)

	main := p.containerConfig("main", "sleep", "1000")
	main.Mounts = []*cri.Mount{
		{ContainerPath: "/secret", HostPath: secret, Readonly: true}, {ContainerPath: "/token", HostPath: token, Readonly: true},
	}
	c := p.startContainer(main)
	if got, want := p.exec(c, "sh", "-c", "sha256sum < /secret/big; stat -L -c '%a %s' /secret/empty"), fmt.Sprintf("%x  -\n400 0", sha256.Sum256(big)); got != want {
		t.Errorf("the Secret: %q, want %q", got, want)
	}
	for _, name := range odd {
		if got := p.exec(c, "cat", "/secret/"+name); got != name {
			t.Errorf("%s holds %q", name, got)
		}
	}
	// A reader that looks all the time never finds the token missing, or a part of it.
	p.exec(c, "sh", "-c", "(while :; do t=$(cat /token/token) && case $t in token-[0-9]) ;; *) echo \"$t\" >> /bad;; esac || echo missing >> /bad; done) >/dev/null 2>&1 &")
	for i := 1; i < 4; i++ {
		want := fmt.Sprint("token-", i)
		write(token, fmt.Sprint("..2026_", i), map[string][]byte{"token": []byte(want)}, 0o644)
		n.eventually(want, func() bool { return p.exec(c, "cat", "/token/token") == want })
	}
	if got := p.exec(c, "sh", "-c", "cat /bad 2>/dev/null; ls -A /token"); got != "..2026_3\n..data\ntoken" {
		t.Errorf("seen meanwhile, and left: %q", got)
	}
	p.remove()
	n.nothingLeft()
}
