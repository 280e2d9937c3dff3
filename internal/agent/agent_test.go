package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cnitypes "github.com/containernetworking/cni/pkg/types"
	mdns "github.com/miekg/dns"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// A pod's whole life, by way of h8s-cni, portal and API server.
func TestPodLifecycle(t *testing.T) {
	l := newLab(t)
	l.network("acme", "10.0.0.0/16", 101)
	l.namespace("shop", "acme")
	web := l.pod("shop", "web", "acme").add()
	cli := l.pod("shop", "cli", "acme").add()
	web.serve(8080)

	if got, want := []string{web.address.String(), cli.address.String()}, []string{"10.0.0.1", "10.0.0.2"}; strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("addresses %v, want %v", got, want)
	}
	if got := l.blocks("acme"); len(got) != 1 || got[0] != "10.0.0.0/28" {
		t.Errorf("Blocks: %v", got)
	}
	if again, err := web.cni("ADD"); err != nil || again.IPs[0].Address.IP.String() != web.address.String() {
		t.Errorf("ADD again: %v, %v", again, err)
	}
	if _, err := web.cni("CHECK"); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	for who, dial := range map[string]func(string) (net.Conn, error){"a pod": cli.dial, "the node": fromNode} {
		l.answers("from "+who, dial, web.address.String()+":8080", "shop/web")
	}

	service := l.service("shop", "web", web.address, netip.MustParseAddr(nodeIP))
	l.answers("the Service", cli.dial, service.Spec.ClusterIP+":80", "shop/web")
	l.eventually("the Service has a name", func() error {
		got, _, err := cli.lookUp("web.shop.svc.cluster.local")
		if err == nil && (len(got) != 1 || got[0] != service.Spec.ClusterIP) {
			err = fmt.Errorf("%v", got)
		}
		return err
	})
	kubernetes := &corev1.Service{}
	l.must(api.Get(context.Background(), client.ObjectKey{Namespace: "default", Name: "kubernetes"}, kubernetes))
	l.eventually("the API server is reachable", func() error {
		conn, err := cli.dial(kubernetes.Spec.ClusterIP + ":443")
		if err == nil {
			conn.Close()
		}
		return err
	})
	l.eventually("the API server has a name, and a namespace that is not there has none", func() error {
		if got, _, err := cli.lookUp("kubernetes.default.svc.cluster.local"); err != nil || len(got) != 1 || got[0] != kubernetes.Spec.ClusterIP {
			return fmt.Errorf("kubernetes.default: %v, %w", got, err)
		}
		_, rcode, err := cli.lookUp("web.other.svc.cluster.local")
		switch {
		case err == nil && rcode == mdns.RcodeSuccess:
			t.Fatal("a namespace that is not there has a name")
		case err == nil && rcode != mdns.RcodeNameError:
			err = fmt.Errorf("a namespace that is not there: %s", mdns.RcodeToString[rcode])
		}
		return err
	})

	cli.remove()
	for range 2 {
		if _, err := web.cni("DEL"); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	l.eventually("no record is left", func() error { // DEL does not wait for it
		if got := l.records(); len(got) != 0 {
			return fmt.Errorf("records after DEL: %v", got)
		}
		return nil
	})
	web.remove()
	l.removeNetwork("acme")
	l.expectNothingLeft()
	if calls := l.calls(); strings.Contains(calls, "ADD") {
		t.Errorf("the default network was asked: %s", calls)
	}
}

