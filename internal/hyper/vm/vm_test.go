//go:build hyper

package vm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// image is what the tests boot: the kernel that make builds, and its initial file
// system with testdata/guest as PID 1.
var image struct{ kernel, initrd string }

// The program's first thread does not end before the program. Machines that are started
// from it would hide that others need a thread of their own.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case parentMode:
			beParent()
			return
		case prisonerMode:
			bePrisoner()
			return
		}
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "hyper-vm-")
		if err == nil {
			defer os.RemoveAll(dir)
			err = buildImage(dir)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "build the test guest:", err)
			return 1
		}
		return m.Run()
	}())
}

func buildImage(dir string) error {
	built, err := filepath.Abs("../../../bin/hyper")
	if err != nil {
		return err
	}
	image.kernel, image.initrd = filepath.Join(built, "vmlinuz"), filepath.Join(dir, "initrd.img")
	initrd, err := os.ReadFile(filepath.Join(built, "initrd.img"))
	if err != nil {
		return fmt.Errorf("%w: make build makes it", err)
	}
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", init, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	program, err := os.ReadFile(init)
	if err != nil {
		return err
	}
	// The kernel unpacks one archive after the other: ours replaces /init.
	archive := bytes.NewBuffer(initrd)
	addFile(archive, "init", 0o100755, program)
	addFile(archive, "TRAILER!!!", 0, nil)
	return os.WriteFile(image.initrd, archive.Bytes(), 0o644)
}

// addFile appends a file to a cpio archive in the format "newc".
func addFile(archive *bytes.Buffer, name string, mode int, content []byte) {
	pad := func() { archive.Write(make([]byte, -archive.Len()&3)) }
	pad()
	fmt.Fprintf(archive, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad()
	archive.Write(content)
	pad()
}

const memory = 192 << 20

// config is of a machine that writes its console to the test's log when it fails.
func config(t testing.TB) Config {
	t.Helper()
	console := &lockedBuffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	})
	return Config{
		ID: strings.ReplaceAll(t.Name(), "/", "-"), Dir: t.TempDir(), Accel: "tcg",
		Users:  Users{File: filepath.Join(t.TempDir(), "users")},
		Kernel: image.kernel, Initrd: image.initrd, CPUs: 1, Memory: memory, Console: console,
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// guest is a machine with someone who talks to it.
type guest struct {
	*VM
	t  testing.TB
	in *bufio.Reader
}

func boot(t testing.TB, c Config) *guest {
	t.Helper()
	v, err := Start(deadline(t), c)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{v, t, bufio.NewReader(v.Channel())}
	t.Cleanup(func() {
		v.Kill()
		<-v.Done()
		v.Channel().Close()
	})
	return g
}

// ask sends a line to the guest and returns its answer.
func (g *guest) ask(line string, args ...any) string {
	g.t.Helper()
	line = fmt.Sprintf(line, args...)
	answer, err := ask(g.Channel(), g.in, line)
	if err != nil {
		g.t.Fatalf("ask the guest %q: %v", line, err)
	}
	return answer
}

func ask(channel io.Writer, in *bufio.Reader, line string) (string, error) {
	if err := channel.(net.Conn).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(channel, line); err != nil {
		return "", err
	}
	answer, err := in.ReadString('\n')
	if err == nil && strings.HasPrefix(answer, "error: ") {
		err = fmt.Errorf("it answers %s", answer)
	}
	return strings.TrimSpace(answer), err
}

func TestBoot(t *testing.T) {
	c := config(t)
	c.CPUs, c.NIC = 2, testNIC(t)
	var cgroup []int
	c.Cgroup = func(pid int) error {
		cgroup = append(cgroup, pid)
		return nil
	}
	g := boot(t, c)
	if !slices.Equal(cgroup, []int{g.Pid()}) {
		t.Errorf("cgroup of processes %d, want %d", cgroup, g.Pid())
	}
	for question, want := range map[string]string{
		"echo hello": "hello",
		"cpus":       "2",
		"address":    c.NIC.HardwareAddr.String(),
		"disk none":  "none",
	} {
		if got := g.ask("%s", question); got != want {
			t.Errorf("%s: %q, want %q", question, got, want)
		}
	}
	// Its first second it is "tsc-early".
	if got := g.ask("clock"); !strings.HasPrefix(got, "tsc") {
		t.Errorf("clock: %q, want tsc", got)
	}
}

// What the guest takes for a second is one.
func TestTime(t *testing.T) {
	g := boot(t, config(t))
	ask := func() (guest time.Duration, before, after time.Time) {
		before = time.Now()
		ns, err := strconv.Atoi(g.ask("uptime"))
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(ns), before, time.Now()
	}
	ask() // it has booted
	first, before1, after1 := ask()
	time.Sleep(3 * time.Second) // long, compared with what asking takes
	last, before2, after2 := ask()
	passed, least, most := last-first, before2.Sub(after1), after2.Sub(before1)
	if passed < least*99/100 || passed > most*101/100 {
		t.Errorf("%v have passed in the guest, and %v to %v on the host", passed, least, most)
	}
}

// QEMU runs confined, as a cold boot and as a clone.
func TestConfined(t *testing.T) {
	outer := t
	cold := config(t)
	clone := cold
	clone.Template = save(t, clone, "template")
	users := map[int]bool{}
	for name, c := range map[string]Config{"cold": cold, "clone": clone, "another clone": clone} {
		t.Run(name, func(t *testing.T) {
			g := boot(outer, c) // together with the others
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.Pid()))
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for line := range strings.Lines(string(text)) {
				key, value, _ := strings.Cut(line, ":")
				got[key] = strings.TrimSpace(value)
			}
			user, err := strconv.Atoi(strings.Fields(got["Uid"])[0])
			if err != nil || user < 1_900_000_000 || users[user] {
				t.Errorf("user %s; of others there are %v", got["Uid"], users)
			}
			users[user] = true
			alone := strings.TrimSpace(strings.Repeat(fmt.Sprint(user, "\t"), 4))
			const none = "0000000000000000"
			for key, want := range map[string]string{
				"Uid": alone, "Gid": alone, "Groups": "",
				"Seccomp": "2", "NoNewPrivs": "1", "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none, "CapInh": none,
			} {
				if got[key] != want {
					t.Errorf("%s is %q, want %q", key, got[key], want)
				}
			}
			if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", g.Pid())); err != nil || dir != c.Dir {
				t.Errorf("its working directory is %s (%v)", dir, err)
			}
			// Of our files it has only those that it needs.
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", g.Pid()))
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range fds {
				path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", g.Pid(), fd.Name()))
				if err == nil && !openFile.MatchString(path) {
					t.Errorf("it has %s open", path)
				}
				if strings.HasSuffix(path, "/template/memory") {
					info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", g.Pid(), fd.Name()))
					if err != nil || !readOnly.Match(info) {
						t.Errorf("it has its template open for writing: %s (%v)", info, err)
					}
				}
			}
		})
	}
}

