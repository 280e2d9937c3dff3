package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery"

	"golang.org/x/sync/errgroup"
)

// TestTenancy plays an owner who uses her own tenant and tries to reach another's.
func TestTenancy(t *testing.T) {
	acme := newTenant(t, "tenancy-acme", "10.0.0.0/16")
	globex := newTenant(t, "tenancy-globex", "10.0.0.0/16")
	acme.run(t, pod("web", "", ""))
	globex.run(t, pod("web", "", ""), "apiVersion: v1\nkind: Secret\nmetadata: {name: treasure}\nstringData: {key: secret}\n")
	acme.waitReady(t, "web")
	globex.waitReady(t, "web")

	t.Run("Admin", func(t *testing.T) { testNamespaceAdmin(t, acme) })
	t.Run("Matrix", func(t *testing.T) { testMatrix(t, acme, globex) })
	t.Run("Rules", func(t *testing.T) { testRules(t, acme, globex) })
	t.Run("Refused", func(t *testing.T) { testTenantRefusals(t, acme, globex) })
	t.Run("ServiceAccount", func(t *testing.T) { testServiceAccount(t, acme, globex) })
	t.Run("Operator", func(t *testing.T) { testOperatorNamespace(t, acme) })
	t.Run("Members", func(t *testing.T) { testMembers(t, acme, globex) })
	t.Run("Disabled", func(t *testing.T) { testDisabledUser(t, acme) })
	t.Run("Suspended", func(t *testing.T) { testSuspended(t, acme) })
}

// testNamespaceAdmin does what a person does in a namespace of her own.
func testNamespaceAdmin(t *testing.T, tn tenant) {
	ns := func(args ...string) []string { return append([]string{"-n", tn.ns}, args...) }
	do := func(want string, args ...string) {
		t.Helper()
		out := kubectl(t, tn.owner, ns(args...)...)
		if !strings.Contains(out, want) {
			t.Errorf("kubectl %s printed %q, which does not contain %q", strings.Join(args, " "), out, want)
		}
	}
	if got := kubectl(t, tn.owner, "get", "namespace", tn.ns, "-o",
		`jsonpath={.metadata.labels.h8s\.io/tenant} {.metadata.labels.h8s\.io/network} {.metadata.annotations.h8s\.io/creator}`); got != tn.name+" "+tn.name+" "+tn.owner {
		t.Errorf("labels of the namespace: tenant, network and creator are %q", got)
	}
	do("hello", "exec", "web", "--", "echo", "hello")
	do("netexec", "exec", "web", "--", "cat", "/proc/1/cmdline")
	eventually(t, func() error { // it has started, and may not have written yet
		out, err := try(tn.owner, ns("logs", "web")...)
		if err != nil || !strings.Contains(out, "Started HTTP server") {
			return fmt.Errorf("kubectl logs printed %q, %w", out, err)
		}
		return nil
	})
	t.Run("port-forward", func(t *testing.T) { testPortForward(t, tn) })
	t.Run("cp", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, []byte("there and back"), 0o600); err != nil {
			t.Fatal(err)
		}
		kubectl(t, tn.owner, ns("cp", file, "web:/tmp/file")...)
		kubectl(t, tn.owner, ns("cp", "web:/tmp/file", file+".back")...)
		got, err := os.ReadFile(file + ".back")
		if err != nil || string(got) != "there and back" {
			t.Errorf("the file came back as %q, %v", got, err)
		}
	})
	do("created", "create", "deployment", "app", "--image=localhost/agnhost:latest", "--replicas=2", "--", "/agnhost", "pause")
	do("patched", "patch", "deployment", "app", "--type=json", "-p",
		`[{"op":"add","path":"/spec/template/spec/containers/0/imagePullPolicy","value":"Never"},{"op":"add","path":"/spec/template/spec/terminationGracePeriodSeconds","value":1}]`)
	do("successfully rolled out", "rollout", "status", "deployment/app", "--timeout=4m")
	do("scaled", "scale", "deployment/app", "--replicas=1")
	do("restarted", "rollout", "restart", "deployment/app")
	do("successfully rolled out", "rollout", "status", "deployment/app", "--timeout=4m")
	do("exposed", "expose", "deployment/app", "--port=80", "--target-port=8080")
	do("created", "create", "configmap", "settings", "--from-literal=a=b")
	do("created", "create", "secret", "generic", "password", "--from-literal=a=b")
	do("created", "create", "serviceaccount", "robot")
	do("created", "create", "role", "reader", "--verb=get,list", "--resource=pods")
	do("created", "create", "rolebinding", "reader", "--role=reader", "--serviceaccount="+tn.ns+":robot")
	do("created", "create", "job", "once", "--image=localhost/busybox:latest", "--", "true")
	do("created", "create", "cronjob", "nightly", "--image=localhost/busybox:latest", "--schedule=0 3 * * *", "--", "true")
	do("created", "create", "ingress", "front", "--rule=example.com/*=app:80")
	do("created", "create", "poddisruptionbudget", "app", "--selector=app=app", "--min-available=1")
	do("autoscaled", "autoscale", "deployment/app", "--max=2", "--cpu=80%")
	do("annotated", "annotate", "pod", "web", "example.com/note=mine")
	do("labeled", "label", "pod", "web", "tier=front")
	eventually(t, func() error { // events are written in the background
		out, err := try(tn.owner, ns("get", "events", "--field-selector=involvedObject.name=web")...)
		if err != nil || !strings.Contains(out, "Scheduled") {
			return fmt.Errorf("kubectl get events printed %q, %w", out, err)
		}
		return nil
	})
	do("", "auth", "can-i", "delete", "pods")
	kubectl(t, tn.owner, ns("delete", "deployment/app", "service/app", "configmap/settings", "secret/password", "serviceaccount/robot", "role/reader",
		"rolebinding/reader", "job/once", "cronjob/nightly", "ingress/front", "poddisruptionbudget/app", "horizontalpodautoscaler/app", "--wait=false")...)

	// A namespace of a name that the server makes, and without ceremony.
	name := kubectl(t, tn.owner, "create", "-o", "jsonpath={.metadata.name}", "-f", manifest(t, "apiVersion: v1\nkind: Namespace\nmetadata: {generateName: tenancy-}\n"))
	eventually(t, func() error {
		_, err := try(tn.owner, "create", "configmap", "c", "-n", name)
		return err
	})
	kubectl(t, tn.owner, "delete", "namespace", name, "--timeout=4m")
	kubectl(t, tn.owner, "get", "tenant", tn.name)
	kubectl(t, tn.owner, "get", "network", tn.name)
	testLists(t, tn)
}

