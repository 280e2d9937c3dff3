package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"h8s.io/hypernetes/test/e2e/probe"
)

// shop is a tenant whose pod "client" uses the Services of pods "one" and "two",
// which are on different nodes and in different sandboxes, and a rival with Services
// and pods of other names.
type shop struct {
	tenant
	rival tenant
}

// TestServices uses every kind of Service from inside a tenant's Network, and its names.
func TestServices(t *testing.T) {
	names := nodes(t)
	s := shop{tenant: newTenant(t, "svc-a", "10.0.0.0/16", "gvisor", "hyper"), rival: newTenant(t, "svc-b", "10.0.0.0/16")}
	s.run(t,
		serverPod("one", names[0], 8080, "hostname: one, subdomain: headless"),
		serverPod("two", names[1], 8081, "hostname: two, subdomain: headless, runtimeClassName: hyper"),
		serverPod("client", names[0], 8080, ""),
		shopServices)
	s.rival.run(t, serverPod("secret", names[1], 8080, "hostname: secret, subdomain: secret-headless"), rivalServices)
	s.waitReady(t, "one", "two", "client")
	s.rival.waitReady(t, "secret")
	s.arm(t, "client", "one", "two")
	s.rival.arm(t, "secret")

	t.Run("ClusterIP", s.testClusterIP)
	t.Run("Affinity", s.testAffinity)
	t.Run("Hairpin", s.testHairpin)
	t.Run("NoEndpoints", s.testNoEndpoints)
	t.Run("Readiness", s.testReadiness)
	t.Run("NotReadyAddresses", s.testNotReadyAddresses)
	t.Run("Terminating", s.testTerminating)
	t.Run("PortsChange", s.testPortsChange)
	t.Run("APIServer", s.testAPIServer)
	t.Run("DNS", s.testDNS)
	t.Run("ForeignNames", s.testForeignNames)
	t.Run("OutsideNames", s.testOutsideNames)
}

// serverPod serves agnhost netexec on port, TCP and UDP, named http and udp, and
// on port+100 once more. It is Ready as long as podReady exists. Told to end, it still serves for
// longer than a busy machine needs to see that, if it is given the time.
func serverPod(name, node string, port int, extra string) string {
	if extra != "" {
		extra = "\n  " + strings.ReplaceAll(extra, ", ", "\n  ")
	}
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {name: %[1]s, web: "%[4]s"}}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %[2]s}%[5]s
  containers:
  - name: agnhost
    image: localhost/agnhost:latest
    imagePullPolicy: Never
    command: [sh, -c, "mkdir /tmp/www && touch %[6]s && httpd -p 8090 -h /tmp/www && /agnhost netexec --http-port=%[7]d --udp-port=%[7]d & exec /agnhost netexec --http-port=%[3]d --udp-port=%[3]d --delay-shutdown=200"]
    ports: [{name: http, containerPort: %[3]d}, {name: udp, containerPort: %[3]d, protocol: UDP}, {name: more, containerPort: %[7]d}]
    readinessProbe: {httpGet: {path: /ready, port: 8090}, periodSeconds: 1, timeoutSeconds: 10}
