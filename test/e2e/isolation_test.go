package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"h8s.io/hypernetes/test/e2e/probe"
)

// rivals is two tenants on one CIDR and a third one on another, with pods on both
// nodes and in both sandboxes, and the operator's own pods on the default network.
type rivals struct {
	a, b tenant
	// c's addresses are not within the Network of the others, nor theirs within its
	// own: each node has a route from every one of them to c, and back.
	c tenant
	// def is no tenant: a namespace of the operator's, whose pods d1 (on n1) and d2 (on n2) use runc.
	def tenant
	// n1 is the node with the control plane.
	n1, n2 string
	// nodeIP by node, pods by tenant's name, placement by "tenant/pod", ips by "tenant/pod".
	nodeIP map[string]string
	pods   map[string][]string
	nodeOf map[string]string
	ips    map[string]string
	// services are the ClusterIPs of the Service "web" by tenant's name; nodePort is def's.
	services map[string]string
	nodePort string
	// hyper are the pods that are virtual machines, by name.
	hyper []string
	// twinA and twinB are pods of a and b with one and the same address, on different nodes.
	twinA, twinB string
}

// TestIsolation has tenants, two of them on one CIDR, use what they have and try
// to reach what they have not.
func TestIsolation(t *testing.T) {
	r := newRivals(t)
	t.Run("EqualAddresses", r.testEqualAddresses)
	t.Run("WithinTenant", r.testWithinTenant)
	t.Run("BigPayloads", r.testBigPayloads)
	t.Run("BetweenTenants", r.testBetweenTenants)
	t.Run("Infrastructure", r.testInfrastructure)
	t.Run("Machine", r.testMachine)
	t.Run("Internet", r.testInternet)
	t.Run("FromDefaultNetwork", r.testFromDefaultNetwork)
	t.Run("SpoofedSource", r.testSpoofedSource)
	t.Run("ForgedFrames", r.testForgedFrames)
	t.Run("OtherProtocols", r.testOtherProtocols)
	t.Run("ForgedVXLAN", r.testForgedVXLAN)
	t.Run("SpoofedFromDefaultNetwork", r.testSpoofedFromDefaultNetwork)
	t.Run("ForeignEndpoints", r.testForeignEndpoints)
	t.Run("NodePort", r.testNodePort)
	t.Run("ProbesOfTwins", r.testProbesOfTwins)
}

// rivalPod is a pod that is Ready as long as the file podReady is there.
func rivalPod(name, node, fields string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %s}
  %s
  containers:
  - name: agnhost
    image: localhost/agnhost:latest
    imagePullPolicy: Never
    command: [sh, -c, "mkdir /tmp/www && touch %s && httpd -p 8090 -h /tmp/www && exec /agnhost netexec --http-port=8080 --udp-port=8080"]
    ports: [{name: http, containerPort: 8080}, {name: udp, containerPort: 8080, protocol: UDP}]
    readinessProbe: {httpGet: {path: /ready, port: 8090}, periodSeconds: 1, timeoutSeconds: 10}
