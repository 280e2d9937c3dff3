package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	types040 "github.com/containernetworking/cni/pkg/types/040"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// program is h8s-cni, built once for all tests.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "h8s-cni-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, pluginType)
		build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "h8s.io/hypernetes/cmd/h8s-cni")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build h8s-cni: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// runtime stands for the container runtime of a node.
type runtime struct {
	t                        *testing.T
	dir, bin, conf, cacheDir string
	version                  string
	stopAgent                func()
	mu                       sync.Mutex
	requests                 []Request
}

// newRuntime has a default network whose only plugin, "fake", writes down what
// it is called with.
func newRuntime(t *testing.T, handle Handler) *runtime {
	t.Helper()
	dir := t.TempDir()
	r := &runtime{t: t, dir: dir, bin: filepath.Join(dir, "bin"), conf: filepath.Join(dir, "net.d"), cacheDir: filepath.Join(dir, "cache"), version: "1.1.0"}
	for _, d := range []string{r.bin, r.conf} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.write("bin/fake", fmt.Sprintf(`#!/bin/sh
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_ARGS" >> %[1]s/calls
cat > %[1]s/stdin.$CNI_COMMAND
if [ -e %[1]s/fail ]; then echo '{"code": 42, "msg": "the fake plugin is told to fail"}'; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then echo '{"cniVersion": "1.1.0", "ips": [{"address": "192.0.2.5/24"}]}'; fi
`, dir), 0o755)
	r.write("net.d/10-default.conflist", `{"cniVersion": "1.1.0", "name": "default", "plugins": [{"type": "fake", "capabilities": {"portMappings": true}}]}`, 0o644)
	r.write("net.d/20-other.conf", `{"cniVersion": "1.0.0", "name": "other", "type": "absent"}`, 0o644)
	if err := InstallConflist(r.conf, r.socket()); err != nil {
		t.Fatal(err)
	}
	r.startAgent(handle)
	return r
}

func (r *runtime) socket() string { return filepath.Join(r.dir, "cni.sock") }

func (r *runtime) write(name, content string, mode os.FileMode) {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, name), []byte(content), mode); err != nil {
		r.t.Fatal(err)
	}
}

func (r *runtime) startAgent(handle Handler) {
	r.t.Helper()
	l, err := Listen(r.socket())
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, func(ctx context.Context, request Request) (Answer, error) {
			r.mu.Lock()
			r.requests = append(r.requests, request)
			r.mu.Unlock()
			return handle(ctx, request)
		}, slog.New(slog.DiscardHandler))
	}()
	var once sync.Once
	r.stopAgent = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				r.t.Error(err)
			}
		})
	}
	r.t.Cleanup(r.stopAgent)
}

// config is what the runtime hands to the plugin, with what it adds to the list's entry.
func (r *runtime) config(add map[string]any) []byte {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join(r.conf, ConflistName))
	if err != nil {
		r.t.Fatal(err)
	}
	var list struct {
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		r.t.Fatal(err)
	}
	config := list.Plugins[0]
	config["name"], config["cniVersion"], config["cacheDir"] = list.Name, r.version, r.cacheDir
	for k, v := range add {
		config[k] = v
	}
	if data, err = json.Marshal(config); err != nil {
		r.t.Fatal(err)
	}
	return data
}

func (r *runtime) exec(verb string, config []byte) ([]byte, *types.Error) {
	r.t.Helper()
	cmd := exec.Command(program)
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_PATH=" + r.bin, "PATH=" + os.Getenv("PATH"),
		"CNI_CONTAINERID=c1", "CNI_NETNS=" + filepath.Join(r.dir, "netns"), "CNI_IFNAME=eth0",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1",
		// There is no network namespace in these tests.
		"CNI_NETNS_OVERRIDE=1",
	}
	cmd.Stdin = bytes.NewReader(config)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		r.t.Fatal(err)
	}
	e := new(types.Error)
	if err := json.Unmarshal(stdout.Bytes(), e); err != nil {
		r.t.Fatalf("%s failed without an error object: %q, %q", verb, stdout.String(), stderr.String())
	}
	return nil, e
}

