package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
)

// podStats is what the kubelet of a pod's node says of it.
func podStats(tn tenant, node, pod string) (stats.PodStats, error) {
	out, err := try(admin, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/stats/summary")
	if err != nil {
		return stats.PodStats{}, err
	}
	var summary stats.Summary
	if err := json.Unmarshal([]byte(out), &summary); err != nil {
		return stats.PodStats{}, err
	}
	for _, p := range summary.Pods {
		if p.PodRef.Namespace == tn.ns && p.PodRef.Name == pod {
			return p, nil
		}
	}
	return stats.PodStats{}, fmt.Errorf("the kubelet of %s has no stats of %s", node, pod)
}

// testHyperMetrics: what kubectl top and autoscalers read is non-zero and right.
func testHyperMetrics(t *testing.T, tn tenant) {
	const pod, held = "metered", 100 << 20
	tn.run(t, flowPod(pod, "",
		shContainer("busy", "while :; do :; done", ""),
		// dd holds its one block: nobody reads it.
		shContainer("memory", "dd if=/dev/zero bs=100M count=1 | sleep 100000", ""),
		shContainer("idle", "exec sleep 100000", "")))
	tn.waitReady(t, pod)
	node := kubectl(t, tn.owner, "get", "pod", pod, "-n", tn.ns, "-o", "jsonpath={.spec.nodeName}")

	type use struct {
		cpu  uint64 // nanoseconds, in all
		at   time.Time
		work uint64 // bytes
	}
	read := func() (map[string]use, use, error) {
		p, err := podStats(tn, node, pod)
		if err != nil {
			return nil, use{}, err
		}
		of := func(cpu *stats.CPUStats, memory *stats.MemoryStats) use {
			if cpu == nil || memory == nil || cpu.UsageCoreNanoSeconds == nil || memory.WorkingSetBytes == nil {
				return use{}
			}
			return use{*cpu.UsageCoreNanoSeconds, cpu.Time.Time, *memory.WorkingSetBytes}
		}
		containers := map[string]use{}
		for _, c := range p.Containers {
			containers[c.Name] = of(c.CPU, c.Memory)
		}
		whole := of(p.CPU, p.Memory)
		for _, name := range []string{"busy", "memory", "idle"} {
			if u := containers[name]; u.cpu == 0 || u.work == 0 {
				return nil, whole, fmt.Errorf("container %s: %+v", name, u)
			}
		}
		if whole.cpu == 0 || whole.work == 0 {
			return nil, whole, fmt.Errorf("the pod: %+v", whole)
		}
		return containers, whole, nil
	}
	var first, last map[string]use
	var firstPod, lastPod use
	eventually(t, func() (err error) {
		if first, firstPod, err = read(); err == nil && first["memory"].work < held {
			err = fmt.Errorf("the container that holds %d bytes has %d", held, first["memory"].work)
		}
		return err
	})
	eventually(t, func() (err error) {
		if last, lastPod, err = read(); err == nil && (last["busy"].at.Sub(first["busy"].at) < 5*time.Second || lastPod.at.Equal(firstPod.at)) {
			err = fmt.Errorf("no new measurement: of the container at %s, of the pod at %s", last["busy"].at, lastPod.at)
		}
		return err
	})
	share := func(before, after use) float64 {
		return float64(after.cpu-before.cpu) / float64(after.at.Sub(before.at).Nanoseconds())
	}
	// By the guest's clock: what the node gives the machine less of, the guest does not know.
	if got := share(first["busy"], last["busy"]); got < 0.5 || got > 1.2 {
		t.Errorf("the busy container uses %.2f processors, and it has one", got)
	}
	if got := share(first["idle"], last["idle"]); got > 0.1 {
		t.Errorf("the idle container uses %.2f processors", got)
	}
	if got := share(firstPod, lastPod); got < 0.1 || got > 2.2 {
		t.Errorf("the pod uses %.2f processors", got)
	}
	if got := last["memory"].work; got > held+held/4 {
		t.Errorf("the container that holds %d bytes has %d", held, got)
	}
	if got := last["idle"].work; got > held/4 {
		t.Errorf("the idle container has %d bytes", got)
	}
	// The node pays for the guest's kernel, too, but for no more than the pod's machine has.
	if got := lastPod.work; got < held || got > 600<<20 {
		t.Errorf("the pod has %d bytes", got)
	}

	// The same, in the form that the metrics server reads.
	eventually(t, func() error {
		out, err := try(admin, "get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics/resource")
		if err != nil {
			return err
		}
		for metric, least := range map[string]float64{
			`container_cpu_usage_seconds_total{container="busy",namespace="` + tn.ns + `",pod="` + pod + `"}`:    1,
			`container_memory_working_set_bytes{container="memory",namespace="` + tn.ns + `",pod="` + pod + `"}`: held,
			`pod_cpu_usage_seconds_total{namespace="` + tn.ns + `",pod="` + pod + `"}`:                           1,
			`pod_memory_working_set_bytes{namespace="` + tn.ns + `",pod="` + pod + `"}`:                          held,
			`container_start_time_seconds{container="idle",namespace="` + tn.ns + `",pod="` + pod + `"}`:         1e9,
		} {
			m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(metric) + ` (\S+)`).FindStringSubmatch(out)
			if m == nil {
				return fmt.Errorf("there is no %s", metric)
			}
			if value, err := strconv.ParseFloat(m[1], 64); err != nil || value < least {
				return fmt.Errorf("%s is %s, %w", metric, m[1], err)
			}
		}
		return nil
	})

	t.Run("Top", func(t *testing.T) {
		serveMetricsAPI(t, node)
		eventually(t, func() error {
			out, err := try(tn.owner, "top", "pod", pod, "-n", tn.ns, "--containers", "--no-headers")
			if err != nil {
				return err
			}
			for container, least := range map[string][2]int{"busy": {500, 0}, "memory": {0, 100}, "idle": {0, 0}} {
				m := regexp.MustCompile(`(?m)^` + pod + `\s+` + container + `\s+(\d+)m\s+(\d+)Mi`).FindStringSubmatch(out)
				if m == nil {
					return fmt.Errorf("kubectl top does not show container %s: %s", container, out)
				}
				cpu, _ := strconv.Atoi(m[1])
				memory, _ := strconv.Atoi(m[2])
				if cpu < least[0] || memory < least[1] {
					return fmt.Errorf("kubectl top shows container %s with %dm and %dMi: %s", container, cpu, memory, out)
				}
			}
			return nil
		})
	})
}