`, name, node, port, map[bool]string{true: "no", false: "yes"}[name == "client"], extra, podReady, port+100)
}

func service(name, spec string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {%s}\n---\n", name, spec)
}

const (
	webSelector = `selector: {web: "yes"}`
	webPorts    = "ports: [{name: http, port: 80, targetPort: http}, {name: more, port: 81, targetPort: more}, {name: udp, port: 80, targetPort: udp, protocol: UDP}]"
)

//nolint:gochecknoglobals // manifests
var (
	shopServices = service("web", webSelector+", "+webPorts) +
		service("sticky", webSelector+", sessionAffinity: ClientIP, "+webPorts) +
		service("headless", webSelector+", clusterIP: None, "+webPorts) +
		service("only-one", "selector: {name: one}, "+webPorts) +
		service("only-two", "selector: {name: two}, "+webPorts) +
		service("none", "selector: {name: nobody}, "+webPorts) +
		service("unready", `selector: {unready: "yes"}, publishNotReadyAddresses: true, `+webPorts) +
		service("unready-headless", `selector: {unready: "yes"}, clusterIP: None, publishNotReadyAddresses: true, `+webPorts) +
		service("strict", `selector: {unready: "yes"}, `+webPorts) +
		service("strict-headless", `selector: {unready: "yes"}, clusterIP: None, `+webPorts) +
		service("leaving", "selector: {name: leaving}, "+webPorts) +
		service("leaving-or-one", `selector: {leaving: "maybe"}, `+webPorts) +
		service("outside", "type: ExternalName, externalName: "+outsideName)
	rivalServices = service("secret", "selector: {name: secret}, "+webPorts) +
		service("secret-headless", "selector: {name: secret}, clusterIP: None, "+webPorts)
)

// clusterIP of one of the tenant's Services.
func (tn tenant) clusterIP(t testing.TB, service string) string {
	t.Helper()
	return kubectl(t, tn.owner, "get", "service", service, "-n", tn.ns, "-o", "jsonpath={.spec.clusterIP}")
}

// answers dials one address many times and says who answered, and what else happened.
func (s shop) answers(t testing.TB, from, proto, address string, times int) (who []string, failures []string) {
	t.Helper()
	for _, o := range s.dial(t, from, slices.Repeat([]probe.Target{{Proto: proto, Address: address}}, times)...) {
		if o.Failure != "" {
			failures = append(failures, o.Failure)
		} else {
			who = append(who, o.Answer)
		}
	}
	slices.Sort(who)
	slices.Sort(failures)
	return slices.Compact(who), slices.Compact(failures)
}

// settle waits until exactly these pods answer at an address, and nothing fails.
func (s shop) settle(t testing.TB, from, proto, address string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		who, failures := s.answers(t, from, proto, address, 24)
		if !slices.Equal(who, want) || len(failures) > 0 {
			return fmt.Errorf("%s %s from %s: answered by %v, want %v; failed: %v", proto, address, from, who, want, failures)
		}
		return nil
	})
}

// refusedEverywhere waits until an address is refused from everywhere: not silently
// dropped. A kernel answers UDP with one ICMP error a second for each client (RFC
// 1812, section 4.3.2.8), so that only one datagram is sent at a time.
func (s shop) refusedEverywhere(t testing.TB, address string) {
	t.Helper()
	for _, from := range []string{"client", "two"} {
		for proto, times := range map[string]int{"tcp": 4, "udp": 1} {
			eventually(t, func() error {
				who, failures := s.answers(t, from, proto, address, times)
				if len(who) > 0 || slices.ContainsFunc(failures, func(f string) bool { return f != "refused" }) {
					return fmt.Errorf("%s %s from %s: answered by %v, failed with %v; want refused", proto, address, from, who, failures)
				}
				return nil
			})
		}
	}
}

// testClusterIP: the pods have different numbers for the same port names.
func (s shop) testClusterIP(t *testing.T) {
	ip := s.clusterIP(t, "web")
	for _, from := range []string{"client", "one", "two"} {
		s.settle(t, from, "http", ip+":80", "one", "two")
		s.settle(t, from, "http", ip+":81", "one", "two")
		s.settle(t, from, "udp", ip+":80", "one", "two")
	}
	// The port of the Service, not the pod's, and none that it does not have.
	s.refusedEverywhere(t, ip+":8080")
	for service, want := range map[string]string{"only-one": "one", "only-two": "two"} {
		s.settle(t, "client", "http", s.clusterIP(t, service)+":80", want)
		s.settle(t, "client", "udp", s.clusterIP(t, service)+":80", want)
	}
	// The server sees who really calls.
	eventually(t, func() error {
		o := s.dial(t, "client", probe.Target{Proto: "http", Address: s.clusterIP(t, "only-two") + ":80", Path: "/clientip"})[0]
		if !strings.HasPrefix(o.Answer, s.ip(t, "client")+":") {
			return fmt.Errorf("the server sees the client as %q %s, want %s", o.Answer, o.Failure, s.ip(t, "client"))
		}
		return nil
	})
}

func (s shop) testAffinity(t *testing.T) {
	ip := s.clusterIP(t, "sticky")
	for _, from := range []string{"client", "one", "two"} {
		for _, proto := range []string{"http", "udp"} {
			eventually(t, func() error {
				before, err := s.readiness("one", "two")
				if err != nil {
					return err
				}
				recent := steady(before)
				// One call first: calls made at once may all be the first.
				first, failures := s.answers(t, from, proto, ip+":80", 1)
				if len(failures) > 0 {
					return fmt.Errorf("%s from %s with affinity: %v", proto, from, failures)
				}
				who, failures := s.answers(t, from, proto, ip+":80", 32)
				others := slices.DeleteFunc(who, func(pod string) bool { return slices.Contains(first, pod) })
				if len(others) > 0 {
					after, err := s.readiness("one", "two")
					if err != nil {
						return err
					}
					if after != before {
						return fmt.Errorf("a pod was not Ready for a moment, and its clients are the other's: %s, then %s", before, after)
					}
					if recent != nil {
						return recent
					}
					t.Fatalf("%s from %s with affinity: answered by %v, and first by %v; want one of them only", proto, from, others, first)
				}
				if len(failures) > 0 {
					return fmt.Errorf("%s from %s with affinity: %v", proto, from, failures)
				}
				return nil
			})
		}
	}
	// Its control, a Service of the same pods without affinity, is in testClusterIP.
}

// readiness says of pods whether they are Ready, and since when.
func (s shop) readiness(pods ...string) (string, error) {
	const since = `jsonpath={range .items[*]}{.metadata.name} {.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].lastTransitionTime}{"\n"}{end}`
	return try(s.owner, append([]string{"get", "pods", "-n", s.ns, "-o", since}, pods...)...)
}

// steady is nil if each pod of a readiness has been Ready for half a minute. Portals hear of a change
// by watches, later than the status has it, and only then do clients of a pod become another's.
func steady(readiness string) error {
	for line := range strings.Lines(readiness) {
		var pod, ready, since string
		if _, err := fmt.Sscan(line, &pod, &ready, &since); err != nil {
			return fmt.Errorf("read the readiness %q: %w", line, err)
		}
		at, err := time.Parse(time.RFC3339, since)
		if err != nil {
			return err
		}
		if ready != "True" || time.Since(at) < 30*time.Second {
			return fmt.Errorf("pod %s is Ready=%s since %s, and its clients may just have become the other's", pod, ready, since)
		}
	}
	return nil
}

// testHairpin has a pod call a Service that only itself is behind.
func (s shop) testHairpin(t *testing.T) {
	for pod, service := range map[string]string{"one": "only-one", "two": "only-two"} {
		s.settle(t, pod, "http", s.clusterIP(t, service)+":80", pod)
		s.settle(t, pod, "udp", s.clusterIP(t, service)+":80", pod)
	}
}

func (s shop) testNoEndpoints(t *testing.T) {
	s.refusedEverywhere(t, s.clusterIP(t, "none")+":80")
}

// testReadiness: endpoints come and go with the pods' readiness.
func (s shop) testReadiness(t *testing.T) {
	web := s.clusterIP(t, "web") + ":80"
	unready := func(pod string) { t.Helper(); mustSh(t, s.tenant, pod, "rm "+podReady) }
	ready := func(pod string) { t.Helper(); mustSh(t, s.tenant, pod, "touch "+podReady) }
	t.Cleanup(func() { ready("one"); ready("two"); s.waitReady(t, "one", "two") }) // for the tests that follow
	unready("two")
	s.settle(t, "client", "http", web, "one")
	s.settle(t, "two", "udp", web, "one")
	unready("one")
	s.refusedEverywhere(t, web)
	s.eventuallyAnswer(t, probe.Query{Name: s.fqdn("headless"), Type: "A"}, "NXDOMAIN")
	ready("two")
	s.settle(t, "client", "http", web, "two")
	ready("one")
	s.settle(t, "client", "http", web, "one", "two")
	s.settle(t, "two", "udp", web, "one", "two")
}

func mustSh(t testing.TB, tn tenant, pod, command string) string {
	t.Helper()
	out, err := tn.sh(pod, command)
	if err != nil {
		t.Fatalf("%s %v", out, err)
	}
	return out
}

// testNotReadyAddresses: a pod that is never Ready, behind Services that
// publish such pods and Services that do not.
func (s shop) testNotReadyAddresses(t *testing.T) {
	manifest := strings.Replace(serverPod("unready", nodes(t)[1], 8080, ""), `web: "yes"`, `unready: "yes"`, 1)
	s.run(t, strings.Replace(manifest, "path: /ready", "path: /never", 1))
	defer kubectl(t, s.owner, "delete", "pod", "unready", "-n", s.ns, "--grace-period=0", "--force")
	var ip string
	eventually(t, func() error {
		if ip = s.ip(t, "unready"); ip == "" {
			return fmt.Errorf("the pod has no address yet")
		}
		return nil
	})
	s.settle(t, "client", "http", s.clusterIP(t, "unready")+":80", "unready")
	s.eventuallyAnswer(t, probe.Query{Name: s.fqdn("unready-headless"), Type: "A"}, "NOERROR", ip)
	s.refusedEverywhere(t, s.clusterIP(t, "strict")+":80")
	s.eventuallyAnswer(t, probe.Query{Name: s.fqdn("strict-headless"), Type: "A"}, "NXDOMAIN")
}

// testTerminating: a pod that is told to end but still serves gets new
// connections only where there is nobody else, and keeps those that it has.
func (s shop) testTerminating(t *testing.T) {
	leaving := strings.Replace(serverPod("leaving", nodes(t)[1], 8080, ""), `web: "yes"`, `leaving: "maybe"`, 1)
	s.run(t, strings.Replace(leaving, "terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 220", 1))
	s.waitReady(t, "leaving")
	end := once(func() { // it does not wait for all of the pod's time
		kubectl(t, s.owner, "delete", "pod", "leaving", "-n", s.ns, "--ignore-not-found", "--grace-period=1", "--timeout=4m")
	})
	defer end()
	kubectl(t, s.owner, "label", "pod", "one", "-n", s.ns, "leaving=maybe")
	defer kubectl(t, s.owner, "label", "pod", "one", "-n", s.ns, "leaving-")
	alone, shared := s.clusterIP(t, "leaving")+":80", s.clusterIP(t, "leaving-or-one")+":80"
	s.settle(t, "client", "http", alone, "leaving")
	s.settle(t, "client", "http", shared, "leaving", "one")

	kubectl(t, s.owner, "delete", "pod", "leaving", "-n", s.ns, "--wait=false")
	eventually(t, func() error {
		out, err := try(s.owner, "get", "endpointslices", "-n", s.ns, "-l", "kubernetes.io/service-name=leaving", "-o", "jsonpath={.items[*].endpoints[*].conditions}")
		if err == nil && !strings.Contains(out, `"terminating":true`) {
			err = fmt.Errorf("the endpoint is not terminating: %s", out)
		}
		return err
	})
	s.settle(t, "client", "http", shared, "one")
	s.settle(t, "client", "http", alone, "leaving")
	// Gone at last, there is nobody.
	end()
	s.refusedEverywhere(t, alone)
	s.settle(t, "client", "http", shared, "one")
}

// testPortsChange: a Service is edited, deleted and made again while it is used.
func (s shop) testPortsChange(t *testing.T) {
	s.run(t, service("edited", "selector: {name: one}, ports: [{port: 90, targetPort: http}]"))
	ip := s.clusterIP(t, "edited")
	s.settle(t, "client", "http", ip+":90", "one")
	s.run(t, service("edited", "selector: {name: two}, ports: [{port: 91, targetPort: http}]"))
	s.settle(t, "client", "http", ip+":91", "two")
	s.refusedEverywhere(t, ip+":90")
	kubectl(t, s.owner, "delete", "service", "edited", "-n", s.ns)
	s.refusedEverywhere(t, ip+":91")
	s.eventuallyAnswer(t, probe.Query{Name: s.fqdn("edited"), Type: "A"}, "NXDOMAIN")
}

// testAPIServer uses the ServiceAccount's token and CA as a program in a pod does.
func (s shop) testAPIServer(t *testing.T) {
	get := func(host, path string) (answer string) {
		t.Helper()
		eventually(t, func() error { // any answer will do: who asks knows which is right
			o := s.dial(t, "client", probe.Target{Proto: "api", Address: host, Path: path})[0]
			if answer = o.Answer; o.Failure != "" {
				return fmt.Errorf("%s of %s: %s %s", path, host, o.Failure, o.Detail)
			}
			return nil
		})
		return answer
	}
	pods := "/api/v1/namespaces/" + s.ns + "/pods"
	const forbidden = "403 "
	if out := get("kubernetes.default.svc.cluster.local", pods); !strings.HasPrefix(out, forbidden) {
		t.Errorf("a ServiceAccount without rights lists pods: %.600s", out)
	}
	s.run(t, fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: default-view}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: default, namespace: %s}]
`, s.ns))
	environment := strings.TrimSpace(mustSh(t, s.tenant, "client", "echo $KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT"))
	for _, host := range []string{"kubernetes.default", "kubernetes.default.svc.cluster.local", environment} {
		eventually(t, func() error {
			out := get(host, pods)
			var list struct {
				Items []struct{ Metadata struct{ Name string } }
			}
			if err := json.Unmarshal([]byte(strings.TrimPrefix(out, "200 ")), &list); err != nil {
				return fmt.Errorf("via %s: %w: %.600s", host, err, out)
			}
			var names []string
			for _, i := range list.Items {
				names = append(names, i.Metadata.Name)
			}
			if !slices.Contains(names, "one") || slices.Contains(names, "secret") {
				return fmt.Errorf("via %s: pods %v", host, names)
			}
			return nil
		})
	}
	for name, path := range map[string]string{
		"the rival's pods": "/api/v1/namespaces/" + s.rival.ns + "/pods",
		"every pod":        "/api/v1/pods",
		"nodes":            "/api/v1/nodes",
		"networks":         "/apis/h8s.io/v1alpha1/networks",
		"blocks":           "/apis/h8s.io/v1alpha1/blocks",
		"own secrets":      "/api/v1/namespaces/" + s.ns + "/secrets",
	} {
		if out := get("kubernetes.default", path); !strings.HasPrefix(out, forbidden) {
			t.Errorf("%s: want 403 Forbidden, got %.300s", name, out)
		}
	}
}