var readOnly = regexp.MustCompile(`(?m)^flags:\t[0-9]*0$`)

var openFile = regexp.MustCompile(`^(/dev/null|pipe:.*|socket:.*|anon_inode:.*|.*/template/memory|.*/(vmlinuz|initrd.img))$`)

func TestStartFails(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no processor":  {func(c *Config) { c.CPUs = 0 }, "there must be a processor"},
		"odd memory":    {func(c *Config) { c.Memory++ }, "multiple of 2 MiB"},
		"accelerator":   {func(c *Config) { c.Accel = "xen" }, `accelerator "xen"`},
		"no kernel":     {func(c *Config) { c.Kernel += ".gone" }, "vmlinuz.gone"},
		"no kernel yet": {func(c *Config) { c.Kernel = c.Initrd }, "QEMU says: "},
		"no template":   {func(c *Config) { c.Template = "/nonexistent" }, ErrTemplate.Error()},
		"card":          {func(c *Config) { c.NIC = &NIC{} }, "tap device"},
		"cgroup": {
			func(c *Config) { c.Cgroup = func(int) error { return errors.New("no such cgroup") } },
			"no such cgroup",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := config(t)
			test.change(&c)
			v, err := Start(deadline(t), c)
			if err == nil {
				v.Kill()
				t.Fatal("it starts")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %q, want %q in it", err, test.want)
			}
		})
	}
}

func TestEnds(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(*guest)
		want error
	}{
		"power off": {func(g *guest) { g.say("poweroff") }, ErrPoweredOff},
		"panic":     {func(g *guest) { g.say("panic") }, ErrPanicked},
		"reboot":    {func(g *guest) { g.say("reboot") }, ErrReset},
		"Kill":      {func(g *guest) { g.Kill() }, ErrKilled},
		"kill -9":   {func(g *guest) { g.sendSignal(unix.SIGKILL) }, ErrDied},
		"killed":    {func(g *guest) { g.sendSignal(unix.SIGKILL) }, ErrKilled},
		"crash":     {func(g *guest) { g.sendSignal(unix.SIGSEGV) }, ErrDied},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := config(t)
			g := boot(t, c)
			g.ask("echo hello")
			if err := g.Err(); err != nil {
				t.Fatalf("it has ended: %v", err)
			}
			test.end(g)
			select {
			case <-g.Done():
			case <-deadline(t).Done():
				t.Fatal("it does not end")
			}
			if err := g.Err(); !errors.Is(err, test.want) {
				t.Errorf("it ended with %v, want %v", err, test.want)
			}
			g.Kill()
			if err := g.Err(); !errors.Is(err, test.want) {
				t.Errorf("after Kill it ended with %v, want %v", err, test.want)
			}
			if _, err := g.in.ReadByte(); err == nil {
				t.Error("the channel has more to say")
			}
			if err := unix.Kill(g.Pid(), 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("QEMU is still there: %v", err)
			}
			if left, err := os.ReadDir(c.Dir); err != nil || len(left) > 0 {
				t.Errorf("left in its directory: %v (%v)", left, err)
			}
			if err := g.AddDisk(t.Context(), Disk{Serial: "a"}); err == nil {
				t.Error("a machine that has ended takes a disk")
			}
		})
	}
}