// calls are what the default network's plugin was called with.
func (r *runtime) calls() []string {
	r.t.Helper()
	data, err := os.ReadFile(filepath.Join(r.dir, "calls"))
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
}

const podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1"

func tenant(context.Context, Request) (Answer, error) {
	return Answer{Interface: &Interface{
		Address: netip.MustParseAddr("10.0.0.5"), Gateway: netip.MustParseAddr("169.254.1.1"), MAC: "02:00:00:00:00:05", MTU: 1450,
	}}, nil
}

func nobodys(context.Context, Request) (Answer, error) { return Answer{Delegate: true}, nil }

func done(context.Context, Request) (Answer, error) { return Answer{}, nil }

func TestAddTenant(t *testing.T) {
	for _, v := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(v, func(t *testing.T) {
			r := newRuntime(t, tenant)
			r.version = v
			out, e := r.exec("ADD", r.config(nil))
			if e != nil {
				t.Fatal(e)
			}
			if v == "0.4.0" {
				result := &types040.Result{}
				if err := json.Unmarshal(out, result); err != nil {
					t.Fatal(err)
				}
				if got := result.IPs[0].Address; got.String() != "10.0.0.5/32" || result.CNIVersion != v {
					t.Errorf("got %s", out)
				}
			} else {
				result := &types100.Result{}
				if err := json.Unmarshal(out, result); err != nil {
					t.Fatal(err)
				}
				if result.CNIVersion != v || result.IPs[0].Address.String() != "10.0.0.5/32" || result.IPs[0].Gateway.String() != "169.254.1.1" ||
					result.Interfaces[0].Name != "eth0" || result.Interfaces[0].Mac != "02:00:00:00:00:05" || result.Routes[0].Dst.String() != "0.0.0.0/0" {
					t.Errorf("got %s", out)
				}
			}
			want := []Request{{Verb: Add, ContainerID: "c1", Netns: filepath.Join(r.dir, "netns"), IfName: "eth0", Pod: Pod{"shop", "web", "u1"}}}
			if diff := cmp.Diff(want, r.requests); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff([]string{""}, r.calls()); diff != "" {
				t.Errorf("the default network was called: %s", diff)
			}
		})
	}
}

func TestDelegation(t *testing.T) {
	r := newRuntime(t, nobodys)
	out, e := r.exec("ADD", r.config(map[string]any{"runtimeConfig": map[string]any{
		"portMappings": []any{map[string]any{"hostPort": 80, "containerPort": 8080}}, "bandwidth": map[string]any{"ingressRate": 1},
	}}))
	if e != nil {
		t.Fatal(e)
	}
	if !bytes.Contains(out, []byte("192.0.2.5/24")) {
		t.Errorf("result: %s", out)
	}
	// The plugin gets the capabilities that it declares, and no others.
	stdin, err := os.ReadFile(filepath.Join(r.dir, "stdin.ADD"))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(stdin, &config); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"portMappings": []any{map[string]any{"hostPort": 80.0, "containerPort": 8080.0}}}
	if diff := cmp.Diff(want, config["runtimeConfig"]); diff != "" || config["name"] != "default" {
		t.Errorf("configuration %s: %s", stdin, diff)
	}
	for _, verb := range []string{"CHECK", "STATUS", "DEL", "DEL"} {
		if _, e := r.exec(verb, r.config(nil)); e != nil {
			t.Fatalf("%s: %v", verb, e)
		}
	}
	if _, e := r.exec("GC", r.config(map[string]any{"cni.dev/valid-attachments": []any{map[string]any{"containerID": "c9", "ifname": "eth0"}}})); e != nil {
		t.Fatal(e)
	}
	got := r.calls()
	wantCalls := []string{"ADD c1 eth0 " + podArgs, "CHECK c1 eth0 " + podArgs, "STATUS   ", "DEL c1 eth0 " + podArgs, "DEL c1 eth0 " + podArgs, "GC   "}
	if diff := cmp.Diff(wantCalls, got, cmpopts.AcyclicTransformer("trim", strings.TrimSpace)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]types.GCAttachment{{ContainerID: "c9", IfName: "eth0"}}, r.requests[len(r.requests)-1].ValidAttachments); diff != "" {
		t.Error(diff)
	}
}