// testLists lists what is the tenant's by its label, which the API server asks the controller about.
func testLists(t *testing.T, tn tenant) {
	for what, want := range map[string]string{"namespaces": tn.ns, "networks": tn.name, "tenants": tn.name} {
		if got := kubectl(t, tn.owner, "get", what, "-l", "h8s.io/tenant="+tn.name, "-o", "jsonpath={.items[*].metadata.name}"); !slices.Contains(strings.Fields(got), want) {
			t.Errorf("%s by label: %q, want %s among them", what, got, want)
		}
		refused(t, tn.owner, "", "you may list, with -l 'h8s.io/tenant="+tn.name+"'", "get", what)
		refused(t, tn.owner, "", "cannot list", "get", what, "-l", "h8s.io/tenant!="+tn.name)
	}
	// And the kubectl plugin, which is h8s by another name.
	plugins := t.TempDir()
	if err := os.Symlink(filepath.Join(cluster.bin, "h8s"), filepath.Join(plugins, "kubectl-h8s")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), "h8s", "ns", "-o", "name")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(tn.owner), "PATH="+plugins+":"+cluster.bin)
	if out, err := cmd.CombinedOutput(); err != nil || !slices.Contains(strings.Fields(string(out)), "namespace/"+tn.ns) {
		t.Errorf("kubectl h8s ns: %v: %s", err, out)
	}
}

func testPortForward(t *testing.T, tn tenant) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), "port-forward", "-n", tn.ns, "pod/web", ":8080", "--address=127.0.0.1")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(tn.owner))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("port-forward: %v", err)
	}
	// Forwarding from 127.0.0.1:40123 -> 8080
	fields := strings.Fields(line)
	if len(fields) < 3 {
		t.Fatalf("port-forward said %q", line)
	}
	client := http.Client{Timeout: 10 * time.Second}
	eventually(t, func() error {
		resp, err := client.Get("http://" + fields[2] + "/echo?msg=through")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || string(body) != "through" {
			return fmt.Errorf("answer %q, %w", body, err)
		}
		return nil
	})
}

