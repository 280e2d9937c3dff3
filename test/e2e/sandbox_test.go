package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// gvisorBoot is what the kernel log of a gVisor sandbox begins with; the host's
// kernel log has no such line.
const gvisorBoot = "Starting gVisor"

// TestSandbox starts containers by every way there is and looks at the kernel that
// they got; then it asks for what would weaken the sandbox.
func TestSandbox(t *testing.T) {
	tn := newTenant(t, "sandbox", "10.0.0.0/16")
	// A RuntimeClass that exists and works, and that the tenant may not use.
	apply(t, admin, "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: e2e-runc}\nhandler: runc\n")
	t.Cleanup(func() { _, _ = try(admin, "delete", "runtimeclass", "e2e-runc", "--ignore-not-found") })
	t.Run("Kernel", func(t *testing.T) { testKernel(t, tn) })
	t.Run("Forbidden", func(t *testing.T) { testForbiddenPods(t, tn) })
	t.Run("Annotations", func(t *testing.T) { testPodAnnotations(t, tn) })
	t.Run("Update", func(t *testing.T) { testForbiddenUpdates(t, tn) })
	t.Run("Templates", func(t *testing.T) { testForbiddenTemplates(t, tn) })
	t.Run("Services", func(t *testing.T) { testForbiddenServices(t, tn) })
	t.Run("NodeWithoutAgent", func(t *testing.T) { testNodeWithoutAgent(t, tn) })
}

// dmesgPod is the spec of a pod, in YAML's flow style, each of whose containers prints its kernel's log.
func dmesgPod(restartPolicy string) string {
	container := func(name, then, extra string) string {
		return fmt.Sprintf(`{name: %s, image: "localhost/busybox:latest", imagePullPolicy: Never, command: [sh, -c, "dmesg; %s"]%s}`, name, then, extra)
	}
	then := "exec sleep 1000"
	if restartPolicy != "Always" {
		then = "true"
	}
	return fmt.Sprintf(`{restartPolicy: %s, terminationGracePeriodSeconds: 0, initContainers: [%s, %s], containers: [%s, %s]}`,
		restartPolicy,
		container("init", "true", ""), container("sidecar", "exec sleep 1000", ", restartPolicy: Always"),
		container("main", then, ""), container("second", then, ", securityContext: {runAsUser: 1000, readOnlyRootFilesystem: true}"))
}