func TestErrors(t *testing.T) {
	notReady := func(context.Context, Request) (Answer, error) {
		return Answer{}, fmt.Errorf("attach: %w", NewError(types.ErrTryAgainLater, "Network acme is not ready: %s", "no ID"))
	}
	tests := map[string]struct {
		handle  Handler
		prepare func(*runtime)
		verb    string
		config  map[string]any
		code    uint
		message string
	}{
		"the agent's code and text": {
			handle: notReady, verb: "ADD", code: types.ErrTryAgainLater, message: "Network acme is not ready: no ID",
		},
		"an error without a code": {
			handle: func(context.Context, Request) (Answer, error) { return Answer{}, errors.New("broken") },
			verb:   "ADD", code: types.ErrInternal, message: "broken",
		},
		"an empty answer to ADD":     {handle: done, verb: "ADD", code: types.ErrInternal, message: "of one version"},
		"ADD without agent":          {verb: "ADD", code: types.ErrTryAgainLater, message: "does not answer"},
		"DEL without agent":          {verb: "DEL", code: types.ErrTryAgainLater, message: "does not answer"},
		"CHECK without agent":        {verb: "CHECK", code: types.ErrTryAgainLater, message: "does not answer"},
		"STATUS without agent":       {verb: "STATUS", code: types.ErrPluginNotAvailable, message: "does not answer"},
		"STATUS of a starting agent": {handle: notReady, verb: "STATUS", code: types.ErrPluginNotAvailable, message: "not ready"},
		"a socket nobody listens on": {
			prepare: func(r *runtime) { r.write("cni.sock", "", 0o600) },
			verb:    "DEL", code: types.ErrTryAgainLater, message: "does not answer",
		},
		"the default network fails": {
			handle: nobodys, prepare: func(r *runtime) { r.write("fail", "", 0o600) },
			verb: "ADD", code: 42, message: "told to fail",
		},
		"ADD without default network": {
			handle: nobodys, prepare: func(r *runtime) { r.removeDefault() },
			verb: "ADD", code: types.ErrInternal, message: "no default network is configured",
		},
		"STATUS without default network": {
			handle: done, prepare: func(r *runtime) { r.removeDefault() },
			verb: "STATUS", code: types.ErrPluginNotAvailable, message: "no default network is configured",
		},
		"a default network that is not valid": {
			handle: nobodys, prepare: func(r *runtime) { r.write("net.d/05-broken.conflist", "{", 0o644) },
			verb: "ADD", code: types.ErrInternal, message: "05-broken.conflist is not valid",
		},
		"GC that does not say what is valid": {handle: done, verb: "GC", code: types.ErrInvalidNetworkConfig, message: "refused"},
		"a configuration without socket": {
			handle: done, verb: "ADD", config: map[string]any{"socket": ""}, code: types.ErrInvalidNetworkConfig, message: "lacks socket",
		},
		"a version from the future": {
			handle: done, verb: "ADD", config: map[string]any{"cniVersion": "9.0.0"}, code: types.ErrIncompatibleCNIVersion, message: "incompatible",
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := newRuntime(t, tc.handle)
			if tc.handle == nil {
				r.stopAgent()
				if err := os.Remove(r.socket()); err != nil {
					t.Fatal(err)
				}
			}
			if tc.prepare != nil {
				tc.prepare(r)
			}
			_, e := r.exec(tc.verb, r.config(tc.config))
			if e == nil {
				t.Fatal("no error")
			}
			if e.Code != tc.code || !strings.Contains(e.Error(), tc.message) {
				t.Errorf("got code %d: %s; want %d: %s", e.Code, e, tc.code, tc.message)
			}
			// containerd takes these for success of a DEL.
			if tc.verb == "DEL" && (strings.Contains(e.Error(), "not found") || strings.Contains(e.Error(), "no such file or directory")) {
				t.Errorf("containerd would take this for success: %s", e)
			}
		})
	}
}

func (r *runtime) removeDefault() {
	for _, name := range []string{"10-default.conflist", "20-other.conf"} {
		if err := os.Remove(filepath.Join(r.conf, name)); err != nil {
			r.t.Fatal(err)
		}
	}
}