// manifest writes YAML to a file, for commands that take one.
func manifest(t testing.TB, yaml string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "manifest.yaml")
	if err := os.WriteFile(path, []byte(yaml), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ownNamespace is what an owner may do in a namespace of her tenant, resources and
// verbs as `kubectl api-resources -o wide` names them: the aggregated role "admin"
// of Kubernetes 1.36, and kubectl debug. Every other pair that the API server knows is forbidden.
var ownNamespace = func() map[string][]string {
	const (
		read  = "get list watch "
		write = "create update patch delete deletecollection "
	)
	allowed := map[string][]string{}
	for _, row := range []struct{ verbs, resources string }{
		{read + write, `pods replicationcontrollers serviceaccounts services persistentvolumeclaims configmaps secrets events
			deployments.apps statefulsets.apps daemonsets.apps replicasets.apps horizontalpodautoscalers.autoscaling
			jobs.batch cronjobs.batch poddisruptionbudgets.policy networkpolicies.networking.k8s.io ingresses.networking.k8s.io
			leases.coordination.k8s.io events.events.k8s.io resourceclaims.resource.k8s.io resourceclaimtemplates.resource.k8s.io
			roles.rbac.authorization.k8s.io rolebindings.rbac.authorization.k8s.io`},
		{read, `endpoints limitranges resourcequotas controllerrevisions.apps endpointslices.discovery.k8s.io`},
		{read + write, `pods/attach pods/exec pods/portforward pods/proxy services/proxy
			replicationcontrollers/scale deployments.apps/scale statefulsets.apps/scale replicasets.apps/scale`},
		{read, `pods/log pods/status services/status persistentvolumeclaims/status resourcequotas/status replicationcontrollers/status
			deployments.apps/status statefulsets.apps/status daemonsets.apps/status replicasets.apps/status
			horizontalpodautoscalers.autoscaling/status jobs.batch/status cronjobs.batch/status
			poddisruptionbudgets.policy/status ingresses.networking.k8s.io/status resourceclaims.resource.k8s.io/status`},
		{"get update patch", `pods/ephemeralcontainers`},
		{"create", `pods/eviction serviceaccounts/token localsubjectaccessreviews.authorization.k8s.io`},
		{"impersonate", `serviceaccounts`},
	} {
		for _, r := range strings.Fields(row.resources) {
			allowed[r] = append(allowed[r], strings.Fields(row.verbs)...)
		}
	}
	return allowed
}()

// everywhere is what anybody who is authenticated may do: learn about herself.
// Discovery is no resource.
var everywhere = map[string][]string{
	"selfsubjectaccessreviews.authorization.k8s.io": {"create"},
	"selfsubjectrulesreviews.authorization.k8s.io":  {"create"},
	"selfsubjectreviews.authentication.k8s.io":      {"create"},
}

// cell is one question of the matrix.
type cell struct {
	verb, resource, subresource string
	group, version              string
	namespace, name             string
}

func (c cell) resourceName() string {
	r := c.resource
	if c.group != "" {
		r += "." + c.group
	}
	if c.subresource != "" {
		r += "/" + c.subresource
	}
	return r
}

func (c cell) String() string {
	where := "the cluster"
	if c.namespace != "" {
		where = c.namespace
	}
	if c.name != "" {
		where += " (" + c.name + ")"
	}
	return c.verb + " " + c.resourceName() + " in " + where
}

// request is the HTTP request that asks for it. It changes nothing where it is
// allowed: a dry run, or of an object that does not exist.
func (c cell) request() (method, path string, body any) {
	path = "/apis/" + c.group + "/" + c.version
	if c.group == "" {
		path = "/api/" + c.version
	}
	if c.namespace != "" && c.resource != "namespaces" {
		path += "/namespaces/" + c.namespace
	}
	path += "/" + c.resource
	name := c.name
	if name == "" {
		name = "no-such-object"
	}
	object := map[string]any{"metadata": map[string]any{"name": name}}
	if c.resource == "rolebindings" || c.resource == "clusterrolebindings" {
		// Without it the API server fails before it has looked at the rest.
		object["roleRef"] = map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"}
	}
	named := path + "/" + name
	if c.subresource != "" {
		named += "/" + c.subresource
	}
	// In the body: a DELETE that has one ignores the query.
	deletion := map[string]any{"apiVersion": "v1", "kind": "DeleteOptions", "dryRun": []string{"All"}}
	switch c.verb {
	case "get":
		return http.MethodGet, named, nil
	case "list":
		return http.MethodGet, path + "?limit=1", nil
	case "watch":
		return http.MethodGet, path + "?watch=true&timeoutSeconds=1", nil
	case "create":
		if c.subresource != "" {
			return http.MethodPost, named + "?dryRun=All", object
		}
		return http.MethodPost, path + "?dryRun=All", object
	case "update":
		return http.MethodPut, named + "?dryRun=All", object
	case "patch":
		return http.MethodPatch, named + "?dryRun=All", map[string]any{}
	case "delete":
		return http.MethodDelete, named, deletion
	case "deletecollection":
		return http.MethodDelete, path, deletion
	}
	return "", "", nil // not a request by itself: impersonate, bind, escalate …
}

// testMatrix asks for every verb on every resource that the API server serves, in
// every kind of place, twice: by a SelfSubjectAccessReview, as `kubectl auth
// can-i` does, and by the request itself.
func testMatrix(t *testing.T, acme, globex tenant) {
	cells := discoverCells(t, acme, globex)
	client := newAPIClient(t, acme.owner)
	type verdict struct{ review, request string }
	verdicts := make([]verdict, len(cells))
	g, ctx := errgroup.WithContext(t.Context())
	g.SetLimit(4)
	for i, c := range cells {
		g.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err() // what failed first says why
			}
			allowed, err := client.mayI(c)
			if err != nil {
				return err
			}
			v := verdict{review: word(allowed)}
			if method, path, body := c.request(); method != "" {
				code, answer, err := client.do(method, path, body)
				if err != nil {
					return fmt.Errorf("%s: %w", c, err)
				}
				if code == http.StatusUnauthorized || code >= http.StatusInternalServerError && code != http.StatusNotImplemented {
					return fmt.Errorf("%s: %d: %s", c, code, answer)
				}
				// Admission refuses with the same code, and other words.
				v.request = word(code != http.StatusForbidden || !strings.Contains(answer, "cannot "+c.verb+" resource"))
			}
			verdicts[i] = v
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for i, c := range cells {
		want := word(may("owner", acme, c) || renews(c))
		counts[want]++
		if got := verdicts[i].review; got != want {
			t.Errorf("can-i %s: %s, want %s", c, got, want)
		}
		if got := verdicts[i].request; got != "" && got != want {
			t.Errorf("%s: %s, want %s", c, got, want)
		}
	}
	t.Logf("%d questions: %v", len(cells), counts)
	if counts["allowed"] < 150 || counts["forbidden"] < 1000 {
		t.Errorf("%v is fewer than Kubernetes has: the matrix is not whole", counts)
	}
}

// mayI asks the API server what its client may do.
func (c apiClient) mayI(q cell) (bool, error) {
	review, err := post(c, "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", authorizationv1.SelfSubjectAccessReview{
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Verb: q.verb, Group: q.group, Version: q.version, Resource: q.resource, Subresource: q.subresource, Namespace: q.namespace, Name: q.name,
		}},
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", q, err)
	}
	return review.Status.Allowed, nil
}

func word(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "forbidden"
}

// notFor is what the lesser roles lack of what an owner may do in a namespace:
// whole resources. A viewer only reads the others.
var notFor = map[string][]string{
	"edit": {"roles.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io", "localsubjectaccessreviews.authorization.k8s.io"},
	"view": {
		"roles.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io", "secrets", "leases.coordination.k8s.io",
		"pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "pods/ephemeralcontainers", "services/proxy",
	},
}

