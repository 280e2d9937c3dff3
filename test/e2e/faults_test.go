package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"h8s.io/hypernetes/internal/network"
)

const (
	systemNamespace = "h8s-system"
	agentDaemonSet  = "daemonset/h8s-node"
)

// TestFaults breaks what a pod needs to start, at its worst moment.
func TestFaults(t *testing.T) {
	tn := newTenant(t, "faults", "10.0.0.0/16")
	a, b := nodes(t)[0], nodes(t)[1]
	tn.run(t, pod("client", a, ""), pod("server", b, ""),
		"apiVersion: v1\nkind: Service\nmetadata: {name: server}\nspec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}\n")
	tn.waitReady(t, "client", "server")

	t.Run("Connections", func(t *testing.T) { testConnections(t, tn) })
	t.Run("AgentDown", func(t *testing.T) { testAgentDown(t, tn) })
	t.Run("KilledInAdd", func(t *testing.T) { testKilledInAdd(t, tn) })
	t.Run("NetworkMissing", func(t *testing.T) { testNetworkMissing(t, tn) })
	t.Run("Conflict", func(t *testing.T) { testConflict(t, tn) })
	t.Run("Leftovers", func(t *testing.T) { testLeftovers(t, tn) })
}

// testConnections: a stream that is open before the agents die, or are replaced,
// goes on without a gap.
func testConnections(t *testing.T, tn tenant) {
	a, b := nodes(t)[0], nodes(t)[1]
	busybox := func(name, node, containers string) string {
		return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %[1]s, labels: {app: %[1]s}}, spec: {restartPolicy: Never, terminationGracePeriodSeconds: 0,
			nodeSelector: {kubernetes.io/hostname: %[2]s}, containers: [%[3]s]}}`, name, node, containers)
	}
	container := func(name, script string) string {
		return fmt.Sprintf(`{name: %s, image: "localhost/busybox:latest", imagePullPolicy: Never, command: [sh, -c, %q]}`, name, script)
	}
	tn.run(t, busybox("echo", b, container("echo", "exec nc -ll -p 9000 -e cat")),
		"{apiVersion: v1, kind: Service, metadata: {name: echo}, spec: {selector: {app: echo}, ports: [{port: 9000}]}}")
	tn.waitReady(t, "echo")
	eventually(t, func() error { return tn.connect("client", "echo:9000", "tcp") })
	count := func(to string) string {
		return "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done | nc " + to + " 9000"
	}
	clusterIP := kubectl(t, tn.owner, "get", "service", "echo", "-n", tn.ns, "-o", "jsonpath={.spec.clusterIP}")
	streams := []string{"direct", "service"}
	tn.run(t,
		busybox("across", a, container("direct", count(tn.ip(t, "echo")))+", "+container("service", count(clusterIP))),
		busybox("local", b, container("direct", count(tn.ip(t, "echo")))+", "+container("service", count(clusterIP))))
	tn.waitReady(t, "across", "local")

	// length is how much the stream has echoed, all of it in order.
	length := func(pod, stream string) (int, error) {
		log, err := try(tn.owner, "logs", "-n", tn.ns, pod, "-c", stream)
		lines := strings.Fields(log)
		for i, line := range lines {
			if line != strconv.Itoa(i+1) {
				return 0, fmt.Errorf("line %d of the stream is %q", i+1, line)
			}
		}
		return len(lines), err
	}
	// advanced waits until every stream has echoed some more.
	advanced := func(after string) {
		t.Helper()
		before := map[string]int{}
		for _, p := range []string{"across", "local"} {
			for _, c := range streams {
				n, err := length(p, c)
				if err != nil {
					t.Fatalf("%s: %s/%s: %v", after, p, c, err)
				}
				before[p+"/"+c] = n
			}
		}
		for _, p := range []string{"across", "local"} {
			for _, c := range streams {
				stood := before[p+"/"+c]
				eventually(t, func() error {
					now, err := length(p, c)
					if err == nil && now < stood+5 {
						err = fmt.Errorf("after %s: stream %s/%s stands at %d since %d", after, p, c, now, stood)
					}
					return err
				})
			}
			if phase := kubectl(t, tn.owner, "get", "pod", p, "-n", tn.ns, "-o", "jsonpath={.status.phase} {.status.containerStatuses[*].state.terminated}"); strings.TrimSpace(phase) != "Running" {
				t.Errorf("after %s: pod %s: %s", after, p, phase)
			}
		}
	}
	advanced("the start")
	for _, n := range nodes(t) {
		old := only(t, n, "h8s-node")
		old.kill(t)
		restarted(t, n, "h8s-node", old)
	}
	kubectl(t, admin, "rollout", "status", agentDaemonSet, "-n", systemNamespace, "--timeout=4m")
	advanced("kill -9 of the agents")
	rollBack := upgrade(t)
	advanced("an upgrade")
	rollBack()
	advanced("the way back")
	kubectl(t, tn.owner, "delete", "pod", "across", "local", "echo", "-n", tn.ns, "--wait=false")
}

// upgrade installs another image of the product and another argument of the
// agents, as an operator does, and gives back what undoes it.
func upgrade(t *testing.T) (rollBack func()) {
	t.Helper()
	const tag = "localhost/h8s:e2e-upgrade"
	archive := filepath.Join(t.TempDir(), "h8s.tar")
	if err := relabel(filepath.Join(cluster.bin, "images", "h8s.tar"), archive, tag); err != nil {
		t.Fatal(err)
	}
	if out, err := h8sOutput(6*time.Minute, "image", "load", "--name", cluster.cluster, archive); err != nil {
		t.Fatalf("h8s image load: %v: %s", err, out)
	}
	caches := t.TempDir()
	helm := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), patience+time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "helm"),
			append(args, "--namespace", systemNamespace, "--kubeconfig", kubeconfigPath(admin), "--wait", "--timeout", "4m")...)
		cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+caches, "HELM_CONFIG_HOME="+caches, "HELM_DATA_HOME="+caches)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("helm %s: %v: %s", args[0], err, out)
		}
	}
	// agents are what runs on the nodes, not what the DaemonSet says.
	agents := func() map[string]process {
		t.Helper()
		found := map[string]process{}
		for _, n := range nodes(t) {
			found[n] = only(t, n, "h8s-node")
		}
		return found
	}
	images := func() string {
		t.Helper()
		return kubectl(t, admin, "get", "pods", "-n", systemNamespace, "-l", "app.kubernetes.io/component=node", "-o", "jsonpath={.items[*].status.containerStatuses[0].imageID}")
	}
	before, imagesBefore := agents(), images()
	helm("upgrade", "h8s", filepath.Join(cluster.root, "deploy", "h8s"), "--reset-then-reuse-values", "--set", "image.tag=e2e-upgrade,node.logLevel=debug")
	rollBack = once(func() { helm("rollback", "h8s") })
	t.Cleanup(rollBack)
	for n, agent := range agents() {
		if agent.pid == before[n].pid || !slices.Contains(agent.args, "--log-level=debug") {
			t.Errorf("after the upgrade the agent on %s is process %d, %v; it was %d", n, agent.pid, agent.args, before[n].pid)
		}
	}
	if now := images(); now == imagesBefore {
		t.Errorf("the agents' image is still %s", now)
	}
	return rollBack
}

// relabel makes of the image in an archive another one, with another tag.
func relabel(archive, to, tag string) error {
	img, err := tarball.ImageFromPath(archive, nil)
	if err != nil {
		return err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config := file.Config.DeepCopy()
	config.Labels = map[string]string{"e2e": "upgrade"}
	if img, err = mutate.Config(img, *config); err != nil {
		return err
	}
	ref, err := name.NewTag(tag)
	if err != nil {
		return err
	}
	return tarball.WriteToFile(to, ref, img)
}

// testAgentDown: what runs goes on, what is new waits and says why, and nothing
// lands on the default network.
func testAgentDown(t *testing.T, tn tenant) {
	a, b := nodes(t)[0], nodes(t)[1]
	tn.run(t, pod("leaving", b, ""))
	tn.waitReady(t, "leaving")
	old := kubectl(t, admin, "get", agentDaemonSet, "-n", systemNamespace, "-o", "jsonpath={.spec.template.spec.nodeSelector}")
	schedule := func(selector string) {
		t.Helper()
		kubectl(t, admin, "patch", agentDaemonSet, "-n", systemNamespace, "--type=merge", "-p", `{"spec":{"template":{"spec":{"nodeSelector":`+selector+`}}}}`)
	}
	back := once(func() {
		schedule(`{"example.com/nowhere":null}`)
		kubectl(t, admin, "rollout", "status", agentDaemonSet, "-n", systemNamespace, "--timeout=4m")
		if now := kubectl(t, admin, "get", agentDaemonSet, "-n", systemNamespace, "-o", "jsonpath={.spec.template.spec.nodeSelector}"); now != old && now != "{}"+old {
			t.Errorf("the node selector of the agents was %q and is %q", old, now)
		}
	})
	defer back()
	schedule(`{"example.com/nowhere":"true"}`)
	eventually(t, func() error {
		if n := len(processes(a, "h8s-node")) + len(processes(b, "h8s-node")); n > 0 {
			return fmt.Errorf("%d agents still run", n)
		}
		return nil
	})
	tn.run(t, pod("waiting", b, ""))
	reaches := func(target string) {
		t.Helper()
		eventually(t, func() error { return tn.connect("client", target, "tcp") })
	}
	reaches(tn.ip(t, "server") + ":8080")
	clusterIP := kubectl(t, tn.owner, "get", "service", "server", "-n", tn.ns, "-o", "jsonpath={.spec.clusterIP}")
	reaches(clusterIP + ":80")
	tn.waitsBecause(t, "waiting", "h8s-node")
	kubectl(t, tn.owner, "delete", "pod", "leaving", "-n", tn.ns, "--wait=false")
	back()
	tn.waitReady(t, "waiting")
	reaches(tn.ip(t, "waiting") + ":8080")
	kubectl(t, tn.owner, "wait", "--for=delete", "pod/leaving", "-n", tn.ns, "--timeout=4m")
	kubectl(t, tn.owner, "delete", "pod", "waiting", "-n", tn.ns, "--timeout=4m")
	recordsMatch(t, tn)
}

// once makes f run once, however often it is called.
func once(f func()) func() {
	done := false
	return func() {
		if !done {
			done = true
			f()
		}
	}
}

// waitsBecause asserts that a pod has no address and that an event of it says why. Of which
// reason it is depends on what the kubelet asks first: for the pod's sandbox
// (FailedCreatePodSandBox), or whether the network is ready at all (NetworkNotReady).
func (tn tenant) waitsBecause(t testing.TB, pod, why string) {
	t.Helper()
	eventually(t, func() error {
		out, err := try(tn.owner, "get", "events", "-n", tn.ns, "--field-selector=involvedObject.name="+pod+",type=Warning", "-o", `jsonpath={range .items[*]}{.reason} {.message}{"\n"}{end}`)
		for event := range strings.Lines(out) {
			reason, message, _ := strings.Cut(event, " ")
			if (reason == "FailedCreatePodSandBox" || reason == "NetworkNotReady") && strings.Contains(message, why) {
				return nil
			}
		}
		return fmt.Errorf("no event of pod %s says %q: %q, %w", pod, why, out, err)
	})
	if ip := tn.ip(t, pod); ip != "" {
		t.Errorf("pod %s waits and has the address %s", pod, ip)
	}
}

// attachments are the records that a node's agent keeps of its pods' addresses, read from outside.
func attachments(node string) ([]network.Attachment, error) {
	files, err := filepath.Glob(filepath.Join("/var/lib/h8s", cluster.cluster, "nodes", node, "var/lib/h8s/attachments/*.json"))
	if err != nil {
		return nil, err
	}
	var found []network.Attachment
	for _, f := range files {
		data, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) { // removed meanwhile
			continue
		}
		var a network.Attachment
		if err := errors.Join(err, json.Unmarshal(data, &a)); err != nil {
			return nil, fmt.Errorf("record %s: %w", f, err)
		}
		found = append(found, a)
	}
	return found, nil
}

// recordsMatch waits until the nodes' records of the attachments in a tenant's
// namespace, and the portals' links, are those of its pods, no more and no less.
func recordsMatch(t testing.TB, tn tenant) {
	t.Helper()
	network := kubectl(t, admin, "get", "namespace", tn.ns, "-o", `jsonpath={.metadata.labels.h8s\.io/network}`)
	id := kubectl(t, admin, "get", "network", network, "-o", "jsonpath={.status.id}")
	eventually(t, func() error {
		out, err := try(admin, "get", "pods", "-n", tn.ns, "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.status.podIP}{"\n"}{end}`)
		if err != nil {
			return err
		}
		var want, got []string
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 2 {
				want = append(want, f[0]+" "+f[1])
			}
		}
		for _, n := range nodes(t) {
			held, err := attachments(n)
			if err != nil {
				return err
			}
			links := 0
			for _, a := range held {
				if a.Namespace == tn.ns {
					got = append(got, n+" "+a.Address.String())
				}
				if a.Network == network {
					links++
				}
			}
			out, err := tryNode(n, "test ! -e /run/netns/h8s-"+id+" || nsenter --net=/run/netns/h8s-"+id+" ip -o link show type veth")
			if err != nil {
				return err
			}
			if toPods := strings.Count(out, "\n") - strings.Count(out, " uplink@"); toPods != links {
				return fmt.Errorf("node %s holds %d addresses of Network %s, and its portal has %d links to pods:\n%s", n, links, network, toPods, out)
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(want, got) {
			return fmt.Errorf("pods are %v and records are %v", want, got)
		}
		return nil
	})
}

