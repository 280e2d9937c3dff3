package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestUpstream looks at what the cluster is made of.
func TestUpstream(t *testing.T) {
	t.Run("Version", func(t *testing.T) {
		var v struct {
			ClientVersion, ServerVersion struct{ GitVersion string }
		}
		if err := json.Unmarshal([]byte(kubectl(t, admin, "version", "-o", "json")), &v); err != nil {
			t.Fatal(err)
		}
		if v.ClientVersion.GitVersion != "v1.36.3" || v.ServerVersion.GitVersion != "v1.36.3" {
			t.Errorf("versions are %+v", v)
		}
	})
	t.Run("Nodes", func(t *testing.T) {
		if n := len(nodes(t)); n < 2 {
			t.Errorf("%d nodes, want at least 2", n)
		}
		awaitCluster(t)
		lines := strings.Split(strings.TrimSpace(kubectl(t, admin, "get", "nodes", "-o", "wide", "--no-headers")), "\n")
		for _, line := range lines {
			f := strings.Fields(line)
			if f[1] != "Ready" || !strings.Contains(line, "v1.36.3") || !strings.Contains(line, "containerd://2.4") && !strings.Contains(line, "containerd://v2.4") {
				t.Errorf("node: %s", line)
			}
		}
	})
	t.Run("Programs", func(t *testing.T) {
		for _, n := range nodes(t) {
			for _, program := range []string{"containerd", "kubelet", "kube-proxy"} {
				only(t, n, program) // a child of it, before it becomes another program, is of that name
			}
		}
	})
	t.Run("Doctor", func(t *testing.T) {
		doctorContent(t)
	})
	t.Run("AlreadyUp", func(t *testing.T) {
		awaitCluster(t)
		complete(t, cluster.cluster)
		eventually(t, func() error { // it gives the nodes a moment to say that they are ready
			out, err := h8sOutput(upLimit, "up", "--name", cluster.cluster)
			if strings.Contains(out, "changed since") {
				t.Fatalf("h8s up again finds what nobody has changed: %s", out)
			}
			if err != nil || !strings.Contains(out, "already up") {
				return fmt.Errorf("h8s up again: %w: %s", err, out)
			}
			return nil
		})
	})
}

// TestKinds reads our kinds as a person does who has only kubectl.
func TestKinds(t *testing.T) {
	for kind, test := range map[string]struct {
		short   string
		columns []string
		fields  map[string]string // path → a part of what explain says
	}{
		"tenants": {"tn", []string{"NAME", "READY", "SUSPENDED", "NETWORK", "NAMESPACES", "SANDBOX", "AGE"}, map[string]string{
			"":                       "unit of trust",
			".spec.members":          "Members are the people and machines",
			".spec.members.role":     "Role of the member",
			".spec.network.cidrs":    "CIDRs of the Network to make",
			".spec.sandbox.allowed":  "RuntimeClasses",
			".spec.quota.namespaces": "how many namespaces",
			".status.conditions":     "Conditions",
		}},
		"networks": {"net", []string{"NAME", "TENANT", "CIDRS", "PROVIDER", "ID", "READY", "PODS", "AGE"}, map[string]string{
			"":             "isolated address space",
			".spec.egress": "may reach outside",
			".status.id":   "number of the Network on the wire",
		}},
		"users":        {"", []string{"NAME", "DISPLAY NAME", "DISABLED", "TENANTS", "AGE"}, map[string]string{".spec.disabled": "takes away every access"}},
		"blocks":       {"", []string{"NAME", "NETWORK", "CIDR", "NODE", "AGE"}, map[string]string{"": "slice of a Network"}},
		"quotaledgers": {"ql", []string{"NAME", "GENERATION", "AGE"}, map[string]string{"": "keeps the quota of the Tenant", ".spec.reservations": "may not exist yet"}},
	} {
		t.Run(kind, func(t *testing.T) {
			for path, want := range test.fields {
				out := strings.Join(strings.Fields(kubectl(t, admin, "explain", kind+path)), " ")
				if !strings.Contains(out, want) {
					t.Errorf("explain %s%s does not say %q: %s", kind, path, want, out)
				}
			}
			if test.short != "" {
				kubectl(t, admin, "get", test.short)
			}
			var crd struct {
				Spec struct {
					Versions []struct {
						AdditionalPrinterColumns []struct {
							Name     string
							Priority int
						}
					}
				}
			}
			if err := json.Unmarshal([]byte(kubectl(t, admin, "get", "crd", kind+".h8s.io", "-o", "json")), &crd); err != nil {
				t.Fatal(err)
			}
			columns := []string{"NAME"}
			for _, c := range crd.Spec.Versions[0].AdditionalPrinterColumns {
				if c.Priority == 0 {
					columns = append(columns, strings.ToUpper(c.Name))
				}
			}
			if diff := cmp.Diff(test.columns, columns); diff != "" {
				t.Errorf("columns (- want, + got):\n%s", diff)
			}
		})
	}
}

