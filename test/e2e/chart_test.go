package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// TestChart lives the product's whole life on a cluster that was there before:
// installed, given a namespace with running Services, upgraded, uninstalled. The
// commands are those of the documentation.
func TestChart(t *testing.T) {
	const name = "e2e-chart"
	outer := cluster
	cluster = env{root: outer.root, bin: outer.bin, cluster: name, dir: t.TempDir()}
	t.Cleanup(func() { cluster = outer })
	_, _ = h8sOutput(2*time.Minute, "down", "--name", name)
	t.Cleanup(func() {
		if out, err := h8sOutput(2*time.Minute, "down", "--name", name); err != nil {
			t.Errorf("h8s down: %v: %s", err, out)
		}
	})
	if out, err := h8sOutput(upLimit, "up", "--name", name, "--nodes", "2", "--no-product", "--resolver", outsideDNS); err != nil {
		t.Fatalf("h8s up: %v: %s", err, out)
	}
	if err := writeKubeconfig(admin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := try(admin, "get", "pods,events", "-A", "-o", "wide")
			logs, _ := try(admin, "logs", "-n", "h8s-system", "--selector=app.kubernetes.io/name=h8s", "--tail=20", "--prefix")
			t.Logf("the cluster:\n%s\n%s", out, logs)
		}
	})
	// Before the product: a Service and one who uses it, both on the default network.
	shop, visitor := operatorNamespace(t, "shop"), operatorNamespace(t, "visitor")
	shop.run(t, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: web, image: "localhost/agnhost:latest", imagePullPolicy: Never, args: [netexec, --http-port=8080], readinessProbe: {httpGet: {port: 8080}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`)
	visitor.run(t, pod("client", "", ""))
	rolledOut(t, "shop", "deployment/web")
	visitor.waitReady(t, "client")
	service := kubectl(t, admin, "get", "service", "web", "-n", shop.ns, "-o", "jsonpath={.spec.clusterIP}") + ":80"
	reaches := func(t *testing.T, from tenant, target string) {
		t.Helper()
		eventually(t, func() error { return from.connect("client", target, "tcp") })
	}
	reaches(t, visitor, service)

	// The image is brought to where the nodes find it.
	if out, err := h8sOutput(6*time.Minute, "image", "load", "--name", name, filepath.Join(cluster.bin, "images", "h8s.tar")); err != nil {
		t.Fatalf("h8s image load: %v: %s", err, out)
	}
	// Two controllers share the webhooks.
	install := strings.ReplaceAll(documented(t, "README.md", "helm upgrade --install"), "registry.example.com/h8s", "localhost/h8s")
	shell(t, strings.TrimSpace(install)+" --set controller.replicas=2 --set node.blockGrace=3s")
	if args := kubectl(t, admin, "get", "daemonset", "h8s-node", "-n", "h8s-system", "-o", "jsonpath={.spec.template.spec.containers[0].env[*].name}"); strings.Contains(args, "KUBERNETES_SERVICE_HOST") {
		t.Errorf("node agents are told an address of the API server: %s", args)
	}
	awaitCluster(t)
	reaches(t, visitor, service) // what is of no tenant is as it was

	tn := newTenant(t, "chart", "10.0.0.0/16")
	tn.run(t, pod("client", "", ""))
	tn.waitReady(t, "client")
	if err := tn.connect("client", service, "tcp"); err == nil {
		t.Error("a tenant's pod reaches a Service of the default network")
	}
	t.Run("Quota", func(t *testing.T) { testQuotaOfTwoControllers(t, tn) })

	t.Run("Adopt", func(t *testing.T) {
		shell(t, strings.ReplaceAll(documented(t, "docs/operations.md", "kubectl rollout restart"), "h8s.io/tenant=acme", "h8s.io/tenant="+tn.name))
		rolledOut(t, "shop", "deployment/web")
		eventually(t, func() error {
			out, err := try(tn.owner, "get", "pods", "-n", shop.ns, "-o", `jsonpath={range .items[*]}{.spec.runtimeClassName} {.status.podIP}{"\n"}{end}`)
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				if !strings.HasPrefix(line, "gvisor 10.0.") {
					return fmt.Errorf("a pod of the adopted namespace: %q", line)
				}
			}
			return nil
		})
		reaches(t, tn, service)
		reaches(t, tn, "web.shop.svc.cluster.local:80")
		if err := visitor.connect("client", service, "tcp"); err == nil {
			t.Error("a pod of the default network reaches a Service that is a tenant's now")
		}
	})

	t.Run("Upgrade", func(t *testing.T) {
		ca := func() string {
			return kubectl(t, admin, "get", "secret", "h8s-controller-tls", "-n", "h8s-system", "-o", `jsonpath={.data.ca\.crt}`)
		}
		before := ca()
		shell(t, "helm upgrade h8s deploy/h8s -n h8s-system --reset-then-reuse-values --wait --set node.logLevel=debug --set controller.logLevel=debug")
		rolledOut(t, "h8s-system", "daemonset/h8s-node", "deployment/h8s-controller")
		for _, workload := range []string{"daemonset/h8s-node", "deployment/h8s-controller"} {
			args := kubectl(t, admin, "get", workload, "-n", "h8s-system", "-o", "jsonpath={.spec.template.spec.containers[0].args}")
			if !strings.Contains(args, "--log-level=debug") {
				t.Errorf("%s does not have the new value: %s", workload, args)
			}
		}
		if ca() != before {
			t.Error("an upgrade replaced the certificate of the webhooks")
		}
		reaches(t, tn, service)
		eventually(t, func() error {
			_, err := try(tn.owner, "create", "namespace", "chart-later", "--dry-run=server")
			return err
		})
		out, err := tryShell("helm upgrade h8s deploy/h8s -n h8s-system --reset-then-reuse-values --set controller.replicas=0")
		if err == nil || !strings.Contains(out, "replicas") {
			t.Errorf("a value that makes no sense: %v: %s", err, out)
		}
	})

	t.Run("Hyper", func(t *testing.T) {
		shell(t, documented(t, "docs/operations.md", "hyper.install=true"))
		rolledOut(t, "h8s-system", "daemonset/h8s-node")
		for _, n := range nodes(t) {
			if _, err := tryNode(n, "pkill -KILL -x containerd"); err != nil {
				t.Fatal(err)
			}
		}
		kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"sandbox":{"allowed":["gvisor","hyper"]}}}`)
		eventually(t, func() error {
			_, err := try(tn.owner, "run", "machine", "-n", tn.ns, "--image=localhost/agnhost:latest", "--image-pull-policy=Never", `--overrides={"spec":{"runtimeClassName":"hyper"}}`, "--", "pause")
			return err
		})
		tn.waitReady(t, "machine")
		node := kubectl(t, tn.owner, "get", "pod", "machine", "-n", tn.ns, "-o", "jsonpath={.spec.nodeName}")
		if out, err := tryNode(node, "readlink /proc/$(pgrep -f containerd-shim-hyper-v1 | head -1)/exe"); err != nil || strings.TrimSpace(out) != "/opt/h8s/containerd-shim-hyper-v1" {
			t.Errorf("the pod's shim is %s, %v", out, err)
		}
		if out, err := tryNode(node, "/opt/h8s/containerd-shim-hyper-v1 probe"); err != nil || !strings.HasPrefix(out, "tcg: ") && !strings.HasPrefix(out, "kvm: ") {
			t.Errorf("probe: %s, %v", out, err)
		}
		eventually(t, func() error {
			if got := kubectl(t, admin, "get", "node", node, "-o", `jsonpath={.metadata.labels.h8s\.io/hyper}`); got != "kvm" && got != "tcg" {
				return fmt.Errorf("the label of node %s is %q", node, got)
			}
			return nil
		})
	})

	t.Run("Uninstall", func(t *testing.T) {
		kubectl(t, admin, "label", "namespace", shop.ns, "h8s.io/tenant-")
		eventually(t, func() error {
			namespace, err := try(admin, "get", "namespace", shop.ns, "-o", "yaml")
			if err != nil {
				return err
			}
			inside, err := try(admin, "get", "services,rolebindings", "-n", shop.ns, "-o", "yaml")
			left := namespace + inside
			if err != nil || strings.Contains(left, "h8s.io/network:") || strings.Contains(left, "service-proxy-name") || strings.Contains(left, "kind: RoleBinding\n") {
				return fmt.Errorf("the namespace has not left the tenant: %s, %w", left, err)
			}
			return nil
		})
		kubectl(t, admin, "rollout", "restart", "deployment/web", "-n", shop.ns)
		rolledOut(t, "shop", "deployment/web")
		shell(t, documented(t, "docs/operations.md", "helm uninstall"))
		for _, n := range nodes(t) {
			debug := strings.NewReplacer("NODE", n, "IMAGE", "localhost/h8s:latest", " -it", "").Replace(documented(t, "docs/operations.md", "h8s-node uninstall"))
			shell(t, debug)
			// Any path, link or table of ours would be printed.
			eventually(t, func() error {
				left, err := tryNode(n, `ls -d /etc/containerd/conf.d/*h8s* /opt/h8s/*hyper* /etc/cni/net.d/*h8s* /opt/cni/bin/*h8s* /run/netns/h8s-* 2>/dev/null; ip -br link | grep h8su; nft list tables | grep -x "table inet h8s"; ip route | grep 169.254.77; true`)
				if err != nil || left != "" {
					return fmt.Errorf("node %s is not clean: %s, %w", n, left, err)
				}
				return nil
			})
		}
		eventually(t, func() error {
			labels, err := try(admin, "get", "nodes", "-o", "jsonpath={.items[*].metadata.labels}")
			if err != nil || strings.Contains(labels, "h8s.io") {
				return fmt.Errorf("labels of nodes: %s, %w", labels, err)
			}
			return nil
		})
		// The kinds stay, and nothing else does.
		if crds := strings.Fields(kubectl(t, admin, "get", "crd", "-o", "name")); len(crds) != 5 {
			t.Errorf("kinds: %v, want our five", crds)
		}
		eventually(t, func() error { // what the garbage collector takes away goes later
			left, err := try(admin, "get", "tenants,networks,blocks,validatingadmissionpolicies,mutatingadmissionpolicies,validatingwebhookconfigurations,mutatingwebhookconfigurations,runtimeclasses", "-o", "name")
			inside, errInside := try(admin, "get", "all,secrets,serviceaccounts", "-n", "h8s-system", "-o", "name", "--selector=app.kubernetes.io/name=h8s")
			roles, errRoles := try(admin, "get", "clusterroles,clusterrolebindings", "-o", "name")
			if err := errors.Join(err, errInside, errRoles); err != nil {
				return err
			}
			left += inside
			for line := range strings.Lines(roles) {
				// One is the embedded cluster's own.
				if strings.Contains(line, "h8s") && !strings.Contains(line, "kubelet") {
					left += line
				}
			}
			if left != "" {
				return fmt.Errorf("left in the cluster:\n%s", left)
			}
			return nil
		})
		reaches(t, visitor, service)
		for i, n := range nodes(t) {
			after := fmt.Sprintf("after-%d", i)
			visitor.run(t, pod(after, n, ""))
			visitor.waitReady(t, after)
			eventually(t, func() error { return visitor.connect(after, service, "tcp") })
		}
	})
}

