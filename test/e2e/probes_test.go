package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"h8s.io/hypernetes/test/e2e/probe"
)

// TestProbes runs pods of two tenants on one node, one's in gVisor and the other's
// virtual machines, and has kubelet and their owners reach into them by every way
// there is.
func TestProbes(t *testing.T) {
	node := nodes(t)[1] // not the API server's: kubectl's requests cross the underlay
	a, b := newTenant(t, "probes-a", "10.0.0.0/16"), newTenant(t, "probes-b", "10.0.0.0/16", "hyper")
	both := []tenant{a, b}
	for _, tn := range both {
		tn.run(t, tlsSecret(t), probedPod("healthy", node, true), probedPod("sick", node, false), hookedPod("hooked", node), badHookPod("badhook", node))
	}
	for _, tn := range both {
		tn.waitReady(t, "healthy", "hooked")
	}
	for _, tn := range both {
		t.Run(tn.name, func(t *testing.T) {
			t.Run("Addresses", func(t *testing.T) { testAddresses(t, tn, node) })
			t.Run("HealthyPasses", func(t *testing.T) { testHealthy(t, tn) })
			t.Run("SickFails", func(t *testing.T) { testSick(t, tn, node) })
			t.Run("Hooks", func(t *testing.T) { testHooks(t, tn) })
			t.Run("Logs", func(t *testing.T) { testLogs(t, tn) })
			t.Run("Exec", func(t *testing.T) { testExec(t, tn) })
			t.Run("Copy", func(t *testing.T) { testCopy(t, tn) })
			t.Run("PortForward", func(t *testing.T) { testForwardedPorts(t, tn) })
		})
	}
	t.Run("ForeignHost", func(t *testing.T) { testForeignHost(t, a, b) })
	t.Run("LivenessRestarts", func(t *testing.T) { testLiveness(t, a, b) })
}

// tlsSecret is a certificate for the https and grpc servers; kubelet does not verify it.
func tlsSecret(t testing.TB) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "probed"}, DNSNames: []string{"probed"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, b []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: tls}\ntype: kubernetes.io/tls\ndata: {tls.crt: %s, tls.key: %s}\n",
		encode("CERTIFICATE", cert), encode("PRIVATE KEY", der))
}

// probes are the readiness probes of probedPod, by its containers' names: one
// that passes and one that must fail, each against the same server.
var probes = map[string]struct{ pass, fail string }{ //nolint:gochecknoglobals // a table
	"http":  {`httpGet: {path: "/echo?msg=ready&code=200", port: http}`, `httpGet: {path: "/echo?msg=sick&code=500", port: http}`},
	"https": {"httpGet: {path: /hostname, port: 8443, scheme: HTTPS}", "httpGet: {path: /hostname, port: 8443, scheme: HTTP}"},
	"tcp":   {"tcpSocket: {port: 9000}", "tcpSocket: {port: 9999}"},
	"grpc":  {"grpc: {port: 5000, service: probed}", "grpc: {port: 5000, service: another}"},
	"exec":  {`exec: {command: [cat, /etc/passwd]}`, `exec: {command: [cat, /no/such/file]}`},
}

