package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// tenant is a Tenant with one owner, one namespace that the owner made, and the owner's kubeconfig.
type tenant struct {
	name  string
	owner string
	ns    string
}

// newTenant makes a Tenant named name with the default Network cidr, whose owner
// is the User <name>-owner, and lets the owner make the namespace <name>-ns. All
// of it is deleted at the end of the test. The sandboxes are those that it may use,
// the default one first; without any, what a Tenant has that says nothing.
func newTenant(t testing.TB, name, cidr string, sandboxes ...string) tenant {
	t.Helper()
	awaitCluster(t)
	tn := tenant{name: name, owner: name + "-owner", ns: name + "-ns"}
	sandbox := "{}"
	if len(sandboxes) > 0 {
		sandbox = fmt.Sprintf("{default: %s, allowed: [%s]}", sandboxes[0], strings.Join(sandboxes, ", "))
	}
	apply(t, admin, fmt.Sprintf(`
apiVersion: h8s.io/v1alpha1
kind: User
metadata: {name: %[2]s}
---
apiVersion: h8s.io/v1alpha1
kind: Tenant
metadata: {name: %[1]s}
spec:
  members: [{kind: User, name: %[2]s, role: owner}]
  network: {cidrs: [%[3]q]}
  sandbox: %[4]s
`, tn.name, tn.owner, cidr, sandbox))
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try(admin, "get", "pods,events,services", "-n", tn.ns, "-o", "wide")
			fmt.Fprintf(t.Output(), "namespace %s:\n%s", tn.ns, out) // no message of the test's, to test/runner
		}
		if _, err := try(admin, "delete", "tenant", tn.name, "--ignore-not-found", "--timeout=4m"); err != nil {
			t.Errorf("deleting tenant %s: %v", tn.name, err)
		}
		if _, err := try(admin, "delete", "user", tn.owner, "--ignore-not-found"); err != nil {
			t.Errorf("deleting user %s: %v", tn.owner, err)
		}
	})
	kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/"+name, "--timeout=4m")
	if err := writeKubeconfig(tn.owner); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := try(tn.owner, "create", "namespace", tn.ns)
		return err
	})
	// RoleBindings and the default ServiceAccount follow within moments.
	eventually(t, func() error {
		if out, err := try(tn.owner, "auth", "can-i", "create", "pods", "-n", tn.ns); err != nil {
			return fmt.Errorf("may not create pods yet: %s %w", out, err)
		}
		_, err := try(tn.owner, "get", "serviceaccount", "default", "-n", tn.ns)
		return err
	})
	return tn
}

// awaitCluster waits until the cluster is whole. The test before may have killed, stopped or
// starved any part of it.
func awaitCluster(t testing.TB) {
	t.Helper()
	eventually(t, func() error {
		out, err := try(admin, "get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} is ready {.status.conditions[?(@.type=="Ready")].status}, `+
			`for tenants {.metadata.labels.h8s\.io/node-ready}, short of memory {.status.conditions[?(@.type=="MemoryPressure")].status}, with taints {.spec.taints[*].key}{"\n"}{end}`)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if !strings.HasSuffix(line, " is ready True, for tenants true, short of memory False, with taints \n") {
				return fmt.Errorf("node %s", line)
			}
		}
		out, err = try(admin, "get", "pods", "-n", systemNamespace, "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if !strings.HasSuffix(line, " True\n") {
				return fmt.Errorf("pods of the product and whether they are ready: %s", out)
			}
		}
		// That a controller is ready is not known to kube-proxy at once.
		_, err = tryInput(admin, "{apiVersion: h8s.io/v1alpha1, kind: Tenant, metadata: {name: probe}, spec: {network: {cidrs: [10.0.0.0/16]}}}", "create", "--dry-run=server", "-f", "-")
		return err
	})
}

// pod is a manifest of a pod that serves agnhost netexec on 8080 (TCP and UDP),
// on the given node if that is not empty. Extra is merged into spec as YAML
// lines, each indented by two spaces.
func pod(name, node, extra string) string {
	sel := ""
	if node != "" {
		sel = fmt.Sprintf("  nodeSelector: {kubernetes.io/hostname: %s}\n", node)
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  terminationGracePeriodSeconds: 1
%[2]s%[3]s
  containers:
  - name: agnhost
    image: localhost/agnhost:latest
    imagePullPolicy: Never
    args: [netexec, --http-port=8080, --udp-port=8080]
    ports: [{name: http, containerPort: 8080}, {name: udp, containerPort: 8080, protocol: UDP}]
---
`, name, sel, extra)
}

// run applies manifests in the tenant's namespace as its owner.
func (tn tenant) run(t testing.TB, manifests ...string) {
	t.Helper()
	if _, err := tryInput(tn.owner, strings.Join(manifests, "\n---\n"), "apply", "-n", tn.ns, "-f", "-"); err != nil {
		t.Fatalf("as %q: %v", tn.owner, err)
	}
}

// waitReady waits for pods to be Ready.
func (tn tenant) waitReady(t testing.TB, pods ...string) {
	t.Helper()
	for _, p := range pods {
		kubectl(t, tn.owner, "wait", "-n", tn.ns, "--for=condition=Ready", "pod/"+p, "--timeout=4m")
	}
}

// ip is the status.podIP of a pod.
func (tn tenant) ip(t testing.TB, pod string) string {
	t.Helper()
	return kubectl(t, tn.owner, "get", "pod", pod, "-n", tn.ns, "-o", "jsonpath={.status.podIP}")
}

// sh runs a shell command in a pod, as its owner.
func (tn tenant) sh(pod, command string) (string, error) {
	return try(tn.owner, "exec", "-n", tn.ns, pod, "--", "sh", "-c", command)
}

// connect asks pod from to GET url; agnhost's own client, with a timeout of two seconds.
func (tn tenant) connect(from, hostPort, protocol string) error {
	out, err := try(tn.owner, "exec", "-n", tn.ns, from, "--", "/agnhost", "connect", "--timeout=2s", "--protocol="+protocol, hostPort)
	if err != nil {
		return fmt.Errorf("%s → %s/%s: %s %w", from, hostPort, protocol, strings.TrimSpace(out), err)
	}
	return nil
}

// nodes are the names of the cluster's nodes, sorted.
func nodes(t testing.TB) []string {
	t.Helper()
	return strings.Fields(kubectl(t, admin, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"))
}