func testKernel(t *testing.T, tn tenant) {
	template := func(app string) string {
		return fmt.Sprintf("{metadata: {labels: {app: %s}}, spec: %s}", app, dmesgPod("Always"))
	}
	selector := func(app string) string { return fmt.Sprintf("selector: {matchLabels: {app: %s}}", app) }
	job := fmt.Sprintf("{metadata: {labels: {app: %%s}}, spec: %s}", dmesgPod("Never"))
	// By the label "app", how many pods carry it.
	pods := map[string]int{"bare": len(nodes(t)), "deployment": 1, "daemonset": len(nodes(t)), "statefulset": 1, "rc": 1, "job": 1, "cronjob": 1}
	manifests := []string{
		fmt.Sprintf("{apiVersion: apps/v1, kind: Deployment, metadata: {name: d}, spec: {%s, template: %s}}", selector("deployment"), template("deployment")),
		fmt.Sprintf("{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: d}, spec: {%s, template: %s}}", selector("daemonset"), template("daemonset")),
		fmt.Sprintf("{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: s}, spec: {serviceName: s, %s, template: %s}}", selector("statefulset"), template("statefulset")),
		fmt.Sprintf("{apiVersion: v1, kind: ReplicationController, metadata: {name: r}, spec: {selector: {app: rc}, template: %s}}", template("rc")),
		fmt.Sprintf("{apiVersion: batch/v1, kind: Job, metadata: {name: j}, spec: {template: %s}}", fmt.Sprintf(job, "job")),
		fmt.Sprintf(`{apiVersion: batch/v1, kind: CronJob, metadata: {name: c}, spec: {schedule: "0 3 * * *", jobTemplate: {spec: {template: %s}}}}`, fmt.Sprintf(job, "cronjob")),
	}
	for _, n := range nodes(t) {
		// Also where she asks for a node, and tolerates what keeps others away from it.
		spec := strings.TrimSuffix(dmesgPod("Always"), "}") + fmt.Sprintf(", nodeSelector: {kubernetes.io/hostname: %s}, tolerations: [{operator: Exists}]}", n)
		manifests = append(manifests, fmt.Sprintf("{apiVersion: v1, kind: Pod, metadata: {name: bare-%s, labels: {app: bare}}, spec: %s}", n, spec))
	}
	tn.run(t, manifests...)
	kubectl(t, tn.owner, "create", "job", "c-now", "--from=cronjob/c", "-n", tn.ns)
	kubectl(t, tn.owner, "delete", "-n", tn.ns, "cronjob/c", "--cascade=orphan")
	for app, count := range pods {
		t.Run(app, func(t *testing.T) {
			eventually(t, func() error {
				out, err := try(tn.owner, "get", "pods", "-n", tn.ns, "-l", "app="+app, "-o",
					`jsonpath={range .items[*]}{.metadata.name} {.status.phase} {.spec.runtimeClassName}{"\n"}{end}`)
				if err != nil {
					return err
				}
				if lines := strings.Count(out, "\n"); lines < count {
					return fmt.Errorf("%d pods of %d: %s", lines, count, out)
				}
				for line := range strings.Lines(out) {
					f := strings.Fields(line)
					if len(f) != 3 || f[2] != "gvisor" {
						return fmt.Errorf("pod, phase and RuntimeClass: %q", line)
					}
					if f[1] == "Pending" {
						return fmt.Errorf("pending: %q", line)
					}
					for _, c := range []string{"init", "sidecar", "main", "second"} {
						log, err := try(tn.owner, "logs", "-n", tn.ns, f[0], "-c", c)
						if err != nil || !strings.Contains(log, gvisorBoot) {
							return fmt.Errorf("container %s of %s does not run in gVisor: %q, %w", c, f[0], log, err)
						}
					}
				}
				return nil
			})
		})
	}
	t.Run("ephemeral", func(t *testing.T) {
		target := "bare-" + nodes(t)[0]
		debug := func(name, profile string) []string {
			return []string{
				"debug", target, "-n", tn.ns, "--image=localhost/busybox:latest", "--image-pull-policy=Never", "--target=main",
				"--profile=" + profile, "--container=" + name, "--", "dmesg",
			}
		}
		kubectl(t, tn.owner, debug("helper", "baseline")...)
		eventually(t, func() error {
			log, err := try(tn.owner, "logs", "-n", tn.ns, target, "-c", "helper")
			if err != nil || !strings.Contains(log, gvisorBoot) {
				return fmt.Errorf("the ephemeral container does not run in gVisor: %q, %w", log, err)
			}
			return nil
		})
		refused(t, tn.owner, "", "privileged", debug("root", "sysadmin")...)
		refused(t, tn.owner, "", "capabilities", debug("admin", "netadmin")...)
		for name, context := range map[string]string{
			"privileged":   `{"privileged":true}`,
			"capabilities": `{"capabilities":{"add":["SYS_ADMIN"]}}`,
			"procMount":    `{"procMount":"Unmasked"}`,
			"seccomp":      `{"seccompProfile":{"type":"Unconfined"}}`,
		} {
			refused(t, tn.owner, "", name, "patch", "pod", target, "-n", tn.ns, "--subresource=ephemeralcontainers", "-p",
				`{"spec":{"ephemeralContainers":[{"name":"evil","image":"localhost/busybox:latest","command":["true"],"securityContext":`+context+`}]}}`)
		}
	})
	kubectl(t, tn.owner, "delete", "-n", tn.ns, "deployment,daemonset,statefulset,rc,job,pod", "--all", "--wait=false")
}