// probedPod has a container for each kind of probe: readiness, liveness and
// startup are all of that kind. Of a sick pod, readiness fails. The timeouts are
// long: on a busy machine a slow answer is not a wrong one.
func probedPod(name, node string, healthy bool) string {
	container := func(kind, command string) string {
		p := probes[kind]
		readiness := p.pass + ", periodSeconds: 2"
		if !healthy {
			readiness = p.fail + ", periodSeconds: 20"
		}
		return fmt.Sprintf(`
  - name: %s
    image: localhost/agnhost:latest
    imagePullPolicy: Never
    command: %s
    volumeMounts: [{name: tls, mountPath: /tls}]
    startupProbe: {%s, periodSeconds: 5, timeoutSeconds: 10, failureThreshold: 20}
    livenessProbe: {%s, periodSeconds: 4, timeoutSeconds: 15}
    readinessProbe: {%s, timeoutSeconds: 10}`, kind, command, p.pass, p.pass, readiness)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %s}
  volumes: [{name: tls, secret: {secretName: tls}}]
  containers:%s
    ports: [{name: http, containerPort: 8080}]%s%s%s%s
`, name, node,
		container("http", "[/agnhost, netexec, --http-port=8080, --udp-port=-1]"),
		container("https", "[/agnhost, netexec, --http-port=8443, --udp-port=-1, --tls-cert-file=/tls/tls.crt, --tls-private-key-file=/tls/tls.key]"),
		// An application that listens on loopback only, beside the server of the tcp probe.
		container("tcp", `[sh, -c, "mkdir /tmp/www && echo on loopback >/tmp/www/index.html && httpd -p 127.0.0.1:7070 -h /tmp/www && exec httpd -f -p 9000 -h /tmp/www"]`),
		container("grpc", "[/agnhost, grpc-health-checking, --port=5000, --http-port=5001, --service=probed]"),
		container("exec", "[/agnhost, pause]"))
}

// hookedPod has an http postStart hook, whose server is the container before
// it, and an http preStop hook. The server logs who called.
func hookedPod(name, node string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 10
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - name: server
    image: localhost/agnhost:latest
    imagePullPolicy: Never
    args: [netexec, --http-port=8080, --udp-port=-1]
    ports: [{name: http, containerPort: 8080}]
    lifecycle:
      # Containers start in order, and the next one after this hook.
      postStart: {exec: {command: [sh, -c, "until wget -q -O /dev/null http://127.0.0.1:8080/; do sleep 0.1; done"]}}
      preStop: {httpGet: {path: "/echo?msg=prestop-was-called", port: http}}
  - name: caller
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
    lifecycle:
      postStart: {httpGet: {path: "/echo?msg=poststart-was-called", port: 8080}}
`, name, node)
}