`, name, node, fields, podReady)
}

const (
	podReady = "/tmp/www/ready"
	// rivalsCIDR is the Network of both. Nobody else on the cluster uses it, so that
	// the nodes' Blocks come out the same every time: see newRivals.
	rivalsCIDR = "10.77.0.0/16"
	thirdCIDR  = "10.78.0.0/16"
)

// webService is a Service of the pods with app=web: 80 over TCP and UDP.
const webService = `
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: udp, port: 80, targetPort: udp, protocol: UDP}
`

func newRivals(t *testing.T) *rivals {
	t.Helper()
	names := nodes(t)
	if len(names) < 2 {
		t.Fatalf("these tests need two nodes, the cluster has %v", names)
	}
	r := &rivals{
		a:     newTenant(t, "iso-a", rivalsCIDR, "gvisor", "hyper"),
		b:     newTenant(t, "iso-b", rivalsCIDR, "gvisor", "hyper"),
		c:     newTenant(t, "iso-c", thirdCIDR, "gvisor", "hyper"),
		hyper: []string{"a2", "b1", "c2"},
		def:   operatorNamespace(t, "iso-default"),
		n1:    names[0], n2: names[1],
		nodeIP: map[string]string{}, pods: map[string][]string{}, nodeOf: map[string]string{}, ips: map[string]string{}, services: map[string]string{},
	}
	for _, n := range []string{r.n1, r.n2} {
		r.nodeIP[n] = kubectl(t, admin, "get", "node", n, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
	}
	r.def.run(t, rivalPod("d1", r.n1, ""), rivalPod("d2", r.n2, ""), strings.Replace(webService, "spec:", "spec:\n  type: NodePort", 1))
	r.add(t, r.a, map[string]string{"a1": r.n1, "a2": r.n1, "a3": r.n2, "a4": r.n2})
	r.add(t, r.b, map[string]string{"b1": r.n2, "b2": r.n2, "b3": r.n1, "b4": r.n2})
	r.add(t, r.c, map[string]string{"c1": r.n1, "c2": r.n2})
	// A node holds no range twice, and takes the lowest that is free: what a holds
	// on one node is what b gets on the other. Each has one address that the other has not.
	r.findTwins()
	r.def.waitReady(t, "d1", "d2")
	r.pods[r.def.name] = []string{"d1", "d2"}
	for _, p := range r.pods[r.def.name] {
		r.ips[r.def.name+"/"+p] = r.def.ip(t, p)
	}
	for _, tn := range r.tenants() {
		tn.run(t, webService)
	}
	for _, tn := range append(r.tenants(), r.def) {
		r.services[tn.name] = kubectl(t, tn.owner, "get", "service", "web", "-n", tn.ns, "-o", "jsonpath={.spec.clusterIP}")
		tn.arm(t, r.pods[tn.name]...)
	}
	r.nodePort = kubectl(t, admin, "get", "service", "web", "-n", r.def.ns, "-o", "jsonpath={.spec.ports[0].nodePort}")
	return r
}

// operatorNamespace is a namespace of no tenant, used by the operator.
func operatorNamespace(t testing.TB, name string) tenant {
	t.Helper()
	eventually(t, func() error { // an earlier run's may still be going
		_, err := try(admin, "create", "namespace", name)
		return err
	})
	t.Cleanup(func() {
		if _, err := try(admin, "delete", "namespace", name, "--timeout=4m"); err != nil {
			t.Error(err)
		}
	})
	eventually(t, func() error {
		_, err := try(admin, "get", "serviceaccount", "default", "-n", name)
		return err
	})
	return tenant{name: name, owner: admin, ns: name}
}

// add runs pods, by name on nodes, and waits for them.
func (r *rivals) add(t testing.TB, tn tenant, placement map[string]string) {
	t.Helper()
	var manifests []string
	names := slices.Sorted(maps.Keys(placement))
	for _, p := range names {
		fields := ""
		if slices.Contains(r.hyper, p) {
			fields = "runtimeClassName: hyper"
		}
		manifests = append(manifests, rivalPod(p, placement[p], fields))
	}
	tn.run(t, manifests...)
	tn.waitReady(t, names...)
	for _, p := range names {
		key := tn.name + "/" + p
		r.ips[key], r.nodeOf[key] = tn.ip(t, p), placement[p]
		r.pods[tn.name] = append(r.pods[tn.name], p)
	}
}

func (r *rivals) findTwins() {
	for _, a := range r.pods[r.a.name] {
		for _, b := range r.pods[r.b.name] {
			if r.ip(r.a, a) == r.ip(r.b, b) {
				r.twinA, r.twinB = a, b
			}
		}
	}
}

func (r *rivals) ip(tn tenant, pod string) string   { return r.ips[tn.name+"/"+pod] }
func (r *rivals) node(tn tenant, pod string) string { return r.nodeOf[tn.name+"/"+pod] }

// byIP are a tenant's pods by address.
func (r *rivals) byIP(tn tenant) map[string]string {
	m := map[string]string{}
	for _, p := range r.pods[tn.name] {
		m[r.ip(tn, p)] = p
	}
	return m
}

func (r *rivals) tenants() []tenant { return []tenant{r.a, r.b, r.c} }

// others are the tenants that tn must know nothing of.
func (r *rivals) others(tn tenant) []tenant {
	return slices.DeleteFunc(r.tenants(), func(o tenant) bool { return o.name == tn.name })
}

func (r *rivals) testEqualAddresses(t *testing.T) {
	if r.twinA == "" {
		t.Fatalf("no pods of both tenants with one address: %v", r.ips)
	}
	ip := kubectl(t, r.a.owner, "get", "pod", r.twinA, "-n", r.a.ns, "-o", "jsonpath={.status.podIP}")
	if got := kubectl(t, r.b.owner, "get", "pod", r.twinB, "-n", r.b.ns, "-o", "jsonpath={.status.podIP}"); got != ip {
		t.Errorf("status.podIP of the twins: %s and %s", ip, got)
	}
	nodeA := kubectl(t, r.a.owner, "get", "pod", r.twinA, "-n", r.a.ns, "-o", "jsonpath={.spec.nodeName}")
	nodeB := kubectl(t, r.b.owner, "get", "pod", r.twinB, "-n", r.b.ns, "-o", "jsonpath={.spec.nodeName}")
	if nodeA == nodeB {
		t.Errorf("both pods with %s are on node %s", ip, nodeA)
	}
	// No two pods of one node have one address, whosever they are.
	seen := map[string]string{}
	for key, ip := range r.ips {
		if where, ok := r.nodeOf[key]; ok {
			if twin, ok := seen[where+" "+ip]; ok {
				t.Errorf("%s and %s both have %s on %s", key, twin, ip, where)
			}
			seen[where+" "+ip] = key
		}
	}
}

// check is a dial and what must come of it.
type check struct {
	probe.Target
	// want is the answer; empty: nobody may answer.
	want string
	// rejected is allowed besides silence: the portal itself refuses what is no Service of its Network.
	rejected bool
}

// dialAll dials from one pod and reports every outcome that is not as it must be.
// It insists on at least one check that must succeed, by the protocols that must not.
// Who must answer and is late, on a busy machine, is dialled again; all others once.
func dialAll(t *testing.T, tn tenant, pod string, checks []check) {
	t.Helper()
	controls := map[string]bool{}
	for _, c := range checks {
		controls[c.Proto] = controls[c.Proto] || c.want != ""
	}
	for proto, ok := range controls {
		if !ok {
			t.Fatalf("no positive control for %s from %s: a broken probe would pass", proto, pod)
		}
	}
	err := poll(time.Minute, func() error {
		targets := make([]probe.Target, len(checks))
		for i, c := range checks {
			targets[i] = c.Target
		}
		var late []check
		var errs []error
		for i, o := range tn.dial(t, pod, targets...) {
			c := checks[i]
			what := fmt.Sprintf("%s/%s → %s %s", tn.name, pod, c.Proto, c.Address)
			switch {
			case c.want != "" && o.Failure != "":
				late, errs = append(late, c), append(errs, fmt.Errorf("%s: want an answer %q, got %s %s", what, c.want, o.Failure, o.Detail))
			case c.want != "" && o.Answer != c.want:
				t.Errorf("%s: want an answer %q, got %q", what, c.want, o.Answer)
			case c.want != "":
			case o.Answer != "":
				t.Errorf("%s: LEAK: answered %q", what, o.Answer)
			case o.Failure == "timeout", o.Failure == "unreachable":
			case o.Failure == "refused" && c.rejected:
			default:
				t.Errorf("%s: want silence, got %s: %s", what, o.Failure, o.Detail)
			}
		}
		checks = late
		return errors.Join(errs...)
	})
	if err != nil {
		t.Error(err)
	}
}

const pong = "echo reply with 56 bytes"

// reach is the three ways to a pod by its address.
func reach(ip, want string) []check {
	ping := ""
	if want != "" {
		ping = pong
	}
	return []check{
		{Target: probe.Target{Proto: "http", Address: ip + ":8080"}, want: want},
		{Target: probe.Target{Proto: "udp", Address: ip + ":8080"}, want: want},
		{Target: probe.Target{Proto: "icmp", Address: ip, Size: 56}, want: ping},
	}
}

// own is every pod of the pod's own tenant, with the name that must answer, and
// a TCP connection: the positive controls. (A ping to oneself stays inside the
// sandbox, where a ping socket does not hear it.)
func (r *rivals) own(tn tenant, pod string) []check {
	var checks []check
	for _, p := range r.pods[tn.name] {
		checks = append(checks, slices.DeleteFunc(reach(r.ip(tn, p), p), func(c check) bool { return p == pod && c.Proto == "icmp" })...)
	}
	return append(checks, check{Target: probe.Target{Proto: "tcp", Address: r.ip(tn, r.pods[tn.name][0]) + ":8080"}, want: "connected"})
}

// eachPod does something in every pod of the given tenants, all at the same time.
func (r *rivals) eachPod(t *testing.T, do func(t *testing.T, tn tenant, pod string), tenants ...tenant) {
	t.Helper()
	t.Run("pods", func(t *testing.T) {
		for _, tn := range tenants {
			for _, p := range r.pods[tn.name] {
				t.Run(tn.name+"/"+p, func(t *testing.T) {
					t.Parallel()
					do(t, tn, p)
				})
			}
		}
	})
}

// testWithinTenant has every pod of both tenants dial every pod of its own
// tenant at the same time. A pod that answers says its name.
func (r *rivals) testWithinTenant(t *testing.T) {
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		dialAll(t, tn, pod, r.own(tn, pod))
	}, r.a, r.b)
}

func (r *rivals) testBigPayloads(t *testing.T) {
	const megabyte = 1 << 20
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		mtu := podMTU(t, tn, pod)
		var targets []probe.Target
		var sizes []int
		for _, p := range r.pods[tn.name] {
			ip := r.ip(tn, p)
			targets = append(targets,
				probe.Target{Proto: "http", Address: ip + ":8080", Path: fmt.Sprintf("/shell?cmd=head+-c+%d+/dev/zero+|+tr+'\\0'+x", megabyte)},
				// Fragments, in both directions. netexec takes 2048 bytes at most.
				probe.Target{Proto: "udp", Address: ip + ":8080", Size: 2000})
			sizes = append(sizes, megabyte, 2000-len("echo "))
			if p == pod {
				continue // a ping to oneself stays inside the sandbox
			}
			// To the byte: the largest that fits, one more, and many fragments.
			for _, size := range []int{mtu - 28, mtu - 27, 4000, 8000} {
				targets = append(targets, probe.Target{Proto: "icmp", Address: ip, Size: size})
				sizes = append(sizes, size)
			}
		}
		// What does not fit never arrives; what is lost on a busy machine does the next time.
		err := poll(60*time.Second, func() error {
			var errs []error
			var again []probe.Target
			var missing []int
			for i, o := range tn.dial(t, pod, targets...) {
				ok := false
				switch targets[i].Proto {
				case "http":
					ok = strings.Count(o.Answer, "x") == sizes[i]
				case "udp":
					ok = len(o.Answer) == sizes[i]
				case "icmp":
					ok = o.Answer == fmt.Sprintf("echo reply with %d bytes", sizes[i])
				}
				if !ok {
					errs = append(errs, fmt.Errorf("%s → %s %s with %d bytes: got %d bytes, %s %s", pod, targets[i].Proto, targets[i].Address, sizes[i], len(o.Answer), o.Failure, o.Detail))
					again, missing = append(again, targets[i]), append(missing, sizes[i])
				}
			}
			targets, sizes = again, missing
			return errors.Join(errs...)
		})
		if err != nil {
			t.Error(err)
		}
	}, r.a, r.b)
}

func podMTU(t *testing.T, tn tenant, pod string) int {
	t.Helper()
	out, err := tn.sh(pod, "ip link show eth0 | sed -n 's/.* mtu \\([0-9]*\\).*/\\1/p'")
	var mtu int
	if err == nil {
		_, err = fmt.Sscan(out, &mtu)
	}
	if err != nil {
		t.Fatalf("MTU of %s: %q: %v", pod, out, err)
	}
	return mtu
}

// unusedServiceIP is a ClusterIP that nobody has; what answers for another
// tenant's must be what answers for this one.
const unusedServiceIP = "10.96.255.251"

// testBetweenTenants dials every address of the other tenants. Where the own
// tenant has that address too, the own pod must answer.
func (r *rivals) testBetweenTenants(t *testing.T) {
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		checks := r.own(tn, pod)
		mine := r.byIP(tn)
		var services []string
		for _, theirs := range r.others(tn) {
			for ip := range r.byIP(theirs) {
				if mine[ip] == "" { // if not, it is the own pod's, which is among the controls
					checks = append(checks, reach(ip, "")...)
				}
			}
			if theirs.name != r.c.name && tn.name != r.c.name {
				r.foreign(t, theirs, tn) // or nothing of theirs would have been dialled
			}
			services = append(services, r.services[theirs.name])
			checks = append(checks, serviceChecks(r.services[theirs.name])...)
		}
		dialAll(t, tn, pod, checks)
		r.indistinguishable(t, tn, pod, services...)
	}, r.tenants()...)
}

func serviceChecks(ip string) []check {
	return []check{
		{Target: probe.Target{Proto: "http", Address: ip + ":80"}, rejected: true},
		{Target: probe.Target{Proto: "udp", Address: ip + ":80"}, rejected: true},
		{Target: probe.Target{Proto: "tcp", Address: ip + ":8080"}, rejected: true},
		{Target: probe.Target{Proto: "icmp", Address: ip}, rejected: true},
	}
}

// refusals is how long the kernel takes until it says "unreachable" six times at once
// again: see icmp_ratelimit in ip-sysctl.
const refusals = 7 * time.Second

// indistinguishable asserts that a Service of someone else is met as one that
// does not exist. The kernel limits how often it says "unreachable", so that one
// of two equal refusals may be silent; several times in a row they are not.
func (r *rivals) indistinguishable(t *testing.T, tn tenant, pod string, services ...string) {
	t.Helper()
	for _, ip := range services {
		var targets []probe.Target
		for _, addr := range []string{ip, unusedServiceIP} {
			for _, c := range serviceChecks(addr) {
				targets = append(targets, c.Target)
			}
		}
		err := poll(2*time.Minute, func() (err error) {
			defer func() {
				if err != nil {
					time.Sleep(refusals) // or the second half would always meet the limit
				}
			}()
			out := tn.dial(t, pod, targets...)
			half := len(out) / 2
			for i := range half {
				if out[i].Failure != out[half+i].Failure || out[i].Answer != out[half+i].Answer {
					return fmt.Errorf("%s %s gives %+v, an unused address gives %+v", targets[i].Proto, targets[i].Address, out[i], out[half+i])
				}
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s can tell that Service %s exists: %v", pod, ip, err)
		}
	}
}

// metadataAddress is where clouds keep their machines' credentials.
const metadataAddress = "169.254.169.254"

// testInfrastructure dials what is not the tenants': nodes, the control plane,
// the default network, portals, and a metadata server that really is there.
func (r *rivals) testInfrastructure(t *testing.T) {
	api := strings.Fields(kubectl(t, admin, "get", "endpointslices", "-n", "default", "-l", "kubernetes.io/service-name=kubernetes",
		"-o", "jsonpath={.items[*].endpoints[*].addresses[*]}"))
	if len(api) == 0 {
		t.Fatal("the Service kubernetes has no endpoints")
	}
	for _, n := range []string{r.n1, r.n2} {
		serveMetadata(t, n)
		// etcd itself is on the node's loopback; what a dial of its port says takes a server there.
		serve(t, nodeNetns(t, n), r.nodeIP[n]+":2379")
	}

	var forbidden []check
	add := func(proto, address string, rejected bool) {
		forbidden = append(forbidden, check{Target: probe.Target{Proto: proto, Address: address}, rejected: rejected})
	}
	hosts := []string{r.nodeIP[r.n1], r.nodeIP[r.n2], metadataAddress, "169.254.77.1", "169.254.77.2", "169.254.1.1"}
	for _, host := range hosts {
		for _, port := range []string{"22", "53", "80", "2379", "2380", "6443", "9476", "10248", "10249", "10250", "10256", "10257", "10259", r.nodePort} {
			if port == "6443" && slices.Contains(api, host) {
				continue // the one exception; see below
			}
			add("tcp", host+":"+port, false)
		}
		for _, port := range []string{"53", "2379", "4789", r.nodePort} {
			add("udp", host+":"+port, false)
		}
		if host != "169.254.1.1" { // the pod's own router, which answers pings
			add("icmp", host, false)
		}
	}
	for _, p := range r.pods[r.def.name] {
		forbidden = append(forbidden, reach(r.ip(r.def, p), "")...)
	}
	foreign := []string{r.services[r.def.name]}
	for line := range strings.Lines(kubectl(t, admin, "get", "services", "-n", "kube-system", "-o", "jsonpath={range .items[*]}{.spec.clusterIP}{'\\n'}{end}")) {
		// The cluster DNS address is the tenant's own name server; only other ports of it are not.
		if ip := strings.TrimSpace(line); ip != "" && ip != "None" {
			add("tcp", ip+":9153", true)
			add("tcp", ip+":8080", true)
		}
	}
	for _, ip := range foreign {
		forbidden = append(forbidden, serviceChecks(ip)...)
	}

	t.Run("Controls", func(t *testing.T) { r.testTargetsAlive(t) })
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		checks := append(r.own(tn, pod), forbidden...)
		for _, ip := range api {
			checks = append(checks, check{Target: probe.Target{Proto: "tcp", Address: ip + ":6443"}, want: "connected"})
		}
		dialAll(t, tn, pod, checks)
		r.indistinguishable(t, tn, pod, foreign...)
	}, r.a, r.b)
}

// testTargetsAlive shows that what tenants may not reach is there: the operator's pods reach it.
func (r *rivals) testTargetsAlive(t *testing.T) {
	checks := []check{
		{Target: probe.Target{Proto: "http", Address: metadataAddress + ":80"}, want: "served"},
		{Target: probe.Target{Proto: "tcp", Address: r.nodeIP[r.n1] + ":10250"}, want: "connected"},
		{Target: probe.Target{Proto: "tcp", Address: r.nodeIP[r.n2] + ":10250"}, want: "connected"},
		{Target: probe.Target{Proto: "tcp", Address: r.nodeIP[r.n1] + ":" + r.nodePort}, want: "connected"},
		{Target: probe.Target{Proto: "tcp", Address: r.nodeIP[r.n2] + ":" + r.nodePort}, want: "connected"},
		{Target: probe.Target{Proto: "http", Address: r.nodeIP[r.n1] + ":2379"}, want: "served"},
		{Target: probe.Target{Proto: "http", Address: r.nodeIP[r.n2] + ":2379"}, want: "served"},
		{Target: probe.Target{Proto: "udp", Address: r.nodeIP[r.n1] + ":2379"}, want: "served"},
		{Target: probe.Target{Proto: "udp", Address: r.nodeIP[r.n2] + ":2379"}, want: "served"},
		{Target: probe.Target{Proto: "icmp", Address: r.nodeIP[r.n1], Size: 56}, want: pong},
		{Target: probe.Target{Proto: "icmp", Address: r.nodeIP[r.n2], Size: 56}, want: pong},
		{Target: probe.Target{Proto: "tcp", Address: r.services[r.def.name] + ":80"}, want: "connected"},
	}
	for _, p := range r.pods[r.def.name] {
		dialAll(t, r.def, p, append(r.own(r.def, p), checks...))
	}
}

// serveMetadata gives a node a metadata server for the time of the test.
func serveMetadata(t *testing.T, node string) {
	t.Helper()
	onNode(t, node, "ip address add "+metadataAddress+"/32 dev lo")
	t.Cleanup(func() { onNode(t, node, "ip address del "+metadataAddress+"/32 dev lo") })
	serve(t, nodeNetns(t, node), metadataAddress+":80")
}

// serve answers HTTP in a network namespace of the machine until the test is over.
func serve(t *testing.T, netns, address string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := probeIn(ctx, t, netns, "serve", address)
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	eventually(t, func() error {
		check := probeIn(ctx, t, netns, "dial")
		check.Stdin = strings.NewReader(mustJSON(t, []probe.Target{{Proto: "http", Address: address}}))
		out, err := check.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "served") {
			return fmt.Errorf("the server at %s is not up yet: %s %w", address, out, err)
		}
		return nil
	})
}

// testMachine: the cluster's network is the machine's bridge, and what the
// machine serves on all addresses, it serves there. That is as little a tenant's
// business as a node is.
func (r *rivals) testMachine(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	datagrams, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp4", "0.0.0.0:"+port)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "served") })}
	go func() { _ = srv.Serve(listener) }()
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := datagrams.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = datagrams.WriteTo([]byte("served"), from)
		}
	}()
	t.Cleanup(func() { srv.Close(); datagrams.Close() })

	_, bridge := r.gateway(t)
	targets := []probe.Target{{Proto: "udp", Address: bridge + ":" + port}}
	interfaces, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range interfaces {
		ip := a.(*net.IPNet).IP
		if ip.To4() == nil || ip.IsLoopback() {
			continue
		}
		targets = append(targets, probe.Target{Proto: "http", Address: ip.String() + ":" + port}, probe.Target{Proto: "icmp", Address: ip.String(), Size: 56})
	}
	for _, node := range []string{r.n1, r.n2} {
		eventually(t, func() error {
			for i, o := range dialFrom(t, nodeNetns(t, node), targets...) {
				if o.Failure != "" {
					return fmt.Errorf("control: node %s does not reach %+v: %+v", node, targets[i], o)
				}
			}
			return nil
		})
	}
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		checks := r.own(tn, pod)
		for _, target := range targets {
			checks = append(checks, check{Target: target})
		}
		dialAll(t, tn, pod, checks)
	}, r.tenants()...)
}

// gateway is where the nodes' default route leads, and the link by which.
func (r *rivals) gateway(t *testing.T) (link, address string) {
	t.Helper()
	route := strings.Fields(onNode(t, r.n1, "ip -4 route show default"))
	return route[slices.Index(route, "dev")+1], route[slices.Index(route, "via")+1]
}

// outsideHost is no part of the cluster's network.
const outsideHost = "203.0.113.250"

// testInternet: what is no part of the cluster may be reached, and sees the node
// as the client. A machine beside the nodes, with an address of another network,
// plays the internet.
func (r *rivals) testInternet(t *testing.T) {
	const netns, outside = "h8s-e2e-outside", outsideHost
	link, gateway := r.gateway(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "delete", netns).Run() }) // its link goes with it
	script := fmt.Sprintf(`set -e
