//go:build hyper

package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	profiles "github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/anypb"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/seccomp"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// TestMachine boots the guest that make builds, and does in it what a pod does.
func TestMachine(t *testing.T) {
	m := boot(t, 256<<20)
	m.must("POST", "/v1/setup", guestapi.Setup{
		Hostname: "web-0", MachineID: "0123456789abcdef0123456789abcdef",
		Time: time.Now(), Entropy: bytes.Repeat([]byte{7}, 64),
		Sysctls: map[string]string{"net.core.somaxconn": "1234"},
	})
	if err := m.vm.AddDisk(t.Context(), vm.Disk{
		Serial: "busybox", ReadOnly: true, Backend: map[string]any{"driver": "file", "filename": busyboxLayer(t)},
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		m.must("PUT", "/v1/disks/busybox", guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
	}

	for name, test := range map[string]func(*testing.T, *machine){
		"setup":      testSetup,
		"output":     testOutput,
		"input":      testInput,
		"exec":       testExec,
		"stats":      testStats,
		"memory":     testMemory,
		"volume":     testVolume,
		"dial":       testDial,
		"signals":    testSignals,
		"seccomp":    testSeccompOfNode,
		"bad_bundle": testBadBundle,
	} {
		t.Run(name, func(t *testing.T) {
			sub := *m
			sub.t = t
			test(t, &sub)
		})
	}

	for range 2 {
		m.must("DELETE", "/v1/disks/busybox", nil)
	}
	if err := m.vm.RemoveDisk(t.Context(), "busybox"); err != nil {
		t.Error(err)
	}
	t.Logf("memory of the idle guest:\n%s", m.must("GET", "/v1/files?path=/proc/meminfo", nil)[:140])
	m.must("POST", "/v1/shutdown", nil)
	select {
	case <-m.vm.Done():
		if err := m.vm.Err(); !errors.Is(err, vm.ErrPoweredOff) {
			t.Errorf("the machine ended otherwise than by power off: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Error("the machine does not power off")
	}
}

// busyboxLayer makes a file system image of busybox.
func busyboxLayer(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc", "vol"} {
		if err := os.MkdirAll(filepath.Join(dir, "root", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "root/bin/busybox"), busybox, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, applet := range []string{"sh", "cat", "sleep", "echo", "hostname", "sha256sum", "dd", "nc", "touch", "kill", "ps", "unshare"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "root/bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "layer.erofs")
	if out, err := exec.Command("mkfs.erofs", image, filepath.Join(dir, "root")).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v: %s", err, out)
	}
	return image
}

// container is one that was made in the machine.
type container struct {
	*machine
	id             string
	stdin          net.Conn
	stdout, stderr net.Conn
}

// spec is about what containerd's CRI plugin would write.
func spec(args ...string) *specs.Spec {
	capabilities := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"}
	s := &specs.Spec{
		Version: "1.2.0",
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		},
		Root: &specs.Root{},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: "/host/knows/better",
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
			},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys"},
			ReadonlyPaths: []string{"/proc/sys"},
		},
	}
	s.Linux.Seccomp = profiles.DefaultProfile(s)
	return s
}

// compile compiles a specification's seccomp profile, as the shim does.
func compile(t testing.TB, s *specs.Spec) {
	t.Helper()
	if err := seccomp.Compile(t.Context(), "../../../bin/hyper/seccomp-filter", s); err != nil {
		t.Fatal(err)
	}
}

// create makes and starts a container, which is removed with the test.
func (m *machine) create(id string, s *specs.Spec) *container {
	m.t.Helper()
	raw, err := json.Marshal(s)
	if err != nil {
		m.t.Fatal(err)
	}
	for range 2 {
		m.must("PUT", "/v1/containers/"+id, guestapi.Container{Spec: raw, Layers: []string{"busybox"}})
	}
	c := &container{machine: m, id: id}
	c.stdin, c.stdout, c.stderr = m.pipe(id, "stdin:w"), m.pipe(id, "stdout:r"), m.pipe(id, "stderr:r")
	at := filepath.Join(guestapi.PipeDir, id)
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	if _, err := m.tasks.Create(ctx, &taskapi.CreateTaskRequest{
		ID: id, Bundle: "/host/knows/better", Stdin: at + "/stdin", Stdout: at + "/stdout", Stderr: at + "/stderr",
	}); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		_, _ = m.tasks.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: 9, All: true})
		_, _ = m.tasks.Wait(ctx, &taskapi.WaitRequest{ID: id})
		if _, err := m.tasks.Delete(ctx, &taskapi.DeleteRequest{ID: id}); err != nil {
			m.t.Errorf("delete: %v", err)
		}
		if _, err := m.call("DELETE", "/v1/disks/busybox", nil); err == nil || !strings.Contains(err.Error(), "409") {
			m.t.Errorf("take away a disk that is in use: %v", err)
		}
		for range 2 {
			m.must("DELETE", "/v1/containers/"+id, nil)
		}
	})
	if _, err := m.tasks.Start(ctx, &taskapi.StartRequest{ID: id}); err != nil {
		m.t.Fatal(err)
	}
	return c
}

