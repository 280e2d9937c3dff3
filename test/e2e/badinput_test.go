package e2e

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// TestBadInput applies what is wrong, and expects a sentence that says what to change.
func TestBadInput(t *testing.T) {
	tenantSpec := func(spec string) string {
		return fmt.Sprintf("{apiVersion: h8s.io/v1alpha1, kind: Tenant, metadata: {name: bad}, spec: {%s}}", spec)
	}
	const good = `network: {cidrs: ["10.0.0.0/16"]}`
	long := strings.Repeat("n", 41)
	node := kubectl(t, admin, "get", "nodes", "-o", `jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}`)
	octets := strings.Split(node, ".")
	underlay := strings.Join(octets[:3], ".") + ".0/24"

	cidrs := map[string]struct{ cidr, want string }{
		"no prefix length":    {"10.0.0.0", "not a CIDR"},
		"five octets":         {"10.0.0.0.0/16", "not a CIDR"},
		"letters":             {"ten/8", "not a CIDR"},
		"leading zero":        {"010.0.0.0/16", "not a CIDR"},
		"prefix length of 33": {"10.0.0.0/33", "not a CIDR"},
		"empty":               {"", "not a CIDR"},
		"host bits":           {"10.0.1.0/16", "not canonical"},
		"too small":           {"10.0.0.0/27", "between /8 and /26"},
		"one address":         {"10.0.0.1/32", "between /8 and /26"},
		"too large":           {"0.0.0.0/0", "between /8 and /26"},
		"IPv6":                {"fd00::/64", "IPv6 is not supported yet"},
		"services":            {"10.96.0.0/16", "overlaps"},
		"a part of services":  {"10.96.128.0/24", "overlaps"},
		"around services":     {"10.0.0.0/8", "overlaps"},
		"default network":     {"10.244.0.0/16", "overlaps"},
		"nodes":               {underlay, "overlaps"},
		"around nodes":        {"172.16.0.0/12", "overlaps"},
		"loopback":            {"127.0.0.0/16", "overlaps"},
		"link-local":          {"169.254.0.0/16", "overlaps"},
		"multicast":           {"224.0.0.0/16", "overlaps"},
		"reserved":            {"240.0.0.0/8", "overlaps"},
		"this host":           {"0.0.0.0/8", "overlaps"},
	}
	type test struct{ manifest, want string }
	table := map[string]test{
		"Tenant/member twice": {
			tenantSpec(good + ", members: [{kind: User, name: ann, role: owner}, {kind: User, name: ann, role: view}]"), "Duplicate value",
		},
		"Tenant/member of Kubernetes":   {tenantSpec(good + ", members: [{kind: Group, name: 'system:authenticated', role: view}]"), "belong to Kubernetes"},
		"Tenant/unknown role":           {tenantSpec(good + ", members: [{kind: User, name: ann, role: god}]"), "supported values"},
		"Tenant/unknown kind of member": {tenantSpec(good + ", members: [{kind: Robot, name: ann, role: view}]"), "supported values"},
		"Tenant/member without name":    {tenantSpec(good + ", members: [{kind: User, name: '', role: view}]"), "at least 1 char"},
		"Tenant/no network":             {tenantSpec("members: []"), "spec.network: Required value"},
		"Tenant/empty network":          {tenantSpec("network: {}"), "set either network.cidrs"},
		"Tenant/two networks":           {tenantSpec(`network: {cidrs: ["10.0.0.0/16"], name: other}`), "set either network.cidrs"},
		"Tenant/default not allowed":    {tenantSpec(good + ", sandbox: {default: hyper, allowed: [gvisor]}"), "must be one of sandbox.allowed"},
		"Tenant/negative quota":         {tenantSpec(good + ", quota: {namespaces: -1}"), "greater than or equal to 0"},
		"Tenant/unknown field":          {tenantSpec(good + ", nets: {}"), `unknown field "spec.nets"`},
		"Tenant/name of 41":             {strings.Replace(tenantSpec(good), "name: bad", "name: "+long, 1), "40 characters at most"},
		"Tenant/name with dots":         {strings.Replace(tenantSpec(good), "name: bad", "name: bad.example", 1), "must be a DNS label"},
		"Network/two CIDRs":             {"{apiVersion: h8s.io/v1alpha1, kind: Network, metadata: {name: bad}, spec: {tenant: bad, cidrs: [10.0.0.0/16, 10.1.0.0/16]}}", "at most 1 item"},
		"Network/no CIDR":               {"{apiVersion: h8s.io/v1alpha1, kind: Network, metadata: {name: bad}, spec: {tenant: bad, cidrs: []}}", "at least 1 item"},
		"Network/no tenant":             {"{apiVersion: h8s.io/v1alpha1, kind: Network, metadata: {name: bad}, spec: {cidrs: [10.0.0.0/16]}}", "spec.tenant: Required value"},
		"Network/name of 41":            {networkManifest(long, "bad", "10.0.0.0/16"), "40 characters at most"},
		"Network/name with dots":        {networkManifest("bad.example", "bad", "10.0.0.0/16"), "must be a DNS label"},
		"Network/unknown tenant":        {networkManifest("bad", "bad", "10.0.0.0/16"), `the Tenant "bad" does not exist`},
		"Network/provider": {
			"{apiVersion: h8s.io/v1alpha1, kind: Network, metadata: {name: bad}, spec: {tenant: bad, cidrs: [10.0.0.0/16], provider: magic}}", "supported values",
		},
		"Block/CIDR": {"{apiVersion: h8s.io/v1alpha1, kind: Block, metadata: {name: bad}, spec: {network: bad, cidr: 10.0.0.1/28, node: n1}}", "not a canonical CIDR"},
	}
	for name, c := range cidrs {
		table["Network/CIDR/"+name] = test{networkManifest("bad", "bad-owner", c.cidr), c.want}
		table["Tenant/CIDR/"+name] = test{tenantSpec(fmt.Sprintf("network: {cidrs: [%q]}", c.cidr)), c.want}
	}
	apply(t, admin, strings.Replace(tenantSpec(good), "name: bad", "name: bad-owner", 1))
	t.Cleanup(func() { _, _ = try(admin, "delete", "tenant", "bad-owner", "--timeout=4m") })
	kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/bad-owner", "--timeout=4m")
	for name, test := range table {
		t.Run(name, func(t *testing.T) { refused(t, admin, test.manifest, test.want, "create", "-f", "-") })
	}
	if out := kubectl(t, admin, "get", "tenants,networks,blocks", "-o", "name"); strings.Contains(out, "/bad\n") {
		t.Errorf("something that was refused is there: %s", out)
		_, _ = try(admin, "delete", "tenant/bad", "network/bad", "block/bad", "--ignore-not-found")
	}
	t.Run("Kubeconfig", func(t *testing.T) {
		for user, want := range map[string]string{"no-such-user": "there is no User", "system:admin": "system:"} {
			out, err := h8sOutput(time.Minute, "kubeconfig", "--name", cluster.cluster, "--user", user)
			if err == nil || !strings.Contains(out, want) {
				t.Errorf("h8s kubeconfig --user %s: %v: %s", user, err, out)
			}
		}
	})
	t.Run("ForeignNetwork", func(t *testing.T) {
		apply(t, admin, strings.Replace(tenantSpec("network: {name: bad-owner}"), "name: bad}", "name: bad-thief}", 1))
		defer func() { _, _ = try(admin, "delete", "tenant", "bad-thief", "--timeout=4m") }()
		eventually(t, func() error {
			out, err := try(admin, "get", "tenant", "bad-thief", "-o", `jsonpath={.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].message}`)
			if !strings.HasPrefix(out, "False ") || !strings.Contains(out, "belongs to the Tenant bad-owner") {
				return fmt.Errorf("condition Ready: %s, %w", out, err)
			}
			return nil
		})
	})
	t.Run("InUse", testInUse)
	t.Run("TwoTenants", testTwoTenants)
	t.Run("LongNames", testLongNames)
	t.Run("LongMembers", testLongMembers)
	t.Run("NamespaceQuota", testNamespaceQuota)
}

