package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"h8s.io/hypernetes/test/e2e/probe"
)

// probeProgram builds package probe's program, once.
var probeProgram = sync.OnceValues(func() (string, error) { //nolint:gochecknoglobals // a build to share
	path := filepath.Join(cluster.dir, "probe")
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./probe/main")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the probe: %w: %s", err, out)
	}
	return path, nil
})

// podProbe is where arm puts the probe.
const podProbe = "/tmp/probe"

// arm copies the probe into pods, as their owner: nothing that a tenant could not do.
func (tn tenant) arm(t testing.TB, pods ...string) {
	t.Helper()
	path, err := probeProgram()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var g errgroup.Group
	for _, p := range pods {
		g.Go(func() error {
			return poll(patience, func() error {
				_, err := tryInput(tn.owner, string(program), "exec", "-i", "-n", tn.ns, p, "--", "sh", "-c", "cat >"+podProbe+" && chmod +x "+podProbe)
				return err
			})
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatalf("copy the probe: %v", err)
	}
}

// dial dials all targets at once from a pod that is armed.
func (tn tenant) dial(t testing.TB, pod string, targets ...probe.Target) []probe.Outcome {
	t.Helper()
	return viaPod[probe.Outcome](t, tn, pod, "dial", targets)
}

// ask puts all questions to the name server of a pod that is armed; those again that a busy
// machine has not answered in time.
func (tn tenant) ask(t testing.TB, pod string, queries ...probe.Query) []probe.Answer {
	t.Helper()
	answers := make([]probe.Answer, len(queries))
	open := make([]int, len(queries))
	for i := range open {
		open[i] = i
	}
	_ = poll(time.Minute, func() error { // who asks sees what is missing
		var asked []probe.Query
		for _, i := range open {
			asked = append(asked, queries[i])
		}
		var late []int
		for n, a := range viaPod[probe.Answer](t, tn, pod, "dns", asked) {
			if answers[open[n]] = a; a.Late {
				late = append(late, open[n])
			}
		}
		if open = late; len(late) > 0 {
			return fmt.Errorf("%d questions are open", len(late))
		}
		return nil
	})
	return answers
}

func viaPod[Out, In any](t testing.TB, tn tenant, pod, verb string, in []In) []Out {
	t.Helper()
	var out []Out
	var err error
	for range 3 {
		var text string
		if text, err = tryInput(tn.owner, mustJSON(t, in), "exec", "-i", "-n", tn.ns, pod, "--", podProbe, verb); err == nil {
			err = json.Unmarshal([]byte(text), &out)
		}
		// On a busy machine kubectl may lose the end of what a program writes, and succeed
		// (kubernetes/kubernetes#124571). Of an answer that is cut off, nothing is known.
		var cut *json.SyntaxError
		if !errors.As(err, &cut) {
			break
		}
		t.Logf("probe in %s/%s: of the answer, only %d bytes have come", tn.ns, pod, len(text))
	}
	if err == nil && len(out) != len(in) {
		err = fmt.Errorf("%d answers to %d questions", len(out), len(in))
	}
	if err != nil {
		t.Fatalf("probe in %s/%s: %v", tn.ns, pod, err)
	}
	return out
}

func mustJSON(t testing.TB, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// netnsOf is the path of a tenant's pod's network namespace, as seen from the
// machine, by the node agent's own record.
func (tn tenant) netnsOf(t testing.TB, node, pod string) string {
	t.Helper()
	p, err := nodeInit(node)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join("/proc", strconv.Itoa(p.pid), "root")
	records, _ := filepath.Glob(filepath.Join(root, "var/lib/h8s/attachments/*.json"))
	for _, record := range records {
		var a struct{ Namespace, Pod, Netns string }
		data, err := os.ReadFile(record)
		if err != nil || json.Unmarshal(data, &a) != nil || a.Namespace != tn.ns || a.Pod != pod {
			continue
		}
		// As seen from here, an absolute link such as /var/run would lead out of root.
		return filepath.Join(root, strings.TrimPrefix(a.Netns, "/var"))
	}
	t.Fatalf("no attachment of %s/%s on node %s", tn.ns, pod, node)
	return ""
}

// nodeNetns is the path of a node's network namespace, as seen from the machine.
func nodeNetns(t testing.TB, node string) string {
	t.Helper()
	p, err := nodeInit(node)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("/proc/%d/ns/net", p.pid)
}

// probeIn is the probe's command line in a network namespace of the machine.
func probeIn(ctx context.Context, t testing.TB, netns string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := probeProgram()
	if err != nil {
		t.Fatal(err)
	}
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + netns, path}, args...)...)
}

// dialFrom dials all targets at once from a network namespace of the machine.
func dialFrom(t testing.TB, netns string, targets ...probe.Target) []probe.Outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := probeIn(ctx, t, netns, "dial")
	cmd.Stdin = strings.NewReader(mustJSON(t, targets))
	text, err := cmd.Output()
	var out []probe.Outcome
	if err == nil {
		err = json.Unmarshal(text, &out)
	}
	if err != nil || len(out) != len(targets) {
		t.Fatalf("dial from %s: %v: %s", netns, err, text)
	}
	return out
}

// sendFrom sends packets from a network namespace of the machine.
func sendFrom(t testing.TB, netns string, packets ...probe.Packet) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := probeIn(ctx, t, netns, "send")
	cmd.Stdin = strings.NewReader(mustJSON(t, packets))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("send: %v: %s", err, out)
	}
}

// sendFromPod sends packets from within a pod that is armed.
func (tn tenant) sendFromPod(pod, packets string) error {
	_, err := tryInput(tn.owner, packets, "exec", "-i", "-n", tn.ns, pod, "--", podProbe, "send")
	return err
}

// capture is what one network interface sees.
type capture struct {
	where string
	out   *syncBuffer
	done  chan error
}

// captureIn watches interface name of a network namespace for packets that
// contain mark, until one contains end or the test is over. It is listening
// when it returns.
func captureIn(t testing.TB, where, netns, name, mark, end string) *capture {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := probeIn(ctx, t, netns, "capture", name, mark, end)
	c := &capture{where: where, out: &syncBuffer{}, done: make(chan error, 1)}
	cmd.Stdout, cmd.Stderr = c.out, c.out
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	go func() { c.done <- cmd.Wait() }()
	t.Cleanup(func() {
		cancel()
		<-c.done
	})
	eventually(t, func() error {
		if !strings.Contains(c.out.String(), "ready\n") {
			return fmt.Errorf("capture in %s is not ready: %s", where, c.out.String())
		}
		return nil
	})
	return c
}

// lines waits for the packet that ends the capture, and returns all that were seen.
func (c *capture) lines(t testing.TB) []string {
	t.Helper()
	select {
	case err := <-c.done:
		c.done <- err
		if err != nil {
			t.Fatalf("capture in %s: %v: %s", c.where, err, c.out.String())
		}
	case <-time.After(patience):
		t.Fatalf("capture in %s: the control packet, which is allowed, did not arrive; seen: %s", c.where, c.out.String())
	}
	return strings.Split(strings.TrimSpace(strings.TrimPrefix(c.out.String(), "ready\n")), "\n")
}

// syncBuffer is a bytes.Buffer to write and read at once.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