// testQuotaOfTwoControllers: however many namespaces are created at once, and
// whichever controller is asked, the quota is exact.
func testQuotaOfTwoControllers(t *testing.T, tn tenant) {
	kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"quota":{"namespaces":4}}}`)
	defer kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"quota":null}}`)
	const one = "{apiVersion: v1, kind: Namespace, metadata: {generateName: chart-many-}}"
	var g errgroup.Group
	for range 12 {
		g.Go(func() error {
			var failure error
			late := poll(patience, func() error {
				_, err := tryInput(tn.owner, one, "create", "-f", "-")
				switch {
				case err == nil, strings.Contains(err.Error(), "has 4 of 4 namespaces"):
				case strings.Contains(err.Error(), "try again"), clientTimedOut(err):
					return err
				default:
					failure = err
				}
				return nil
			})
			return errors.Join(failure, late)
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	tn.fills(t, 4, one)
}

// clientTimedOut says of an error of kubectl whether no answer came in time. An answer may name
// a timeout, too: that of a webhook is in its URL.
func clientTimedOut(err error) bool {
	return !strings.Contains(err.Error(), "Error from server") &&
		(strings.Contains(err.Error(), " timeout") || strings.Contains(err.Error(), "Client.Timeout"))
}

// documented is the fenced block of a document that contains the text.
func documented(t testing.TB, file, text string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(cluster.root, file))
	if err != nil {
		t.Fatal(err)
	}
	for i, block := range strings.Split(string(content), "```") {
		if i%2 == 1 && strings.Contains(block, text) {
			_, commands, _ := strings.Cut(block, "\n")
			return commands
		}
	}
	t.Fatalf("%s has no block with %q", file, text)
	return ""
}

// tryShell runs commands as an operator would who stands in the repository.
func tryShell(commands string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euc", commands)
	cmd.Dir = cluster.root
	cmd.Env = append(os.Environ(), "PATH="+cluster.bin+":"+os.Getenv("PATH"), "KUBECONFIG="+kubeconfigPath(admin), "HOME="+cluster.dir)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// shell is tryShell that must succeed.
func shell(t testing.TB, commands string) {
	t.Helper()
	if out, err := tryShell(commands); err != nil {
		t.Fatalf("%s: %v: %s", commands, err, out)
	}
}

// rolledOut waits until workloads run as they are specified.
func rolledOut(t testing.TB, namespace string, workloads ...string) {
	t.Helper()
	for _, w := range workloads {
		kubectl(t, admin, "rollout", "status", w, "-n", namespace, "--timeout=4m")
	}
}
