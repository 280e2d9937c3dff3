package identity

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/credentials"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/trusts"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"

	"h8s.io/hypernetes/internal/keystone"
)

// server is a real Keystone, which all tests of this package share, and its
// administrator.
var (
	server *keystone.Server
	admin  *gophercloud.ServiceClient
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	ctx := context.Background()
	var err error
	if server, err = keystone.StartServer(ctx, 0); err != nil {
		fmt.Fprintln(os.Stderr, "start Keystone:", err)
		return 1
	}
	defer func() {
		if err := server.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "stop Keystone:", err)
			code = 1
		}
	}()
	if admin, err = server.Admin(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

var serial atomic.Int64

// unique makes a name that is not in Keystone yet.
func unique(name string) string { return fmt.Sprintf("%s-%d", name, serial.Add(1)) }

func newDomain(t *testing.T, name string) *domains.Domain {
	t.Helper()
	return must[*domains.Domain](t)(domains.Create(t.Context(), admin, domains.CreateOpts{Name: name}).Extract())
}

func newProject(t *testing.T, domain *domains.Domain, name string) *projects.Project {
	t.Helper()
	return must[*projects.Project](t)(projects.Create(t.Context(), admin, projects.CreateOpts{Name: name, DomainID: domain.ID}).Extract())
}

func newRole(t *testing.T, name string) *roles.Role {
	t.Helper()
	return must[*roles.Role](t)(roles.Create(t.Context(), admin, roles.CreateOpts{Name: name}).Extract())
}

// person is a user of Keystone with the password that all of them have.
type person struct{ *users.User }

const password = "pa ss/wörd"

func newPerson(t *testing.T, domain *domains.Domain, name string) person {
	t.Helper()
	return person{must[*users.User](t)(users.Create(t.Context(), admin, users.CreateOpts{Name: name, DomainID: domain.ID, Password: password}).Extract())}
}

func assign(t *testing.T, role *roles.Role, opts roles.AssignOpts) {
	t.Helper()
	ok(t, roles.Assign(t.Context(), admin, role.ID, opts).ExtractErr())
}

type object = map[string]any

// login is a request for a token, as the API's reference writes it.
func login(t *testing.T, identity, scope object) (string, error) {
	t.Helper()
	auth := object{"identity": identity}
	if scope != nil {
		auth["scope"] = scope
	}
	body := must[[]byte](t)(json.Marshal(object{"auth": auth}))
	req := must[*http.Request](t)(http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL()+"/auth/tokens", bytes.NewReader(body)))
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return "", fmt.Errorf("login: %s", resp.Status)
	}
	return resp.Header.Get("X-Subject-Token"), nil
}

func (p person) byPassword() object {
	return object{"methods": []string{"password"}, "password": object{"user": object{"id": p.ID, "password": password}}}
}

func byToken(token string) object {
	return object{"methods": []string{"token"}, "token": object{"id": token}}
}

func project(p *projects.Project) object { return object{"project": object{"id": p.ID}} }
func inDomain(d *domains.Domain) object  { return object{"domain": object{"id": d.ID}} }

func (p person) token(t *testing.T, scope object) string {
	t.Helper()
	return must[string](t)(login(t, p.byPassword(), scope))
}

// byTOTP gives the user a second factor, RFC 6238, and logs in with that alone.
func (p person) byTOTP(t *testing.T) object {
	t.Helper()
	secret := []byte("a secret of 20 bytes")
	_, err := credentials.Create(t.Context(), admin, credentials.CreateOpts{
		Type: "totp", UserID: p.ID, Blob: base32.StdEncoding.EncodeToString(secret),
	}).Extract()
	ok(t, err)
	mac := hmac.New(sha1.New, secret)
	ok(t, binary.Write(mac, binary.BigEndian, time.Now().Unix()/30))
	sum := mac.Sum(nil)
	at := sum[len(sum)-1] & 0xf
	code := binary.BigEndian.Uint32(sum[at:]) & 0x7fffffff % 1000000
	return object{"methods": []string{"totp"}, "totp": object{"user": object{"id": p.ID, "passcode": fmt.Sprintf("%06d", code)}}}
}

