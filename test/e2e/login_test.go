package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/applicationcredentials"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/clientcmd"

	"h8s.io/hypernetes/internal/dex"
	"h8s.io/hypernetes/internal/terminal"
)

// The cluster believes an OpenID Connect provider on the loopback of its control plane's
// node, which runs as long as TestLogin does, with its memory beside it.
const (
	issuerAddress = "127.0.0.1:5556"
	issuerMemory  = "http://127.0.0.1:5557"
	oidcPrefix    = "oidc:"
)

// newProvider prepares the provider before there is a cluster, whose flags name it.
func newProvider() (*dex.Provider, error) {
	dir := filepath.Join(cluster.dir, "dex")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return dex.New(filepath.Join(cluster.bin, "dex"), dir, netip.MustParseAddrPort(issuerAddress))
}

// upFlags are those of `h8s up` for people who log in.
func upFlags(p *dex.Provider) []string {
	return []string{"--keystone", "--oidc-issuer-url", p.Issuer, "--oidc-client-id", dex.ClientID, "--oidc-ca-file", p.CAFile, "--oidc-username-prefix", oidcPrefix}
}

// person is somebody with a home directory of her own, and a shell whose environment says
// nothing of OpenStack but what is in env.
type person struct {
	home, kubeconfig string
	env              []string
}

// newPerson is somebody who has got h8s, kubectl, the plugin of kubectl, and no kubeconfig.
func newPerson(t testing.TB, env ...string) *person {
	t.Helper()
	home := t.TempDir()
	bin := filepath.Join(home, "bin")
	if err := errors.Join(os.Mkdir(bin, 0o700), os.Symlink(filepath.Join(cluster.bin, "h8s"), filepath.Join(bin, "kubectl-h8s"))); err != nil {
		t.Fatal(err)
	}
	return &person{home: home, kubeconfig: filepath.Join(home, "of", "the", "cluster"), env: append([]string{
		"HOME=" + home, "PATH=" + bin + ":" + cluster.bin + ":" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir(),
	}, env...)}
}

func (p *person) command(ctx context.Context, argv ...string) *exec.Cmd {
	path := filepath.Join(cluster.bin, argv[0])
	if argv[0] == "nsenter" {
		path = argv[0]
	}
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.Env = append(slices.Clone(p.env), "KUBECONFIG="+p.kubeconfig)
	return cmd
}

// try runs a program as the person, and gives back all that it printed.
func (p *person) try(stdin string, argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := p.command(ctx, argv...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return string(out), err
}

// do is try that must succeed and print all of these.
func (p *person) do(t testing.TB, argv []string, want ...string) {
	t.Helper()
	if err := p.says(argv, want...); err != nil {
		t.Error(err)
	}
}

// sees waits until the person is told all of these: what she asks may have heard of a change later than she.
func (p *person) sees(t testing.TB, argv []string, want ...string) {
	t.Helper()
	eventually(t, func() error { return p.says(argv, want...) })
}

func (p *person) says(argv []string, want ...string) error {
	out, err := p.try("", argv...)
	if err != nil {
		return err
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			return fmt.Errorf("%s does not say %q:\n%s", strings.Join(argv, " "), w, out)
		}
	}
	return nil
}

// refused asserts that it fails, and says so.
func (p *person) refused(t testing.TB, want string, argv ...string) {
	t.Helper()
	if out, err := p.try("", argv...); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: %v, want a refusal with %q: %s", strings.Join(argv, " "), err, want, out)
	}
}

// types runs a program on a terminal and types what it asks for out of sight.
func (p *person) types(t testing.TB, question, secret string, argv ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := terminal.Answer(ctx, p.command(ctx, argv...), question, secret)
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out)
	}
	return out
}

// openStack is the cluster's own Keystone: a project, and people with a role in it.
type openStack struct {
	url      string
	admin    *gophercloud.ServiceClient
	project  *projects.Project
	role     *roles.Role
	ann, bob *users.User
	// plant is a project that has the tag of those that are Tenants, and carla is a member of it.
	plant *projects.Project
	carla *users.User
}