bridge=$(ip -4 -o address show to %[2]s | cut -d' ' -f2)
ip netns add %[1]s
ip link add h8s-e2e-out type veth peer name eth0 netns %[1]s
ip link set h8s-e2e-out master "$bridge" up
ip -n %[1]s link set lo up
ip -n %[1]s link set eth0 up
ip -n %[1]s address add %[3]s/32 dev eth0
ip -n %[1]s route add default dev eth0`, netns, gateway, outside)
	if out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, node := range []string{r.n1, r.n2} {
		onNode(t, node, "ip route replace "+outside+"/32 dev "+link)
		t.Cleanup(func() { onNode(t, node, "ip route del "+outside+"/32 dev "+link) })
	}
	serve(t, "/run/netns/"+netns, outside+":80")
	reachable := func(t *testing.T, tn tenant, pod string) {
		target := probe.Target{Proto: "http", Address: outside + ":80", Path: "/clientip"}
		eventually(t, func() error {
			if o, want := tn.dial(t, pod, target)[0], r.nodeIP[r.node(tn, pod)]; o.Answer != want {
				return fmt.Errorf("%s/%s: %s sees the client as %q %s %s, want the node, %s", tn.name, pod, outside, o.Answer, o.Failure, o.Detail, want)
			}
			return nil
		})
	}
	r.eachPod(t, reachable, r.a, r.b)

	// The operator closes b's Network, and opens it again. That is no matter of a's.
	setEgress := func(t *testing.T, open bool) {
		kubectl(t, admin, "patch", "network", r.b.name, "--type=merge", "-p", fmt.Sprintf(`{"spec":{"egress":{"internet":%[1]t,"apiServer":%[1]t}}}`, open))
	}
	t.Cleanup(func() { setEgress(t, true) })
	api := r.nodeIP[r.n1] + ":6443"
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprintf("open=%t", open), func(t *testing.T) {
			setEgress(t, open)
			for _, pod := range r.pods[r.b.name] {
				eventually(t, func() error {
					out := r.b.dial(t, pod, probe.Target{Proto: "http", Address: outside + ":80"}, probe.Target{Proto: "tcp", Address: api}, probe.Target{Proto: "tcp", Address: "10.96.0.1:443"})
					for i, o := range out {
						if (o.Failure == "") != open {
							return fmt.Errorf("%s: outside, API server and its Service: the %d. is %+v", pod, i+1, o)
						}
					}
					return nil
				})
				want := map[bool]string{true: "NOERROR", false: "NXDOMAIN"}[open]
				eventually(t, func() error {
					if a := r.b.ask(t, pod, probe.Query{Name: "kubernetes.default.svc.cluster.local", Type: "A"})[0]; a.Rcode != want {
						return fmt.Errorf("%s: kubernetes.default is %s, want %s", pod, a.Rcode, want)
					}
					return nil
				})
				dialAll(t, r.b, pod, r.own(r.b, pod))
			}
			r.eachPod(t, reachable, r.a)
		})
	}
}

// testFromDefaultNetwork has the operator's pods dial the tenants.
func (r *rivals) testFromDefaultNetwork(t *testing.T) {
	r.eachPod(t, func(t *testing.T, tn tenant, pod string) {
		checks := r.own(tn, pod)
		for _, victim := range r.tenants() {
			for ip := range r.byIP(victim) {
				checks = append(checks, reach(ip, "")...)
				checks = append(checks, check{Target: probe.Target{Proto: "tcp", Address: ip + ":8090"}})
			}
			checks = append(checks, serviceChecks(r.services[victim.name])...)
		}
		dialAll(t, tn, pod, checks)
		r.indistinguishable(t, tn, pod, r.services[r.a.name], r.services[r.b.name], r.services[r.c.name])
	}, r.def)
}

// testSpoofedSource sends packets with a source that is not the sender's, as a
// tenant who is root in her sandbox would, and as one who broke out of the
// sandbox into the pod's network namespace would.
func (r *rivals) testSpoofedSource(t *testing.T) {
	for from, targets := range map[string]map[string]string{
		"a1": {"same node": "a2", "other node": "a3"},
		"a2": {"same node": "a1", "other node": "a4"},
	} {
		for where, target := range targets {
			t.Run(from+" to "+where, func(t *testing.T) { r.spoof(t, from, target) })
		}
	}
}

// spoof sends from one of a's pods to another.
func (r *rivals) spoof(t *testing.T, from, target string) {
	neighbours := slices.DeleteFunc(slices.Clone(r.pods[r.a.name]), func(p string) bool { return p == from })
	spoofed := map[string]string{
		"nobody":          "10.77.255.77",
		"node":            r.nodeIP[r.n1],
		"other node":      r.nodeIP[r.n2],
		"node's uplink":   "169.254.77.1",
		"portal's uplink": "169.254.77.2",
		"portal":          "169.254.1.1",
		"cluster DNS":     "10.96.0.10",
		"default network": r.ip(r.def, "d1"),
		"loopback":        "127.0.0.1",
		"internet":        "198.51.100.7",
		"zero":            "0.0.0.0",
	}
	for _, p := range neighbours {
		spoofed["neighbour "+p] = r.ip(r.a, p)
	}
	netns := r.a.netnsOf(t, r.node(r.a, from), from)
	gateway := r.nextHop(t, r.a, from, netns)
	mark := "h8s-spoof-" + from + "-" + target
	saw := captureIn(t, target, r.a.netnsOf(t, r.node(r.a, target), target), "eth0", mark, mark+" control netns")
	packet := func(source, label string) probe.Packet {
		return probe.Packet{
			Source:      netip.AddrPortFrom(netip.MustParseAddr(source), 4000),
			Destination: netip.AddrPortFrom(netip.MustParseAddr(r.ip(r.a, target)), 8080),
			Payload:     []byte(mark + " " + label),
		}
	}
	frame := func(p probe.Packet) probe.Packet {
		p.Interface, p.Gateway = "eth0", gateway
		return p
	}
	var inside, outside []probe.Packet
	for name, source := range spoofed {
		p := packet(source, "SPOOFED sandbox "+name)
		if slices.Contains(r.hyper, from) { // its kernel has opinions about the sources of raw packets, and none about frames
			p = frame(p)
		}
		inside = append(inside, p)
		outside = append(outside, frame(packet(source, "SPOOFED netns "+name)))
	}
	self := r.ip(r.a, from)
	if err := r.a.sendFromPod(from, mustJSON(t, append(inside, packet(self, "control sandbox")))); err != nil {
		t.Errorf("raw packets: %v", err)
	}
	sendFrom(t, netns, append(outside, frame(packet(self, "control netns")))...)

	// What was sent before the control on the same path came before it, if it came.
	controls := 0
	for _, line := range saw.lines(t) {
		if strings.Contains(line, "SPOOFED") {
			t.Errorf("LEAK: %s arrived at %s", line, target)
		}
		if strings.Contains(line, "control") {
			controls++
		}
	}
	if controls != 2 {
		t.Errorf("%d of 2 control packets arrived at %s: %s", controls, target, saw.out.String())
	}
}

// testForgedFrames has root in a virtual machine, who has a whole network card, send
// what makes other machines of an Ethernet believe things: none of it leaves the
// pod's own link.
func (r *rivals) testForgedFrames(t *testing.T) {
	const from, mark = "a2", "h8s-frame"
	const all, forged = "ff:ff:ff:ff:ff:ff", "02:00:5e:00:53:01"
	netns := r.a.netnsOf(t, r.node(r.a, from), from)
	gateway := r.nextHop(t, r.a, from, netns)
	self, neighbour := netip.MustParseAddr(r.ip(r.a, from)), netip.MustParseAddr(r.ip(r.a, "a1"))
	arp := func(operation byte, claimed, asked netip.Addr) []byte { // RFC 826
		sender, target := claimed.As4(), asked.As4()
		mac, _ := net.ParseMAC(forged)
		body := append(append([]byte{0, 1, 8, 0, 6, 4, 0, operation}, mac...), sender[:]...)
		return append(append(append(body, 0, 0, 0, 0, 0, 0), target[:]...), mark+" FORGED ARP"...)
	}
	port := func(address string, port uint16) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(address), port)
	}
	packets := []probe.Packet{
		{Ethertype: 0x0806, Gateway: all, Payload: arp(2, neighbour, neighbour)},
		{Ethertype: 0x0806, Gateway: all, Payload: arp(1, netip.MustParseAddr("169.254.1.1"), neighbour)},
		{Ethertype: 0x0806, Gateway: gateway, Payload: arp(2, neighbour, netip.MustParseAddr("169.254.1.1"))},
		// A router advertisement (RFC 4861), and the answer of a DHCP server.
		{Protocol: 58, Gateway: "33:33:00:00:00:01", Source: port("fe80::1", 0), Destination: port("ff02::1", 0), Payload: []byte("\x86\x00\x00\x00\x40\x00\x07\x08" + mark + " FORGED RA")},
		{Gateway: all, Source: port("169.254.1.1", 67), Destination: port("255.255.255.255", 68), Payload: []byte(mark + " FORGED DHCP")},
		{Gateway: all, Source: port(self.String(), 67), Destination: port("255.255.255.255", 68), Payload: []byte(mark + " FORGED DHCP")},
		{Gateway: gateway, Hardware: forged, Source: port(neighbour.String(), 4000), Destination: port(r.ip(r.a, "a4"), 8080), Payload: []byte(mark + " FORGED hardware and source")},
		{Gateway: gateway, Hardware: gateway, Source: port(neighbour.String(), 4000), Destination: port(r.ip(r.a, "a4"), 8080), Payload: []byte(mark + " FORGED gateway's hardware")},
	}
	control := probe.Packet{Gateway: gateway, Source: port(self.String(), 4000), Payload: []byte(mark + " control")}
	for i := range packets {
		packets[i].Interface = "eth0"
	}
	control.Interface = "eth0"
	own := captureIn(t, from, netns, "eth0", mark, mark+" control")
	seen := map[string]*capture{}
	for _, v := range []struct {
		tenant
		pod string
	}{{r.a, "a1"}, {r.a, "a3"}, {r.a, "a4"}, {r.b, "b3"}, {r.c, "c1"}} {
		seen[v.pod] = captureIn(t, v.pod, v.netnsOf(t, r.node(v.tenant, v.pod), v.pod), "eth0", mark, mark+" control")
	}
	for _, friend := range []string{"a1", "a3", "a4"} {
		control.Destination = port(r.ip(r.a, friend), 8080)
		packets = append(packets, control)
	}
	if err := r.a.sendFromPod(from, mustJSON(t, packets)); err != nil {
		t.Fatal(err)
	}
	for _, friend := range []string{"a1", "a3", "a4"} {
		for _, line := range seen[friend].lines(t) {
			if strings.Contains(line, "FORGED") {
				t.Errorf("LEAK: %s arrived at %s", line, friend)
			}
		}
	}
	for pod, saw := range seen {
		if out := saw.out.String(); strings.Contains(out, "FORGED") {
			t.Errorf("LEAK: %s saw %s", pod, out)
		}
	}
	if lines := own.lines(t); len(lines) != len(packets)-2 {
		t.Errorf("control: the pod's own link saw %d frames of the machine's, want %d: %q", len(lines), len(packets)-2, lines)
	}
	// Nobody believes any of it.
	for _, pod := range []string{"a2", "a3"} {
		dialAll(t, r.a, pod, r.own(r.a, pod))
	}
}

// testOtherProtocols sends packets of protocols that have no ports, and of IPv6,
// to other tenants' pods. They are not answered, so that the victims' own links
// must say whether they came.
func (r *rivals) testOtherProtocols(t *testing.T) {
	// Each with what makes it one that connection tracking takes for valid.
	payloads := map[string]struct {
		protocol uint8
		of       func(text string) []byte
	}{
		"IPIP": {4, func(text string) []byte {
			return probe.Packet{Source: netip.MustParseAddrPort("10.77.0.1:1"), Destination: netip.MustParseAddrPort("10.78.0.1:1"), Payload: []byte(text)}.IP()
		}},
		"GRE": {47, func(text string) []byte { return append([]byte{0, 0, 8, 0}, text...) }},
		"SCTP": {132, func(text string) []byte { // a chunk INIT (RFC 9260)
			packet := append([]byte{0, 9, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, byte(20 + len(text)), 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1}, text...)
			binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))
			return packet
		}},
	}
	packet := func(protocol, source, destination, text string) probe.Packet {
		p := payloads[protocol]
		return probe.Packet{
			Protocol: p.protocol, Payload: p.of(text),
			Source: netip.AddrPortFrom(netip.MustParseAddr(source), 0), Destination: netip.AddrPortFrom(netip.MustParseAddr(destination), 0),
		}
	}
	// The pod's network namespace has no routes, as its sandbox has them.
	frames := func(t *testing.T, tn tenant, pod string, packets ...probe.Packet) {
		t.Helper()
		netns := tn.netnsOf(t, r.node(tn, pod), pod)
		gateway := r.nextHop(t, tn, pod, netns)
		for i := range packets {
			packets[i].Interface, packets[i].Gateway = "eth0", gateway
		}
		sendFrom(t, netns, packets...)
	}
	send := func(t *testing.T, from, mark, to string) {
		t.Helper()
		var inside, outside []probe.Packet
		for protocol := range payloads {
			inside = append(inside, packet(protocol, r.ip(r.a, from), to, mark+" LEAK "+from+" sandbox "+protocol))
			outside = append(outside, packet(protocol, r.ip(r.a, from), to, mark+" LEAK "+from+" netns "+protocol))
		}
		for _, destination := range []string{"ff02::1", "ff02::2", "fe80::1", "::ffff:" + to, "2001:db8::1"} {
			outside = append(outside, probe.Packet{
				Protocol: 47, Source: netip.MustParseAddrPort("[fe80::6838:1]:0"), Destination: netip.MustParseAddrPort("[" + destination + "]:0"),
				Payload: []byte(mark + " LEAK " + from + " netns IPv6 to " + destination),
			})
		}
		if err := r.a.sendFromPod(from, mustJSON(t, inside)); err != nil {
			t.Errorf("raw packets from within the sandbox: %v", err)
		}
		frames(t, r.a, from, outside...)
	}
	t.Run("control", func(t *testing.T) {
		// The same packets do leave the sandbox, and pass within the Network.
		for _, friend := range []string{"a2", "a3"} {
			mark := "h8s-protocol-" + friend
			saw := captureIn(t, friend, r.a.netnsOf(t, r.node(r.a, friend), friend), "eth0", mark, mark+" end")
			send(t, "a1", mark, r.ip(r.a, friend))
			frames(t, r.a, "a1", packet("GRE", r.ip(r.a, "a1"), r.ip(r.a, friend), mark+" end"))
			lines := strings.Join(saw.lines(t), "\n")
			for protocol := range payloads {
				for _, where := range []string{"sandbox", "netns"} {
					if !strings.Contains(lines, where+" "+protocol) {
						t.Errorf("%s from %s did not reach %s: %s", protocol, where, friend, lines)
					}
				}
			}
			if strings.Contains(lines, "IPv6") {
				t.Errorf("a Network of IPv4 carries IPv6: %s", lines)
			}
		}
	})
	for victim, v := range map[string]struct {
		tenant
		friend string
	}{"c1": {r.c, "c2"}, "c2": {r.c, "c1"}, "b3": {r.b, "b1"}, "b4": {r.b, "b3"}} {
		t.Run(victim, func(t *testing.T) {
			mark := "h8s-protocol-" + victim
			saw := captureIn(t, victim, v.netnsOf(t, r.node(v.tenant, victim), victim), "eth0", mark, mark+" end")
			for _, from := range []string{"a1", "a3"} { // on either node
				send(t, from, mark, r.ip(v.tenant, victim))
			}
			frames(t, v.tenant, v.friend, packet("GRE", r.ip(v.tenant, v.friend), r.ip(v.tenant, victim), mark+" end"))
			for _, line := range saw.lines(t) {
				if strings.Contains(line, "LEAK") {
					t.Errorf("%s arrived at %s", line, victim)
				}
			}
		})
	}
}

// nextHop is the hardware address of the portal's end of a pod's link.
func (r *rivals) nextHop(t *testing.T, tn tenant, pod, netns string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "nsenter", "--net="+netns, "ip", "-o", "link", "show", "eth0").CombinedOutput()
	if err != nil {
		t.Fatalf("link of %s: %v: %s", pod, err, out)
	}
	peer := regexp.MustCompile(`eth0@if(\d+):`).FindSubmatch(out)
	if peer == nil {
		t.Fatalf("eth0 of %s has no peer: %s", pod, out)
	}
	portal := kubectl(t, admin, "get", "network", tn.name, "-o", "jsonpath=h8s-{.status.id}")
	links := onNode(t, r.node(tn, pod), "ip -n "+portal+" -o link")
	mac := regexp.MustCompile(`(?m)^` + string(peer[1]) + `: p[0-9a-f]{10}@.* link/ether (\S+)`).FindStringSubmatch(links)
	if mac == nil {
		t.Fatalf("no link %s in %s: %s", peer[1], portal, links)
	}
	return mac[1]
}

// testForgedVXLAN sends the overlay's own packets from where none may come. A
// packet that is taken for the overlay's would reach any pod of any tenant.
func (r *rivals) testForgedVXLAN(t *testing.T) {
	const victim = "a3"
	node := r.node(r.a, victim) // n2
	vni := kubectl(t, admin, "get", "network", r.a.name, "-o", "jsonpath={.status.id}")
	var id uint32
	if _, err := fmt.Sscan(vni, &id); err != nil {
		t.Fatalf("the Network's id is %q: %v", vni, err)
	}
	const mark = "h8s-forged"
	saw := captureIn(t, victim, r.a.netnsOf(t, node, victim), "eth0", mark, mark+" control")
	forge := func(label string) []byte {
		return vxlan(t, id, r.nodeIP[r.n1], r.nodeIP[node], r.ip(r.a, "a1"), r.ip(r.a, victim), mark+" "+label)
	}
	port := netip.AddrPortFrom(netip.MustParseAddr(r.nodeIP[node]), 4789)
	outer := func(source, label string) probe.Packet {
		return probe.Packet{Source: netip.AddrPortFrom(netip.MustParseAddr(source), 51000), Destination: port, Payload: forge(label)}
	}

	for _, p := range r.pods[r.def.name] {
		own, other := r.ip(r.def, p), r.nodeIP[r.n1]
		// In the clear, and with the address of a node as the source.
		for label, source := range map[string]string{"own source": own, "node's source": other, "target's source": r.nodeIP[node]} {
			if err := r.def.sendFromPod(p, mustJSON(t, []probe.Packet{outer(source, "FORGED by "+p+" with "+label)})); err != nil {
				t.Errorf("a raw packet from the default network: %v", err)
			}
		}
	}
	for _, tn := range []tenant{r.a, r.b} {
		for _, p := range r.pods[tn.name] {
			for label, source := range map[string]string{"own source": r.ip(tn, p), "node's source": r.nodeIP[r.n1]} {
				if err := tn.sendFromPod(p, mustJSON(t, []probe.Packet{outer(source, "FORGED by "+tn.name+"/"+p+" with "+label)})); err != nil {
					t.Errorf("a raw packet with source %s was not sent: %v", source, err)
				}
			}
		}
	}
	// The same bytes from the node that may send them arrive.
	sendFrom(t, nodeNetns(t, r.n1), outer(r.nodeIP[r.n1], "control"))
	for _, line := range saw.lines(t) {
		// What the victim itself sent has a node as its destination.
		if strings.Contains(line, "FORGED") && strings.Contains(line, "→ "+r.ip(r.a, victim)+":") {
			t.Errorf("LEAK: %s arrived at %s", line, victim)
		}
	}
}

// vxlan is a VXLAN payload (RFC 7348) that holds one UDP datagram.
func vxlan(t testing.TB, vni uint32, fromNode, toNode, source, destination, payload string) []byte {
	t.Helper()
	mac := func(node string) []byte {
		a := netip.MustParseAddr(node).As4()
		return append([]byte{0x0a, 0x58}, a[:]...)
	}
	b := []byte{0x08, 0, 0, 0}
	b = binary.BigEndian.AppendUint32(b, vni<<8)
	b = append(append(append(b, mac(toNode)...), mac(fromNode)...), 0x08, 0x00)
	inner := probe.Packet{
		Source:      netip.AddrPortFrom(netip.MustParseAddr(source), 4000),
		Destination: netip.AddrPortFrom(netip.MustParseAddr(destination), 8080),
		Payload:     []byte(payload),
	}
	return append(b, inner.IP()...)
}

// testSpoofedFromDefaultNetwork: only what the node itself sends may enter a
// portal; a pod of the default network that claims to be the node is not the node.
func (r *rivals) testSpoofedFromDefaultNetwork(t *testing.T) {
	const mark = "h8s-default"
	for _, victim := range r.pods[r.a.name] {
		node := r.node(r.a, victim)
		saw := captureIn(t, victim, r.a.netnsOf(t, node, victim), "eth0", mark, mark+" control")
		to := netip.AddrPortFrom(netip.MustParseAddr(r.ip(r.a, victim)), 8080)
		packet := func(source, label string) probe.Packet {
			return probe.Packet{Source: netip.AddrPortFrom(netip.MustParseAddr(source), 4000), Destination: to, Payload: []byte(mark + " " + label)}
		}
		for _, p := range r.pods[r.def.name] {
			var packets []probe.Packet
			for label, source := range map[string]string{
				"own": r.ip(r.def, p), "node n1": r.nodeIP[r.n1], "node n2": r.nodeIP[r.n2],
				"uplink": "169.254.77.1", "portal": "169.254.1.1", "victim's neighbour": r.ip(r.a, r.pods[r.a.name][0]),
			} {
				packets = append(packets, packet(source, "SPOOFED by "+p+" as "+label))
			}
			if err := r.def.sendFromPod(p, mustJSON(t, packets)); err != nil {
				t.Fatal(err)
			}
		}
		// The node itself may.
		sendFrom(t, nodeNetns(t, node), packet("169.254.77.1", "control"))
		for _, line := range saw.lines(t) {
			if strings.Contains(line, "SPOOFED") {
				t.Errorf("LEAK: %s arrived at %s", line, victim)
			}
		}
	}
}

// foreignService is a Service without a selector, and an EndpointSlice that says
// who is behind it.
func foreignService(name, ip string, port int) (service, slice string) {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {ports: [{name: p, port: 80, targetPort: %d}]}\n", name, port),
		fmt.Sprintf("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: %[1]s, labels: {kubernetes.io/service-name: %[1]s}}\n"+
			"addressType: IPv4\nports: [{name: p, port: %[3]d}]\nendpoints: [{addresses: [%[2]s], conditions: {ready: true}}]\n", name, ip, port)
}

// foreign is an address that a pod of whose has, and none of mine.
func (r *rivals) foreign(t *testing.T, whose, mine tenant) string {
	t.Helper()
	own := r.byIP(mine)
	for ip := range r.byIP(whose) {
		if own[ip] == "" {
			return ip
		}
	}
	t.Fatalf("every address of %s is one of %s, too: %v", whose.name, mine.name, r.ips)
	return ""
}

// testForeignEndpoints points Services of a tenant at what it may not reach. A
// tenant may not write EndpointSlices; even what an operator writes opens nothing.
func (r *rivals) testForeignEndpoints(t *testing.T) {
	table := map[string]struct {
		ip   string
		port int
		want string
	}{
		"control":         {r.ip(r.a, "a3"), 8080, "a3"},
		"kubelet":         {r.nodeIP[r.n2], 10250, ""},
		"default-network": {r.ip(r.def, "d1"), 8080, ""},
		"default-service": {r.services[r.def.name], 80, ""},
		"rival-service":   {r.services[r.b.name], 80, ""},
		"rival-pod":       {r.foreign(t, r.b, r.a), 8080, ""},
		"third-pod-near":  {r.ip(r.c, "c1"), 8080, ""},
		"third-pod-far":   {r.ip(r.c, "c2"), 8080, ""},
		"unused":          {"10.77.200.1", 8080, ""},
	}
	_, slice := foreignService("kubelet", r.nodeIP[r.n2], 10250)
	refused(t, r.a.owner, slice, "forbidden", "create", "-n", r.a.ns, "-f", "-")
	for name, tc := range table {
		svc, slice := foreignService(name, tc.ip, tc.port)
		r.a.run(t, svc)
		if _, err := tryInput(admin, slice, "apply", "-n", r.a.ns, "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for name := range table {
			kubectl(t, admin, "delete", "service,endpointslice", name, "-n", r.a.ns, "--ignore-not-found")
		}
	})
	r.eachPod(t, func(t *testing.T, _ tenant, pod string) {
		control := probe.Target{Proto: "http", Address: r.a.clusterIP(t, "control") + ":80"}
		eventually(t, func() error {
			if o := r.a.dial(t, pod, control)[0]; o.Answer != "a3" {
				return fmt.Errorf("control: %+v", o)
			}
			return nil
		})
		var checks []check
		for name, tc := range table {
			ip := r.a.clusterIP(t, name)
			checks = append(checks, check{Target: probe.Target{Proto: "http", Address: ip + ":80"}, want: tc.want, rejected: true})
		}
		dialAll(t, r.a, pod, checks)
	}, r.a)
}

// testNodePort: a tenant's Service is the tenant's, whatever its type. The
// operator's of the same type, in testTargetsAlive, is the control.
func (r *rivals) testNodePort(t *testing.T) {
	for kind, name := range map[string]string{"NodePort": "np", "LoadBalancer": "lb"} {
		r.a.run(t, strings.Replace(strings.Replace(webService, "spec:", "spec:\n  type: "+kind, 1), "name: web", "name: "+name, 1))
		port := kubectl(t, r.a.owner, "get", "service", name, "-n", r.a.ns, "-o", "jsonpath={.spec.ports[0].nodePort}")
		ip := r.a.clusterIP(t, name)
		eventually(t, func() error {
			o := r.a.dial(t, "a1", probe.Target{Proto: "http", Address: ip + ":80"})[0]
			if o.Failure != "" {
				return fmt.Errorf("the tenant's own pods, by its ClusterIP: %+v", o)
			}
			return nil
		})
		for _, from := range []struct {
			tn  tenant
			pod string
		}{{r.def, "d1"}, {r.def, "d2"}, {r.b, "b1"}, {r.b, "b3"}, {r.a, "a1"}} {
			checks := r.own(from.tn, from.pod)
			for _, node := range []string{r.n1, r.n2} {
				// From the default network, a node answers that nobody listens there.
				checks = append(checks, check{Target: probe.Target{Proto: "http", Address: r.nodeIP[node] + ":" + port}, rejected: from.tn.name == r.def.name})
			}
			if from.tn.name != r.a.name {
				checks = append(checks, serviceChecks(ip)...)
			}
			dialAll(t, from.tn, from.pod, checks)
		}
	}
}