func TestDelWithoutDefaultNetwork(t *testing.T) {
	r := newRuntime(t, nobodys)
	r.removeDefault()
	if _, e := r.exec("DEL", r.config(nil)); e != nil {
		t.Error(e)
	}
}

func TestDelOfDelegatedWithoutAgent(t *testing.T) {
	r := newRuntime(t, nobodys)
	if _, e := r.exec("ADD", r.config(nil)); e != nil {
		t.Fatal(e)
	}
	r.stopAgent()
	if _, e := r.exec("DEL", r.config(nil)); e != nil {
		t.Errorf("the default network has a record: %v", e)
	}
	if _, e := r.exec("DEL", r.config(nil)); e == nil {
		t.Error("there is no record any more, so only the agent can tell")
	}
}

func TestGCNothingValid(t *testing.T) {
	for name, valid := range map[string]any{"null": nil, "empty": []any{}} {
		t.Run(name, func(t *testing.T) {
			r := newRuntime(t, done)
			if _, e := r.exec("GC", r.config(map[string]any{"cni.dev/valid-attachments": valid})); e != nil {
				t.Fatal(e)
			}
			if len(r.requests) != 1 || len(r.requests[0].ValidAttachments) != 0 {
				t.Errorf("got %+v", r.requests)
			}
			stdin, err := os.ReadFile(filepath.Join(r.dir, "stdin.GC"))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Contains(stdin, []byte(`"cni.dev/valid-attachments":[]`)) {
				t.Errorf("the default network got %s", stdin)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	r := newRuntime(t, done)
	out, e := r.exec("VERSION", nil)
	if e != nil || !bytes.Contains(out, []byte(`["0.4.0","1.0.0","1.1.0"]`)) {
		t.Errorf("got %s, %v", out, e)
	}
}

// A request under way is finished although its caller is gone, and before Serve returns.
func TestServeFinishesRequests(t *testing.T) {
	begun, finished := make(chan struct{}), make(chan struct{})
	release := make(chan struct{})
	r := newRuntime(t, func(ctx context.Context, _ Request) (Answer, error) {
		close(begun)
		<-release
		if ctx.Err() == nil {
			close(finished)
		}
		return Answer{}, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = call(ctx, r.socket(), Request{Verb: Add})
	}()
	<-begun
	cancel()
	<-gone
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		r.stopAgent()
	}()
	close(release)
	<-stopped
	select {
	case <-finished:
	default:
		t.Fatal("the request was cut off")
	}
}

func TestListenReplaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "cni.sock")
	first, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	first.Close() // must not take the successor's socket with it
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, second, nobodys, slog.New(slog.NewTextHandler(io.Discard, nil))) }()
	if answer, err := call(ctx, path, Request{Verb: Add}); err != nil || !answer.Delegate {
		t.Errorf("got %+v, %v", answer, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	conf, bin := filepath.Join(dir, "net.d"), filepath.Join(dir, "bin")
	source := filepath.Join(dir, "source")
	for _, content := range []string{"old", "new"} {
		if err := os.WriteFile(source, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := InstallPlugin(source, bin); err != nil {
			t.Fatal(err)
		}
		if err := InstallConflist(conf, "/run/h8s/cni.sock"); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(bin, pluginType))
	if err != nil || string(data) != "new" {
		t.Errorf("got %q, %v", data, err)
	}
	if info, err := os.Stat(filepath.Join(bin, pluginType)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("got %v, %v", info, err)
	}
	list, err := loadConfig(filepath.Join(conf, ConflistName))
	if err != nil || list.Name != networkName || list.Plugins[0].Network.Type != pluginType {
		t.Errorf("got %+v, %v", list, err)
	}
	for _, d := range []string{conf, bin} {
		if entries, _ := os.ReadDir(d); len(entries) != 1 {
			t.Errorf("%s: %v", d, entries)
		}
	}
	for range 2 {
		if err := Uninstall(bin, conf); err != nil {
			t.Error(err)
		}
	}
	if entries, _ := os.ReadDir(conf); len(entries) != 0 {
		t.Errorf("left: %v", entries)
	}
}