// renews says what every User whom a Tenant lists may besides: request a certificate, of which admission
// leaves the renewal of its own.
func renews(c cell) bool {
	return c.resourceName() == "certificatesigningrequests.certificates.k8s.io" && c.verb == "create"
}

// may is the whole truth about a member that is no User.
func may(role string, tn tenant, c cell) bool {
	r := c.resourceName()
	if slices.Contains(everywhere[r], c.verb) {
		return true
	}
	creates := role == "owner" || role == "admin"
	reads := slices.Contains([]string{"get", "list", "watch"}, c.verb)
	switch {
	case r == "namespaces" && c.name == tn.ns:
		return c.verb == "get" || c.verb == "delete" && creates
	case r == "namespaces/status" && c.name == tn.ns:
		return c.verb == "get"
	case r == "namespaces" && c.name == "":
		return c.verb == "create" && creates
	case (r == "tenants.h8s.io" || r == "networks.h8s.io") && c.name == tn.name:
		return c.verb == "get"
	case c.namespace == tn.ns:
		return slices.Contains(ownNamespace[r], c.verb) && !slices.Contains(notFor[role], r) && (reads || role != "view")
	}
	return false
}

// discoverCells makes the questions from what the API server says it serves.
func discoverCells(t *testing.T, acme, globex tenant) []cell {
	t.Helper()
	dc, err := discovery.NewDiscoveryClientForConfig(restConfig(t, admin))
	if err != nil {
		t.Fatal(err)
	}
	_, lists, err := dc.ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	var cells []cell
	seen := map[string]bool{}
	for _, list := range lists {
		group, version, found := strings.Cut(list.GroupVersion, "/")
		if !found {
			group, version = "", group
		}
		for _, r := range list.APIResources {
			resource, sub, _ := strings.Cut(r.Name, "/")
			c := cell{resource: resource, subresource: sub, group: group, version: version}
			if seen[c.resourceName()] {
				continue
			}
			seen[c.resourceName()] = true
			cells = append(cells, cellsOf(c, r, acme, globex)...)
		}
	}
	// Verbs that authorizers know and discovery does not list.
	return append(cells, []cell{
		{verb: "impersonate", resource: "users"},
		{verb: "impersonate", resource: "groups", name: "system:masters"},
		{verb: "impersonate", resource: "users", name: globex.owner},
		{verb: "impersonate", resource: "uids", group: "authentication.k8s.io"},
		{verb: "impersonate", resource: "serviceaccounts", namespace: acme.ns, name: "default"},
		{verb: "impersonate", resource: "serviceaccounts", namespace: globex.ns, name: "default"},
		{verb: "impersonate", resource: "serviceaccounts", namespace: "kube-system", name: "default"},
		{verb: "impersonate", resource: "serviceaccounts", namespace: "h8s-system", name: "h8s-controller"},
		{verb: "bind", resource: "clusterroles", group: "rbac.authorization.k8s.io", name: "cluster-admin"},
		{verb: "bind", resource: "roles", group: "rbac.authorization.k8s.io", namespace: acme.ns},
		{verb: "escalate", resource: "roles", group: "rbac.authorization.k8s.io", namespace: acme.ns},
		{verb: "approve", resource: "signers", group: "certificates.k8s.io", name: "kubernetes.io/kube-apiserver-client"},
		{verb: "sign", resource: "signers", group: "certificates.k8s.io", name: "kubernetes.io/kube-apiserver-client"},
		{verb: "get", resource: "nodes", subresource: "log", version: "v1"},
		{verb: "get", resource: "nodes", subresource: "metrics", version: "v1"},
		{verb: "get", resource: "nodes", subresource: "stats", version: "v1"},
	}...)
}

func cellsOf(c cell, r metav1.APIResource, acme, globex tenant) []cell {
	type place struct{ namespace, name string }
	var named, unnamed []place
	switch {
	case r.Namespaced:
		for _, ns := range []string{acme.ns, globex.ns, "kube-system", "h8s-system", "default"} {
			named, unnamed = append(named, place{ns, ""}), append(unnamed, place{ns, ""})
		}
		unnamed = append(unnamed, place{}) // all namespaces
	case c.resource == "namespaces":
		for _, ns := range []string{acme.ns, globex.ns, "kube-system", "h8s-system"} {
			named = append(named, place{ns, ns})
		}
		unnamed = []place{{}}
	case c.resource == "tenants" || c.resource == "networks":
		named, unnamed = []place{{"", acme.name}, {"", globex.name}}, []place{{}}
	case c.resource == "users":
		named, unnamed = []place{{"", acme.owner}, {"", globex.owner}}, []place{{}}
	default:
		named, unnamed = []place{{}}, []place{{}}
	}
	var cells []cell
	for _, verb := range r.Verbs {
		places := unnamed
		switch verb {
		case "get", "update", "patch", "delete":
			places = named
		case "create", "deletecollection":
			if c.subresource != "" {
				places = named
			} else if r.Namespaced {
				places = named // there is no creating in all namespaces
			}
		}
		for _, p := range places {
			c.verb, c.namespace, c.name = verb, p.namespace, p.name
			cells = append(cells, c)
		}
	}
	return cells
}