const (
	annsPassword = "p\"4$s: word"
	bobsPassword = "bob's own"
	// carlasPassword is for the project plant.
	carlasPassword = "carla's"
)

func newOpenStack(t *testing.T) *openStack {
	t.Helper()
	ctx := t.Context()
	opts, endpoint, tls, err := clouds.Parse(clouds.WithLocations("/var/lib/h8s/"+cluster.cluster+"/clouds.yaml"), clouds.WithCloudName("h8s-"+cluster.cluster))
	if err != nil {
		t.Fatalf("the way into the cluster's Keystone: %v", err)
	}
	provider, err := config.NewProviderClient(ctx, opts, config.WithTLSConfig(tls))
	if err != nil {
		t.Fatal(err)
	}
	k := &openStack{url: opts.IdentityEndpoint}
	if k.admin, err = openstack.NewIdentityV3(provider, endpoint); err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// The test's context has ended when this is cleaned up.
	clean := func(what string, remove func(context.Context) error) {
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := remove(ctx); err != nil {
				t.Errorf("remove %s from Keystone: %v", what, err)
			}
		})
	}
	project := func(name string, tags ...string) *projects.Project {
		t.Helper()
		p, err := projects.Create(ctx, k.admin, projects.CreateOpts{Name: name, DomainID: "default", Tags: tags}).Extract()
		check(err)
		clean("the project "+name, func(ctx context.Context) error { return projects.Delete(ctx, k.admin, p.ID).ExtractErr() })
		return p
	}
	k.project, k.plant = project("shop"), project("plant", "h8s")
	k.role, err = roles.Create(ctx, k.admin, roles.CreateOpts{Name: "deployer"}).Extract()
	check(err)
	clean("the role", func(ctx context.Context) error { return roles.Delete(ctx, k.admin, k.role.ID).ExtractErr() })
	user := func(name, password string, role *roles.Role, project *projects.Project) *users.User {
		t.Helper()
		u, err := users.Create(ctx, k.admin, users.CreateOpts{Name: name, DomainID: "default", Password: password}).Extract()
		check(err)
		clean(name, func(ctx context.Context) error { return users.Delete(ctx, k.admin, u.ID).ExtractErr() })
		check(roles.Assign(ctx, k.admin, role.ID, roles.AssignOpts{UserID: u.ID, ProjectID: project.ID}).ExtractErr())
		return u
	}
	k.ann, k.bob = user("ann o'hara", annsPassword, k.role, k.project), user("bob", bobsPassword, k.role, k.project)
	page, err := roles.List(k.admin, roles.ListOpts{Name: "member"}).AllPages(ctx)
	check(err)
	members, err := roles.ExtractRoles(page)
	check(err)
	if len(members) != 1 {
		t.Fatalf("Keystone has the roles %+v called member", members)
	}
	k.carla = user("carla", carlasPassword, &members[0], k.plant)
	return k
}

// scope is what `openstack` prints for a user's openrc, the password excepted.
func (k *openStack) scope(user *users.User, project *projects.Project) []string {
	return []string{
		"OS_AUTH_URL=" + k.url, "OS_USERNAME=" + user.Name, "OS_USER_DOMAIN_NAME=Default",
		"OS_PROJECT_NAME=" + project.Name, "OS_PROJECT_DOMAIN_NAME=Default",
	}
}

