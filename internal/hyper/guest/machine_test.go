//go:build hyper

package guest_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// machine is a virtual machine with the guest of bin/hyper, and the ways to it.
type machine struct {
	t     testing.TB
	vm    *vm.VM
	host  *channel.Host
	http  *http.Client
	tasks taskapi.TTRPCTaskService
}

// boot starts a machine, which ends with the test.
func boot(t testing.TB, memory int64) *machine {
	t.Helper()
	return start(t, config(t, memory))
}

func config(t testing.TB, memory int64) vm.Config {
	t.Helper()
	bin, err := filepath.Abs("../../../bin/hyper")
	if err != nil {
		t.Fatal(err)
	}
	return vm.Config{
		ID: t.Name(), Dir: t.TempDir(),
		Kernel: filepath.Join(bin, "vmlinuz"), Initrd: filepath.Join(bin, "initrd.img"),
		CPUs: 1, Memory: memory, Accel: "tcg",
	}
}

func start(t testing.TB, c vm.Config) *machine {
	t.Helper()
	var console lockedBuffer
	c.Console = &console
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the guest's console:\n%s", console.String())
		}
	})
	started := time.Now()
	v, err := vm.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.Kill()
		<-v.Done()
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := v.AwaitGuest(ctx); err != nil {
		t.Fatal(err)
	}
	host, err := channel.NewHost(v.Channel())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	m := &machine{t: t, vm: v, host: host, http: httpClient(host)}
	stream, err := host.Open(ctx, channel.Task, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest served its channel %v after the start", time.Since(started).Round(time.Millisecond))
	client := ttrpc.NewClient(stream)
	t.Cleanup(func() { client.Close() })
	m.tasks = taskapi.NewTTRPCTaskClient(client)
	return m
}

// httpClient speaks with the control service.
func httpClient(host *channel.Host) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return host.Open(ctx, channel.Control, "")
		},
	}}
}

// call makes a request of the control service and returns the answer's body. A body that is
// no reader is sent as JSON.
func (m *machine) call(method, path string, body any) ([]byte, error) {
	var content io.Reader
	switch b := body.(type) {
	case nil:
	case io.Reader:
		content = b
	default:
		data, err := json.Marshal(b)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(data)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // also for cleaning up
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://guest"+path, content)
	if err != nil {
		return nil, err
	}
	answer, err := m.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, bytes.TrimSpace(text))
	}
	return text, err
}

// must makes a request that succeeds.
func (m *machine) must(method, path string, body any) []byte {
	m.t.Helper()
	answer, err := m.call(method, path, body)
	if err != nil {
		m.t.Fatal(err)
	}
	return answer
}

// lockedBuffer is a bytes.Buffer for two.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