// testKilledInAdd kills the agents as soon as the first record of an ADD is on
// disk, when the kernel has not been touched or only half.
func testKilledInAdd(t *testing.T, tn tenant) {
	const count = 8
	records := func(node string) int {
		entries, _ := os.ReadDir(filepath.Join("/var/lib/h8s", cluster.cluster, "nodes", node, "var/lib/h8s/attachments"))
		return len(entries)
	}
	var manifests, names []string
	for i := range count {
		names = append(names, fmt.Sprintf("killed-%d", i))
		manifests = append(manifests, pod(names[i], nodes(t)[i%2], ""))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	killed := make(chan error)
	for _, n := range nodes(t) {
		agent, before := only(t, n, "h8s-node"), records(n)
		go func() {
			tick := time.NewTicker(200 * time.Microsecond)
			defer tick.Stop()
			for records(n) <= before {
				select {
				case <-ctx.Done():
					killed <- fmt.Errorf("no ADD on %s", n)
					return
				case <-tick.C:
				}
			}
			killed <- agent.crash()
		}()
	}
	tn.run(t, manifests...)
	for range nodes(t) {
		if err := <-killed; err != nil {
			t.Error(err)
		}
	}
	tn.waitReady(t, names...)
	owner := map[string]string{}
	for _, name := range names {
		ip := tn.ip(t, name)
		if other := owner[ip]; other != "" {
			t.Errorf("pods %s and %s both have the address %s", name, other, ip)
		}
		owner[ip] = name
		eventually(t, func() error { return tn.connect("client", ip+":8080", "tcp") })
	}
	recordsMatch(t, tn)
	kubectl(t, tn.owner, append([]string{"delete", "pod", "-n", tn.ns, "--timeout=4m"}, names...)...)
	recordsMatch(t, tn)
}

// testNetworkMissing: the namespace names a Network that is not there yet.
func testNetworkMissing(t *testing.T, tn tenant) {
	const name, cidr = "faults-late", "10.79.0.0/24"
	late := tenant{name: name, owner: admin, ns: name}
	t.Cleanup(func() {
		_, _ = try(admin, "delete", "namespace", name, "--ignore-not-found", "--timeout=4m")
		_, _ = try(admin, "delete", "network", name, "--ignore-not-found", "--timeout=4m")
	})
	apply(t, admin, fmt.Sprintf("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {h8s.io/tenant: %s, h8s.io/network: %s}}}", name, tn.name, name))
	waitNamespace(t, late)
	late.run(t, pod("web", "", ""))
	late.waitsBecause(t, "web", name)
	apply(t, admin, networkManifest(name, tn.name, cidr))
	late.waitReady(t, "web")
	if ip := netip.MustParseAddr(late.ip(t, "web")); !netip.MustParsePrefix(cidr).Contains(ip) {
		t.Errorf("the pod's address is %s, want one of %s", ip, cidr)
	}
}

func networkManifest(name, tenant, cidr string) string {
	return fmt.Sprintf("{apiVersion: h8s.io/v1alpha1, kind: Network, metadata: {name: %q}, spec: {tenant: %q, cidrs: [%q]}}", name, tenant, cidr)
}

// waitNamespace waits until admission can work for a namespace: its labels are
// whole and its ServiceAccount is there.
func waitNamespace(t testing.TB, tn tenant) {
	t.Helper()
	eventually(t, func() error {
		out, err := try(admin, "get", "namespace", tn.ns, "-o", `jsonpath={.metadata.labels.h8s\.io/sandbox}`)
		if err != nil || out == "" {
			return fmt.Errorf("namespace %s has no sandbox yet: %w", tn.ns, err)
		}
		_, err = try(admin, "get", "serviceaccount", "default", "-n", tn.ns)
		return err
	})
}

// testConflict: a node needs for itself what a Network has.
func testConflict(t *testing.T, tn tenant) {
	const name, cidr = "faults-conflict", "10.78.0.0/24"
	node := nodes(t)[1]
	onNode(t, node, "ip route add blackhole 10.78.0.0/16")
	remove := once(func() { onNode(t, node, "ip route del blackhole 10.78.0.0/16") })
	defer remove()
	conflict := tenant{name: name, owner: admin, ns: name}
	t.Cleanup(func() {
		_, _ = try(admin, "delete", "namespace", name, "--ignore-not-found", "--timeout=4m")
		_, _ = try(admin, "delete", "network", name, "--ignore-not-found", "--timeout=4m")
	})
	apply(t, admin, networkManifest(name, tn.name, cidr))
	apply(t, admin, fmt.Sprintf("{apiVersion: v1, kind: Namespace, metadata: {name: %s, labels: {h8s.io/tenant: %s, h8s.io/network: %s}}}", name, tn.name, name))
	waitNamespace(t, conflict)
	conflict.run(t, pod("web", node, ""))
	conflict.waitsBecause(t, "web", "10.78.0.0/16")
	eventually(t, func() error {
		out, err := try(admin, "get", "network", name, "-o", `jsonpath={.status.conditions[?(@.type=="Conflict")].status} {.status.conditions[?(@.type=="Conflict")].message}`)
		if err != nil || !strings.HasPrefix(out, "True") || !strings.Contains(out, node) || !strings.Contains(out, "10.78.0.0/16") {
			return fmt.Errorf("condition Conflict: %q, %w", out, err)
		}
		return nil
	})
	remove()
	conflict.waitReady(t, "web")
}

// testLeftovers makes what a crash could leave and lets doctor find it, before
// those who would clean it up.
func testLeftovers(t *testing.T, tn tenant) {
	doctorContent(t)
	node := nodes(t)[1]
	record, err := json.Marshal(network.Attachment{
		ContainerID: "0123456789abcdef", IfName: "eth0", Network: tn.name, Address: netip.MustParseAddr("10.0.255.1"),
		Namespace: tn.ns, Pod: "ghost", PodUID: "no-such-uid",
	})
	if err != nil {
		t.Fatal(err)
	}
	const file = "/var/lib/h8s/attachments/0123456789abcdef-eth0.json"
	const empty = "faults-empty" // a Network that nobody uses
	t.Cleanup(func() { _, _ = try(admin, "delete", "network", empty, "--ignore-not-found", "--timeout=4m") })
	apply(t, admin, networkManifest(empty, tn.name, "10.77.0.0/16"))
	kubectl(t, admin, "wait", "--for=condition=Ready", "network/"+empty, "--timeout=4m")
	emptyID := kubectl(t, admin, "get", "network", empty, "-o", "jsonpath={.status.id}")
	portal := "h8s-" + kubectl(t, admin, "get", "network", tn.name, "-o", "jsonpath={.status.id}")
	for name, test := range map[string]struct{ add, del, want string }{
		"netns":      {"ip netns add h8s-16000001", "ip netns del h8s-16000001", "h8s-16000001"},
		"idle netns": {"ip netns add h8s-" + emptyID, "ip netns del h8s-" + emptyID, "Network " + empty},
		"link":       {"ip link add h8su16000002 type veth peer name h8sp16000002", "ip link del h8su16000002", "h8su16000002"},
		"route":      {"ip link add h8su16000003 type veth peer name h8sp16000003 && ip link set h8su16000003 up && ip route add 10.77.0.0/28 dev h8su16000003", "ip link del h8su16000003", "10.77.0.0/28"},
		"pod's link": {"ip -n " + portal + " link add p0123456789 type veth peer name ghost", "ip -n " + portal + " link del p0123456789", "p0123456789 in " + portal},
		"nft table":  {"ip netns exec " + portal + " nft add table ip stray", "ip netns exec " + portal + " nft delete table ip stray", "ip stray in " + portal},
		"attachment": {"echo '" + string(record) + "' > " + file, "rm -f " + file, "ghost"},
	} {
		t.Run(name, func(t *testing.T) {
			resume := only(t, node, "h8s-node").pause(t)
			defer resume()
			onNode(t, node, test.add)
			defer func() { _, _ = tryNode(node, test.del) }()
			doctorReports(t, test.want, node)
		})
	}
	t.Run("Blocks", func(t *testing.T) {
		// The controller reaps the one and the node's agent the other.
		deployed := kubectl(t, admin, "get", "deployment", "h8s-controller", "-n", systemNamespace, "-o", "jsonpath={.spec.replicas}")
		scale := func(replicas string) {
			t.Helper()
			kubectl(t, admin, "scale", "deployment/h8s-controller", "-n", systemNamespace, "--replicas="+replicas)
			kubectl(t, admin, "rollout", "status", "deployment/h8s-controller", "-n", systemNamespace, "--timeout=4m")
		}
		back := once(func() { scale(deployed) })
		defer back()
		scale("0")
		eventually(t, func() error {
			for _, n := range nodes(t) {
				if len(processes(n, "h8s-controller")) > 0 {
					return fmt.Errorf("the controller still runs on %s", n)
				}
			}
			return nil
		})
		resume := once(only(t, node, "h8s-node").pause(t))
		defer resume()
		blocks := map[string]string{
			"faults-10-0-255-240":  fmt.Sprintf("network: %s, cidr: 10.0.255.240/28, node: no-such-node", tn.name),
			"no-net-10-99-255-240": fmt.Sprintf("network: no-net, cidr: 10.99.255.240/28, node: %s", node),
		}
		for name, spec := range blocks {
			t.Cleanup(func() { _, _ = try(admin, "delete", "block", name, "--ignore-not-found") })
			apply(t, admin, fmt.Sprintf("{apiVersion: h8s.io/v1alpha1, kind: Block, metadata: {name: %s}, spec: {%s}}", name, spec))
		}
		doctorReports(t, slices.Collect(maps.Keys(blocks))...)
		resume()
		back()
		eventually(t, func() error {
			if out, err := try(admin, "get", "blocks", "faults-10-0-255-240", "no-net-10-99-255-240", "--ignore-not-found", "-o", "name"); out != "" || err != nil {
				return fmt.Errorf("Blocks that nobody needs are still there: %s, %w", out, err)
			}
			return nil
		})
	})
	doctorContent(t)
}

// TestCleanUp deletes all that a tenant had and looks for what is left of it on
// the nodes and in the API.
func TestCleanUp(t *testing.T) {
	tn := newTenant(t, "cleanup", "10.0.0.0/16")
	var manifests []string
	for _, n := range nodes(t) {
		manifests = append(manifests, pod("web-"+n, n, ""))
	}
	tn.run(t, append(manifests, "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {selector: {app: web-n1}, ports: [{port: 80, targetPort: 8080}]}}")...)
	for _, n := range nodes(t) {
		tn.waitReady(t, "web-"+n)
	}
	id := kubectl(t, admin, "get", "network", tn.name, "-o", "jsonpath={.status.id}")
	for _, n := range nodes(t) {
		if traces := tracesOf(n, id); len(traces) < 3 {
			t.Fatalf("node %s: this test does not see a network that is there: %v", n, traces)
		}
	}
	kubectl(t, tn.owner, "delete", "pod", "--all", "-n", tn.ns, "--timeout=4m")
	recordsMatch(t, tn)
	kubectl(t, admin, "delete", "tenant", tn.name, "--timeout=4m")
	noTraces(t, id)
	for _, n := range nodes(t) {
		held, err := attachments(n)
		if err != nil {
			t.Error(err)
		}
		for _, a := range held {
			if a.Network == tn.name {
				t.Errorf("node %s: a record is left: %+v", n, a)
			}
		}
	}
	if out := kubectl(t, admin, "get", "blocks", "-o", "name"); strings.Contains(out, "/"+tn.name+"-") {
		t.Errorf("Blocks are left: %s", out)
	}
}

// tracesOf are the lines on a node that speak of the Network with this number.
func tracesOf(node, id string) []string {
	out, err := tryNode(node, "ls /run/netns; ip -o link; ip route show table all; ip rule; nft list ruleset; ip -d -o link show type vxlan")
	if err != nil {
		return []string{err.Error()}
	}
	var traces []string
	for line := range strings.Lines(out) {
		for _, word := range strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\",:@{}", r) }) {
			if word == "h8s-"+id || word == "h8su"+id {
				traces = append(traces, strings.TrimSpace(line))
				break
			}
		}
	}
	return traces
}

// noTraces waits until no node has anything of the Networks with these numbers.
func noTraces(t testing.TB, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if id == "" {
			t.Error("a Network had no number")
			continue
		}
		for _, n := range nodes(t) {
			eventually(t, func() error {
				if traces := tracesOf(n, id); len(traces) > 0 {
					return fmt.Errorf("node %s still has of Network %s: %s", n, id, strings.Join(traces, "; "))
				}
				return nil
			})
		}
	}
}