// testRules reads the rules as `kubectl auth can-i --list` shows them: outside her
// namespaces an owner has the same few everywhere.
func testRules(t *testing.T, acme, globex tenant) {
	client := newAPIClient(t, acme.owner)
	rules := func(ns string) []string {
		review, err := post(client, "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", authorizationv1.SelfSubjectRulesReview{
			Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: ns},
		})
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, r := range review.Status.ResourceRules {
			for _, group := range r.APIGroups {
				for _, resource := range r.Resources {
					slices.Sort(r.Verbs)
					lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s.%s %s", strings.Join(r.Verbs, ","), resource, group, strings.Join(r.ResourceNames, ","))))
				}
			}
		}
		slices.Sort(lines)
		return slices.Compact(lines)
	}
	want := []string{
		"create namespaces.",
		"create selfsubjectaccessreviews.authorization.k8s.io",
		"create selfsubjectreviews.authentication.k8s.io",
		"create selfsubjectrulesreviews.authorization.k8s.io",
		"create,renew certificatesigningrequests.certificates.k8s.io", // admission leaves her own renewal
		"delete,get certificatesigningrequests.certificates.k8s.io h8s:user:" + acme.owner,
		"get,list,watch namespaces. " + acme.ns,
		"get,list,watch networks.h8s.io " + acme.name,
		"get,list,watch tenants.h8s.io " + acme.name,
	}
	for _, ns := range []string{globex.ns, "kube-system", "h8s-system", "default"} {
		if diff := cmp.Diff(want, rules(ns)); diff != "" {
			t.Errorf("rules in %s (- want, + got):\n%s", ns, diff)
		}
	}
}