// badHookPod has a postStart hook to a port on which nobody listens.
func badHookPod(name, node string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - name: c
    image: localhost/busybox:latest
    imagePullPolicy: Never
    command: [sleep, "100000"]
    lifecycle: {postStart: {httpGet: {path: /, port: 9999}}}
`, name, node)
}

func testAddresses(t *testing.T, tn tenant, node string) {
	cidr := netip.MustParsePrefix("10.0.0.0/16")
	nodeIP := kubectl(t, admin, "get", "node", node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	for _, p := range []string{"healthy", "sick", "hooked"} {
		var got struct {
			Status struct {
				PodIP  string
				PodIPs []struct{ IP string }
				HostIP string
			}
		}
		eventually(t, func() error { // nobody has waited for the sick pod
			out, err := try(tn.owner, "get", "pod", p, "-n", tn.ns, "-o", "json")
			if err != nil {
				return err
			}
			if err := json.Unmarshal([]byte(out), &got); err == nil && got.Status.PodIP == "" {
				return fmt.Errorf("%s has no address yet", p)
			}
			return err
		})
		ip, err := netip.ParseAddr(got.Status.PodIP)
		if err != nil || !cidr.Contains(ip) {
			t.Errorf("%s: status.podIP %q is not in %s", p, got.Status.PodIP, cidr)
		}
		if len(got.Status.PodIPs) != 1 || got.Status.PodIPs[0].IP != got.Status.PodIP {
			t.Errorf("%s: status.podIPs is %v, podIP %s", p, got.Status.PodIPs, got.Status.PodIP)
		}
		if got.Status.HostIP != nodeIP {
			t.Errorf("%s: status.hostIP is %q, the node's address %q", p, got.Status.HostIP, nodeIP)
		}
	}
	out, err := try(tn.owner, "exec", "-n", tn.ns, "healthy", "-c", "exec", "--", "ip", "-4", "-o", "address", "show", "eth0")
	if err != nil || !strings.Contains(out, "inet "+tn.ip(t, "healthy")+"/") {
		t.Errorf("the pod itself sees %q, %v; its status.podIP is %s", out, err, tn.ip(t, "healthy"))
	}
}

// containerReady is status.containerStatuses[].ready by name.
func containerReady(tn tenant, pod string) (ready map[string]bool, restarts int, err error) {
	var got struct {
		Status struct {
			ContainerStatuses []struct {
				Name         string
				Ready        bool
				Started      bool
				RestartCount int
			}
		}
	}
	out, err := try(tn.owner, "get", "pod", pod, "-n", tn.ns, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &got)
	}
	ready = map[string]bool{}
	for _, c := range got.Status.ContainerStatuses {
		ready[c.Name] = c.Ready
		restarts += c.RestartCount
		if !c.Started && err == nil {
			err = fmt.Errorf("%s: the startup probe of container %s has not passed", pod, c.Name)
		}
	}
	return ready, restarts, err
}

func testHealthy(t *testing.T, tn tenant) {
	want := map[string]bool{}
	for kind := range probes {
		want[kind] = true
	}
	eventually(t, func() error { // an answer that is late makes a container not ready for a moment
		got, restarts, err := containerReady(tn, "healthy")
		if restarts != 0 {
			t.Fatalf("%d restarts: a liveness probe failed", restarts)
		}
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			return fmt.Errorf("%w; ready containers (- want + got):\n%s", err, diff)
		}
		return nil
	})
}

// testSick shows that each kind of probe tells a healthy server from a sick one. It asks
// for the kubelet's count: of events it sends each pod a few only.
func testSick(t *testing.T, tn tenant, node string) {
	eventually(t, func() error {
		metrics, err := try(admin, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/probes")
		if err != nil {
			return err
		}
		failed := map[string]bool{}
		for line := range strings.Lines(metrics) {
			if m := probeTotal.FindStringSubmatch(line); m != nil && m[2] == tn.ns && m[3] == "sick" {
				failed[m[1]] = failed[m[1]] || m[4] == "failed"
				if m[4] == "successful" {
					t.Errorf("the readiness probe %s has passed: %s", m[1], line)
				}
			}
		}
		for kind := range probes {
			if !failed[kind] {
				return fmt.Errorf("the readiness probe %s has not failed: %v", kind, failed)
			}
		}
		return nil
	})
	want := map[string]bool{}
	for kind := range probes {
		want[kind] = false
	}
	var got map[string]bool
	var restarts int
	eventually(t, func() (err error) { // the API server learns of it a little later
		got, restarts, err = containerReady(tn, "sick")
		return err
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ready containers (- want + got):\n%s", diff)
	}
	if restarts != 0 {
		t.Errorf("%d restarts: startup and liveness probes, which pass, failed", restarts)
	}
}

// probeTotal is a line of the kubelet's /metrics/probes: container, namespace, pod and result of a readiness probe.
var probeTotal = regexp.MustCompile(`^prober_probe_total\{container="([^"]*)",namespace="([^"]*)",pod="([^"]*)",pod_uid="[^"]*",probe_type="Readiness",result="([^"]*)"\}`)

func testHooks(t *testing.T, tn tenant) {
	eventually(t, func() error {
		out, err := try(tn.owner, "logs", "-n", tn.ns, "hooked", "-c", "server")
		if err == nil && !strings.Contains(out, "poststart-was-called") {
			err = fmt.Errorf("the http postStart hook did not arrive: %s", out)
		}
		return err
	})
	eventually(t, func() error {
		out, err := try(tn.owner, "get", "events", "-n", tn.ns, "--field-selector", "involvedObject.name=badhook,reason=FailedPostStartHook", "-o", "name")
		if err != nil || out == "" {
			return fmt.Errorf("control: a postStart hook that nobody answers did not fail: %q, %w", out, err)
		}
		return nil
	})

	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	follow := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), "logs", "-f", "-n", tn.ns, "hooked", "-c", "server")
	follow.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(tn.owner), "HOME="+cluster.dir)
	log := &syncBuffer{}
	follow.Stdout, follow.Stderr = log, log
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if !strings.Contains(log.String(), "poststart-was-called") {
			return fmt.Errorf("kubectl logs -f: %s", log)
		}
		return nil
	})
	kubectl(t, tn.owner, "delete", "pod", "hooked", "-n", tn.ns, "--timeout=4m")
	_ = follow.Wait() // it ends with the container, one way or another
	if !strings.Contains(log.String(), "prestop-was-called") {
		t.Errorf("the http preStop hook did not arrive: %s", log)
	}
}