// testInUse changes and deletes what pods rely on.
func testInUse(t *testing.T) {
	tn := newTenant(t, "inuse", "10.0.0.0/16")
	tn.run(t, pod("web", "", ""))
	tn.waitReady(t, "web")
	for name, test := range map[string]struct{ object, patch, want string }{
		"Network's CIDR":     {"network/inuse", `{"spec":{"cidrs":["10.1.0.0/16"]}}`, "cidrs are immutable"},
		"Network's tenant":   {"network/inuse", `{"spec":{"tenant":"other"}}`, "tenant is immutable"},
		"Network's provider": {"network/inuse", `{"spec":{"provider":"magic"}}`, "supported values"},
		"Tenant's network":   {"tenant/inuse", `{"spec":{"network":{"cidrs":["10.1.0.0/16"]}}}`, "default network is immutable"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, admin, "", test.want, "patch", test.object, "--type=merge", "-p", test.patch)
		})
	}
	t.Run("Block", func(t *testing.T) {
		block := strings.Fields(kubectl(t, admin, "get", "blocks", "-o", "name", "--field-selector=spec.network=inuse"))[0]
		refused(t, admin, "", "immutable", "patch", block, "--type=merge", "-p", `{"spec":{"node":"other"}}`)
	})
	t.Run("delete the Network", func(t *testing.T) {
		refused(t, admin, "", tn.ns, "delete", "network", "inuse", "--wait=false")
	})
	// Nothing is lost.
	if _, err := tn.sh("web", "true"); err != nil {
		t.Error(err)
	}
	if out := kubectl(t, admin, "get", "network", "inuse", "-o", "jsonpath={.metadata.deletionTimestamp} {.spec.cidrs}"); out != ` ["10.0.0.0/16"]` {
		t.Errorf("the Network is now %s", out)
	}
	tn.run(t, pod("more", "", ""))
	tn.waitReady(t, "more")
	eventually(t, func() error { return tn.connect("more", tn.ip(t, "web")+":8080", "tcp") })
}