func (m *machine) pipe(id, name string) net.Conn {
	m.t.Helper()
	p, err := m.host.Open(m.t.Context(), channel.Pipe, id+"/"+name)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { p.Close() })
	return p
}

// all reads a pipe to its end.
func (m *machine) all(p net.Conn) string {
	m.t.Helper()
	if err := p.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		m.t.Fatal(err)
	}
	text, err := io.ReadAll(p)
	if err != nil {
		m.t.Errorf("read a pipe: %v", err)
	}
	return string(text)
}

// line reads a pipe to the end of a line.
func (m *machine) line(p net.Conn) string {
	m.t.Helper()
	if err := p.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		m.t.Fatal(err)
	}
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := p.Read(b); err != nil {
			m.t.Fatalf("after %q: %v", line, err)
		}
		if b[0] == '\n' {
			return string(line)
		}
		line = append(line, b[0])
	}
}

// closeInput ends the container's standard input.
func (c *container) closeInput() {
	c.t.Helper()
	if err := c.stdin.Close(); err != nil {
		c.t.Fatal(err)
	}
}

// wait returns the exit status of a process.
func (c *container) wait(execID string) uint32 {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	w, err := c.tasks.Wait(ctx, &taskapi.WaitRequest{ID: c.id, ExecID: execID})
	if err != nil {
		c.t.Fatal(err)
	}
	return w.ExitStatus
}

func check[T comparable](t *testing.T, what string, have, want T) {
	t.Helper()
	if have != want {
		t.Errorf("%s: %v, want %v", what, have, want)
	}
}

func testSetup(t *testing.T, m *machine) {
	c := m.create("setup", spec("sh", "-c", "hostname; cat /proc/sys/net/core/somaxconn; cat /proc/self/oom_score_adj; cat /proc/self/cgroup"))
	check(t, "output", m.all(c.stdout), "web-0\n1234\n1\n0::/\n")
	check(t, "machine ID", string(m.must("GET", "/v1/files?path=/etc/machine-id", nil)), "0123456789abcdef0123456789abcdef\n")
	check(t, "PID 1's badness", string(m.must("GET", "/v1/files?path=/proc/1/oom_score_adj", nil)), "-1000\n")
	if _, err := m.call("GET", "/v1/files?path=/dev/console", nil); err == nil {
		t.Error("a device can be read as a file")
	}
}

func testOutput(t *testing.T, m *machine) {
	c := m.create("output", spec("sh", "-c", "echo hello; cat; echo oops >&2; touch /new; exit 3"))
	if _, err := io.WriteString(c.stdin, "from the host\n"); err != nil {
		t.Fatal(err)
	}
	c.closeInput()
	check(t, "output", m.all(c.stdout), "hello\nfrom the host\n")
	check(t, "errors", m.all(c.stderr), "oops\n")
	check(t, "exit status", c.wait(""), 3)
}

func testInput(t *testing.T, m *machine) {
	const size = 10 << 20
	data := make([]byte, size)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(data)
	c := m.create("input", spec("cat"))
	go func() {
		_, _ = c.stdin.Write(data)
		c.stdin.Close()
	}()
	start := time.Now()
	back := m.all(c.stdout)
	t.Logf("%d bytes in and out in %v", len(back), time.Since(start).Round(time.Millisecond))
	check(t, "what came back", sha256.Sum256([]byte(back)), sha256.Sum256(data))
	check(t, "exit status", c.wait(""), 0)
}

