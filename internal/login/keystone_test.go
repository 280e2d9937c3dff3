package login

import (
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/applicationcredentials"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/credentials"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"

	"h8s.io/hypernetes/internal/keystone"
)

// typist answers questions by the words in them.
type typist struct {
	answers map[string]string
	asked   []string
}

func (p *typist) Ask(_ context.Context, question string, secret bool) (string, error) {
	p.asked = append(p.asked, question)
	for word, answer := range p.answers {
		if strings.HasPrefix(question, word) {
			if !secret && word != "User name" {
				return "", fmt.Errorf("%q is asked with echo", question)
			}
			return answer, nil
		}
	}
	return "", fmt.Errorf("unexpected question %q", question)
}

func (p *typist) Tell(string) {}

// TestKeystone logs in to a real Keystone by each of its methods.
func TestKeystone(t *testing.T) {
	ctx := t.Context()
	server, err := keystone.StartServer(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	admin, err := identityClient(server.URL(), nil)
	if err != nil {
		t.Fatal(err)
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(openstack.AuthenticateV3(ctx, admin.ProviderClient, &tokens.AuthOptions{
		IdentityEndpoint: server.URL(), Username: keystone.AdminUser, Password: server.AdminPassword(), DomainName: "Default",
		Scope: tokens.Scope{ProjectName: "admin", DomainName: "Default"},
	}, gophercloud.EndpointOpts{}))
	project, err := projects.Create(ctx, admin, projects.CreateOpts{Name: "acme", DomainID: "default"}).Extract()
	check(err)
	role, err := roles.Create(ctx, admin, roles.CreateOpts{Name: "user"}).Extract()
	check(err)
	newUser := func(name, password string, options map[users.Option]any) *users.User {
		t.Helper()
		u, err := users.Create(ctx, admin, users.CreateOpts{Name: name, Password: password, DomainID: "default", Options: options}).Extract()
		check(err)
		check(roles.Assign(ctx, admin, role.ID, roles.AssignOpts{UserID: u.ID, ProjectID: project.ID}).ExtractErr())
		return u
	}
	const secret = "p\"4$s: word"
	ann := newUser("ann o'hara", secret, nil)
	bob := newUser("bob", "secret", map[users.Option]any{users.MultiFactorAuthEnabled: true, users.MultiFactorAuthRules: [][]string{{"password", "totp"}}})
	seed := base32.StdEncoding.EncodeToString([]byte("12345678901234567890")) // of RFC 6238's test vectors
	_, err = credentials.Create(ctx, admin, credentials.CreateOpts{UserID: bob.ID, Type: "totp", Blob: seed}).Extract()
	check(err)

	annScope := map[string]string{
		"OS_AUTH_URL": server.URL(), "OS_USERNAME": ann.Name, "OS_USER_DOMAIN_NAME": "Default",
		"OS_PROJECT_NAME": "acme", "OS_PROJECT_DOMAIN_NAME": "Default",
	}
	with := func(extra ...string) map[string]string {
		all := map[string]string{}
		for k, v := range annScope {
			all[k] = v
		}
		for i := 0; i < len(extra); i += 2 {
			all[extra[i]] = extra[i+1]
		}
		return all
	}
	annToken, err := authenticate(ctx, gophercloud.AuthOptions{
		IdentityEndpoint: server.URL(), Username: ann.Name, Password: secret, DomainName: "Default", Scope: &gophercloud.AuthScope{ProjectID: project.ID},
	}, nil)
	check(err)
	annClient, err := identityClient(server.URL(), nil)
	check(err)
	annClient.SetToken(annToken.Token)
	app, err := applicationcredentials.Create(ctx, annClient, ann.ID, applicationcredentials.CreateOpts{Name: "kubectl", Secret: "app secret"}).Extract()
	check(err)

	dir := t.TempDir()
	file := filepath.Join(dir, "clouds.yaml")
	check(os.WriteFile(file, fmt.Appendf(nil, `clouds:
  ann:
    auth: {auth_url: %q, username: %q, user_domain_name: Default, project_name: acme, project_domain_name: Default}
  bob:
    auth_type: v3multifactor
    auth: {auth_url: %[1]q, username: bob, user_domain_name: Default, project_name: acme, project_domain_name: Default}
  app:
    auth_type: v3applicationcredential
    auth: {auth_url: %[1]q, application_credential_id: %[3]q}
`, server.URL(), ann.Name, app.ID), 0o600))
	secure := filepath.Join(dir, "secure.yaml")

	for name, test := range map[string]struct {
		cloud  string
		env    map[string]string
		secure string // secure.yaml
		types  map[string]string
		asked  int
		silent bool   // it renews by itself
		want   string // part of the error
	}{
		"variables, password typed":     {env: annScope, types: map[string]string{"Password of ann o'hara": secret}, asked: 1},
		"variables, all of them":        {env: with("OS_PASSWORD", secret), silent: true},
		"variables, name typed":         {env: with("OS_USERNAME", ""), types: map[string]string{"User name": ann.Name, "Password of": secret}, asked: 2},
		"a token":                       {env: with("OS_TOKEN", annToken.Token)},
		"wrong password":                {env: annScope, types: map[string]string{"Password of": "wrong"}, asked: 1, want: "Keystone at " + server.URL() + " refuses"},
		"a project that is not mine":    {env: with("OS_PROJECT_NAME", "admin", "OS_PASSWORD", secret), want: "refuses"},
		"no Keystone":                   {env: map[string]string{}, want: "--os-cloud"},
		"clouds.yaml, password typed":   {cloud: "ann", types: map[string]string{"Password of ann o'hara": secret}, asked: 1},
		"clouds.yaml and secure.yaml":   {cloud: "ann", secure: fmt.Sprintf("clouds: {ann: {auth: {password: %q}}}", secret), silent: true},
		"OS_CLOUD":                      {env: map[string]string{"OS_CLOUD": "ann"}, types: map[string]string{"Password of": secret}, asked: 1},
		"no such cloud":                 {cloud: "nowhere", want: `"nowhere" not found`},
		"application credential, typed": {cloud: "app", types: map[string]string{"Secret of": "app secret"}, asked: 1},
		"application credential":        {cloud: "app", secure: `clouds: {app: {auth: {application_credential_secret: "app secret"}}}`, silent: true},
		"password and one-time code":    {cloud: "bob", types: map[string]string{"Password of": "secret", "One-time code": totp(t, time.Now())}, asked: 2},
		"one-time code is wrong":        {cloud: "bob", types: map[string]string{"Password of": "secret", "One-time code": "000000"}, asked: 2, want: "refuses"},
	} {
		t.Run(name, func(t *testing.T) {
			env := map[string]string{"OS_CLIENT_CONFIG_FILE": file}
			for k, v := range test.env {
				env[k] = v
			}
			if test.secure != "" {
				if err := os.WriteFile(secure, []byte(test.secure), 0o600); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = os.Remove(secure) })
			}
			if _, ok := test.types["One-time code"]; ok && test.want == "" {
				test.types["One-time code"] = totp(t, time.Now()) // it lives for 30 s
			}
			cache, person := Cache(filepath.Join(t.TempDir(), "h8s")), &typist{answers: test.types}
			k, err := NewKeystone(test.cloud, false, func(name string) string { return env[name] })
			if err == nil {
				err = cache.Login(ctx, "s", &Session{Keystone: k}, person)
			}
			if len(person.asked) != test.asked {
				t.Errorf("asked %q, want %d questions", person.asked, test.asked)
			}
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%v, want %q", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			checkModes(t, string(cache))
			data, err := os.ReadFile(cache.file("s", ".json"))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range []string{secret, `p\"4$s`, "app secret"} {
				if strings.Contains(string(data), s) {
					t.Errorf("a secret is in the session's file:\n%s", data)
				}
			}
			have, err := cache.Credential(ctx, "s", Cluster{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if valid(t, admin, have.Token) != http.StatusOK {
				t.Error("Keystone does not know the token")
			}

			// The plugin is another process, later.
			s, err := cache.load("s")
			if err != nil {
				t.Fatal(err)
			}
			s.Keystone.lookup = func(name string) string { return env[name] }
			renewed, err := s.Keystone.Renew(ctx, have)
			if test.silent && (err != nil || renewed.Token == have.Token) {
				t.Errorf("renewal: %v", err)
			}
			if !test.silent && !errors.Is(err, ErrPersonNeeded) {
				t.Errorf("renewal: %v, want that somebody is needed", err)
			}
			if test.env["OS_PASSWORD"] != "" {
				// Another cloud's variables in the shell: its password is not for this Keystone.
				s.Keystone.lookup = func(name string) string {
					if name == "OS_AUTH_URL" {
						return "https://elsewhere:5000/v3"
					}
					return env[name]
				}
				if _, err := s.Keystone.Renew(ctx, have); !errors.Is(err, ErrPersonNeeded) {
					t.Errorf("renewal with another cloud's password: %v", err)
				}
			}

			if name == "a token" {
				return // it is the others', too
			}
			if err := cache.Logout(ctx, "s"); err != nil {
				t.Fatal(err)
			}
			if code := valid(t, admin, have.Token); code != http.StatusNotFound {
				t.Errorf("after the logout Keystone says %d of the token", code)
			}
		})
	}

	t.Run("Keystone is down", func(t *testing.T) {
		cache := Cache(filepath.Join(t.TempDir(), "h8s"))
		k, err := NewKeystone("", false, func(name string) string { return with("OS_PASSWORD", secret)[name] })
		if err != nil {
			t.Fatal(err)
		}
		if err := cache.Login(ctx, "s", &Session{Keystone: k}, &typist{}); err != nil {
			t.Fatal(err)
		}
		server.Stop()
		if _, err := cache.Credential(ctx, "s", Cluster{}, nil); err != nil {
			t.Errorf("the token is good, and still: %v", err)
		}
		err = cache.Logout(ctx, "s")
		if err == nil || !strings.Contains(err.Error(), "could not be revoked") {
			t.Errorf("logout: %v, want that the token could not be revoked", err)
		}
		if _, err := cache.load("s"); !errors.Is(err, errNoSession) {
			t.Errorf("the session is not forgotten: %v", err)
		}
	})
}

func valid(t *testing.T, admin *gophercloud.ServiceClient, token string) int {
	t.Helper()
	err := tokens.Get(t.Context(), admin, token).Err
	var code gophercloud.ErrUnexpectedResponseCode
	if errors.As(err, &code) {
		return code.Actual
	}
	if err != nil {
		t.Fatal(err)
	}
	return http.StatusOK
}

// totp is the code of RFC 6238 for the seed of its test vectors: HMAC-SHA-1 of the
// number of half minutes, six digits of it (RFC 4226, section 5.3).
func totp(t *testing.T, now time.Time) string {
	t.Helper()
	mac := hmac.New(sha1.New, []byte("12345678901234567890"))
	if err := binary.Write(mac, binary.BigEndian, now.Unix()/30); err != nil {
		t.Fatal(err)
	}
	sum := mac.Sum(nil)
	offset := sum[len(sum)-1] & 0xf
	return fmt.Sprintf("%06d", (binary.BigEndian.Uint32(sum[offset:])&0x7fffffff)%1_000_000)
}

// checkModes wants everything of sessions closed to others.
func checkModes(t *testing.T, dir string) {
	t.Helper()
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of sessions: %v, %v", info.Mode(), err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatalf("the files of sessions: %v, %v", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
	}
}
