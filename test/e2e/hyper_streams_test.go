package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sync/errgroup"
)

// hyperStreams has a container for each way into and out of it.
func hyperStreams() string {
	return flowPod("streams", "",
		shContainer("shell", "exec sleep 100000", ""),
		// 10 MB, each line with its number; one more and the kubelet would begin another file.
		shContainer("lines", `awk 'BEGIN { for (i = 0; i < 10000; i++) printf "%06d %0992d\n", i, 0 }'; exec sleep 100000`, ""),
		shContainer("echo", "exec cat", "stdin: true"),
		shContainer("terminal", "exec sh", "stdin: true, tty: true"),
		// It answers what it gets, until the client's half of the connection ends.
		shContainer("server", "exec nc -ll -p 9000 -e cat", ""))
}

// testHyperStreams has one after the other: they share a processor.
func testHyperStreams(t *testing.T, tn tenant) {
	tn.waitReady(t, "streams")
	for name, test := range map[string]func(*testing.T, tenant){
		"Logs": testHyperLogs, "Terminal": testHyperTerminal, "Exec": testHyperExec, "Attach": testHyperAttach, "PortForward": testHyperPortForward,
		"Copy": testHyperCopy,
	} {
		t.Run(name, func(t *testing.T) { test(t, tn) })
	}
}

// command is kubectl's command line as the tenant's owner.
func (tn tenant) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), append([]string{"-n", tn.ns}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(tn.owner), "HOME="+cluster.dir, "TERM=xterm")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// follow runs kubectl logs -f until the test is over.
func (tn tenant) follow(t *testing.T, pod, container string) *syncBuffer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd, out := tn.command(ctx, "logs", "-f", pod, "-c", container), &syncBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = cmd.Wait() }) // it was killed, or has ended with the container
	return out
}

func testHyperLogs(t *testing.T, tn tenant) {
	eventually(t, func() error {
		out, err := try(tn.owner, "logs", "streams", "-n", tn.ns, "-c", "lines", "--tail=1")
		if err != nil || !strings.HasPrefix(out, "009999 ") {
			return fmt.Errorf("the last line: %q, %w", out, err)
		}
		return nil
	})
	var want strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&want, "%06d %0992d\n", i, 0)
	}
	if got := kubectl(t, tn.owner, "logs", "streams", "-n", tn.ns, "-c", "lines"); got != want.String() {
		t.Errorf("the log has %d bytes, want %d, in order", len(got), want.Len())
	}
	if got := kubectl(t, tn.owner, "logs", "streams", "-n", tn.ns, "-c", "lines", "--since=1h", "--tail=10"); strings.Count(got, "\n") != 10 {
		t.Errorf("the last ten lines since an hour ago: %q", got)
	}
	eventually(t, func() error {
		if out, err := try(tn.owner, "logs", "streams", "-n", tn.ns, "-c", "lines", "--since=1s"); err != nil || out != "" {
			return fmt.Errorf("%d bytes are of the last second, %w", len(out), err)
		}
		return nil
	})
}

// testHyperExec passes 100 MB through a process in the pod, both ways at once.
func testHyperExec(t *testing.T, tn tenant) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	const size = 100_000_000
	var in hash.Hash
	var out *counter
	var stderr bytes.Buffer
	var err error
	// The end of the connection may overtake what is on its way, and kubectl then ends well:
	// kubernetes/kubernetes#124571. Then, and only then, it is asked again.
	for range 3 {
		in, out = sha256.New(), &counter{Hash: sha256.New()}
		cmd := tn.command(ctx, "exec", "-i", "streams", "-c", "shell", "--", "sh", "-c", "cat; echo to standard error >&2; exit 3")
		cmd.Stdin = io.TeeReader(io.LimitReader(mathrand.NewChaCha8([32]byte{}), size), in)
		stderr.Reset()
		cmd.Stdout, cmd.Stderr = out, &stderr
		if err = cmd.Run(); err != nil || out.n >= size {
			break
		}
	}
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("kubectl exec ended with %v, want 3: %s", err, &stderr)
	}
	if out.n != size || !bytes.Equal(in.Sum(nil), out.Sum(nil)) {
		t.Errorf("%d bytes came back of %d, or others", out.n, size)
	}
	if !strings.Contains(stderr.String(), "to standard error\n") {
		t.Errorf("standard error: %q", &stderr)
	}
	for script, want := range map[string]int{"exit 0": 0, "exit 255": 255, "kill -9 $$": 137, "kill -TERM $$": 143, "exec /no/such/file": 127} {
		err := tn.command(ctx, "exec", "streams", "-c", "shell", "--", "sh", "-c", script).Run()
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			t.Error(err)
		}
		if code != want {
			t.Errorf("exec of %q ended with %d, want %d", script, code, want)
		}
	}
}

// counter is a hash that counts.
type counter struct {
	hash.Hash
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return c.Hash.Write(b)
}

// typist is a person before a terminal.
type typist struct {
	t   *testing.T
	tty *os.File
	out *syncBuffer
	cmd *exec.Cmd
}

// sit runs kubectl on a terminal of the given size.
func (tn tenant) sit(t *testing.T, rows, columns uint16, args ...string) *typist {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := tn.command(ctx, args...)
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: rows, Cols: columns})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	p := &typist{t: t, tty: tty, out: &syncBuffer{}, cmd: cmd}
	done := make(chan struct{})
	go func() {
		_, _ = io.Copy(p.out, tty) // ends with an error, when the terminal is hung up
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was waited for, or killed
		tty.Close()
		<-done
	})
	return p
}