// testTwoTenants: a user of two tenants says for which a namespace is.
func testTwoTenants(t *testing.T) {
	const both = "bad-both"
	apply(t, admin, fmt.Sprintf("{apiVersion: h8s.io/v1alpha1, kind: User, metadata: {name: %s}}", both))
	t.Cleanup(func() { _, _ = try(admin, "delete", "user", both, "--ignore-not-found") })
	for _, name := range []string{"two-a", "two-b"} {
		apply(t, admin, fmt.Sprintf(`{apiVersion: h8s.io/v1alpha1, kind: Tenant, metadata: {name: %s}, spec: {members: [{kind: User, name: %s, role: owner}], network: {cidrs: ["10.0.0.0/16"]}}}`, name, both))
		t.Cleanup(func() { _, _ = try(admin, "delete", "tenant", name, "--ignore-not-found", "--timeout=4m") })
	}
	kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/two-a", "tenant/two-b", "--timeout=4m")
	if err := writeKubeconfig(both); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		out, err := try(both, "auth", "can-i", "create", "namespaces")
		if err != nil {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	for _, want := range []string{"two-a", "two-b", "h8s.io/tenant"} {
		refused(t, both, "", want, "create", "namespace", "two-ns")
	}
	refused(t, both, "{apiVersion: v1, kind: Namespace, metadata: {name: two-ns, labels: {h8s.io/tenant: two-c}}}", "two-c", "create", "-f", "-")
	kubectl(t, both, "create", "-f", manifest(t, "{apiVersion: v1, kind: Namespace, metadata: {name: two-ns, labels: {h8s.io/tenant: two-b}}}"))
	if got := kubectl(t, admin, "get", "namespace", "two-ns", "-o", `jsonpath={.metadata.labels.h8s\.io/tenant} {.metadata.labels.h8s\.io/network}`); got != "two-b two-b" {
		t.Errorf("tenant and network of the namespace are %q", got)
	}
}

// testLongNames: everything at its limit works, from admission to the kernel.
func testLongNames(t *testing.T) {
	name := "long-" + strings.Repeat("t", 35) // 40
	tn := newTenant(t, name, "10.0.0.0/16")
	tn.ns = "long-" + strings.Repeat("n", 58) // 63
	kubectl(t, tn.owner, "create", "namespace", tn.ns)
	eventually(t, func() error {
		_, err := try(tn.owner, "get", "serviceaccount", "default", "-n", tn.ns)
		return err
	})
	web := "web-" + strings.Repeat("p", 59) // 63: it is the value of a label too
	svc := "svc-" + strings.Repeat("s", 59) // 63
	// kubelet keeps logs in a directory named <namespace>_<pod>_<uid>, of 255 at most.
	far := "far." + strings.Repeat("q.", 73) + "end" // 153
	manifest := strings.Replace(pod(far, "", ""), "labels: {app: "+far+"}", "labels: {app: far}", 1)
	tn.run(t, pod(web, "", ""), manifest,
		fmt.Sprintf("{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, ports: [{port: 80, targetPort: 8080}]}}", svc, web))
	tn.waitReady(t, web, far)
	eventually(t, func() error { return tn.connect(far, svc+":80", "tcp") })
	eventually(t, func() error {
		return tn.connect(far, svc+"."+tn.ns+".svc.cluster.local:80", "tcp")
	})
	testLongNode(t, name, strings.TrimSpace(kubectl(t, tn.owner, "get", "pod", web, "-n", tn.ns, "-o", "jsonpath={.spec.nodeName}")))
	kubectl(t, tn.owner, "delete", "namespace", tn.ns, "--timeout=4m")
}

// longest is a name of 253 characters, as objects may have at most.
func longest(letter string) string {
	label := strings.Repeat(letter, 63)
	return strings.Join([]string{label, label, label, label[:61]}, ".")
}

// testLongNode: a node whose name is at its limit holds a Block of a Network whose
// name is; the other nodes route to it, and the controller reaps the Block when the node is gone.
func testLongNode(t *testing.T, network, onto string) {
	t.Helper()
	const block, address = "10.0.255.240/28", "192.0.2.77"
	long, name := longest("o"), network+"-10-0-255-240"
	t.Cleanup(func() { _, _ = try(admin, "delete", "node/"+long, "block/"+name, "--ignore-not-found") })
	apply(t, admin, fmt.Sprintf("{apiVersion: v1, kind: Node, metadata: {name: %s}}", long))
	kubectl(t, admin, "patch", "node", long, "--subresource=status", "-p", `{"status":{"addresses":[{"type":"InternalIP","address":"`+address+`"}]}}`)
	apply(t, admin, fmt.Sprintf("{apiVersion: h8s.io/v1alpha1, kind: Block, metadata: {name: %s}, spec: {network: %s, cidr: %s, node: %s}}", name, network, block, long))
	id := kubectl(t, admin, "get", "network", network, "-o", "jsonpath={.status.id}")
	eventually(t, func() error {
		out, err := tryNode(onto, "ip -n h8s-"+id+" route show "+block)
		if err != nil || !strings.Contains(out, "via "+address) {
			return fmt.Errorf("the portal on %s does not route to the Block: %q, %w", onto, out, err)
		}
		return nil
	})
	kubectl(t, admin, "delete", "node", long)
	eventually(t, func() error {
		if out, err := try(admin, "get", "block", name, "--ignore-not-found", "-o", "name"); out != "" || err != nil {
			return fmt.Errorf("the Block of a node that is gone is still there: %s, %w", out, err)
		}
		return nil
	})
}

// testLongMembers: a User and a group with the longest names there are.
func testLongMembers(t *testing.T) {
	const tenant, ns = "long-members", "long-members-ns"
	user, group := longest("u"), "keystone:"+strings.Repeat("g", 244)
	spec := func(user, group string) string {
		return fmt.Sprintf(`{apiVersion: h8s.io/v1alpha1, kind: Tenant, metadata: {name: %s}, spec: {members: [{kind: User, name: %q, role: owner}, {kind: Group, name: %q, role: edit}], network: {cidrs: ["10.0.0.0/16"]}}}`, tenant, user, group)
	}
	refused(t, admin, spec(user, group+"g"), "253", "create", "-f", "-")
	refused(t, admin, spec(user+"u", group), "253", "create", "-f", "-")
	refused(t, admin, "{apiVersion: h8s.io/v1alpha1, kind: User, metadata: {name: "+user+"u}}", "253", "create", "-f", "-")

	apply(t, admin, "{apiVersion: h8s.io/v1alpha1, kind: User, metadata: {name: "+user+"}}")
	t.Cleanup(func() { _, _ = try(admin, "delete", "user", user, "--ignore-not-found") })
	apply(t, admin, spec(user, group))
	t.Cleanup(func() { _, _ = try(admin, "delete", "tenant", tenant, "--ignore-not-found", "--timeout=4m") })
	kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/"+tenant, "--timeout=4m")
	config, err := h8sOutput(time.Minute, "kubeconfig", "--name", cluster.cluster, "--user", user)
	if err != nil {
		t.Fatalf("h8s kubeconfig: %v: %s", err, config)
	}
	as := "--kubeconfig=" + manifest(t, config) // the name of a file has its limit, too
	eventually(t, func() error {
		_, err := try(admin, as, "create", "namespace", ns)
		return err
	})
	if got := kubectl(t, admin, "get", "namespace", ns, "-o", `jsonpath={.metadata.labels.h8s\.io/tenant} {.metadata.annotations.h8s\.io/creator}`); got != tenant+" "+user {
		t.Errorf("tenant and creator of the namespace are %q", got)
	}
	for name, args := range map[string][]string{"user": {as}, "group": {"--as=somebody", "--as-group=" + group}} {
		eventually(t, func() error {
			if out, err := try(admin, append(args, "auth", "can-i", "create", "pods", "-n", ns)...); err != nil {
				return fmt.Errorf("the %s may not create pods: %s, %w", name, out, err)
			}
			return nil
		})
	}
	refused(t, admin, "", "", "--as=somebody", "--as-group="+group[:252], "auth", "can-i", "create", "pods", "-n", ns)
}

// testNamespaceQuota: exactly as many as the Tenant says, also all at once.
func testNamespaceQuota(t *testing.T) {
	tn := newTenant(t, "counted", "10.0.0.0/16") // has one namespace
	kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"quota":{"namespaces":3}}}`)
	var g errgroup.Group
	g.SetLimit(6)
	for i := range 6 {
		g.Go(func() error {
			_, _ = try(tn.owner, "create", "namespace", fmt.Sprintf("counted-%d", i))
			return nil
		})
	}
	_ = g.Wait()
	tn.fills(t, 3, "{apiVersion: v1, kind: Namespace, metadata: {generateName: counted-}}")
	refused(t, tn.owner, "", "3", "create", "namespace", "counted-more")
	kubectl(t, tn.owner, "delete", "namespace", tn.ns, "--timeout=4m")
	eventually(t, func() error {
		_, err := try(tn.owner, "create", "namespace", "counted-more")
		return err
	})
}

// fills asserts that a tenant never has more namespaces than it may, and waits until it has as many: a creation that
// failed after it was admitted keeps its place for a minute at most.
func (tn tenant) fills(t *testing.T, quota int, one string) {
	t.Helper()
	within(t, 90*time.Second, func() error {
		out, err := try(admin, "get", "namespaces", "-l", "h8s.io/tenant="+tn.name, "-o", "name")
		if err != nil {
			return err
		}
		n := len(strings.Fields(out))
		if n > quota {
			t.Fatalf("the quota is %d namespaces and there are %d", quota, n)
		}
		if n < quota {
			_, err := tryInput(tn.owner, one, "create", "-f", "-")
			return errors.Join(fmt.Errorf("the quota is %d namespaces and there are %d", quota, n), err)
		}
		return nil
	})
}

// TestCrowd fills a Network and a node to the last pod. An operator lets this
// tenant use runc, so that 110 pods fit into a small machine; some run in gVisor.
func TestCrowd(t *testing.T) {
	const full, sandboxes = 110, 20
	const runc = "e2e-runc"
	tn := newTenant(t, "crowd", "10.0.0.0/26") // 64 addresses; the first and the last are not given out
	const addresses = 62
	node := nodes(t)[1]
	apply(t, admin, "{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: e2e-runc}, handler: runc}")
	t.Cleanup(func() { _, _ = try(admin, "delete", "runtimeclass", "e2e-runc", "--ignore-not-found") })
	kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"sandbox":{"default":"e2e-runc","allowed":["e2e-runc","gvisor"]}}}`)
	const large = "crowd-large"
	apply(t, admin, networkManifest(large, tn.name, "10.64.0.0/16"))
	apply(t, admin, fmt.Sprintf("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {h8s.io/tenant: %s, h8s.io/network: %s}}}", large, tn.name, large))
	for _, ns := range []string{tn.ns, large} {
		eventually(t, func() error {
			out, err := try(admin, "get", "namespace", ns, "-o", `jsonpath={.metadata.labels.h8s\.io/sandbox}`)
			if out != "e2e-runc" {
				return fmt.Errorf("sandbox of namespace %s is %q: %w", ns, out, err)
			}
			_, err = try(tn.owner, "get", "serviceaccount", "default", "-n", ns)
			return err
		})
	}
	deployment := func(ns, sandbox string, replicas int) string {
		return fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: crowd-%[2]s, namespace: %[1]s}, spec: {replicas: %[3]d, progressDeadlineSeconds: 600, selector: {matchLabels: {app: crowd, sandbox: %[2]s}}, template: {
			metadata: {labels: {app: crowd, sandbox: %[2]s}}, spec: {runtimeClassName: %[2]s, terminationGracePeriodSeconds: 0, nodeSelector: {kubernetes.io/hostname: %[4]s}, automountServiceAccountToken: false,
			containers: [{name: c, image: "localhost/busybox:latest", imagePullPolicy: Never, command: [sleep, "10000"]}]}}}}`, ns, sandbox, replicas, node)
	}
	ready := func(ns string) (int, error) {
		out, err := try(tn.owner, "get", "deployments", "-n", ns, "-o", "jsonpath={.items[*].status.readyReplicas}")
		total := 0
		for _, f := range strings.Fields(out) {
			n, bad := strconv.Atoi(f)
			total, err = total+n, errors.Join(err, bad)
		}
		return total, err
	}
	wantReady := func(ns string, want int) {
		t.Helper()
		eventually(t, func() error {
			n, err := ready(ns)
			if n != want {
				return fmt.Errorf("%d pods of %d are ready in %s, %w", n, want, ns, err)
			}
			return nil
		})
	}
	apply(t, tn.owner, deployment(tn.ns, runc, addresses+2))
	wantReady(tn.ns, addresses)
	t.Run("Exhausted", func(t *testing.T) {
		eventually(t, func() error {
			out, err := try(tn.owner, "get", "events", "-n", tn.ns, "--field-selector=reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
			for _, want := range []string{"Network " + tn.name, "exhausted"} {
				if !strings.Contains(out, want) {
					return fmt.Errorf("no event says %q: %s, %w", want, out, err)
				}
			}
			return nil
		})
		ips := strings.Fields(kubectl(t, tn.owner, "get", "pods", "-n", tn.ns, "-o", "jsonpath={.items[*].status.podIP}"))
		seen := map[string]bool{}
		for _, ip := range ips {
			if seen[ip] {
				t.Errorf("two pods have the address %s", ip)
			}
			seen[ip] = true
		}
		if len(seen) != addresses {
			t.Errorf("%d addresses are in use, want %d", len(seen), addresses)
		}
		// Two fewer: those that wait, whichever go, get the addresses of those that went.
		running := strings.Fields(kubectl(t, tn.owner, "get", "pods", "-n", tn.ns, "--field-selector=status.phase=Running", "-o", "name"))
		waiting := strings.Fields(kubectl(t, tn.owner, "get", "pods", "-n", tn.ns, "--field-selector=status.phase=Pending", "-o", "name"))
		if len(waiting) != 2 {
			t.Fatalf("%v wait, want 2", waiting)
		}
		kubectl(t, tn.owner, "delete", "-n", tn.ns, running[0], running[1], "--wait=false")
		apply(t, tn.owner, deployment(tn.ns, runc, addresses))
		wantReady(tn.ns, addresses)
	})
	t.Run("FullNode", func(t *testing.T) {
		eventually(t, func() error { // those that were deleted have gone
			out, err := try(admin, "get", "pods", "-n", tn.ns, "-o", "name")
			if n := len(strings.Fields(out)); err == nil && n != addresses {
				err = fmt.Errorf("%d pods are in %s, want %d", n, tn.ns, addresses)
			}
			return err
		})
		others := len(strings.Fields(kubectl(t, admin, "get", "pods", "-A", "--field-selector=spec.nodeName="+node, "-o", "name"))) - addresses
		sandboxed := -1
		eventually(t, func() error { // a child of one, before it becomes another program, is of that name
			before := sandboxed
			if sandboxed = len(processes(node, "runsc-sandbox")); sandboxed != before {
				return fmt.Errorf("%d sandboxes run on %s, and %d did a moment ago", sandboxed, node, before)
			}
			return nil
		})
		apply(t, tn.owner, deployment(large, "gvisor", sandboxes))
		apply(t, tn.owner, deployment(large, runc, full-others-addresses-sandboxes))
		wantReady(large, full-others-addresses)
		eventually(t, func() error {
			if n := len(processes(node, "runsc-sandbox")) - sandboxed; n != sandboxes {
				return fmt.Errorf("%d more sandboxes run on %s, want %d", n, node, sandboxes)
			}
			return nil
		})
		if n := len(strings.Fields(kubectl(t, admin, "get", "pods", "-A", "--field-selector=spec.nodeName="+node+",status.phase=Running", "-o", "name"))); n != full {
			t.Errorf("%d pods run on %s, want %d", n, node, full)
		}
		recordsMatch(t, tn)
		recordsMatch(t, tenant{name: tn.name, ns: large})
	})
	t.Run("EmptyNode", func(t *testing.T) {
		for _, ns := range []string{tn.ns, large} {
			kubectl(t, tn.owner, "delete", "deployments", "--all", "-n", ns, "--wait=false")
		}
		eventually(t, func() error {
			out, err := try(admin, "get", "pods", "-A", "-l", "app=crowd", "-o", "name")
			if out != "" || err != nil {
				return fmt.Errorf("%d pods are left, %w", len(strings.Fields(out)), err)
			}
			return nil
		})
		recordsMatch(t, tn)
		id := kubectl(t, admin, "get", "network", large, "-o", "jsonpath={.status.id}")
		kubectl(t, admin, "delete", "namespace", large, "--timeout=4m")
		kubectl(t, admin, "delete", "network", large, "--timeout=4m")
		noTraces(t, id)
	})
}