// Two tenants with one CIDR on one node: never one address, never a way across.
func TestOverlappingNetworks(t *testing.T) {
	l := newLab(t)
	var pods []*pod
	for i, tenant := range []string{"blue", "red"} {
		l.network(tenant, "10.0.0.0/24", int32(201+i))
		l.namespace(tenant, tenant)
		p := l.pod(tenant, "a", tenant).add()
		p.serve(8080)
		pods = append(pods, p, l.pod(tenant, "b", tenant).add())
	}
	seen := map[netip.Addr]bool{}
	for _, p := range pods {
		if seen[p.address] {
			t.Errorf("%s is given out twice on one node", p.address)
		}
		seen[p.address] = true
	}
	for _, from := range pods {
		for _, to := range []*pod{pods[0], pods[2]} {
			way := fmt.Sprintf("%s/%s to %s/%s", from.namespace, from.name, to.namespace, to.name)
			if from.namespace == to.namespace {
				l.answers(way, from.dial, to.address.String()+":8080", to.namespace+"/a")
			} else if got, err := greeting(from.dial, to.address.String()+":8080"); err == nil {
				t.Errorf("%s: %q", way, got)
			}
		}
	}
	for _, to := range []*pod{pods[0], pods[2]} {
		l.answers("the node to "+to.namespace, fromNode, to.address.String()+":8080", to.namespace+"/a")
	}
}

// What the operator keeps from tenants is closed to every Network, whether the
// cluster needs the addresses for itself or only does not let anybody out to them.
func TestInfrastructure(t *testing.T) {
	l := newLab(t)
	l.stop()
	l.cfg.InfrastructureCIDRs = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	l.cfg.DeniedCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.2.15/32"), netip.MustParsePrefix("203.0.113.0/24")}
	l.start()

	l.eventually("the guard knows all of it", func() error {
		out, err := exec.Command("nft", "list", "set", "inet", "h8s", "infrastructure").CombinedOutput()
		for _, want := range []string{"198.51.100.0/24", "10.0.2.15", "203.0.113.0/24", "10.244.0.0/16"} {
			if err == nil && !strings.Contains(string(out), want) {
				err = fmt.Errorf("%s is missing: %s", want, out)
			}
		}
		return err
	})
	l.network("near", "10.0.2.0/24", 221)
	l.namespace("near", "near")
	l.pod("near", "web", "near").add()

	l.network("inside", "198.51.100.0/26", 222)
	l.namespace("inside", "inside")
	if _, err := l.pod("inside", "web", "inside").cni("ADD"); err == nil || !strings.Contains(err.Error(), "overlaps with 198.51.100.0/24") {
		t.Errorf("a Network within the cluster's own range: %v", err)
	}
}

// Connections outlive the agent, and the next one knows what the last one did.
func TestRestart(t *testing.T) {
	l := newLab(t)
	l.network("stay", "10.1.0.0/16", 301)
	l.namespace("stay", "stay")
	server := l.pod("stay", "server", "stay").add()
	client := l.pod("stay", "client", "stay").add()
	server.serve(8080)
	var conn net.Conn
	l.eventually("the server is reachable", func() (err error) {
		conn, err = client.dial(server.address.String() + ":8080")
		return err
	})
	defer conn.Close()
	if got, err := readLine(conn); err != nil || got != "stay/server" {
		t.Fatalf("%q, %v", got, err)
	}

	l.stop()
	if _, err := conn.Write([]byte("while it is down\n")); err != nil {
		t.Error(err)
	}
	if got, err := readLine(conn); err != nil || got != "while it is down" {
		t.Errorf("without agent: %q, %v", got, err)
	}
	waiting := l.pod("stay", "waiting", "stay")
	var e *cnitypes.Error
	if _, err := waiting.cni("ADD"); !errors.As(err, &e) || e.Code != cnitypes.ErrTryAgainLater {
		t.Errorf("ADD without agent: %v", err)
	}
	if _, err := waiting.cni("DEL"); !errors.As(err, &e) || e.Code != cnitypes.ErrTryAgainLater {
		t.Errorf("DEL without agent: %v", err)
	}

	l.start()
	if _, err := conn.Write([]byte("again\n")); err != nil {
		t.Error(err)
	}
	if got, err := readLine(conn); err != nil || got != "again" {
		t.Errorf("with the next agent: %q, %v", got, err)
	}
	waiting.add()
	if waiting.address == server.address || waiting.address == client.address {
		t.Errorf("%s is given out twice", waiting.address)
	}
	l.eventually("names are answered", func() error {
		_, _, err := client.lookUp("kubernetes.default.svc.cluster.local")
		return err
	})
	for _, p := range []*pod{server, client, waiting} {
		p.remove()
	}
	l.removeNetwork("stay")
	l.expectNothingLeft()
}

