package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// TestHyper uses pods that are virtual machines by every way that a tenant has to a
// pod. What they are on a Network, TestIsolation, TestServices and TestProbes show:
// each has pods of both sandboxes.
func TestHyper(t *testing.T) {
	tn := newTenant(t, "hyper", "10.0.0.0/16", "hyper", "gvisor")
	tn.run(t, hyperWhole(), hyperSharedPID(), hyperStreams(), hyperPolicies(), hyperStopping(), hyperOOM(), hyperSecure())
	t.Run("pods", func(t *testing.T) {
		for name, test := range map[string]func(*testing.T, tenant){
			"Kernel": testHyperKernel, "Containers": testHyperContainers, "Identity": testHyperIdentity, "SharedPID": testHyperSharedPID,
			"Debug": testHyperDebug, "Policies": testHyperPolicies, "Stopping": testHyperStopping, "OOM": testHyperOOM, "Secure": testHyperSecure,
			"Streams": testHyperStreams,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, tn)
			})
		}
	})
	kubectl(t, tn.owner, "delete", "pods", "--all", "-n", tn.ns, "--wait=false")
	t.Run("Metrics", func(t *testing.T) { testHyperMetrics(t, tn) })
}

// shContainer is a container, in YAML's flow style, that runs a script. All pods of the
// class BestEffort share one weight of 2 beside the thousands of others, too little for
// machines that start together.
func shContainer(name, script, fields string) string {
	if !strings.Contains(fields, "resources:") {
		fields = strings.TrimSuffix("resources: {requests: {cpu: 20m}}, "+fields, ", ")
	}
	if fields != "" {
		fields = ", " + fields
	}
	command, err := json.Marshal(strings.ReplaceAll(script, "$$", "$$$$")) // the kubelet takes one away
	if err != nil {
		panic(err) // a string is always JSON
	}
	return fmt.Sprintf(`{name: %s, image: "localhost/busybox:latest", imagePullPolicy: Never, command: [sh, -c, %s]%s}`, name, command, fields)
}