func (p *typist) types(text string) {
	p.t.Helper()
	if _, err := p.tty.WriteString(text); err != nil {
		p.t.Fatal(err)
	}
}

// reads waits until the screen shows what matches.
func (p *typist) reads(pattern string) {
	p.t.Helper()
	expression := regexp.MustCompile(pattern)
	eventually(p.t, func() error {
		if !expression.MatchString(p.out.String()) {
			return fmt.Errorf("the screen does not show %q: %q", pattern, p.out)
		}
		return nil
	})
}

func (p *typist) resize(rows, columns uint16) {
	p.t.Helper()
	if err := pty.Setsize(p.tty, &pty.Winsize{Rows: rows, Cols: columns}); err != nil {
		p.t.Fatal(err)
	}
}

func testHyperTerminal(t *testing.T, tn tenant) {
	p := tn.sit(t, 40, 101, "exec", "-it", "streams", "-c", "shell", "--", "sh")
	p.types("tty; echo begin$((1+1))\n")
	p.reads(`/dev/pts/\d+\s[^$]*begin2\s`)
	p.types("while ! stty size | grep -q '40 101'; do sleep 0.1; done; echo first$((1+1))\n")
	p.reads(`first2\s`)
	// A shell of its own: the first one's programs have a process group each.
	p.types(`sh -c 'trap "echo changed" WINCH; echo waiting$((1+1)); until stty size | grep "50 122"; do sleep 0.1; done; echo second$((1+1))'` + "\n")
	p.reads(`waiting2\s`)
	p.resize(50, 122)
	p.reads(`(?s)changed\r\n.*second2\s`)
	p.types("sh -c 'echo asleep$((1+1)); exec sleep 100000'\n")
	p.reads(`asleep2\s`)
	p.types("\x03")
	// Only now does the first shell take the next line.
	p.types("echo alive$((1+1))\n")
	p.reads(`alive2\s`)
	p.types("exit 42\n")
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 42 {
			t.Errorf("kubectl exec -it ended with %v, want 42: %q", err, p.out)
		}
	case <-time.After(patience):
		t.Errorf("kubectl exec -it does not end with its shell: %q", p.out)
	}
}

func testHyperAttach(t *testing.T, tn tenant) {
	log := tn.follow(t, "streams", "echo")
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := tn.command(ctx, "attach", "-i", "streams", "-c", "echo")
	out := &syncBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "through the attached input\n"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if !strings.Contains(out.String(), "through the attached input\n") {
			return fmt.Errorf("kubectl attach -i: %q", out)
		}
		return nil
	})
	eventually(t, func() error {
		if !strings.Contains(log.String(), "through the attached input\n") {
			return fmt.Errorf("kubectl logs -f: %q", log)
		}
		return nil
	})
	cancel()
	_ = cmd.Wait() // it was killed: who leaves does not end the container's input
	if status, err := tn.status("streams"); err != nil || status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("after the end of attach: %+v, %v", status.ContainerStatuses, err)
	}

	p := tn.sit(t, 33, 77, "attach", "-it", "streams", "-c", "terminal")
	p.types("until stty size | grep '33 77'; do sleep 0.1; done; echo attached$((1+1))\n")
	p.reads(`attached2\s`)
}

// testHyperPortForward has several connections at once, with much to carry. The server
// ends one when the client has ended its half.
func testHyperPortForward(t *testing.T, tn tenant) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd, out := tn.command(ctx, "port-forward", "pod/streams", ":9000", "--address=127.0.0.1"), &syncBuffer{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }() // it was killed
	var address string
	eventually(t, func() error {
		m := forwarding.FindStringSubmatch(out.String())
		if m == nil {
			return fmt.Errorf("kubectl port-forward: %s", out)
		}
		address = "127.0.0.1:" + m[1]
		return nil
	})
	var g errgroup.Group
	for i := range 4 {
		data := make([]byte, 8<<20)
		_, _ = rand.Read(data) // it does not fail
		g.Go(func() error {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp4", address)
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				return err
			}
			go func() { _, _ = c.Write(data) }() // what is missing is missed below
			got := make([]byte, len(data))
			if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
				return fmt.Errorf("connection %d: %d bytes came back of %d, or others, %w", i, n, len(data), err)
			}
			// containerd gives the other half a second: what it says has been said.
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			if n, err := c.Read(got); !errors.Is(err, io.EOF) {
				return fmt.Errorf("connection %d: after its half was closed: %d bytes, %w", i, n, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Errorf("%v; kubectl port-forward: %s", err, out)
	}
}

// testHyperCopy copies a tree both ways.
func testHyperCopy(t *testing.T, tn tenant) {
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	data := make([]byte, 5<<20)
	_, _ = rand.Read(data) // it does not fail
	want := map[string][]byte{"big": data, "sub/small": []byte("small\n"), "empty": nil}
	for name, content := range want {
		path := filepath.Join(there, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, content, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	remote := tn.ns + "/streams:/tmp/tree"
	kubectl(t, tn.owner, "cp", there, remote, "-c", "shell")
	kubectl(t, tn.owner, "cp", remote, back, "-c", "shell")
	for name, content := range want {
		if got, err := os.ReadFile(filepath.Join(back, name)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s came back with %d bytes of %d, %v", name, len(got), len(content), err)
		}
	}
}