// metricsAPI registers a metrics server at an address, as its own manifests do.
const metricsAPI = `
{apiVersion: apiregistration.k8s.io/v1, kind: APIService, metadata: {name: v1beta1.metrics.k8s.io}, spec: {group: metrics.k8s.io, version: v1beta1,
	service: {name: metrics-server, namespace: kube-system}, insecureSkipTLSVerify: true, groupPriorityMinimum: 100, versionPriority: 100}}
---
{apiVersion: v1, kind: Service, metadata: {name: metrics-server, namespace: kube-system}, spec: {ports: [{name: https, port: 443, targetPort: %[2]s}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: metrics-server, namespace: kube-system, labels: {kubernetes.io/service-name: metrics-server}},
	addressType: IPv4, ports: [{name: https, port: %[2]s}], endpoints: [{addresses: [%[1]s], conditions: {ready: true}}]}
---
{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: "system:aggregated-metrics-reader", labels: {
	rbac.authorization.k8s.io/aggregate-to-view: "true", rbac.authorization.k8s.io/aggregate-to-edit: "true", rbac.authorization.k8s.io/aggregate-to-admin: "true"}},
	rules: [{apiGroups: [metrics.k8s.io], resources: [pods, nodes], verbs: [get, list, watch]}]}
`

// serveMetricsAPI gives the cluster Kubernetes' metrics server for the time of the
// test. It runs beside the nodes.
func serveMetricsAPI(t *testing.T, node string) {
	t.Helper()
	route := strings.Fields(onNode(t, node, "ip -4 route show default"))
	bridge := route[slices.Index(route, "via")+1]
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", bridge+":0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	listener.Close() // the server listens there next
	ctx, cancel := context.WithCancel(context.Background())
	kubeconfig := kubeconfigPath(admin)
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "metrics-server"), "--bind-address="+bridge, "--secure-port="+port, "--cert-dir="+t.TempDir(),
		"--kubeconfig="+kubeconfig, "--authentication-kubeconfig="+kubeconfig, "--authorization-kubeconfig="+kubeconfig,
		"--kubelet-preferred-address-types=InternalIP", "--kubelet-insecure-tls", "--metric-resolution=10s", "--kubelet-request-timeout=5s")
	log := &syncBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	manifests := fmt.Sprintf(metricsAPI, bridge, port)
	t.Cleanup(func() {
		if _, err := tryInput(admin, manifests, "delete", "--ignore-not-found", "-f", "-"); err != nil {
			t.Error(err)
		}
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("metrics-server: %s", log)
		}
	})
	apply(t, admin, manifests)
}