// byCredential makes an application credential with the user's own token, and logs in
// with it: the scope is the credential's.
func (p person) byCredential(t *testing.T, token string, more object) object {
	t.Helper()
	request := object{"name": unique("credential")}
	for k, v := range more {
		request[k] = v
	}
	body := must[[]byte](t)(json.Marshal(object{"application_credential": request}))
	req := must[*http.Request](t)(http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL()+"/users/"+p.ID+"/application_credentials", bytes.NewReader(body)))
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Auth-Token", token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var made struct {
		Credential struct {
			ID     string `json:"id"`
			Secret string `json:"secret"`
		} `json:"application_credential"`
	}
	ok(t, json.NewDecoder(resp.Body).Decode(&made))
	if made.Credential.ID == "" {
		t.Fatalf("make an application credential: %s", resp.Status)
	}
	return object{"methods": []string{"application_credential"}, "application_credential": object{"id": made.Credential.ID, "secret": made.Credential.Secret}}
}

// trust lets another act as the user with a role in a project, and is its id.
func (p person) trust(t *testing.T, token string, trustee person, project *projects.Project, role *roles.Role) string {
	t.Helper()
	provider := must[*gophercloud.ProviderClient](t)(openstack.NewClient(server.URL()))
	provider.SetToken(token)
	client := must[*gophercloud.ServiceClient](t)(openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{}))
	return must[*trusts.Trust](t)(trusts.Create(t.Context(), client, trusts.CreateOpts{
		Impersonation: true, ProjectID: project.ID, TrustorUserID: p.ID, TrusteeUserID: trustee.ID, Roles: []trusts.Role{{ID: role.ID}},
	}).Extract()).ID
}

// gate is between a Service and Keystone: it counts, and misbehaves if told to.
type gate struct {
	*httptest.Server
	// questions are the validations that have come, logins the logins.
	questions, logins atomic.Int64
	// fault takes the place of Keystone's answer to a validation, if set.
	fault atomic.Pointer[http.HandlerFunc]
	// seen is the service user's token of the last validation.
	seen atomic.Pointer[string]
}

func newGate(t *testing.T) *gate {
	t.Helper()
	target := must[*url.URL](t)(url.Parse(server.URL()))
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = target.Scheme, target.Host
		},
		Transport:    &http.Transport{DisableKeepAlives: true},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	g := &gate{}
	g.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			g.logins.Add(1)
			proxy.ServeHTTP(w, r)
			return
		}
		g.questions.Add(1)
		own := r.Header.Get("X-Auth-Token")
		g.seen.Store(&own)
		if fault := g.fault.Load(); fault != nil {
			(*fault)(w, r)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(g.Close)
	return g
}

// service is a Service of a new service user, whose clouds.yaml names the gate.
func (g *gate) service(t *testing.T) (s *Service, cloudsFile string) {
	t.Helper()
	return g.serviceOf(t, must[[]byte](t)(server.EnsureServiceUser(t.Context(), unique("h8s"), "h8s")))
}

// serviceOf is a Service with the clouds.yaml of Keystone, which is made to name the gate.
func (g *gate) serviceOf(t *testing.T, config []byte) (s *Service, cloudsFile string) {
	t.Helper()
	config = bytes.ReplaceAll(config, []byte(server.URL()), []byte(g.URL+"/v3"))
	path := filepath.Join(t.TempDir(), "clouds.yaml")
	ok(t, os.WriteFile(path, config, 0o600))
	return must[*Service](t)(NewService(path, "h8s")), path
}

// clock is a Validator's.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.offset.Load())) }
func (c *clock) advance(d time.Duration) { c.offset.Add(int64(d)) }