// TestKill kills each component as a crash would. It must be started again, what
// ran before must go on answering, and all that it does must be done again.
func TestKill(t *testing.T) {
	tn := newTenant(t, "kill", "10.0.0.0/16")
	control, other := nodes(t)[0], nodes(t)[1]
	system := tenant{name: "default", owner: admin, ns: "kill-default"} // of no tenant: the default network, and runc
	kubectl(t, admin, "create", "namespace", system.ns)
	t.Cleanup(func() { _, _ = try(admin, "delete", "namespace", system.ns, "--timeout=4m") })
	const service = "apiVersion: v1\nkind: Service\nmetadata: {name: %[1]s}\nspec: {selector: {app: %[1]s}, ports: [{port: 80, targetPort: 8080}]}\n"
	tn.run(t, pod("before", other, ""), pod("client", control, ""), pod("shim", other, ""), pod("sandbox", other, ""), pod("gofer", other, ""),
		fmt.Sprintf(service, "before"), fmt.Sprintf(service, "after"))
	eventually(t, func() error {
		_, err := try(admin, "get", "serviceaccount", "default", "-n", system.ns)
		return err
	})
	system.run(t, pod("shim", other, ""), fmt.Sprintf(service, "after"))
	clusterIP := func(of tenant) string {
		return kubectl(t, admin, "get", "service", "after", "-n", of.ns, "-o", "jsonpath={.spec.clusterIP}")
	}
	tenants, systems := clusterIP(tn), clusterIP(system)
	tn.waitReady(t, "before", "client", "shim", "sandbox", "gofer")
	system.waitReady(t, "shim")
	ip := tn.ip(t, "before")
	round := 0

	// converged asserts that the pods that ran before still serve, and that a change goes all the way: for it the
	// controller manager makes a ReplicaSet and an EndpointSlice, the scheduler places its pod, kubelet and containerd
	// start it on node; from there kube-proxy leads to it in the default network, and a portal in the tenant's.
	converged := func(t *testing.T, node string) {
		t.Helper()
		eventually(t, func() error {
			out, err := try(admin, "get", "nodes", "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
			if err != nil || strings.Count(out, "True") != len(strings.Fields(out)) || out == "" {
				return fmt.Errorf("nodes are Ready: %s, %w", out, err)
			}
			return tn.connect("client", ip+":8080", "tcp")
		})
		eventually(t, func() error { return tn.connect("client", "before:80", "tcp") })
		round++
		for _, in := range []tenant{tn, system} {
			eventually(t, func() error {
				_, err := tryInput(in.owner, after(node, round), "apply", "-n", in.ns, "-f", "-")
				return err
			})
		}
		for in, ask := range map[tenant]func() (string, error){
			tn: func() (string, error) { return tn.sh("client", "timeout 3 wget -q -O - http://"+tenants+"/hostname") },
			system: func() (string, error) {
				return tryNode(node, "timeout 3 busybox wget -q -O - http://"+systems+"/hostname")
			},
		} {
			eventually(t, func() error {
				want, err := try(in.owner, "get", "pods", "-n", in.ns, "-l", fmt.Sprintf("app=after,round=%d", round), "-o", "jsonpath={.items[*].metadata.name}")
				if err != nil || want == "" {
					return fmt.Errorf("there is no new pod in %s: %w", in.ns, err)
				}
				if got, err := ask(); err != nil || got != want {
					return fmt.Errorf("Service after in %s, on node %s, is answered by %q, want %q: %w", in.ns, node, got, want, err)
				}
				return nil
			})
		}
	}
	for _, test := range []struct{ program, node string }{
		{"etcd", control},
		{"kube-apiserver", control},
		{"kube-controller-manager", control},
		{"kube-scheduler", control},
		{"containerd", control},
		{"containerd", other},
		{"kubelet", control},
		{"kubelet", other},
		{"kube-proxy", control},
		{"kube-proxy", other},
		{"h8s-node", control},
		{"h8s-node", other},
	} {
		t.Run(test.program+" on "+test.node, func(t *testing.T) {
			old := only(t, test.node, test.program)
			old.kill(t)
			restarted(t, test.node, test.program, old)
			converged(t, test.node)
		})
	}
	t.Run("h8s-controller", func(t *testing.T) {
		var node string
		var old []process
		eventually(t, func() error { // without its lease it ends, and the API server was away
			old = nil
			for _, n := range nodes(t) {
				if found := processes(n, "h8s-controller"); len(found) > 0 {
					node, old = n, append(old, found...)
				}
			}
			if len(old) != 1 {
				return fmt.Errorf("h8s-controller runs %d times, want once", len(old))
			}
			return nil
		})
		old[0].kill(t)
		restarted(t, node, "h8s-controller", old[0])
		converged(t, other)
		// It works, and does not only run.
		kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"quota":{"hard":{"configmaps":"77"}}}}`)
		eventually(t, func() error {
			out, err := try(admin, "get", "tenant", tn.name, "-o", "jsonpath={.status.quota.hard.configmaps}")
			if out != "77" {
				return fmt.Errorf("the quota has not arrived: %q, %w", out, err)
			}
			return nil
		})
	})
	t.Run("Pods' own", func(t *testing.T) {
		// What stands between containerd and one pod: each in a pod of its own, which starts again and no other does.
		sandbox := func(pod string) string {
			held, err := attachments(other)
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range held {
				if a.Namespace == tn.ns && a.Pod == pod {
					return a.ContainerID
				}
			}
			t.Fatalf("node %s has no record of pod %s", other, pod)
			return ""
		}
		container := strings.TrimPrefix(kubectl(t, tn.owner, "get", "pod", "gofer", "-n", tn.ns, "-o", "jsonpath={.status.containerStatuses[0].containerID}"), "containerd://")
		uid := kubectl(t, admin, "get", "pod", "shim", "-n", system.ns, "-o", "jsonpath={.metadata.uid}")
		served := processesBelow("/h8s-"+cluster.cluster+"/"+other+"/kubepods/besteffort/pod"+uid+"/", "agnhost")
		if len(served) != 1 {
			t.Fatalf("the pod of the default network has %d processes, want one", len(served))
		}
		runcShim, err := served[0].parent()
		if err != nil {
			t.Fatal(err)
		}
		mark := func(program, id string) process {
			found := slices.DeleteFunc(processes(other, program), func(p process) bool { return !strings.Contains(strings.Join(p.args, " "), id) })
			if len(found) != 1 {
				t.Fatalf("node %s runs %s of %s %d times", other, program, id, len(found))
			}
			return found[0]
		}
		victims := []process{mark("containerd-shim-runsc-v1", sandbox("shim")), mark("runsc-sandbox", sandbox("sandbox")), mark("runsc-gofer", container), runcShim}
		for _, p := range victims {
			p.kill(t)
		}
		for name, in := range map[string]tenant{"shim": tn, "sandbox": tn, "gofer": tn, "shim of runc": system} {
			pod, _, _ := strings.Cut(name, " ")
			eventually(t, func() error {
				// The kubelet may try it once in the sandbox that ends with it, and counts that.
				out, err := restartsAndReady(in, pod)
				if err != nil || out != "1 True" && out != "2 True" {
					return fmt.Errorf("%s was killed: restarts and readiness of its pod: %q, %w", name, out, err)
				}
				return nil
			})
			if in == tn {
				eventually(t, func() error { return tn.connect("client", tn.ip(t, pod)+":8080", "tcp") })
			}
		}
		eventually(t, func() error {
			out, err := restartsAndReady(tn, "before")
			if err == nil && !strings.HasPrefix(out, "0 ") {
				t.Fatalf("restarts and readiness of a pod of which nothing was killed: %q", out)
			}
			if err != nil || out != "0 True" {
				return fmt.Errorf("readiness of a pod of which nothing was killed: %q, %w", out, err)
			}
			return nil
		})
		converged(t, other)
	})
	t.Run("Init", func(t *testing.T) {
		// The whole node goes, as when a machine loses power, and with it its pods.
		old, err := nodeInit(other)
		if err != nil {
			t.Fatal(err)
		}
		old.kill(t)
		eventually(t, func() error {
			now, err := nodeInit(other)
			if err == nil && now.pid == old.pid {
				err = fmt.Errorf("node init %d still lives", old.pid)
			}
			return err
		})
		eventually(t, func() error {
			out, err := restartsAndReady(tn, "before")
			if err != nil || strings.HasPrefix(out, "0 ") || !strings.HasSuffix(out, "True") {
				return fmt.Errorf("restarts and readiness of the pod: %s, %w", out, err)
			}
			return nil
		})
		ip = tn.ip(t, "before") // a new sandbox may have a new address
		converged(t, other)
	})
	t.Run("Standby", func(t *testing.T) {
		working, standby := supervisors(t, other)
		standby.kill(t)
		eventually(t, func() error {
			for _, p := range processesBelow("/h8s-"+cluster.cluster+"/supervisor", "h8s") {
				if p.pid != working.pid && p.pid != standby.pid {
					return nil
				}
			}
			return errors.New("the supervisor has no new standby")
		})
	})
	t.Run("Supervisor", func(t *testing.T) {
		// Above everything else: with it the whole machine goes, so to speak. Its standby takes over, the one that
		// was started a moment ago.
		restarts := func() ([]string, error) {
			out, err := try(tn.owner, "get", "pods", "before", "client", "-n", tn.ns, "-o", `jsonpath={.items[*].status.containerStatuses[0].restartCount}`)
			return strings.Fields(out), err
		}
		first, err := restarts()
		if err != nil {
			t.Fatal(err)
		}
		old, err := nodeInit(other)
		if err != nil {
			t.Fatal(err)
		}
		supervisor, _ := supervisors(t, other)
		supervisor.kill(t)
		eventually(t, func() error {
			booted, err := nodeInit(other)
			if err != nil {
				return err
			}
			if booted.pid == old.pid {
				return fmt.Errorf("node init %d still lives", old.pid)
			}
			out, err := try(tn.owner, "get", "pods", "before", "client", "-n", tn.ns, "-o", `jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}`)
			if err != nil || out != "True True" {
				return fmt.Errorf("readiness of the pods: %s, %w", out, err)
			}
			// What the API server remembers of the time before is not it: every pod has a new sandbox.
			again, err := restarts()
			if err != nil || len(again) != 2 || again[0] == first[0] || again[1] == first[1] {
				return fmt.Errorf("restarts of the pods are %v and were %v, %w", again, first, err)
			}
			return nil
		})
		ip = tn.ip(t, "before")
		converged(t, other)
		supervisors(t, other)
	})
}

// after is a Deployment whose one pod, on node, is another one in every round.
func after(node string, round int) string {
	return fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: after}, spec: {replicas: 1, selector: {matchLabels: {app: after}}, template: {
		metadata: {labels: {app: after, round: "%d"}}, spec: {terminationGracePeriodSeconds: 0, nodeSelector: {kubernetes.io/hostname: %s}, tolerations: [{operator: Exists}],
		containers: [{name: agnhost, image: "localhost/agnhost:latest", imagePullPolicy: Never, args: [netexec, --http-port=8080],
		readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]}}}}`, round, node)
}