// sandboxed wraps fields of a pod and of its container in a manifest.
func sandboxed(meta, podFields, containerFields string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: forbidden%s}, spec: {%scontainers: [{name: c, image: "localhost/busybox:latest", command: [sleep, "1000"]%s}]}}`,
		meta, podFields, containerFields)
}

// forbiddenPods are pods, by what they ask for, and a part of the sentence that refuses them.
var forbiddenPods = map[string]struct{ pod, want string }{
	"hostNetwork": {sandboxed("", "hostNetwork: true, ", ""), "host namespaces (hostNetwork=true)"},
	"hostPID":     {sandboxed("", "hostPID: true, ", ""), "host namespaces (hostPID=true)"},
	"hostIPC":     {sandboxed("", "hostIPC: true, ", ""), "host namespaces (hostIPC=true)"},
	"hostPath":    {sandboxed("", "volumes: [{name: v, hostPath: {path: /}}], ", ""), "hostPath volumes"},
	"privileged":  {sandboxed("", "", ", securityContext: {privileged: true}"), "privileged"},
	"privileged init": {
		sandboxed("", `initContainers: [{name: i, image: "localhost/busybox:latest", securityContext: {privileged: true}}], `, ""), "privileged",
	},
	"hostPort":             {sandboxed("", "", ", ports: [{containerPort: 80, hostPort: 80}]"), "hostPort"},
	"CAP_SYS_ADMIN":        {sandboxed("", "", ", securityContext: {capabilities: {add: [SYS_ADMIN]}}"), "non-default capabilities"},
	"CAP_NET_ADMIN":        {sandboxed("", "", ", securityContext: {capabilities: {add: [NET_ADMIN]}}"), "non-default capabilities"},
	"all capabilities":     {sandboxed("", "", ", securityContext: {capabilities: {add: [ALL]}}"), "non-default capabilities"},
	"procMount":            {sandboxed("", "", ", securityContext: {procMount: Unmasked}"), "procMount"},
	"seccomp of the pod":   {sandboxed("", "securityContext: {seccompProfile: {type: Unconfined}}, ", ""), "seccompProfile"},
	"seccomp of container": {sandboxed("", "", ", securityContext: {seccompProfile: {type: Unconfined}}"), "seccompProfile"},
	"apparmor":             {sandboxed("", "", ", securityContext: {appArmorProfile: {type: Unconfined}}"), "AppArmor"},
	"selinux":              {sandboxed("", "securityContext: {seLinuxOptions: {type: spc_t}}, ", ""), "seLinuxOptions"},
	"sysctls":              {sandboxed("", `securityContext: {sysctls: [{name: kernel.msgmax, value: "1"}]}, `, ""), "sysctls"},
	"windows host process": {sandboxed("", "securityContext: {windowsOptions: {hostProcess: true}}, hostNetwork: true, ", ""), "hostProcess"},
	// kubelet would ask from the node, on behalf of the pod.
	"probe of another host": {sandboxed("", "", ", livenessProbe: {httpGet: {host: 127.0.0.1, port: 10249}}"), "host"},
	"hook to another host":  {sandboxed("", "", ", lifecycle: {postStart: {httpGet: {host: 127.0.0.1, port: 10249}}}"), "host"},
	// kubelet would mount these from the node's network, on behalf of the pod.
	"nfs":        {sandboxed("", "volumes: [{name: v, nfs: {server: 172.30.0.1, path: /}}], ", ""), "volume"},
	"iscsi":      {sandboxed("", `volumes: [{name: v, iscsi: {targetPortal: 172.30.0.1, iqn: "iqn.2001-04.com.example:disk", lun: 0}}], `, ""), "volume"},
	"flexVolume": {sandboxed("", "volumes: [{name: v, flexVolume: {driver: example.com/driver}}], ", ""), "volume"},

	"runc":                 {sandboxed("", "runtimeClassName: e2e-runc, ", ""), "gvisor"},
	"sandbox of no name":   {sandboxed("", "runtimeClassName: no-such-class, ", ""), "not found"},
	"nodeName":             {sandboxed("", "nodeName: n1, ", ""), "nodeName"},
	"mirror pod":           {sandboxed(`, annotations: {kubernetes.io/config.mirror: "1"}`, "", ""), "kubernetes.io/config"},
	"static pod":           {sandboxed(`, annotations: {kubernetes.io/config.source: file}`, "", ""), "kubernetes.io/config"},
	"gVisor's flags":       {sandboxed(`, annotations: {dev.gvisor.flag.network: host}`, "", ""), "dev.gvisor."},
	"devices":              {sandboxed(`, annotations: {cdi.k8s.io/disk: example.com/disk=all}`, "", ""), "cdi.k8s.io/"},
	"another network":      {sandboxed(`, annotations: {h8s.io/networks: other}`, "", ""), "h8s.io/networks"},
	"system-node-critical": {sandboxed("", "priorityClassName: system-node-critical, ", ""), "system-"},
	"system-cluster":       {sandboxed("", "priorityClassName: system-cluster-critical, ", ""), "system-"},
}

func testForbiddenPods(t *testing.T, tn tenant) {
	for name, test := range forbiddenPods {
		t.Run(name, func(t *testing.T) { refused(t, tn.owner, test.pod, test.want, "create", "-n", tn.ns, "-f", "-") })
	}
	// Whoever it is: what a tenant's pods are does not depend on who made them.
	t.Run("operator", func(t *testing.T) {
		refused(t, admin, forbiddenPods["hostNetwork"].pod, "host namespaces", "create", "-n", tn.ns, "-f", "-")
		refused(t, admin, forbiddenPods["runc"].pod, "gvisor", "create", "-n", tn.ns, "-f", "-")
	})
	t.Run("empty runtimeClassName", func(t *testing.T) {
		out, err := tryInput(tn.owner, sandboxed("", `runtimeClassName: "", `, ""), "create", "-n", tn.ns, "-f", "-", "-o", "jsonpath={.spec.runtimeClassName}")
		if err == nil && out != "gvisor" {
			t.Errorf("a pod with an empty runtimeClassName was made with %q", out)
		}
		_, _ = try(tn.owner, "delete", "pod", "forbidden", "-n", tn.ns, "--ignore-not-found", "--wait=false", "--now")
	})
	eventually(t, func() error {
		out, err := try(tn.owner, "get", "pods", "-n", tn.ns, "-o", "name")
		if err != nil || strings.Contains(out, "forbidden") {
			return fmt.Errorf("there is a pod that must not be: %s, %w", out, err)
		}
		return nil
	})
}

// testPodAnnotations: containerd and its runtimes read annotations; none of those
// that are admitted means anything.
func testPodAnnotations(t *testing.T, tn tenant) {
	const annotations = `, annotations: {io.kubernetes.cri.untrusted-workload: "false", io.kubernetes.cri.runtime-handler: runc}`
	manifest := strings.Replace(sandboxed(annotations, "terminationGracePeriodSeconds: 0, ", ", imagePullPolicy: Never"), "name: forbidden", "name: annotated", 1)
	tn.run(t, manifest)
	tn.waitReady(t, "annotated")
	out, err := tn.sh("annotated", "dmesg | head -1; ls /sys/class/net; cat /proc/net/dev")
	if err != nil || !strings.Contains(out, gvisorBoot) {
		t.Errorf("not in gVisor: %q, %v", out, err)
	}
	for _, link := range []string{"h8su", "cni", "veth"} {
		if strings.Contains(out, link) {
			t.Errorf("the pod sees links of the node:\n%s", out)
		}
	}
}

// testForbiddenUpdates changes a pod that was admitted.
func testForbiddenUpdates(t *testing.T, tn tenant) {
	const name = "annotated"
	const notOfPods = "pod updates may not change fields"
	if got := kubectl(t, tn.owner, "get", "pod", name, "-n", tn.ns, "-o", `jsonpath={.metadata.annotations.h8s\.io/networks}`); got != tn.name {
		t.Errorf("annotation h8s.io/networks is %q, want %q", got, tn.name)
	}
	for what, test := range map[string]struct{ patch, want string }{
		"network":       {`{"metadata":{"annotations":{"h8s.io/networks":"other"}}}`, "h8s.io/networks"},
		"no network":    {`{"metadata":{"annotations":{"h8s.io/networks":null}}}`, "h8s.io/networks"},
		"mirror":        {`{"metadata":{"annotations":{"kubernetes.io/config.mirror":"x"}}}`, "kubernetes.io/config"},
		"runtime class": {`{"spec":{"runtimeClassName":"e2e-runc"}}`, notOfPods},
		"no sandbox":    {`{"spec":{"runtimeClassName":null}}`, notOfPods},
		"host network":  {`{"spec":{"hostNetwork":true}}`, notOfPods},
		"privileged":    {`{"spec":{"containers":[{"name":"c","securityContext":{"privileged":true}}]}}`, notOfPods},
		"node":          {`{"spec":{"nodeName":"other"}}`, notOfPods},
	} {
		t.Run(what, func(t *testing.T) {
			refused(t, tn.owner, "", test.want, "patch", "pod", name, "-n", tn.ns, "--type=strategic", "-p", test.patch)
		})
	}
	t.Run("status", func(t *testing.T) {
		refused(t, tn.owner, "", "cannot patch", "patch", "pod", name, "-n", tn.ns, "--subresource=status", "--type=merge", "-p", `{"status":{"podIP":"10.96.0.1"}}`)
	})
	t.Run("binding", func(t *testing.T) {
		refused(t, tn.owner, `{apiVersion: v1, kind: Binding, metadata: {name: `+name+`}, target: {kind: Node, name: n1}}`, "cannot create", "create", "--validate=false", "-n", tn.ns, "-f", "-")
	})
	kubectl(t, tn.owner, "delete", "pod", name, "-n", tn.ns, "--wait=false")
}

// testForbiddenTemplates: a controller takes the template and says in an event why no pod comes of it.
func testForbiddenTemplates(t *testing.T, tn tenant) {
	template := func(app, podFields, containerFields string) string {
		return fmt.Sprintf(`{metadata: {labels: {app: %s}}, spec: {%scontainers: [{name: c, image: "localhost/busybox:latest"%s}]}}`, app, podFields, containerFields)
	}
	for name, test := range map[string]struct{ manifest, want string }{
		"t-deployment": {
			"{apiVersion: apps/v1, kind: Deployment, metadata: {name: t-deployment}, spec: {selector: {matchLabels: {app: t-deployment}}, template: " + template("t-deployment", "hostNetwork: true, ", "") + "}}",
			"host namespaces",
		},
		"t-daemonset": {
			"{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: t-daemonset}, spec: {selector: {matchLabels: {app: t-daemonset}}, template: " + template("t-daemonset", "", ", securityContext: {privileged: true}") + "}}",
			"privileged",
		},
		"t-statefulset": {
			"{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: t-statefulset}, spec: {serviceName: s, selector: {matchLabels: {app: t-statefulset}}, template: " + template("t-statefulset", "runtimeClassName: e2e-runc, ", "") + "}}",
			"gvisor",
		},
		"t-job": {
			"{apiVersion: batch/v1, kind: Job, metadata: {name: t-job}, spec: {template: " + template("t-job", "restartPolicy: Never, nodeName: n1, ", "") + "}}",
			"nodeName",
		},
	} {
		t.Run(name, func(t *testing.T) {
			tn.run(t, test.manifest)
			eventually(t, func() error {
				out, err := try(tn.owner, "get", "events", "-n", tn.ns, "--field-selector=reason=FailedCreate", "-o",
					`jsonpath={range .items[*]}{.involvedObject.name}: {.message}{"\n"}{end}`)
				for line := range strings.Lines(out) {
					if strings.HasPrefix(line, name) && strings.Contains(line, test.want) {
						return err
					}
				}
				return fmt.Errorf("no event of %s says %q: %s, %w", name, test.want, out, err)
			})
			if out := kubectl(t, tn.owner, "get", "pods", "-n", tn.ns, "-l", "app="+name, "-o", "name"); out != "" {
				t.Errorf("there are pods: %s", out)
			}
		})
	}
	kubectl(t, tn.owner, "delete", "-n", tn.ns, "deployment,daemonset,statefulset,job", "--all", "--wait=false")
}

func testForbiddenServices(t *testing.T, tn tenant) {
	service := func(extra string) string {
		return "{apiVersion: v1, kind: Service, metadata: {name: ext}, spec: {ports: [{port: 80}], selector: {app: x}" + extra + "}}"
	}
	create := []string{"create", "-n", tn.ns, "-f", "-"}
	refused(t, tn.owner, service(", externalIPs: [198.51.100.1]"), "externalIPs", create...)
	tn.run(t, service(""))
	const label = "service.kubernetes.io/service-proxy-name"
	if got := kubectl(t, tn.owner, "get", "service", "ext", "-n", tn.ns, "-o", `jsonpath={.metadata.labels.service\.kubernetes\.io/service-proxy-name}`); got != "h8s.io" {
		t.Errorf("label %s is %q: kube-proxy would serve the Service on the nodes", label, got)
	}
	patch := func(p string) []string {
		return []string{"patch", "service", "ext", "-n", tn.ns, "--type=merge", "-p", p}
	}
	refused(t, tn.owner, "", "externalIPs", patch(`{"spec":{"externalIPs":["198.51.100.1"]}}`)...)
	// Taken off or changed, the label must be refused or put back.
	for _, p := range []string{`{"metadata":{"labels":{"` + label + `":null}}}`, `{"metadata":{"labels":{"` + label + `":"other"}}}`} {
		_, _ = try(tn.owner, patch(p)...)
		if got := kubectl(t, tn.owner, "get", "service", "ext", "-n", tn.ns, "-o", `jsonpath={.metadata.labels.service\.kubernetes\.io/service-proxy-name}`); got != "h8s.io" {
			t.Errorf("after %s the label %s is %q", p, label, got)
		}
	}
	refused(t, tn.owner, `{apiVersion: v1, kind: Endpoints, metadata: {name: e}, subsets: [{addresses: [{ip: 172.30.0.11}], ports: [{port: 6443}]}]}`, "cannot create", create...)
	refused(t, tn.owner, `{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: e}, addressType: IPv4, endpoints: [{addresses: [172.30.0.11]}]}`, "cannot create", create...)
	refused(t, tn.owner, "", "cannot patch", "patch", "service", "ext", "-n", tn.ns, "--subresource=status", "--type=merge", "-p", `{"status":{"loadBalancer":{"ingress":[{"ip":"198.51.100.1"}]}}}`)
	kubectl(t, tn.owner, "delete", "service", "ext", "-n", tn.ns)
}

// testNodeWithoutAgent: whatever a tenant's pod selects and tolerates, it does not
// come to a node without the agent, where it would be on the default network.
func testNodeWithoutAgent(t *testing.T, tn tenant) {
	// No kubelet stands behind this one: a pod that is bound to it stays as it is.
	const node = "e2e-no-agent"
	apply(t, admin, "{apiVersion: v1, kind: Node, metadata: {name: "+node+", labels: {kubernetes.io/hostname: "+node+"}}}")
	t.Cleanup(func() {
		_, _ = try(admin, "delete", "node", node)
		_, _ = try(admin, "delete", "pods", "-A", "--field-selector=spec.nodeName="+node, "--force", "--grace-period=0")
	})
	kubectl(t, admin, "patch", "node", node, "--subresource=status", "--type=merge", "-p", `{"status":{"capacity":{"cpu":"8","memory":"8Gi","pods":"110"},"allocatable":{"cpu":"8","memory":"8Gi","pods":"110"}}}`)

	manifest := func(name, fields string) string {
		return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {tolerations: [{operator: Exists}], %s, containers: [{name: c, image: "localhost/busybox:latest", imagePullPolicy: Never, command: [sleep, "1000"]}]}}`, name, fields)
	}
	affinity := func(expression string) string {
		return "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [" + expression + "]}]}}}"
	}
	nodeOf := func(ns, name string) string {
		return kubectl(t, admin, "get", "pod", name, "-n", ns, "-o", "jsonpath={.spec.nodeName}")
	}
	towards := affinity("{key: kubernetes.io/hostname, operator: In, values: [" + node + "]}")

	// An operator's pod goes there: nothing but admission keeps the tenant's away.
	other := operatorNamespace(t, "sandbox-operator")
	other.run(t, manifest("towards", towards))
	eventually(t, func() error {
		if got := nodeOf(other.ns, "towards"); got != node {
			return fmt.Errorf("the operator's pod is on %q", got)
		}
		return nil
	})
	kubectl(t, admin, "delete", "pod", "towards", "-n", other.ns, "--force", "--grace-period=0")

	for name, fields := range map[string]string{
		"towards":   towards,
		"selector":  "nodeSelector: {kubernetes.io/hostname: " + node + "}",
		"unlabeled": affinity("{key: h8s.io/node-ready, operator: DoesNotExist}"),
		"not-ready": affinity(`{key: h8s.io/node-ready, operator: NotIn, values: ["true"]}`),
	} {
		t.Run(name, func(t *testing.T) {
			tn.run(t, manifest(name, fields))
			eventually(t, func() error {
				why, err := try(tn.owner, "get", "pod", name, "-n", tn.ns, "-o", `jsonpath={.status.conditions[?(@.type=="PodScheduled")].message}`)
				if err != nil || !strings.Contains(why, "node affinity/selector") {
					return fmt.Errorf("the pod waits because %q, %w", why, err)
				}
				return nil
			})
			if got := nodeOf(tn.ns, name); got != "" {
				t.Errorf("the pod is bound to the node %s", got)
			}
		})
	}
	// What she says of our label does not count.
	tn.run(t, manifest("says-no", `nodeSelector: {h8s.io/node-ready: "false"}`))
	if got := kubectl(t, tn.owner, "get", "pod", "says-no", "-n", tn.ns, "-o", `jsonpath={.spec.nodeSelector}`); got != `{"h8s.io/node-ready":"true"}` {
		t.Errorf("the nodeSelector is %s", got)
	}
	kubectl(t, tn.owner, "delete", "pods", "--all", "-n", tn.ns, "--force", "--grace-period=0")
}