// testTenantRefusals tries what the roles would allow and isolation does not.
func testTenantRefusals(t *testing.T, acme, globex tenant) {
	namespace := func(meta string) string { return "apiVersion: v1\nkind: Namespace\nmetadata: {" + meta + "}\n" }
	binding := func(subject string) string {
		return fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: back-door, namespace: %s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [%s]
`, acme.ns, subject)
	}
	create := []string{"create", "-f", "-"}
	table := map[string]struct {
		args  []string
		stdin string
		want  string
	}{
		"list namespaces":           {args: []string{"get", "namespaces"}, want: "cannot list"},
		"read another's secret":     {args: []string{"get", "secret", "treasure", "-n", globex.ns}, want: "cannot get"},
		"exec in another's pod":     {args: []string{"exec", "-n", globex.ns, "web", "--", "true"}, want: "cannot"},
		"logs of another's pod":     {args: []string{"logs", "-n", globex.ns, "web"}, want: "cannot get"},
		"port-forward to another's": {args: []string{"port-forward", "-n", globex.ns, "web", ":8080"}, want: "cannot"},
		"delete another's namespace": {
			args: []string{"delete", "namespace", globex.ns}, want: "cannot delete",
		},
		"label of the tenant":  {args: []string{"label", "namespace", acme.ns, "h8s.io/tenant=" + globex.name, "--overwrite"}, want: "cannot patch"},
		"label of the network": {args: []string{"label", "namespace", acme.ns, "h8s.io/network=" + globex.name, "--overwrite"}, want: "cannot patch"},
		"annotation of sandboxes": {
			args: []string{"annotate", "namespace", acme.ns, "h8s.io/sandboxes=runc", "--overwrite"}, want: "cannot patch",
		},
		"pod security label": {
			args: []string{"label", "namespace", acme.ns, "pod-security.kubernetes.io/enforce=privileged", "--overwrite"}, want: "cannot patch",
		},
		"her tenant":            {args: []string{"patch", "tenant", acme.name, "--type=merge", "-p", `{"spec":{"quota":{"namespaces":1000}}}`}, want: "cannot patch"},
		"her network":           {args: []string{"patch", "network", acme.name, "--type=merge", "-p", `{"spec":{"egress":{"internet":false}}}`}, want: "cannot patch"},
		"another's tenant":      {args: []string{"get", "tenant", globex.name}, want: "cannot get"},
		"a quota of her own":    {args: []string{"create", "quota", "mine", "--hard=pods=1000", "-n", acme.ns}, want: "cannot create"},
		"delete her quota":      {args: []string{"delete", "quota", "h8s", "-n", acme.ns}, want: "cannot delete"},
		"another's namespace":   {args: create, stdin: namespace("name: tenancy-x, labels: {h8s.io/tenant: " + globex.name + "}"), want: globex.name},
		"another's network":     {args: create, stdin: namespace("name: tenancy-x, labels: {h8s.io/network: " + globex.name + "}"), want: "network"},
		"a sandbox of her own":  {args: create, stdin: namespace("name: tenancy-x, labels: {h8s.io/sandbox: runc}"), want: "h8s.io/sandbox"},
		"sandboxes of her own":  {args: create, stdin: namespace("name: tenancy-x, annotations: {h8s.io/sandboxes: runc}"), want: "h8s.io/sandboxes"},
		"no pod security":       {args: create, stdin: namespace("name: tenancy-x, labels: {pod-security.kubernetes.io/enforce: privileged}"), want: "pod-security.kubernetes.io/enforce"},
		"bind a user":           {args: create, stdin: binding("{apiGroup: rbac.authorization.k8s.io, kind: User, name: " + globex.owner + "}"), want: "ServiceAccount"},
		"bind a group":          {args: create, stdin: binding("{apiGroup: rbac.authorization.k8s.io, kind: Group, name: 'system:authenticated'}"), want: "ServiceAccount"},
		"bind another's robot":  {args: create, stdin: binding("{kind: ServiceAccount, name: default, namespace: " + globex.ns + "}"), want: "ServiceAccount"},
		"bind a robot and more": {args: create, stdin: binding("{kind: ServiceAccount, name: default, namespace: " + acme.ns + "}, {apiGroup: rbac.authorization.k8s.io, kind: User, name: x}"), want: "ServiceAccount"},
		"escalate": {
			args: []string{"create", "role", "more", "--verb=create", "--resource=resourcequotas", "-n", acme.ns}, want: "attempting to grant RBAC permissions not currently held",
		},
		"bind cluster-admin": {
			args: []string{"create", "rolebinding", "more", "--clusterrole=cluster-admin", "--serviceaccount=" + acme.ns + ":default", "-n", acme.ns},
			want: "attempting to grant RBAC permissions not currently held",
		},
		"her own binding":       {args: []string{"delete", "rolebinding", "h8s:admin", "-n", acme.ns}, want: "kept in step"},
		"all bindings":          {args: []string{"delete", "rolebindings", "--all", "-n", acme.ns}, want: "kept in step"},
		"a binding like ours":   {args: create, stdin: strings.Replace(binding("{kind: ServiceAccount, name: default, namespace: "+acme.ns+"}"), "back-door", "'h8s:more'", 1), want: "kept in step"},
		"be the operator":       {args: []string{"get", "nodes", "--as=admin", "--as-group=system:masters"}, want: "cannot impersonate"},
		"pods/proxy":            {args: []string{"get", "--raw", "/api/v1/namespaces/" + acme.ns + "/pods/web:8080/proxy/"}, want: "port-forward"},
		"services/proxy":        {args: []string{"get", "--raw", "/api/v1/namespaces/" + acme.ns + "/services/web:8080/proxy/"}, want: "port-forward"},
		"metrics of the server": {args: []string{"get", "--raw", "/metrics"}, want: "cannot get path"},
	}
	for name, test := range table {
		t.Run(name, func(t *testing.T) { refused(t, acme.owner, test.stdin, test.want, test.args...) })
	}
	// Not even an operator's own credentials may make the API server dial a tenant's address.
	t.Run("pods/proxy of the operator", func(t *testing.T) {
		refused(t, admin, "", "port-forward", "get", "--raw", "/api/v1/namespaces/"+acme.ns+"/pods/web:8080/proxy/")
	})
	t.Run("someone of no tenant", func(t *testing.T) {
		apply(t, admin, "apiVersion: h8s.io/v1alpha1\nkind: User\nmetadata: {name: tenancy-nobody}\n")
		defer func() { _, _ = try(admin, "delete", "user", "tenancy-nobody") }()
		if err := writeKubeconfig("tenancy-nobody"); err != nil {
			t.Fatal(err)
		}
		refused(t, "tenancy-nobody", "", "cannot create", "create", "namespace", "tenancy-x")
		refused(t, "tenancy-nobody", "", "cannot list", "get", "pods", "-n", acme.ns)
	})
}

// testServiceAccount: a token of a tenant's ServiceAccount, also one with all that
// its owner can give, is worth nothing elsewhere.
func testServiceAccount(t *testing.T, acme, globex tenant) {
	kubectl(t, acme.owner, "create", "rolebinding", "robot", "--clusterrole=admin", "--serviceaccount="+acme.ns+":default", "-n", acme.ns)
	defer func() { kubectl(t, acme.owner, "delete", "rolebinding", "robot", "-n", acme.ns) }()
	writeTokenKubeconfig(t, "tenancy-token", acme.owner, acme.ns, "default")
	as := func(args ...string) (string, error) { return try("tenancy-token", args...) }
	eventually(t, func() error { // the binding may be newer than what the API server knows
		_, err := as("get", "secrets", "-n", acme.ns)
		return err
	})
	for _, args := range [][]string{
		{"get", "secrets", "-n", globex.ns},
		{"get", "pods", "-A"},
		{"get", "nodes"},
		{"get", "tenants"},
		{"get", "networks"},
		{"get", "blocks"},
		{"get", "quotaledgers"},
		{"create", "namespace", "tenancy-x"},
	} {
		out, err := as(args...)
		if err == nil || !strings.Contains(err.Error(), "cannot") {
			t.Errorf("a tenant's ServiceAccount: kubectl %s: %s, %v", strings.Join(args, " "), out, err)
		}
	}
}

// testOperatorNamespace: an operator names only the tenant; the rest follows.
func testOperatorNamespace(t *testing.T, tn tenant) {
	const ns = "tenancy-given"
	apply(t, admin, fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {h8s.io/tenant: %s}}\n", ns, tn.name))
	defer func() { _, _ = try(admin, "delete", "namespace", ns, "--timeout=4m") }()
	eventually(t, func() error {
		got, err := try(admin, "get", "namespace", ns, "-o",
			`jsonpath={.metadata.labels.h8s\.io/network} {.metadata.labels.h8s\.io/sandbox} {.metadata.labels.pod-security\.kubernetes\.io/enforce} {.metadata.annotations.h8s\.io/sandboxes}`)
		if want := tn.name + " gvisor baseline gvisor"; got != want {
			return fmt.Errorf("labels are %q, want %q, %w", got, want, err)
		}
		_, err = try(tn.owner, "get", "pods", "-n", ns)
		return err
	})
}

// testMembers: what each role gives to each kind of member, asked with the
// member's own credentials, and that it goes with the membership.
func testMembers(t *testing.T, tn, other tenant) {
	member := func(name string) string { return tn.name + "-" + name }
	patch := func(members ...string) {
		t.Helper()
		list := []string{fmt.Sprintf(`{"kind":"User","name":%q,"role":"owner"}`, tn.owner)}
		kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", `{"spec":{"members":[`+strings.Join(append(list, members...), ",")+`]}}`)
	}
	const auditors = "tenancy:auditors"
	people := map[string]struct {
		role   string
		groups []string // by which she is a member; none: by name
	}{
		"admin": {role: "admin"},
		"edit":  {role: "edit"},
		"view":  {role: "view"},
		"group": {role: "view", groups: []string{auditors}},
	}
	roles := map[string]string{} // by user
	members := []string{
		fmt.Sprintf(`{"kind":"Group","name":%q,"role":"view"}`, auditors),
		fmt.Sprintf(`{"kind":"ServiceAccount","name":"%s:default","role":"admin"}`, tn.ns),
	}
	for name, p := range people {
		user := member(name)
		apply(t, admin, "apiVersion: h8s.io/v1alpha1\nkind: User\nmetadata: {name: "+user+"}\n")
		t.Cleanup(func() { _, _ = try(admin, "delete", "user", user, "--ignore-not-found") })
		if err := writeKubeconfig(user, p.groups...); err != nil {
			t.Fatal(err)
		}
		roles[user] = p.role
		if p.groups == nil {
			members = append(members, fmt.Sprintf(`{"kind":"User","name":%q,"role":%q}`, user, p.role))
		}
	}
	robot := member("robot")
	writeTokenKubeconfig(t, robot, tn.owner, tn.ns, "default")
	roles[robot] = "admin"
	for user := range roles {
		refused(t, user, "", "cannot list", "get", "pods", "-n", tn.ns)
	}
	patch(members...)
	cells := discoverCells(t, tn, other)
	for user, role := range roles {
		t.Run(strings.TrimPrefix(user, tn.name+"-"), func(t *testing.T) {
			eventually(t, func() error { _, err := try(user, "get", "pods", "-n", tn.ns); return err })
			client := newAPIClient(t, user)
			// Whom only a group makes a member has no certificate that would be the same once it is renewed.
			byName := user != robot && user != member("group")
			allowed := 0
			for _, c := range cells {
				want := may(role, tn, c) || byName && renews(c)
				got, err := client.mayI(c)
				if err != nil {
					t.Fatal(err)
				}
				if want && !got { // each binding arrives by itself; what nobody has given never does
					eventually(t, func() error {
						if got, err = client.mayI(c); err == nil && !got {
							err = fmt.Errorf("can-i %s: forbidden, want allowed", c)
						}
						return err
					})
				}
				if got && !want {
					t.Errorf("can-i %s: allowed, want forbidden", c)
				}
				if got {
					allowed++
				}
			}
			if allowed < 50 {
				t.Errorf("%d of %d questions are allowed: the matrix is not whole", allowed, len(cells))
			}
		})
	}

	// They are removed, and are out within seconds.
	patch()
	for user := range roles {
		t.Run(strings.TrimPrefix(user, tn.name+"-")+" removed", func(t *testing.T) {
			for _, args := range [][]string{{"get", "pods", "-n", tn.ns}, {"create", "namespace", "tenancy-x", "--dry-run=server"}, {"get", "tenant", tn.name}} {
				within(t, 10*time.Second, func() error {
					out, err := try(user, args...)
					if err == nil || !strings.Contains(err.Error(), "cannot "+args[0]) && !strings.Contains(err.Error(), "cannot list") {
						return fmt.Errorf("may still %s: %s, %w", strings.Join(args, " "), out, err)
					}
					return nil
				})
			}
		})
	}
	kubectl(t, tn.owner, "get", "pods", "-n", tn.ns)
}

// writeTokenKubeconfig gives user the credentials of a ServiceAccount, a token that maker may make.
func writeTokenKubeconfig(t testing.TB, user, maker, namespace, account string) {
	t.Helper()
	useToken(t, user, strings.TrimSpace(kubectl(t, maker, "create", "token", account, "-n", namespace)))
}

// useToken makes token the credentials of user.
func useToken(t testing.TB, user, token string) {
	t.Helper()
	content, err := os.ReadFile(kubeconfigPath(admin))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kubeconfigPath(user), content, 0o600); err != nil {
		t.Fatal(err)
	}
	kubectl(t, user, "config", "set-credentials", user, "--token="+token)
	kubectl(t, user, "config", "set-context", "--current", "--user="+user)
}

func testDisabledUser(t *testing.T, tn tenant) {
	disable := func(disabled bool) {
		kubectl(t, admin, "patch", "user", tn.owner, "--type=merge", "-p", fmt.Sprintf(`{"spec":{"disabled":%t}}`, disabled))
	}
	disable(true)
	defer disable(false)
	for _, args := range [][]string{{"get", "pods", "-n", tn.ns}, {"get", "tenant", tn.name}, {"create", "namespace", "tenancy-x"}} {
		within(t, 10*time.Second, func() error {
			out, err := try(tn.owner, args...)
			if err == nil || !strings.Contains(err.Error(), "forbidden") && !strings.Contains(err.Error(), "Forbidden") {
				return fmt.Errorf("a disabled user: %s: %s, %w", strings.Join(args, " "), out, err)
			}
			return nil
		})
	}
	// Nor does she get a new certificate.
	if err := writeKubeconfig(tn.owner); err == nil || !strings.Contains(err.Error(), "disabled") {
		t.Errorf("a kubeconfig for a disabled user: %v", err)
	}
	disable(false)
	eventually(t, func() error {
		_, err := try(tn.owner, "get", "pods", "-n", tn.ns)
		return err
	})
}

// testSuspended: people and tokens from outside are out, the pod goes on with its own, and
// all is as before afterwards.
func testSuspended(t *testing.T, tn tenant) {
	const outside, copied = "tenancy-outside", "tenancy-copied"
	kubectl(t, tn.owner, "create", "rolebinding", "robot", "--clusterrole=view", "--serviceaccount="+tn.ns+":default", "-n", tn.ns)
	defer func() { _, _ = try(admin, "delete", "rolebinding", "robot", "-n", tn.ns) }()
	writeTokenKubeconfig(t, outside, tn.owner, tn.ns, "default")
	token, err := tn.sh("web", "cat /var/run/secrets/kubernetes.io/serviceaccount/token")
	if err != nil {
		t.Fatal(err)
	}
	useToken(t, copied, strings.TrimSpace(token))
	getPods := []string{"get", "pods", "-n", tn.ns}
	for _, user := range []string{outside, copied} {
		eventually(t, func() error { _, err := try(user, getPods...); return err })
	}
	pod := func() string {
		return kubectl(t, admin, "get", "pod", "web", "-n", tn.ns, "-o", "jsonpath={.metadata.uid} {.status.podIP} {.status.containerStatuses[*].containerID}")
	}
	before := pod()
	suspend := func(suspended bool) {
		t.Helper()
		kubectl(t, admin, "patch", "tenant", tn.name, "--type=merge", "-p", fmt.Sprintf(`{"spec":{"suspended":%t,"suspendedBecause":"the bill of May"}}`, suspended))
	}
	suspend(true)
	defer suspend(false)
	kubectl(t, admin, "wait", "--for=condition=Suspended", "tenant/"+tn.name, "--timeout=4m")
	for _, asked := range []struct {
		user, want string
		args       []string
	}{
		{tn.owner, "Forbidden", getPods},
		{tn.owner, "the bill of May", []string{"get", "namespaces", "-l", "h8s.io/tenant=" + tn.name}},
		{outside, "the bill of May", getPods},
	} {
		within(t, 10*time.Second, func() error {
			out, err := try(asked.user, asked.args...)
			if err == nil || !strings.Contains(err.Error(), asked.want) {
				return fmt.Errorf("of a suspended tenant, %s: kubectl %s: %s, %w, want %q", asked.user, strings.Join(asked.args, " "), out, err, asked.want)
			}
			return nil
		})
	}
	if out, err := try(copied, getPods...); err != nil {
		t.Errorf("the pod's own token: %s, %v", out, err)
	}
	eventually(t, func() error {
		out, err := try(admin, "exec", "-n", tn.ns, "web", "--", "/agnhost", "connect", "--timeout=2s", strings.Fields(before)[1]+":8080")
		if err != nil {
			return fmt.Errorf("the pod does not answer: %s, %w", out, err)
		}
		return nil
	})
	if now := pod(); now != before {
		t.Errorf("the pod was %s and is %s", before, now)
	}
	suspend(false)
	for _, user := range []string{tn.owner, outside} {
		eventually(t, func() error { _, err := try(user, getPods...); return err })
	}
}

// TestTenantDeletion holds a deletion up and reads why, then looks for what is left.
func TestTenantDeletion(t *testing.T) {
	tn := newTenant(t, "tenancy-gone", "10.0.0.0/16")
	tn.run(t, pod("web", "", ""), "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: held, finalizers: [example.com/hold]}\n")
	tn.waitReady(t, "web")
	id := kubectl(t, admin, "get", "network", tn.name, "-o", "jsonpath={.status.id}")
	release := func() (string, error) {
		return try(admin, "patch", "configmap", "held", "-n", tn.ns, "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	}
	t.Cleanup(func() { _, _ = release() })

	kubectl(t, admin, "delete", "tenant", tn.name, "--wait=false")
	eventually(t, func() error {
		message, err := try(admin, "get", "tenant", tn.name, "-o", `jsonpath={.status.conditions[?(@.type=="Deleting")].message}`)
		if err != nil || !strings.Contains(message, tn.ns) {
			return fmt.Errorf("condition Deleting says %q, which does not name the namespace %s: %w", message, tn.ns, err)
		}
		return nil
	})
	// First namespaces, then the network: it must still be there.
	kubectl(t, admin, "get", "network", tn.name)
	// Nobody makes a namespace in a tenant that goes away.
	if out, err := try(tn.owner, "create", "namespace", "tenancy-late"); err == nil {
		t.Errorf("a namespace was made in a tenant that is being deleted: %s", out)
		_, _ = try(admin, "delete", "namespace", "tenancy-late")
	}
	if _, err := release(); err != nil {
		t.Fatal(err)
	}
	kubectl(t, admin, "wait", "--for=delete", "tenant/"+tn.name, "--timeout=4m")
	for _, gone := range []string{"namespace/" + tn.ns, "network/" + tn.name} {
		if out, err := try(admin, "get", gone); err == nil {
			t.Errorf("the tenant is gone and this is not: %s", out)
		}
	}
	naming := func() (lines []string) {
		out := kubectl(t, admin, "get", "clusterroles,clusterrolebindings,rolebindings,roles,blocks,validatingadmissionpolicies,flowschemas,quotaledgers,namespaces", "-A", "-o", "yaml")
		for line := range strings.Lines(out) {
			if strings.Contains(line, tn.name) {
				lines = append(lines, line)
			}
		}
		return lines
	}
	for _, line := range naming() {
		if !strings.Contains(line, tn.owner) { // what its owner may do as a User goes with the User
			t.Errorf("the tenant is gone and something still names it: %s", line)
		}
	}
	kubectl(t, admin, "delete", "user", tn.owner)
	eventually(t, func() error {
		if lines := naming(); len(lines) > 0 {
			return fmt.Errorf("the tenant's owner is gone and something still names it: %s", lines)
		}
		return nil
	})
	refused(t, tn.owner, "", "cannot create", "create", "namespace", "tenancy-late")
	noTraces(t, id)
}