func testLogs(t *testing.T, tn tenant) {
	eventually(t, func() error {
		out, err := try(tn.owner, "logs", "-n", tn.ns, "healthy", "-c", "http", "--tail=200")
		if err != nil || !strings.Contains(out, "msg=ready") {
			return fmt.Errorf("the log does not show kubelet's probes: %s, %w", out, err)
		}
		return nil
	})
}

func testExec(t *testing.T, tn tenant) {
	out, err := tryInput(tn.owner, "through standard input", "exec", "-i", "-n", tn.ns, "healthy", "-c", "exec", "--", "sh", "-c", "cat; hostname; exit 7")
	if out != "through standard inputhealthy\n" || err == nil || !strings.Contains(err.Error(), "exit code 7") {
		t.Errorf("exec printed %q and ended with %v, want an exit code of 7", out, err)
	}
}

func testCopy(t *testing.T, tn tenant) {
	data := make([]byte, 3<<20)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	there, back := filepath.Join(dir, "there"), filepath.Join(dir, "back")
	if err := os.WriteFile(there, data, 0o600); err != nil {
		t.Fatal(err)
	}
	remote := tn.ns + "/healthy:/tmp/copied"
	kubectl(t, tn.owner, "cp", there, remote, "-c", "exec")
	sum := sha256.Sum256(data)
	if out := kubectl(t, tn.owner, "exec", "-n", tn.ns, "healthy", "-c", "exec", "--", "sha256sum", "/tmp/copied"); !strings.HasPrefix(out, hex.EncodeToString(sum[:])) {
		t.Errorf("the copy in the pod is another file: %s", out)
	}
	kubectl(t, tn.owner, "cp", remote, back, "-c", "exec")
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the copy back is another file: %d bytes, %v", len(got), err)
	}
}