// restartsAndReady are, in one line, how often a pod's container was started again and whether the pod is Ready.
func restartsAndReady(tn tenant, pod string) (string, error) {
	return try(tn.owner, "get", "pod", pod, "-n", tn.ns, "-o", `jsonpath={.status.containerStatuses[0].restartCount} {.status.conditions[?(@.type=="Ready")].status}`)
}

// supervisors are the one that works, which has started the nodes, and its standby, which comes soon after it.
func supervisors(t testing.TB, node string) (working, standby process) {
	t.Helper()
	running, err := nodeInit(node)
	if err != nil {
		t.Fatal(err)
	}
	if working, err = running.parent(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		for _, p := range processesBelow("/h8s-"+cluster.cluster+"/supervisor", "h8s") {
			if p.pid != working.pid {
				standby = p
				return nil
			}
		}
		return fmt.Errorf("supervisor %d has no standby", working.pid)
	})
	return working, standby
}

// only is the one process of that name on a node, which may be about to be started again.
func only(t testing.TB, node, program string) (p process) {
	t.Helper()
	eventually(t, func() error {
		found := processes(node, program)
		if len(found) != 1 {
			return fmt.Errorf("node %s runs %s %d times", node, program, len(found))
		}
		p = found[0]
		return nil
	})
	return p
}

// restarted waits for a new process in the place of an old one.
func restarted(t testing.TB, node, program string, old process) {
	t.Helper()
	eventually(t, func() error {
		for _, p := range processes(node, program) {
			if p.pid != old.pid {
				return nil
			}
		}
		return fmt.Errorf("%s on node %s has not been started again", program, node)
	})
}