// as is the user's own client.
func (k *openStack) as(t *testing.T, user *users.User, password string) *gophercloud.ServiceClient {
	t.Helper()
	provider, err := openstack.AuthenticatedClient(t.Context(), gophercloud.AuthOptions{
		IdentityEndpoint: k.url, UserID: user.ID, Password: password, Scope: &gophercloud.AuthScope{ProjectID: k.project.ID},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestLogin plays people who have never had a kubeconfig: they log in with what the
// cluster's Keystone or OpenID Connect provider knows of them, and are what a Tenant makes of
// their names.
func TestLogin(t *testing.T) {
	if cluster.provider == nil {
		t.Skip("these people log in to the cluster that the tests bring up themselves: leave -cluster out")
	}
	const member = "keystone:Default/ann%20o%27hara"
	k := newOpenStack(t)
	provider := startProvider(t)
	apply(t, admin, fmt.Sprintf(`
apiVersion: h8s.io/v1alpha1
kind: Tenant
metadata: {name: login}
spec:
  members:
  - {kind: User, name: %q, role: owner}
  - {kind: User, name: %q, role: view}
  network: {cidrs: [10.0.0.0/16]}
`, member, oidcPrefix+dex.Email))
	t.Cleanup(func() {
		if _, err := try(admin, "delete", "tenant", "login", "plant", "--ignore-not-found", "--timeout=4m"); err != nil {
			t.Error(err)
		}
	})
	kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/login", "--timeout=4m")
	login := loginCommand(t)

	ann := newPerson(t, k.scope(k.ann, k.project)...)
	t.Run("Password", func(t *testing.T) {
		if out := ann.types(t, "Password of "+k.ann.Name+" at "+k.url, annsPassword, login()...); !strings.Contains(out, "logged in") {
			t.Errorf("h8s login says:\n%s", out)
		}
		if info, err := os.Stat(ann.kubeconfig); err != nil || info.Mode() != 0o600 {
			t.Errorf("the kubeconfig: %v, %v", info, err)
		}
		eventually(t, func() error { // the binding may be newer than what the API server knows
			_, err := ann.try("", "kubectl", "create", "namespace", "login-shop")
			return err
		})
		eventually(t, func() error {
			_, err := ann.try(pod("web", "", ""), "kubectl", "apply", "-n", "login-shop", "-f", "-")
			return err
		})
		ann.sees(t, []string{"kubectl", "get", "pods", "-n", "login-shop"}, "web")
		ann.sees(t, []string{"kubectl", "get", "namespaces", "-l", "h8s.io/tenant=login"}, "login-shop")
		ann.refused(t, "(Forbidden)", "kubectl", "get", "namespaces")
		ann.refused(t, "(Forbidden)", "kubectl", "get", "pods", "-n", systemNamespace)
	})
	t.Run("WhoAmI", func(t *testing.T) {
		for _, argv := range [][]string{{"h8s", "whoami"}, {"kubectl", "h8s", "whoami"}} {
			ann.sees(t, argv, member, "keystone:role:Default/shop/deployer", "tenant login", "owner", "namespace login-shop")
		}
		ann.sees(t, []string{"kubectl", "h8s", "ns"}, "login-shop")
		ann.sees(t, []string{"kubectl", "h8s", "tenants"}, "login")
	})
	bob := newPerson(t)
	t.Run("Cloud", func(t *testing.T) {
		// As `openstack` has it: the password in a file of its own.
		config := filepath.Join(bob.home, ".config", "openstack")
		if err := errors.Join(os.MkdirAll(config, 0o700),
			os.WriteFile(filepath.Join(config, "clouds.yaml"), fmt.Appendf(nil, "clouds: {work: {auth: {auth_url: %q, username: bob, user_domain_name: Default, project_name: shop, project_domain_name: Default}}}", k.url), 0o600),
			os.WriteFile(filepath.Join(config, "secure.yaml"), fmt.Appendf(nil, "clouds: {work: {auth: {password: %q}}}", bobsPassword), 0o600),
		); err != nil {
			t.Fatal(err)
		}
		bob.do(t, login("--os-cloud", "work"), "logged in")
		bob.sees(t, []string{"h8s", "whoami"}, "keystone:Default/bob", "none")
		// Of the same project, and no member.
		bob.refused(t, "(Forbidden)", "kubectl", "get", "pods", "-n", "login-shop")
		bob.refused(t, "(Forbidden)", "kubectl", "get", "namespaces", "-l", "h8s.io/tenant=login")
		bob.refused(t, "(Forbidden)", "kubectl", "create", "namespace", "login-bobs")
	})
	t.Run("ApplicationCredential", func(t *testing.T) {
		app, err := applicationcredentials.Create(t.Context(), k.as(t, k.ann, annsPassword), k.ann.ID, applicationcredentials.CreateOpts{Name: "ci"}).Extract()
		if err != nil {
			t.Fatal(err)
		}
		ci := newPerson(t, "OS_AUTH_TYPE=v3applicationcredential", "OS_AUTH_URL="+k.url, "OS_APPLICATION_CREDENTIAL_ID="+app.ID, "OS_APPLICATION_CREDENTIAL_SECRET="+app.Secret)
		ci.do(t, login(), "logged in")
		ci.sees(t, []string{"kubectl", "get", "pods", "-n", "login-shop"}, "web")
		ci.do(t, []string{"h8s", "logout"}, "is over")
	})
	carla := newPerson(t, k.scope(k.carla, k.plant)...)
	t.Run("Project", func(t *testing.T) { // nobody has made a Tenant of it
		eventually(t, func() error { _, err := try(admin, "get", "tenant", "plant"); return err })
		kubectl(t, admin, "wait", "--for=condition=Ready", "tenant/plant", "--timeout=4m")
		kubectl(t, admin, "create", "namespace", "login-plant")
		kubectl(t, admin, "label", "namespace", "login-plant", "h8s.io/tenant=plant")
		carla.types(t, "Password of "+k.carla.Name, carlasPassword, login()...)
		carla.sees(t, []string{"h8s", "whoami"}, "keystone:Default/carla", "tenant plant", "edit")
		eventually(t, func() error {
			_, err := carla.try("", "kubectl", "create", "configmap", "hers", "-n", "login-plant")
			return err
		})
		carla.refused(t, "(Forbidden)", "kubectl", "get", "pods", "-n", "login-shop")
		// What this brings about takes the controller a while: see ProjectGone.
		if err := projects.DeleteTags(t.Context(), k.admin, k.plant.ID).ExtractErr(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("Revoked", func(t *testing.T) {
		ann.sees(t, []string{"kubectl", "get", "pods", "-n", "login-shop"}, "web")
		bob.sees(t, []string{"kubectl", "auth", "whoami"}, "keystone:Default/bob")
		if err := roles.Unassign(t.Context(), k.admin, k.role.ID, roles.UnassignOpts{UserID: k.ann.ID, ProjectID: k.project.ID}).ExtractErr(); err != nil {
			t.Fatal(err)
		}
		if _, err := users.Update(t.Context(), k.admin, k.bob.ID, users.UpdateOpts{Password: "another"}).Extract(); err != nil {
			t.Fatal(err)
		}
		const promised, asking = 10 * time.Second, 3 * time.Second // the latter is kubectl's
		within(t, promised+asking, func() error {
			for name, p := range map[string]*person{"without a role": ann, "with another password": bob} {
				if out, err := p.try("", "kubectl", "auth", "whoami"); err == nil || !strings.Contains(err.Error(), "Unauthorized") {
					return fmt.Errorf("%s: %s, %w", name, out, err)
				}
			}
			return nil
		})
		// Bob's session says so when its token has ended; ann's role is back.
		if err := roles.Assign(t.Context(), k.admin, k.role.ID, roles.AssignOpts{UserID: k.ann.ID, ProjectID: k.project.ID}).ExtractErr(); err != nil {
			t.Fatal(err)
		}
		ann.types(t, "Password of "+k.ann.Name, annsPassword, login()...)
		ann.sees(t, []string{"kubectl", "get", "pods", "-n", "login-shop"}, "web")
	})
	t.Run("Logout", func(t *testing.T) {
		token, err := ann.token()
		if err != nil {
			t.Fatal(err)
		}
		ann.do(t, []string{"h8s", "logout"}, "is over")
		if err := tokens.Get(t.Context(), k.admin, token).Err; !gophercloud.ResponseCodeIs(err, 404) {
			t.Errorf("after the logout Keystone says of the token: %v, want that there is none", err)
		}
		ann.refused(t, "localhost:8080", "kubectl", "get", "pods", "-n", "login-shop") // what kubectl takes who knows of no cluster
	})
	t.Run("DeviceFlow", func(t *testing.T) {
		her := newPerson(t)
		her.device(t, provider, login("--oidc-issuer", provider.Issuer, "--oidc-client-id", dex.ClientID, "--oidc-ca-file", provider.CAFile)...)
		eventually(t, func() error { // the API server looks for a provider that is not there every ten seconds
			_, err := her.try("", "kubectl", "auth", "whoami")
			return err
		})
		her.sees(t, []string{"h8s", "whoami"}, oidcPrefix+dex.Email, oidcPrefix+"system:masters", "tenant login", "view")
		her.sees(t, []string{"kubectl", "get", "pods", "-n", "login-shop"}, "web")
		her.refused(t, "(Forbidden)", "kubectl", "delete", "pod", "web", "-n", "login-shop")
		her.refused(t, "(Forbidden)", "kubectl", "get", "nodes") // whatever her group is called
	})
	t.Run("ProjectGone", func(t *testing.T) {
		kubectl(t, admin, "wait", "--for=condition=Suspended", "tenant/plant", "--timeout=4m")
		within(t, 10*time.Second, func() error { // the API server learns by watches
			out, err := carla.try("", "kubectl", "get", "configmaps", "-n", "login-plant")
			if err == nil || !strings.Contains(err.Error(), "(Forbidden)") {
				return fmt.Errorf("a member of a project without the tag: %s, %w", out, err)
			}
			return nil
		})
		carla.sees(t, []string{"h8s", "whoami"}, `the Tenant "plant" is suspended`)
		kubectl(t, admin, "get", "configmap", "hers", "-n", "login-plant")
	})
}

// loginCommand is `h8s login` for who has the cluster's address and CA and nothing else.
func loginCommand(t *testing.T) func(more ...string) []string {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfigPath(admin))
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, config.CAData, 0o600); err != nil {
		t.Fatal(err)
	}
	return func(more ...string) []string {
		return append([]string{"h8s", "login", "--server", config.Host, "--certificate-authority", ca}, more...)
	}
}

// token is that of the person's only session.
func (p *person) token() (string, error) {
	files, err := filepath.Glob(filepath.Join(p.home, ".cache", "h8s", "sessions", "*.json"))
	if err != nil || len(files) != 1 {
		return "", fmt.Errorf("files of sessions: %v, %w", files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		return "", err
	}
	var session struct{ Credential struct{ Token string } }
	if err := json.Unmarshal(data, &session); err != nil || session.Credential.Token == "" {
		return "", fmt.Errorf("%s has no token: %w", files[0], err)
	}
	return session.Credential.Token, nil
}

// device logs in where the provider is, and approves that in a browser.
func (p *person) device(t *testing.T, provider *dex.Provider, argv ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	argv[0] = filepath.Join(cluster.bin, argv[0])
	cmd := p.command(ctx, append(append([]string{}, provider.Enter...), argv...)...)
	said, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(said)
	var address string
	for address == "" && lines.Scan() {
		address = regexp.MustCompile(`https://\S+`).FindString(lines.Text())
	}
	if err := provider.Approve(ctx, address); err != nil {
		t.Errorf("approve at %q: %v", address, err)
		cancel()
	}
	rest, _ := io.ReadAll(said)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("h8s login: %v: %s", err, rest)
	}
}

// startProvider runs the provider on the control plane's node until the test is over.
func startProvider(t *testing.T) *dex.Provider {
	t.Helper()
	netns := nodeNetns(t, nodes(t)[0])
	p := cluster.provider
	p.Enter, p.Dial = []string{"nsenter", "--net=" + netns}, dialIn(netns)
	const peer = "http://127.0.0.1:5558"
	etcd := exec.Command("nsenter", "--net="+netns, filepath.Join(cluster.bin, "etcd"), "--data-dir="+t.TempDir(), "--log-level=error",
		"--listen-client-urls="+issuerMemory, "--advertise-client-urls="+issuerMemory,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer)
	etcd.Stderr = os.Stderr
	if err := etcd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = etcd.Process.Kill()
		_ = etcd.Wait()
	})
	eventually(t, func() error {
		conn, err := p.Dial(t.Context(), "tcp", strings.TrimPrefix(issuerMemory, "http://"))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	if err := p.Start(t.Context(), issuerMemory, "login/"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// dialIn dials addresses, not names, as a process of the network namespace would.
func dialIn(netns string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // the thread ends with the goroutine: it is no use any more
			var ns *os.File
			if ns, err = os.Open(netns); err != nil {
				return
			}
			defer ns.Close()
			if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return
			}
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		}()
		<-done
		return conn, err
	}
}