// say sends a line to which the guest need not answer.
func (g *guest) say(line string) {
	g.t.Helper()
	if _, err := fmt.Fprintln(g.Channel(), line); err != nil {
		g.t.Error(err)
	}
}

func (g *guest) sendSignal(s unix.Signal) {
	g.t.Helper()
	if err := unix.Kill(g.Pid(), s); err != nil {
		g.t.Error(err)
	}
}

// A guest that writes to its console harms nobody but itself, also if nobody reads.
func TestConsoleThatIsSlow(t *testing.T) {
	c := config(t)
	r, w := io.Pipe()
	c.Console = w
	g := boot(t, c)
	g.say("shout 100000")
	eventually(t, "QEMU answers", func() (bool, string) {
		err := g.AddDisk(deadline(t), Disk{Serial: "a", Backend: map[string]any{"driver": "null-co", "size": 1 << 20}})
		return err == nil, fmt.Sprint(err)
	})
	go func() { _, _ = io.Copy(io.Discard, r) }()
	if got := g.ask("echo hello"); got != "hello" { // after the answer to shout
		if got = strings.TrimSpace(must(g.in.ReadString('\n'))); got != "hello" {
			t.Errorf("echo: %q", got)
		}
	}
}

func must(s string, err error) string {
	if err != nil {
		return err.Error()
	}
	return s
}

// TestParentDies runs this program as a parent that boots a guest and is killed.
func TestParentDies(t *testing.T) {
	parent := exec.Command(os.Args[0], parentMode, image.kernel, image.initrd, t.TempDir())
	parent.Stderr = os.Stderr
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("QEMU is not there while its parent lives: %v", err)
	}
	_ = parent.Process.Kill()
	_ = parent.Wait()
	if pid == 0 {
		return
	}
	defer func() {
		if t.Failed() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}()
	eventually(t, "QEMU ends with its parent", func() (bool, string) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(state), ") Z "), string(state)
	})
}

const parentMode = "be-parent"

// beParent boots a guest, tells its process ID when it answers, and waits to be killed.
func beParent() {
	v, err := Start(context.Background(), Config{
		ID: "orphan", Dir: os.Args[4], Accel: "tcg", Users: Users{File: filepath.Join(os.Args[4], "users")},
		Kernel: os.Args[2], Initrd: os.Args[3], CPUs: 1, Memory: memory,
	})
	if err == nil {
		_, err = ask(v.Channel(), bufio.NewReader(v.Channel()), "echo hello")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// Threads without work end; QEMU's must not be among them.
	for range 100 {
		go func() {
			runtime.LockOSThread()
			time.Sleep(time.Millisecond)
		}()
	}
	time.Sleep(100 * time.Millisecond)
	fmt.Println(v.Pid())
	select {}
}

func TestProbeKVM(t *testing.T) {
	cache := t.TempDir()
	ok, why, err := ProbeKVM(deadline(t), image.kernel, image.initrd, cache, Users{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("KVM boots a guest: %t %s", ok, why)
	if ok == (why != "") {
		t.Errorf("it says %t because of %q", ok, why)
	}
	// Its answer is kept: it would be another one if it were asked without a device.
	answers, err := filepath.Glob(filepath.Join(cache, "kvm-*.json"))
	if err != nil || len(answers) != 1 {
		t.Fatalf("answers %q, %v, want one", answers, err)
	}
	answer := answers[0]
	text, err := os.ReadFile(answer)
	if err != nil {
		t.Fatal(err)
	}
	kept := strings.Replace(string(text), fmt.Sprintf(`"ok":%t`, ok), fmt.Sprintf(`"ok":%t`, !ok), 1)
	if err := os.WriteFile(answer, []byte(kept), 0o600); err != nil {
		t.Fatal(err)
	}
	again, _, err := ProbeKVM(deadline(t), image.kernel, image.initrd, cache, Users{})
	if err != nil {
		t.Fatal(err)
	}
	if again == ok {
		t.Error("the kept answer was not used")
	}
	// Another guest is another question.
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if other, _, err := ProbeKVM(ctx, image.kernel, image.kernel, cache, Users{}); err == nil && other {
		t.Error("an answer was kept for another guest")
	}
}

// TestQuestion: answers for different guests lie side by side.
func TestQuestion(t *testing.T) {
	asked := map[string]string{}
	for name, m := range map[string]manifest{
		"one":          {Boot: "boot", Files: []string{"qemu", "kernel", "initrd"}},
		"another file": {Boot: "boot", Files: []string{"qemu", "kernel", "initrd2"}},
		"another boot": {Boot: "reboot", Files: []string{"qemu", "kernel", "initrd"}},
	} {
		if twin, ok := asked[m.question()]; ok {
			t.Errorf("%s and %s are one question", name, twin)
		}
		asked[m.question()] = name
	}
}