// Whatever is unclear, a tenant's pod waits with the reason, and the default
// network never gets it.
func TestFailsClosed(t *testing.T) {
	l := newLab(t)
	l.network("fine", "10.2.0.0/16", 401)
	raw := func(name string, change func(*v1alpha1.Network)) {
		n := &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.NetworkSpec{Tenant: name, CIDRs: []v1alpha1.CIDR{"10.3.0.0/16"}}}
		l.create(n)
		change(n)
		l.must(api.Status().Update(context.Background(), n))
	}
	raw("unset", func(*v1alpha1.Network) {})
	raw("refused", func(n *v1alpha1.Network) {
		n.Status.ID = 402
		apimeta.SetStatusCondition(&n.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: "No", Message: "the moon is wrong"})
	})
	route := l.network("underlay", "192.0.2.0/24", 403)
	l.network("pods", "10.244.0.0/16", 404)
	l.network("services", "10.96.128.0/20", 405)
	l.namespace("plain", "")
	for _, ns := range []string{"fine", "unset", "refused", "absent", "underlay", "pods", "services"} {
		l.namespace(ns, ns)
	}
	half := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "half", Labels: map[string]string{v1alpha1.LabelTenant: "half"}}}
	l.must(api.Create(context.Background(), half))
	foreign := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "foreign", Labels: map[string]string{v1alpha1.LabelTenant: "foreign", v1alpha1.LabelNetwork: "fine"}}}
	l.must(api.Create(context.Background(), foreign))

	tests := map[string]struct {
		namespace, networks string
		change              func(*pod)
		want                string
	}{
		"the Network has no ID":                       {"unset", "unset", nil, "the controller has not set it up yet"},
		"the Network is not ready":                    {"refused", "refused", nil, "the moon is wrong"},
		"the Network does not exist":                  {"absent", "absent", nil, "Network absent of tenant absent does not exist"},
		"the namespace has no Network":                {"half", "", nil, "has no Network yet"},
		"the pod was admitted without Network":        {"fine", "", nil, `admitted for Network "", but its namespace is on Network "fine"`},
		"the pod was admitted for another":            {"fine", "unset", nil, `admitted for Network "unset"`},
		"the pod's namespace is no tenant's":          {"plain", "fine", nil, "belongs to no tenant"},
		"the Network is another tenant's":             {"foreign", "fine", nil, "belongs to another tenant"},
		"the Network overlaps with a route":           {"underlay", "underlay", nil, "overlaps with 192.0.2."},
		"the Network overlaps with the pods' range":   {"pods", "pods", nil, "overlaps with 10.244.0.0/16"},
		"the Network overlaps with the Service range": {"services", "services", nil, "overlaps with 10.96.0.0/16"},
		"the pod is another one by now":               {"fine", "fine", func(p *pod) { p.uid = "other" }, "does not exist any more"},
		"the pod does not exist":                      {"fine", "fine", func(p *pod) { p.name = "nobody" }, "does not exist"},
		"the namespace does not exist":                {"fine", "fine", func(p *pod) { p.namespace = "nowhere" }, "look up namespace nowhere"},
		"the runtime does not say which pod":          {"fine", "fine", func(p *pod) { p.name, p.namespace, p.uid = "", "", "" }, "does not say which pod"},
	}
	serial := 0
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			serial++
			p := l.pod(tc.namespace, fmt.Sprintf("p%d", serial), tc.networks)
			asked := *p
			if tc.change != nil {
				tc.change(&asked)
			}
			if _, err := asked.cni("ADD"); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if links, err := linksIn(p); err != nil || links != "lo" {
				t.Errorf("links in the pod: %s, %v", links, err)
			}
		})
	}
	if calls := l.calls(); strings.Contains(calls, "ADD") {
		t.Errorf("the default network was asked: %s", calls)
	}
	l.must(api.Get(context.Background(), client.ObjectKeyFromObject(route), route))
	c := apimeta.FindStatusCondition(route.Status.Conditions, v1alpha1.ConditionConflict)
	if c == nil || c.Status != metav1.ConditionTrue || !strings.Contains(c.Message, "node n1: Network underlay (192.0.2.0/24) overlaps") {
		t.Errorf("condition: %+v", c)
	}
	if !apimeta.IsStatusConditionTrue(route.Status.Conditions, v1alpha1.ConditionReady) {
		t.Errorf("the controller's condition is gone: %+v", route.Status.Conditions)
	}
	// The cause goes, the pod starts.
	waiting := l.pod("unset", "waiting", "unset")
	if _, err := waiting.cni("ADD"); err == nil {
		t.Fatal("no error")
	}
	n := &v1alpha1.Network{}
	l.must(api.Get(context.Background(), client.ObjectKey{Name: "unset"}, n))
	n.Status.ID = 406
	apimeta.SetStatusCondition(&n.Status.Conditions, metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: "Ready"})
	l.must(api.Status().Update(context.Background(), n))
	waiting.add().remove()
	l.removeNetworkWithoutFinalizer("unset")
}