func testExec(t *testing.T, m *machine) {
	c := m.create("exec", spec("sleep", "1000"))
	for i, want := range []uint32{0, 7} {
		id := fmt.Sprintf("e%d", i)
		stdout, _ := m.pipe(c.id, id+":r"), m.pipe(c.id, id+"-err:r")
		process, err := json.Marshal(specs.Process{Args: []string{"sh", "-c", fmt.Sprintf("echo ran; exit %d", want)}, Cwd: "/", Env: []string{"PATH=/bin"}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.tasks.Exec(t.Context(), &taskapi.ExecProcessRequest{
			ID: c.id, ExecID: id, Stdout: filepath.Join(guestapi.PipeDir, c.id, id),
			Stderr: filepath.Join(guestapi.PipeDir, c.id, id+"-err"), Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: process},
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := m.tasks.Start(t.Context(), &taskapi.StartRequest{ID: c.id, ExecID: id}); err != nil {
			t.Fatal(err)
		}
		check(t, "output", m.all(stdout), "ran\n")
		check(t, "exit status", c.wait(id), want)
		if _, err := m.tasks.Delete(t.Context(), &taskapi.DeleteRequest{ID: c.id, ExecID: id}); err != nil {
			t.Error(err)
		}
	}
	testTerminal(t, c)
	if _, err := m.tasks.Kill(t.Context(), &taskapi.KillRequest{ID: c.id, Signal: 9}); err != nil {
		t.Fatal(err)
	}
	check(t, "exit status after a kill", c.wait(""), 137)
}

// testTerminal runs a shell on a terminal, resizes that, and types.
func testTerminal(t *testing.T, c *container) {
	const id = "tty"
	stdin, stdout := c.pipe(c.id, id+"-in:w"), c.pipe(c.id, id+"-out:r")
	process, err := json.Marshal(specs.Process{Args: []string{"sh"}, Cwd: "/", Env: []string{"PATH=/bin", "PS1="}, Terminal: true})
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(guestapi.PipeDir, c.id, id)
	if _, err := c.tasks.Exec(t.Context(), &taskapi.ExecProcessRequest{
		ID: c.id, ExecID: id, Terminal: true, Stdin: at + "-in", Stdout: at + "-out",
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: process},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.tasks.Start(t.Context(), &taskapi.StartRequest{ID: c.id, ExecID: id}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.tasks.ResizePty(t.Context(), &taskapi.ResizePtyRequest{ID: c.id, ExecID: id, Width: 123, Height: 45}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "busybox stty size; exit 5\n"); err != nil {
		t.Fatal(err)
	}
	if text := c.all(stdout); !strings.Contains(text, "45 123") {
		t.Errorf("the terminal's size is not in %q", text)
	}
	check(t, "exit status", c.wait(id), 5)
	if _, err := c.tasks.Delete(t.Context(), &taskapi.DeleteRequest{ID: c.id, ExecID: id}); err != nil {
		t.Error(err)
	}
}

func testStats(t *testing.T, m *machine) {
	s := spec("sh", "-c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done; echo done; sleep 1000")
	limit := int64(32 << 20)
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	c := m.create("stats", s)
	check(t, "output", m.line(c.stdout), "done")
	answer, err := m.tasks.Stats(t.Context(), &taskapi.StatsRequest{ID: c.id})
	if err != nil {
		t.Fatal(err)
	}
	var metrics stats.Metrics
	if err := typeurl.UnmarshalTo(answer.Stats, &metrics); err != nil {
		t.Fatal(err)
	}
	if metrics.CPU.GetUsageUsec() == 0 || metrics.Memory.GetUsage() == 0 || metrics.Pids.GetCurrent() == 0 {
		t.Errorf("metrics are zero: %v", &metrics)
	}
	check(t, "memory limit", metrics.Memory.GetUsageLimit(), uint64(limit))
}

func testMemory(t *testing.T, m *machine) {
	s := spec("sh", "-c", "x=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done")
	limit := int64(16 << 20)
	s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	c := m.create("greedy", s)
	check(t, "exit status", c.wait(""), 137)
	check(t, "events", string(m.must("GET", "/v1/events?follow=false", nil)), "{\"oom\":\"greedy\"}\n")
}

func testVolume(t *testing.T, m *machine) {
	m.must("PUT", "/v1/volumes/config", configVolume(t, "..1", "one"))
	m.must("PUT", "/v1/volumes/file", archive(t, &tar.Header{Name: ".", Typeflag: tar.TypeReg, Mode: 0o666}, ""))
	m.must("PUT", "/v1/volumes/empty?scratch=65536", nil)
	s := spec("sh", "-c", `
		while [ "$(cat /vol/config/key)" = one ]; do sleep 0.02; done; cat /vol/config/key; echo
		echo bye >/vol/file
		cat /dev/zero >/vol/empty/big || echo full; cat /vol/empty/big | wc -c`)
	for _, name := range []string{"config", "file", "empty"} {
		s.Mounts = append(s.Mounts, specs.Mount{
			Destination: "/vol/" + name, Type: "bind", Source: filepath.Join(guestapi.VolumeDir, name), Options: []string{"rbind"},
		})
	}
	s.Process.Args[2] = strings.ReplaceAll(s.Process.Args[2], "wc -c", "busybox wc -c")
	c := m.create("volume", s)
	m.must("PUT", "/v1/volumes/config", configVolume(t, "..2", "two"))
	m.must("PUT", "/v1/volumes/empty?scratch=65536", nil)
	check(t, "output", m.all(c.stdout), "two\nfull\n65536\n")
	check(t, "termination message", string(m.must("GET", "/v1/files?path="+guestapi.VolumeDir+"/file", nil)), "bye\n")
}

// configVolume is what kubelet makes of a ConfigMap with one key.
func configVolume(t *testing.T, version, value string) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range []struct {
		h    tar.Header
		data string
	}{
		{h: tar.Header{Name: ".", Typeflag: tar.TypeDir, Mode: 0o755}},
		{h: tar.Header{Name: "key", Typeflag: tar.TypeSymlink, Linkname: "..data/key"}},
		{h: tar.Header{Name: "..data", Typeflag: tar.TypeSymlink, Linkname: version}},
		{h: tar.Header{Name: version, Typeflag: tar.TypeDir, Mode: 0o755}},
		{h: tar.Header{Name: version + "/key", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(value))}, data: value},
	} {
		if err := w.WriteHeader(&e.h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// archive is a tar archive of one entry.
func archive(t *testing.T, h *tar.Header, data string) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	h.Size = int64(len(data))
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func testDial(t *testing.T, m *machine) {
	if _, err := m.host.Open(t.Context(), channel.Dial, "8080"); !errors.As(err, new(*channel.RefusedError)) {
		t.Errorf("a port where nobody listens: %v", err)
	}
	c := m.create("dial", spec("sh", "-c", "echo ready; nc -l -p 8080 -e cat"))
	check(t, "output", m.line(c.stdout), "ready")
	var conn net.Conn
	for deadline := time.Now().Add(2 * time.Minute); ; {
		var err error
		if conn, err = m.host.Open(t.Context(), channel.Dial, "8080"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(conn, "there and back"); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	check(t, "echo", m.all(conn), "there and back")
}

// testSignals shares the machine's PID namespace, and does its worst to PID 1.
func testSignals(t *testing.T, m *machine) {
	s := spec("sh", "-c", "for s in 1 2 3 4 6 7 8 9 11 13 14 15 31 34; do kill -$s 1; done; sleep 0.2; echo alive")
	s.Linux.Namespaces = s.Linux.Namespaces[1:]
	c := m.create("signals", s)
	check(t, "output", m.all(c.stdout), "alive\n")
	m.must("GET", "/v1/events?follow=false", nil)
}

// testSeccompOfNode has the node compile a profile: the filter is the one that the guest
// makes of it, and refuses what it should.
func testSeccompOfNode(t *testing.T, m *machine) {
	args := []string{"sh", "-c", "unshare -U true 2>/dev/null && echo allowed; echo end; cat"}
	unconfined, ofGuest, ofNode := spec(args...), spec(args...), spec(args...)
	unconfined.Linux.Seccomp = nil
	compile(t, ofNode)
	if len(ofNode.Linux.Seccomp.Syscalls) != 0 {
		t.Fatal("the guest gets the rules, too")
	}
	var filters [][]byte
	for _, test := range []struct {
		id   string
		spec *specs.Spec
		want string
	}{
		{"unconfined", unconfined, "allowed"},
		{"of-guest", ofGuest, "end"},
		{"of-node", ofNode, "end"},
	} {
		c := m.create(test.id, test.spec)
		check(t, test.id, c.line(c.stdout), test.want)
		if test.spec.Linux.Seccomp != nil {
			filters = append(filters, m.must("GET", "/v1/files?path=/run/containerd/runc/h8s/"+test.id+"/seccomp.bpf", nil))
		}
		c.closeInput()
		check(t, test.id+" ends", c.wait(""), 0)
	}
	if !bytes.Equal(filters[0], filters[1]) || len(filters[0]) == 0 {
		t.Errorf("the guest made a filter of %d bytes, the node another one of %d", len(filters[0]), len(filters[1]))
	}
}

func testBadBundle(t *testing.T, m *machine) {
	for what, container := range map[string]guestapi.Container{
		"no specification": {Layers: []string{"busybox"}},
		"no layers":        {Spec: json.RawMessage(`{}`)},
		"missing layer":    {Spec: json.RawMessage(`{}`), Layers: []string{"none"}},
		"evil layer":       {Spec: json.RawMessage(`{}`), Layers: []string{"../../../etc"}},
	} {
		if _, err := m.call("PUT", "/v1/containers/bad", container); err == nil || !strings.Contains(err.Error(), "400") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := m.call("PUT", "/v1/containers/..%2f..%2fetc", guestapi.Container{}); err == nil {
		t.Error("a container outside of the bundles' directory")
	}
}

// TestClonesDraw: of two clones, set up at once, none draws what the other does. The
// template has just reseeded, and its kernel would not do so again before half its age
// has passed: of themselves, clones draw the same.
func TestClonesDraw(t *testing.T) {
	c := config(t, 128<<20)
	template := filepath.Join(t.TempDir(), "template")
	setup := func(name string) guestapi.Setup {
		entropy := make([]byte, 64)
		_, _ = crand.Read(entropy)
		return guestapi.Setup{Hostname: name, Time: time.Now(), Entropy: entropy}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := vm.SaveTemplate(ctx, c, template, func(ctx context.Context, rw io.ReadWriteCloser) error {
		host, err := channel.NewHost(rw)
		if err != nil {
			return err
		}
		m := &machine{t: t, http: httpClient(host)}
		for age := 0.0; age < 8; time.Sleep(100 * time.Millisecond) {
			text, err := m.call("GET", "/v1/files?path=/proc/uptime", nil)
			if err == nil {
				_, err = fmt.Sscan(string(text), &age)
			}
			if err != nil {
				return err
			}
		}
		_, err = m.call("POST", "/v1/setup", setup("template"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	c.Template = template
	drawn := map[string]int{}
	for i := range 2 {
		m := start(t, c)
		m.must("POST", "/v1/setup", setup("clone"))
		for range 30 {
			id := string(m.must("GET", "/v1/files?path=/proc/sys/kernel/random/uuid", nil))
			if other, ok := drawn[id]; ok {
				t.Fatalf("clone %d draws %s, as does clone %d", i, strings.TrimSpace(id), other)
			}
			drawn[id] = i
		}
	}
}

// TestClone saves a guest that waits, and runs a container in a clone of it.
func TestClone(t *testing.T) {
	c := config(t, 256<<20)
	c.Template = saveTemplate(t, c)
	m := start(t, c)
	now := time.Now()
	m.must("POST", "/v1/setup", guestapi.Setup{Hostname: "clone", Time: now, Entropy: bytes.Repeat([]byte{1}, 32)})
	if err := m.vm.AddDisk(t.Context(), vm.Disk{
		Serial: "busybox", ReadOnly: true, Backend: map[string]any{"driver": "file", "filename": busyboxLayer(t)},
	}); err != nil {
		t.Fatal(err)
	}
	m.must("PUT", "/v1/disks/busybox", guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
	check(t, "output", m.all(m.create("clone", spec("hostname")).stdout), "clone\n")
}

// TestDisks: the guest waits for disks by itself, for as long as it is asked to.
func TestDisks(t *testing.T) {
	m := boot(t, 256<<20)
	layer := busyboxLayer(t)
	const many = 8
	var group errgroup.Group
	began := time.Now()
	for i := range many {
		serial := fmt.Sprint("layer-", i)
		asked := make(chan struct{})
		group.Go(func() error {
			close(asked)
			_, err := m.call("PUT", "/v1/disks/"+serial, guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
			return err
		})
		group.Go(func() error {
			<-asked // or soon: it is the guest that waits, not the host
			return m.vm.AddDisk(t.Context(), vm.Disk{
				Serial: serial, ReadOnly: true, Backend: map[string]any{"driver": "file", "filename": layer},
			})
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d disks in %v", many, time.Since(began).Round(time.Millisecond))

	body := strings.NewReader(`{"fileSystem": "erofs", "readOnly": true}`)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://guest/v1/disks/never", body)
	if err != nil {
		t.Fatal(err)
	}
	if answer, err := m.http.Do(request); err == nil {
		answer.Body.Close()
		t.Errorf("a disk that never comes: %s", answer.Status)
	}
	began = time.Now()
	if err := m.vm.AddDisk(t.Context(), vm.Disk{
		Serial: "never", ReadOnly: true, Backend: map[string]any{"driver": "file", "filename": layer},
	}); err != nil {
		t.Fatal(err)
	}
	plugged := time.Since(began)
	m.must("PUT", "/v1/disks/never", guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
	t.Logf("one disk: plugged in after %v, mounted after %v", plugged.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
}

// saveTemplate saves a machine of that kind when its guest has answered once. A stream
// stays open, as a host would leave one that dies.
func saveTemplate(t testing.TB, c vm.Config) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "template")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	err := vm.SaveTemplate(ctx, c, dir, func(ctx context.Context, rw io.ReadWriteCloser) error {
		host, err := channel.NewHost(rw)
		if err == nil {
			_, err = host.Open(ctx, channel.Task, "")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