// flowPod is a pod in YAML's flow style: fields of its spec, and its containers.
func flowPod(name, fields string, containers ...string) string {
	if !strings.Contains(fields, "terminationGracePeriodSeconds") {
		fields = strings.TrimSuffix("terminationGracePeriodSeconds: 1, "+fields, ", ")
	}
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {app: %s}}, spec: {%s, containers: [%s]}}`,
		name, name, fields, strings.Join(containers, ", "))
}

// shIn runs a script in a container of a pod; what it prints is returned.
func (tn tenant) shIn(t testing.TB, pod, container, script string) string {
	t.Helper()
	return kubectl(t, tn.owner, "exec", "-n", tn.ns, pod, "-c", container, "--", "sh", "-c", script)
}

// showsIn waits until a script prints this in a container of a pod, whose own script may be late.
func (tn tenant) showsIn(t testing.TB, pod, container, script, want string) {
	t.Helper()
	eventually(t, func() error {
		out, err := try(tn.owner, "exec", "-n", tn.ns, pod, "-c", container, "--", "sh", "-c", script)
		if err == nil && strings.TrimSpace(out) != want {
			err = fmt.Errorf("%s: %s: %q, want %q", container, script, out, want)
		}
		return err
	})
}

// status is what the API server says of a pod.
func (tn tenant) status(pod string) (corev1.PodStatus, error) {
	var p corev1.Pod
	out, err := try(tn.owner, "get", "pod", pod, "-n", tn.ns, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &p)
	}
	return p.Status, err
}

// hyperWhole has everything that a pod's own description says of its containers.
func hyperWhole() string {
	const shared = "volumeMounts: [{name: shared, mountPath: /shared}]"
	identity := `volumeMounts: [{name: shared, mountPath: /shared}, {name: all, mountPath: /all}], resources: {requests: {memory: 16Mi}, limits: {memory: 64Mi, cpu: "1"}}, env: [
		{name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}, {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}},
		{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}},
		{name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory}}}, {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}]`
	return "{apiVersion: v1, kind: ConfigMap, metadata: {name: hyper}, data: {key: of the ConfigMap}}\n---\n" +
		"{apiVersion: v1, kind: Secret, metadata: {name: hyper}, stringData: {key: of the Secret}}\n---\n" +
		"{apiVersion: v1, kind: Service, metadata: {name: hyper-names}, spec: {clusterIP: None, selector: {app: whole}, ports: [{port: 80}]}}\n---\n" +
		flowPod("whole", fmt.Sprintf(`hostname: named, subdomain: hyper-names, hostAliases: [{ip: 192.0.2.1, hostnames: [alias.example]}],
	dnsConfig: {searches: [search.example], options: [{name: ndots, value: "3"}]},
	volumes: [{name: shared, emptyDir: {}}, {name: all, projected: {sources: [
		{configMap: {name: hyper, items: [{key: key, path: config}]}}, {secret: {name: hyper, items: [{key: key, path: secret}]}},
		{downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: memory, resourceFieldRef: {containerName: one, resource: limits.memory}}]}},
		{serviceAccountToken: {path: token, audience: hyper.example}}]}}],
	initContainers: [%s, %s, %s]`,
			shContainer("first", "echo first >/shared/order; echo of first >/own; echo -n first has ended >/tmp/said", shared+", terminationMessagePath: /tmp/said"),
			shContainer("side", "echo side >>/shared/order; echo of side >/own; mkdir /www; echo on port 7000 >/www/index.html; exec httpd -f -p 7000 -h /www",
				shared+", restartPolicy: Always, startupProbe: {exec: {command: [wget, -q, -O, /dev/null, http://127.0.0.1:7000/]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 30}"),
			shContainer("second", "wget -q -O /dev/null http://127.0.0.1:7000/ && echo second >>/shared/order", shared)),
			shContainer("one", "echo of one >/own; mkdir /www; echo on loopback >/www/index.html; httpd -p 127.0.0.1:7001 -h /www; exec sleep 10001", identity),
			shContainer("two", "echo of two >/own; exec sleep 10002", shared),
			// The hook's end is the container's Ready.
			shContainer("three", "echo of three >/own; exec sleep 10003", shared+`, lifecycle: {postStart: {exec: {command: [sh, -c, "echo hook >/hooked"]}}}`))
}

// testHyperKernel: the kernel is the guest's, and there is nothing of the host's to see.
func testHyperKernel(t *testing.T, tn tenant) {
	tn.waitReady(t, "whole")
	// Not all of its containers live on.
	kubectl(t, tn.owner, "wait", "-n", tn.ns, "--for=jsonpath={.status.phase}=Running", "pod/oom", "--timeout=4m")
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(host.Release[:])
	for _, container := range []string{"side", "one", "two", "three"} {
		if got := strings.TrimSpace(tn.shIn(t, "whole", container, "uname -r")); got == release || !strings.Contains(got, "cloud") {
			t.Errorf("%s: uname -r is %q; the host's is %q, the guest's is Debian's cloud kernel", container, got, release)
		}
	}
	for _, file := range []string{"/proc/version", "/proc/cmdline", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/hostname", "/etc/machine-id"} {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // not every host has a machine-id
		}
		if got := tn.shIn(t, "whole", "one", "cat "+file+" 2>/dev/null; true"); strings.TrimSpace(got) == strings.TrimSpace(string(content)) {
			t.Errorf("%s is the host's: %q", file, got)
		}
	}
	// Neither the host's kernel log, nor its processes, mounts, memory or links.
	out := tn.shIn(t, "whole", "one", `dmesg 2>/dev/null; cat /proc/[0-9]*/cmdline | tr '\0' ' '; cat /proc/self/mountinfo /proc/net/dev; true`)
	for _, mark := range []string{release, "kubelet", "containerd", "qemu", cluster.root, "/var/lib/kubelet", "kubernetes.io~", "h8su", "veth"} {
		if strings.Contains(out, mark) {
			t.Errorf("%q is to be seen:\n%s", mark, out)
		}
	}
	// One container's limit is not the pod's; the limits of all are.
	for _, m := range []struct {
		pod, container string
		least, most    int
	}{{"whole", "one", 400 << 10, 512 << 10}, {"oom", "neighbour", 128 << 10, 256 << 10}} {
		var kilobytes int
		if _, err := fmt.Sscan(tn.shIn(t, m.pod, m.container, "sed -n 's/^MemTotal: *//p' /proc/meminfo"), &kilobytes); err != nil || kilobytes < m.least || kilobytes > m.most {
			t.Errorf("MemTotal of %s is %d kB, %v; want %d to %d", m.pod, kilobytes, err, m.least, m.most)
		}
	}
	if processes := strings.Fields(tn.shIn(t, "whole", "two", "ls /proc | grep '^[0-9]'")); len(processes) > 6 {
		t.Errorf("the container sees %d processes, and has its own alone", len(processes))
	}
}

func testHyperContainers(t *testing.T, tn tenant) {
	tn.waitReady(t, "whole")
	status, err := tn.status("whole")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range append(slices.Clone(status.InitContainerStatuses), status.ContainerStatuses...) {
		if s.RestartCount != 0 {
			t.Errorf("container %s was started %d times again", s.Name, s.RestartCount)
		}
		if run := s.State.Terminated; run != nil && (run.ExitCode != 0 || run.Reason != "Completed") {
			t.Errorf("init container %s: %+v", s.Name, run)
		}
	}
	if m := status.InitContainerStatuses[0].State.Terminated; m == nil || m.Message != "first has ended" {
		t.Errorf("the termination message of the first init container: %+v", m)
	}
	tn.showsIn(t, "whole", "two", "cat /shared/order", "first\nside\nsecond")
	for _, c := range []string{"side", "one", "two", "three"} {
		tn.showsIn(t, "whole", c, "cat /own", "of "+c)
	}
	for address, want := range map[string]string{"127.0.0.1:7001": "on loopback", "localhost:7000": "on port 7000"} {
		tn.showsIn(t, "whole", "three", "wget -q -O - http://"+address+"/", want)
	}
	if got := tn.shIn(t, "whole", "three", "cat /hooked"); got != "hook\n" {
		t.Errorf("the postStart hook left %q", got)
	}
}

// testHyperIdentity: names, resolver, downward API and projected volumes.
func testHyperIdentity(t *testing.T, tn tenant) {
	tn.waitReady(t, "whole")
	ip := tn.ip(t, "whole")
	node := kubectl(t, tn.owner, "get", "pod", "whole", "-n", tn.ns, "-o", "jsonpath={.spec.nodeName}")
	fqdn := "named.hyper-names." + tn.ns + ".svc.cluster.local"
	for command, want := range map[string]string{
		"hostname":                             "named",
		"hostname -f":                          fqdn,
		"echo $POD $POD_IP $NODE $MEMORY $CPU": fmt.Sprintf("whole %s %s %d 1", ip, node, 64<<20),
		"cat /all/config":                      "of the ConfigMap",
		"cat /all/secret":                      "of the Secret",
		"cat /all/labels":                      `app="whole"`,
		"cat /all/memory":                      fmt.Sprint(64 << 20),
		// The claims of a token are its second part.
		"cut -d. -f2 /all/token | tr _- /+ | base64 -d 2>/dev/null | grep -o hyper.example":  "hyper.example",
		"sed -n 's/^192.0.2.1[[:space:]]*//p' /etc/hosts":                                    "alias.example",
		"grep -c '" + ip + ".*" + fqdn + ".*named' /etc/hosts":                               "1",
		"grep -o search.example /etc/resolv.conf":                                            "search.example",
		"grep -o 'ndots:[0-9]*' /etc/resolv.conf":                                            "ndots:3",
		"nslookup " + fqdn + " | sed -n 's/^Address: *//p' | tail -1":                        ip,
		"ping -c 1 -W 1 alias.example | grep -o -m 1 192.0.2.1":                              "192.0.2.1",
		"cat /var/run/secrets/kubernetes.io/serviceaccount/namespace":                        tn.ns,
		"ip -4 -o address show eth0 | grep -o '" + strings.ReplaceAll(ip, ".", "[.]") + "/'": ip + "/",
		"(echo >/all/config) 2>&1 | grep -o 'Read-only file system'":                         "Read-only file system",
		"stat -f -c %T /dev/shm":                                                             "tmpfs",
		"echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT":                             "10.96.0.1:443",
	} {
		tn.showsIn(t, "whole", "one", command+" || true", want)
	}
}

func hyperSharedPID() string {
	return flowPod("shared", "shareProcessNamespace: true, terminationGracePeriodSeconds: 20",
		shContainer("one", "exec sleep 20001", ""), shContainer("two", "echo of two >/own; exec sleep 20002", ""))
}

func testHyperSharedPID(t *testing.T, tn tenant) {
	tn.waitReady(t, "shared", "whole")
	eventually(t, func() error { // a shell becomes what it executes a moment after it was started
		out, err := try(tn.owner, "exec", "-n", tn.ns, "shared", "-c", "one", "--", "ps")
		if err == nil && (!strings.Contains(out, "sleep 20001") || !strings.Contains(out, "sleep 20002")) {
			err = fmt.Errorf("containers that share a PID namespace see:\n%s", out)
		}
		return err
	})
	if out := tn.shIn(t, "shared", "one", "cat /proc/$(pidof sleep | cut -d' ' -f1)/comm"); out != "sleep\n" {
		t.Errorf("a process of the pod is %q", out)
	}
	if out := tn.shIn(t, "shared", "one", "cat /own 2>&1; true"); strings.Contains(out, "of two") {
		t.Errorf("a container sees another's file: %q", out)
	}
	// Without it, each has its own.
	for own, other := range map[string]string{"one": "sleep 10002", "two": "sleep 10001"} {
		if out := tn.shIn(t, "whole", own, "ps"); strings.Contains(out, other) || !strings.Contains(out, " 1 ") {
			t.Errorf("container %s sees processes of others:\n%s", own, out)
		}
	}
}

// testHyperDebug adds ephemeral containers, as the pod's owner.
func testHyperDebug(t *testing.T, tn tenant) {
	tn.waitReady(t, "whole")
	debug := func(container, script string, flags ...string) string {
		args := append([]string{
			"debug", "whole", "-n", tn.ns, "--image=localhost/busybox:latest", "--image-pull-policy=Never", "--profile=baseline", "--container=" + container,
		}, flags...)
		kubectl(t, tn.owner, append(args, "--", "sh", "-c", script)...)
		var log string
		eventually(t, func() error {
			status, err := tn.status("whole")
			if err != nil {
				return err
			}
			for _, s := range status.EphemeralContainerStatuses {
				if s.Name == container && s.State.Terminated != nil {
					log, err = try(tn.owner, "logs", "whole", "-n", tn.ns, "-c", container)
					return err
				}
			}
			return fmt.Errorf("ephemeral container %s: %+v", container, status.EphemeralContainerStatuses)
		})
		return log
	}
	// In the target's PID namespace: there it sees the target's files, too.
	if out := debug("into-one", "ps; cat /proc/1/root/own; uname -r", "--target=one"); !strings.Contains(out, "sleep 10001") || strings.Contains(out, "sleep 10002") || !strings.Contains(out, "of one\n") || !strings.Contains(out, "cloud") {
		t.Errorf("kubectl debug --target=one:\n%s", out)
	}
	refused(t, tn.owner, "", "SYS_PTRACE", "debug", "whole", "-n", tn.ns, "--image=localhost/busybox:latest", "--container=by-default", "--", "true")
	if out := debug("beside", "ps; wget -q -O - http://127.0.0.1:7001/"); strings.Contains(out, "sleep 1000") || !strings.Contains(out, "on loopback") {
		t.Errorf("kubectl debug:\n%s", out)
	}
}

func hyperPolicies() string {
	// How often each has started is in a volume, which outlives them.
	lives := func(then string) string {
		return `n=$(cat /lives/$ME 2>/dev/null || echo 0); echo $((n+1)) >/lives/$ME; echo life $((n+1)); ` + then
	}
	container := func(name, then, fields string) string {
		if fields != "" {
			fields = ", " + fields
		}
		return shContainer(name, lives(then), "volumeMounts: [{name: lives, mountPath: /lives}], env: [{name: ME, value: "+name+"}]"+fields)
	}
	const volume = "volumes: [{name: lives, emptyDir: {}}]"
	return flowPod("always", volume,
		container("zero", "[ $n -ge 1 ] && exec sleep 100000; exit 0", ""),
		container("five", "[ $n -ge 1 ] && exec sleep 100000; exit 5", ""),
		// A rule of its own, against the pod's.
		container("never", "exit 0", "restartPolicy: Never")) + "\n---\n" +
		flowPod("onfailure", "restartPolicy: OnFailure, "+volume,
			container("zero", "exit 0", ""), container("three", "[ $n -ge 1 ] && exit 0; exit 3", "")) + "\n---\n" +
		flowPod("never", "restartPolicy: Never, "+volume,
			container("zero", "exit 0", ""), container("seven", "exit 7", ""),
			container("killed", "sh -c 'kill -KILL $$'; exit $?", ""), container("terminated", "sh -c 'kill -TERM $$'; exit $?", ""))
}

// exits waits until containers have ended, and compares their exit codes; reasons are
// Completed for 0 and Error for others.
func (tn tenant) exits(t *testing.T, pod string, want map[string]int32) {
	t.Helper()
	got := map[string]int32{}
	eventually(t, func() error {
		status, err := tn.status(pod)
		if err != nil {
			return err
		}
		for _, s := range status.ContainerStatuses {
			end := s.State.Terminated
			if _, ok := want[s.Name]; !ok {
				continue
			}
			if end == nil {
				end = s.LastTerminationState.Terminated
			}
			if end == nil {
				return fmt.Errorf("container %s has not ended: %+v", s.Name, s.State)
			}
			got[s.Name] = end.ExitCode
			if reason := map[bool]string{true: "Completed", false: "Error"}[end.ExitCode == 0]; end.Reason != reason {
				t.Errorf("container %s ended with %d because of %q, want %q", s.Name, end.ExitCode, end.Reason, reason)
			}
		}
		return nil
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("exit codes of %s (- want + got):\n%s", pod, diff)
	}
}

func (tn tenant) restarts(t *testing.T, pod string, want map[string]int32) {
	t.Helper()
	eventually(t, func() error {
		status, err := tn.status(pod)
		if err != nil {
			return err
		}
		got := map[string]int32{}
		for _, s := range status.ContainerStatuses {
			got[s.Name] = s.RestartCount
		}
		if diff := cmp.Diff(want, got); diff != "" {
			return fmt.Errorf("restarts of %s (- want + got):\n%s", pod, diff)
		}
		return nil
	})
}

func testHyperPolicies(t *testing.T, tn tenant) {
	tn.exits(t, "never", map[string]int32{"zero": 0, "seven": 7, "killed": 137, "terminated": 143})
	tn.restarts(t, "never", map[string]int32{"zero": 0, "seven": 0, "killed": 0, "terminated": 0})
	tn.restarts(t, "always", map[string]int32{"zero": 1, "five": 1, "never": 0})
	tn.exits(t, "always", map[string]int32{"zero": 0, "five": 5, "never": 0})
	for previous, want := range map[string]string{"--previous=true": "life 1\n", "--previous=false": "life 2\n"} {
		eventually(t, func() error {
			out, err := try(tn.owner, "logs", "always", "-n", tn.ns, "-c", "five", previous)
			if err != nil || out != want {
				return fmt.Errorf("kubectl logs %s: %q, want %q, %w", previous, out, want, err)
			}
			return nil
		})
	}
	tn.restarts(t, "onfailure", map[string]int32{"zero": 0, "three": 1})
	for pod, want := range map[string]corev1.PodPhase{"never": corev1.PodFailed, "onfailure": corev1.PodSucceeded, "always": corev1.PodRunning} {
		eventually(t, func() error {
			if status, err := tn.status(pod); err != nil || status.Phase != want {
				return fmt.Errorf("pod %s is %s, want %s, %w", pod, status.Phase, want, err)
			}
			return nil
		})
	}
}

// hyperStopping's finalizer keeps the pod after its end, to read what it ended with.
func hyperStopping() string {
	// The first process of a PID namespace of its own would survive a signal that it does not handle.
	p := flowPod("stopping", "shareProcessNamespace: true, terminationGracePeriodSeconds: 30",
		shContainer("polite", `trap 'cat /hooked; echo terminated; exit 0' TERM; echo ready; while :; do sleep 0.1; done`, `lifecycle: {preStop: {exec: {command: [sh, -c, "echo hook >/hooked"]}}}`),
		shContainer("stubborn", `trap 'echo refused' TERM; echo ready; while :; do sleep 0.1; done`, ""),
		shContainer("plain", "exec sleep 100000", ""))
	return strings.Replace(p, "labels:", "finalizers: [example.com/e2e], labels:", 1)
}

func testHyperStopping(t *testing.T, tn tenant) {
	tn.waitReady(t, "stopping")
	logs := map[string]*syncBuffer{}
	for _, c := range []string{"polite", "stubborn"} {
		logs[c] = tn.follow(t, "stopping", c)
		eventually(t, func() error {
			if !strings.Contains(logs[c].String(), "ready") {
				return fmt.Errorf("log of %s: %s", c, logs[c])
			}
			return nil
		})
	}
	release := once(func() {
		kubectl(t, tn.owner, "patch", "pod", "stopping", "-n", tn.ns, "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	})
	t.Cleanup(release)
	begin := time.Now()
	kubectl(t, tn.owner, "delete", "pod", "stopping", "-n", tn.ns, "--wait=false")
	tn.exits(t, "stopping", map[string]int32{"polite": 0, "stubborn": 137, "plain": 143})
	if took := time.Since(begin); took < 25*time.Second {
		t.Errorf("the pod ended after %s: its grace period is 30 seconds", took)
	}
	for c, want := range map[string]string{"polite": "ready\nhook\nterminated\n", "stubborn": "ready\nrefused\n"} {
		eventually(t, func() error {
			if got := logs[c].String(); got != want {
				return fmt.Errorf("%s printed %q, want %q", c, got, want)
			}
			return nil
		})
	}
	release()
}

func hyperOOM() string {
	return flowPod("oom", "restartPolicy: Never",
		shContainer("hog", "sleep 1; exec tail /dev/zero", "resources: {limits: {memory: 40Mi}}"),
		shContainer("neighbour", "exec sleep 100000", "resources: {limits: {memory: 40Mi}}"),
		// Its first process lives on when another is killed.
		shContainer("parent", "sleep 1; tail /dev/zero; echo the child ended with $?; exec sleep 100000", "resources: {limits: {memory: 40Mi}}"))
}

func testHyperOOM(t *testing.T, tn tenant) {
	eventually(t, func() error {
		status, err := tn.status("oom")
		if err != nil {
			return err
		}
		for _, s := range status.ContainerStatuses {
			if s.Name == "hog" {
				if end := s.State.Terminated; end == nil || end.Reason != "OOMKilled" || end.ExitCode != 137 {
					return fmt.Errorf("container hog: %+v, want an end by OOMKilled with 137", s.State)
				}
			}
		}
		return nil
	})
	eventually(t, func() error { // it may start when the other one has ended
		status, err := tn.status("oom")
		if err != nil {
			return err
		}
		for _, s := range status.ContainerStatuses {
			if s.Name == "neighbour" && (s.State.Terminated != nil || s.RestartCount != 0) {
				t.Fatalf("container %s: %+v", s.Name, s.State)
			}
			if s.Name == "neighbour" && s.State.Running == nil {
				return fmt.Errorf("container %s: %+v", s.Name, s.State)
			}
		}
		return nil
	})
	if out := tn.shIn(t, "oom", "neighbour", "echo lives"); out != "lives\n" {
		t.Errorf("the neighbour: %q", out)
	}
	eventually(t, func() error {
		out, err := try(tn.owner, "logs", "oom", "-n", tn.ns, "-c", "parent")
		if err == nil && !strings.Contains(out, "the child ended with 137\n") {
			err = fmt.Errorf("the container whose child was killed: %q", out)
		}
		return err
	})
}

// hyperSecure's containers print what they have, and live on.
func hyperSecure() string {
	const show = "id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; "
	container := func(name, script, context string) string {
		return shContainer(name, show+script+"; echo done; exec sleep 100000", "volumeMounts: [{name: v, mountPath: /v}], securityContext: "+context)
	}
	return flowPod("secure", `volumes: [{name: v, emptyDir: {}}], securityContext: {fsGroup: 3000, supplementalGroups: [4000],
		sysctls: [{name: net.ipv4.ip_local_port_range, value: "40000 40100"}, {name: kernel.shm_rmid_forced, value: "1"}]}`,
		container("user", "touch /v/file && stat -c '%u:%g' /v/file; touch /root/x || echo no /root", "{runAsUser: 1000, runAsGroup: 2000, runAsNonRoot: true}"),
		container("root", "chown 7:7 /tmp && echo may chown; mount -t tmpfs none /mnt || echo may not mount; cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced", "{}"),
		container("dropped", "chown 7:7 /v || echo may not chown; touch /x || echo read-only; touch /v/y && echo volume is writable",
			"{capabilities: {drop: [ALL], add: [NET_BIND_SERVICE]}, readOnlyRootFilesystem: true, allowPrivilegeEscalation: false}"),
		// A user namespace is what the default profile keeps from those without CAP_SYS_ADMIN.
		container("filtered", "unshare -U true && echo made a namespace || echo may not make a namespace", "{seccompProfile: {type: RuntimeDefault}}"),
		container("unfiltered", "unshare -U true && echo made a namespace || echo may not make a namespace", "{}"))
}

func testHyperSecure(t *testing.T, tn tenant) {
	tn.waitReady(t, "secure")
	const (
		defaults = "00000000a80425fb" // containerd's default capabilities
		none     = "0000000000000000"
		bind     = "0000000000000400"
	)
	caps := func(inheritable, permitted, bounding string) string {
		return fmt.Sprintf("CapInh:\t%s\nCapPrm:\t%s\nCapEff:\t%s\nCapBnd:\t%s\nCapAmb:\t%s\n", inheritable, permitted, permitted, bounding, none)
	}
	for container, want := range map[string]string{
		"user":       "1000\n2000\n2000 3000 4000\n" + caps(none, none, defaults) + "NoNewPrivs:\t0\nSeccomp:\t0\n1000:3000\nno /root\n",
		"root":       "0\n0\n0 3000 4000\n" + caps(none, defaults, defaults) + "NoNewPrivs:\t0\nSeccomp:\t0\nmay chown\nmay not mount\n40000\t40100\n1\n",
		"dropped":    "0\n0\n0 3000 4000\n" + caps(none, bind, bind) + "NoNewPrivs:\t1\nSeccomp:\t0\nmay not chown\nread-only\nvolume is writable\n",
		"filtered":   "0\n0\n0 3000 4000\n" + caps(none, defaults, defaults) + "NoNewPrivs:\t0\nSeccomp:\t2\nmay not make a namespace\n",
		"unfiltered": "0\n0\n0 3000 4000\n" + caps(none, defaults, defaults) + "NoNewPrivs:\t0\nSeccomp:\t0\nmade a namespace\n",
	} {
		eventually(t, func() error {
			out, err := try(tn.owner, "logs", "secure", "-n", tn.ns, "-c", container)
			if err != nil || !strings.Contains(out, "done\n") {
				return fmt.Errorf("log of %s: %q, %w", container, out, err)
			}
			// What the programs complain about goes there, too, by a stream of its own.
			lines := slices.DeleteFunc(strings.SplitAfter(out, "\n"), func(line string) bool {
				return slices.ContainsFunc([]string{"touch: ", "chown: ", "mount: ", "unshare: "}, func(p string) bool { return strings.HasPrefix(line, p) })
			})
			if diff := cmp.Diff(want+"done\n", strings.Join(lines, "")); diff != "" {
				t.Errorf("%s (- want + got):\n%s", container, diff)
			}
			return nil
		})
	}
	host, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil || strings.Contains(string(host), "40100") {
		t.Errorf("the host's ip_local_port_range is %q, %v", host, err)
	}
}