var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:(\d+) -> (\d+)`)

// testForwardedPorts reaches a server that listens on every address, and one that listens on loopback only.
func testForwardedPorts(t *testing.T, tn tenant) {
	for name, tc := range map[string]struct{ port, path, want string }{
		"every address": {"8080", "/hostname", "healthy"},
		"loopback only": {"7070", "/", "on loopback\n"},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), "port-forward", "-n", tn.ns, "pod/healthy", ":"+tc.port, "--address=127.0.0.1")
			cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(tn.owner), "HOME="+cluster.dir)
			out := &syncBuffer{}
			cmd.Stdout, cmd.Stderr = out, out
			if err := cmd.Start(); err != nil {
				cancel()
				t.Fatal(err)
			}
			defer func() { cancel(); _ = cmd.Wait() }() // it was killed
			var local string
			eventually(t, func() error {
				m := forwarding.FindStringSubmatch(out.String())
				if m == nil {
					return fmt.Errorf("kubectl port-forward: %s", out)
				}
				local = m[1]
				return nil
			})
			client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
			for range 3 { // each connection is a stream of its own
				resp, err := client.Get("http://127.0.0.1:" + local + tc.path)
				if err != nil {
					t.Fatalf("%v; kubectl port-forward: %s", err, out)
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || string(body) != tc.want {
					t.Errorf("got %q, %v; want %q", body, err, tc.want)
				}
			}
		})
	}
}

// testForeignHost: kubelet, which is on the node, would connect for the tenant
// to wherever a probe or hook says. A tenant says nothing but ports.
func testForeignHost(t *testing.T, tn, rival tenant) {
	for _, host := range []string{rival.ip(t, "healthy"), "127.0.0.1", "169.254.169.254"} {
		http, tcp := fmt.Sprintf("httpGet: {host: %s, path: /, port: 8080}", host), fmt.Sprintf("tcpSocket: {host: %s, port: 8080}", host)
		for _, field := range []string{
			"readinessProbe: {" + http + "}", "livenessProbe: {" + tcp + "}", "startupProbe: {" + http + "}",
			"lifecycle: {postStart: {" + http + "}}", "lifecycle: {preStop: {" + http + "}}",
		} {
			manifest := fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: foreign}, spec: {containers: [{name: c, image: localhost/busybox, %s}]}}", field)
			refused(t, tn.owner, manifest, "host", "create", "-n", tn.ns, "-f", "-", "--dry-run=server")
		}
	}
	manifest := "{apiVersion: v1, kind: Pod, metadata: {name: own}, spec: {containers: [{name: c, image: localhost/busybox, readinessProbe: {httpGet: {path: /, port: 8080}}}]}}"
	if _, err := tryInput(tn.owner, manifest, "create", "-n", tn.ns, "-f", "-", "--dry-run=server"); err != nil {
		t.Errorf("control: a probe of the pod itself: %v", err)
	}
}

// testLiveness makes the server of one tenant sick: kubelet restarts that
// container, and the other tenant's pod on the same node stays as it is.
func testLiveness(t *testing.T, sick, well tenant) {
	restarts := func(tn tenant) string {
		return kubectl(t, tn.owner, "get", "pod", "healthy", "-n", tn.ns, "-o", `jsonpath={.status.containerStatuses[?(@.name=="grpc")].restartCount}`)
	}
	kubectl(t, sick.owner, "exec", "-n", sick.ns, "healthy", "-c", "grpc", "--", "wget", "-q", "-O", "-", "http://127.0.0.1:5001/make-not-serving")
	eventually(t, func() error {
		if n := restarts(sick); n != "1" {
			return fmt.Errorf("the container with a failing liveness probe was restarted %s times", n)
		}
		return nil
	})
	sick.waitReady(t, "healthy")
	if n := restarts(well); n != "0" {
		t.Errorf("the other tenant's container was restarted %s times", n)
	}
}

// testProbesOfTwins makes one and then the other of two pods with one address
// sick: kubelet on each node must ask its own.
func (r *rivals) testProbesOfTwins(t *testing.T) {
	if r.twinA == "" {
		t.Fatal("no twins")
	}
	twins := map[string]struct {
		tenant
		pod string
	}{"a": {r.a, r.twinA}, "b": {r.b, r.twinB}}
	condition := func(who string) string {
		w := twins[who]
		return kubectl(t, w.owner, "get", "pod", w.pod, "-n", w.ns, "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status}`)
	}
	turn := func(who, command, want string) {
		t.Helper()
		w := twins[who]
		if out, err := w.sh(w.pod, command); err != nil {
			t.Fatalf("%s %v", out, err)
		}
		eventually(t, func() error {
			if got := condition(who); got != want {
				return fmt.Errorf("%s/%s: Ready is %s, want %s", w.ns, w.pod, got, want)
			}
			return nil
		})
	}
	for _, tc := range []struct{ sick, well string }{{"a", "b"}, {"b", "a"}} {
		turn(tc.sick, "rm "+podReady, "False")
		if got := condition(tc.well); got != "True" {
			t.Errorf("twin %s is healthy, but Ready is %s as its twin %s is sick", tc.well, got, tc.sick)
		}
		// Their owners see the same: the address answers for each tenant with its own pod.
		for _, w := range twins {
			from := r.pods[w.name][0]
			dialAll(t, w.tenant, from, []check{{Target: probe.Target{Proto: "http", Address: r.ip(w.tenant, w.pod) + ":8080"}, want: w.pod}})
		}
		turn(tc.sick, "touch "+podReady, "True")
	}
}