func (l *lab) removeNetworkWithoutFinalizer(name string) {
	l.t.Helper()
	l.must(api.Delete(context.Background(), &v1alpha1.Network{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	l.eventually("no Block of "+name+" is left", func() error {
		if left := l.blocks(name); len(left) > 0 {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
}

func linksIn(p *pod) (string, error) {
	var names []string
	err := p.inside(func() error {
		links, err := net.Interfaces()
		for _, link := range links {
			names = append(names, link.Name)
		}
		return err
	})
	return strings.Join(names, " "), err
}

func TestDelegates(t *testing.T) {
	l := newLab(t)
	p := l.pod("default", "plain", "")
	result, err := p.cni("ADD")
	l.must(err)
	if got := result.IPs[0].Address.String(); got != "10.244.0.5/24" {
		t.Errorf("address %s", got)
	}
	p.remove()
	want := "ADD default-plain\nDEL default-plain\n"
	if got := l.calls(); got != want {
		t.Errorf("the default network was asked %q, want %q", got, want)
	}
	l.expectNothingLeft()
}

func TestExhaustedNetwork(t *testing.T) {
	l := newLab(t)
	l.network("small", "10.4.0.0/26", 501)
	l.namespace("small", "small")
	var pods []*pod
	seen := map[netip.Addr]bool{}
	for i := range 62 {
		p := l.pod("small", fmt.Sprintf("p%d", i), "small").add()
		if seen[p.address] {
			t.Fatalf("%s is given out twice", p.address)
		}
		seen[p.address] = true
		pods = append(pods, p)
	}
	last := l.pod("small", "last", "small")
	want := "Network small (10.4.0.0/26) is exhausted: 62 of 62 addresses are in use; delete pods, or use another Network"
	if _, err := last.cni("ADD"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	freed := pods[7].address
	pods[7].remove()
	l.eventually("an address is free", func() error { _, err := last.cni("ADD"); return err })
	if last.add(); last.address != freed {
		t.Errorf("got %s, want %s", last.address, freed)
	}
}

// What DEL has missed is found by looking: a pod that is gone, and a sandbox that
// the container runtime gave up while its pod lives on in another. A sandbox in which
// a process lives is not gone, though its network namespace has no name any more.
func TestReap(t *testing.T) {
	l := newLab(t)
	l.network("reap", "10.5.0.0/16", 601)
	l.namespace("reap", "reap")
	l.pod("reap", "gone", "reap").add().vanish()
	kept := l.pod("reap", "kept", "reap").add()
	held := l.pod("reap", "held", "reap").add()
	ns, err := netns.GetFromPath(held.netns)
	l.must(err)
	held.giveUp()
	l.pod("reap", "again", "reap").add().giveUp()
	reaped := func(want ...netip.Addr) {
		t.Helper()
		l.eventually("the attachments are reaped", func() error {
			l.agent.sweep(context.Background())
			var got []netip.Addr
			for _, at := range l.records() {
				got = append(got, at.Address)
			}
			slices.SortFunc(got, netip.Addr.Compare)
			if !slices.Equal(got, want) {
				return fmt.Errorf("records of %v, want %v", got, want)
			}
			return nil
		})
	}
	reaped(kept.address, held.address)
	l.must(ns.Close()) // as when the process ends
	reaped(kept.address)
}

// A Block that is deleted behind the agent's back while pods use it comes back.
func TestBlockDeleted(t *testing.T) {
	l := newLab(t)
	l.network("robbed", "10.6.0.0/16", 701)
	l.namespace("robbed", "robbed")
	l.pod("robbed", "p", "robbed").add()
	rob := func() {
		l.must(api.Delete(context.Background(), &v1alpha1.Block{ObjectMeta: metav1.ObjectMeta{Name: "robbed-10-6-0-0"}}))
	}
	back := func() error {
		l.agent.sweep(context.Background())
		if got := l.blocks("robbed"); len(got) != 1 {
			return fmt.Errorf("Blocks: %v", got)
		}
		return nil
	}
	rob()
	l.eventually("the Block is back", back)
	l.stop()
	rob()
	l.start()
	l.eventually("the Block is back after a restart", back)
}

// kill -9 at random moments among many ADDs: whatever succeeded works on, whatever
// did not leaves nothing, and no address is given out twice.
func TestKilledWhileAdding(t *testing.T) {
	l := newLab(t)
	l.stop()
	l.network("killed", "10.7.0.0/16", 801)
	l.namespace("killed", "killed")

	kubeconfig := l.kubeconfig()
	startProgram := func() *exec.Cmd {
		cmd := exec.Command(filepath.Join(programs, "h8s-node"), "--node-name="+nodeName, "--kubeconfig="+kubeconfig,
			"--cluster-dns="+clusterDNS, "--pod-cidr=10.244.0.0/16", "--socket="+l.cfg.Socket, "--state-dir="+l.cfg.StateDir,
			"--cni-plugin="+l.cfg.CNIPlugin, "--cni-bin-dir="+l.cfg.CNIBinDir, "--cni-conf-dir="+l.cfg.CNIConfDir, "--health-address=")
		cmd.Stdout, cmd.Stderr = testWriter{t}, testWriter{t}
		l.must(cmd.Start())
		return cmd
	}

	const rounds, perRound = 4, 12
	owners := map[netip.Addr]string{}
	var all []*pod
	for round := range rounds {
		program := startProgram()
		var pods []*pod
		for i := range perRound {
			pods = append(pods, l.pod("killed", fmt.Sprintf("p%d-%d", round, i), "killed"))
		}
		all = append(all, pods...)
		var (
			wg      sync.WaitGroup
			added   atomic.Int32
			killed  = make(chan struct{})
			last    = round == rounds-1
			waitFor = int32(1 + 3*round)
		)
		if last {
			waitFor = perRound
		}
		for _, p := range pods {
			wg.Go(func() {
				// Until the program is up ADD fails, as kubelet sees it too.
				for {
					if result, err := p.cni("ADD"); err == nil {
						p.address, _ = netip.AddrFromSlice(result.IPs[0].Address.IP.To4())
						added.Add(1)
						return
					}
					select {
					case <-killed:
						return
					case <-time.After(10 * time.Millisecond):
					}
				}
			})
		}
		l.eventually("some pods are added", func() error {
			if n := added.Load(); n < waitFor {
				return fmt.Errorf("%d of %d", n, waitFor)
			}
			return nil
		})
		l.must(program.Process.Kill())
		close(killed)
		wg.Wait()
		_ = program.Wait()
	}

	l.start()
	added := 0
	for _, p := range all {
		if !p.address.IsValid() {
			continue
		}
		added++
		if other, ok := owners[p.address]; ok {
			t.Errorf("%s belongs to %s and %s", p.address, other, p.name)
		}
		owners[p.address] = p.name
		if _, err := p.cni("CHECK"); err != nil {
			t.Errorf("CHECK of %s: %v", p.name, err)
		}
	}
	if added < perRound {
		t.Errorf("only %d pods were added", added)
	}
	for _, p := range all {
		p.remove()
	}
	l.removeNetwork("killed")
	l.expectNothingLeft()
}
