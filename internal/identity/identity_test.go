package identity

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	"k8s.io/utils/ptr"
)

// TestIdentities logs in to Keystone in every way and compares what a Validator makes
// of the tokens.
func TestIdentities(t *testing.T) {
	service, _ := newGate(t).service(t)
	v := must[*Validator](t)(New(service, Options{Deadline: patience}))
	acme, odd := newDomain(t, "acme"), newDomain(t, "Ac/me: 1% é")
	member, oddRole := newRole(t, "deployer"), newRole(t, "a/b:c ")
	web := newProject(t, acme, "web")
	// The same names in another domain, where the project's is odd too.
	oddWeb := newProject(t, odd, "web/../x")
	alice, otherAlice := newPerson(t, acme, "alice"), newPerson(t, odd, "alice")
	system := newPerson(t, acme, "system:masters/root@example.com")
	for _, p := range []person{alice, system} {
		assign(t, member, roles.AssignOpts{UserID: p.ID, ProjectID: web.ID})
	}
	assign(t, member, roles.AssignOpts{UserID: alice.ID, DomainID: acme.ID})
	assign(t, oddRole, roles.AssignOpts{UserID: otherAlice.ID, ProjectID: oddWeb.ID})
	// Of another domain than the project that she works on.
	assign(t, member, roles.AssignOpts{UserID: otherAlice.ID, ProjectID: web.ID})

	webGroups := []string{
		"keystone:project:acme/web", "keystone:project-id:" + web.ID,
		"keystone:role:acme/web/deployer", "keystone:role-id:" + web.ID + "/deployer",
	}
	ofWeb := func(p person) map[string][]string {
		return map[string][]string{
			ExtraUserID: {p.ID}, ExtraUserDomainID: {p.DomainID}, ExtraProjectID: {web.ID}, ExtraDomainID: {acme.ID}, ExtraRoles: {"deployer"},
		}
	}
	aliceWeb := &Identity{Username: "keystone:acme/alice", UID: alice.ID, Groups: webGroups, Extra: ofWeb(alice)}
	tests := map[string]struct {
		token string
		want  *Identity
	}{
		"password": {alice.token(t, project(web)), aliceWeb},
		"TOTP":     {must[string](t)(login(t, alice.byTOTP(t), project(web))), aliceWeb},
		"token":    {must[string](t)(login(t, byToken(alice.token(t, nil)), project(web))), aliceWeb},
		"application credential": {must[string](t)(login(t, alice.byCredential(t, alice.token(t, project(web)), nil), nil)), &Identity{
			Username: "keystone:acme/alice", UID: alice.ID, Groups: webGroups, Extra: ofWeb(alice),
		}},
		"domain": {alice.token(t, inDomain(acme)), &Identity{
			Username: "keystone:acme/alice", UID: alice.ID,
			Groups: []string{"keystone:domain-role:acme/deployer", "keystone:domain-role-id:" + acme.ID + "/deployer"},
			Extra:  map[string][]string{ExtraUserID: {alice.ID}, ExtraUserDomainID: {acme.ID}, ExtraDomainID: {acme.ID}, ExtraRoles: {"deployer"}},
		}},
		"a name like Kubernetes' own": {system.token(t, project(web)), &Identity{
			Username: "keystone:acme/system:masters%2Froot@example.com", UID: system.ID, Groups: webGroups, Extra: ofWeb(system),
		}},
		"odd names": {otherAlice.token(t, project(oddWeb)), &Identity{
			Username: "keystone:Ac%2Fme:%201%25%20%C3%A9/alice", UID: otherAlice.ID,
			Groups: []string{
				"keystone:project:Ac%2Fme:%201%25%20%C3%A9/web%2F..%2Fx", "keystone:project-id:" + oddWeb.ID,
				"keystone:role:Ac%2Fme:%201%25%20%C3%A9/web%2F..%2Fx/a%2Fb:c%20", "keystone:role-id:" + oddWeb.ID + "/a%2Fb:c%20",
			},
			Extra: map[string][]string{
				ExtraUserID: {otherAlice.ID}, ExtraUserDomainID: {odd.ID}, ExtraProjectID: {oddWeb.ID}, ExtraDomainID: {odd.ID}, ExtraRoles: {"a/b:c "},
			},
		}},
		"an equal name in another domain, on the same project": {otherAlice.token(t, project(web)), &Identity{
			Username: "keystone:Ac%2Fme:%201%25%20%C3%A9/alice", UID: otherAlice.ID, Groups: webGroups, Extra: ofWeb(otherAlice),
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := v.Validate(t.Context(), test.token)
			if err != nil {
				t.Fatal(err)
			}
			if left := time.Until(got.Expires); left <= 0 || left > 2*time.Hour {
				t.Errorf("expires in %s", left)
			}
			id := *got
			if name == "application credential" {
				if len(id.Extra[ExtraCredentialID]) != 1 {
					t.Errorf("extra %v does not tell of the application credential", id.Extra)
				}
			} else if _, there := id.Extra[ExtraCredentialID]; there {
				t.Errorf("extra %v tells of an application credential", id.Extra)
			}
			ignore := cmpopts.IgnoreMapEntries(func(k string, _ []string) bool { return k == ExtraCredentialID })
			if diff := cmp.Diff(test.want, &id, cmpopts.IgnoreFields(Identity{}, "Expires"), ignore); diff != "" {
				t.Errorf("want (-), got (+):\n%s", diff)
			}
		})
	}
}

// TestWithdrawn: what is taken away in Keystone counts at the next question, and
// before that for as long as answers are used again.
func TestWithdrawn(t *testing.T) {
	gate := newGate(t)
	service, _ := gate.service(t)
	asking := must[*Validator](t)(New(service, Options{Deadline: patience}))
	var time clock
	remembering := must[*Validator](t)(New(service, Options{Deadline: patience, Fresh: MaxCache, Now: time.now}))
	role := newRole(t, "withdrawn")
	tests := map[string]func(t *testing.T, d *domains.Domain, p *projects.Project, u person, token string) error{
		"token revoked": func(t *testing.T, _ *domains.Domain, _ *projects.Project, _ person, token string) error {
			return tokens.Revoke(t.Context(), admin, token).Err
		},
		"role removed": func(t *testing.T, _ *domains.Domain, p *projects.Project, u person, _ string) error {
			return roles.Unassign(t.Context(), admin, role.ID, roles.UnassignOpts{UserID: u.ID, ProjectID: p.ID}).ExtractErr()
		},
		"user disabled": func(t *testing.T, _ *domains.Domain, _ *projects.Project, u person, _ string) error {
			return users.Update(t.Context(), admin, u.ID, users.UpdateOpts{Enabled: ptr.To(false)}).Err
		},
		"user deleted": func(t *testing.T, _ *domains.Domain, _ *projects.Project, u person, _ string) error {
			return users.Delete(t.Context(), admin, u.ID).ExtractErr()
		},
		"project disabled": func(t *testing.T, _ *domains.Domain, p *projects.Project, _ person, _ string) error {
			return projects.Update(t.Context(), admin, p.ID, projects.UpdateOpts{Enabled: ptr.To(false)}).Err
		},
		"domain disabled": func(t *testing.T, d *domains.Domain, _ *projects.Project, _ person, _ string) error {
			return domains.Update(t.Context(), admin, d.ID, domains.UpdateOpts{Enabled: ptr.To(false)}).Err
		},
	}
	for name, withdraw := range tests {
		t.Run(name, func(t *testing.T) {
			domain := newDomain(t, unique("domain"))
			web := newProject(t, domain, "web")
			user := newPerson(t, domain, "user")
			assign(t, role, roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
			token := user.token(t, project(web))
			for _, v := range []*Validator{asking, remembering} {
				if _, err := v.Validate(t.Context(), token); err != nil {
					t.Fatalf("before: %v", err)
				}
			}
			ok(t, withdraw(t, domain, web, user, token))
			if _, err := asking.Validate(t.Context(), token); !errors.Is(err, errUnknown) {
				t.Errorf("after: %v", err)
			}
			time.advance(MaxCache + 1)
			if _, err := remembering.Validate(t.Context(), token); !errors.Is(err, errUnknown) {
				t.Errorf("%s after, with a memory: %v", MaxCache, err)
			}
		})
	}
}

// TestRefused: what is no token, and tokens that Keystone made for other purposes.
func TestRefused(t *testing.T) {
	gate := newGate(t)
	service, _ := gate.service(t)
	began := time.Now() // the clock stands: however long Keystone takes, it remembers
	v := must[*Validator](t)(New(service, Options{Deadline: patience, Now: func() time.Time { return began }}))
	domain := newDomain(t, unique("domain"))
	web := newProject(t, domain, "web")
	user := newPerson(t, domain, "user")
	role := newRole(t, unique("role"))
	assign(t, role, roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
	good := user.token(t, project(web))
	if _, err := v.Validate(t.Context(), good); err != nil {
		t.Fatal(err)
	}
	flip := func(s string, i int) string {
		c := byte('A')
		if s[i] == c {
			c = 'B'
		}
		return s[:i] + string(c) + s[i+1:]
	}
	other := newPerson(t, domain, "other")
	trusted := must[string](t)(login(t, other.byPassword(), object{"OS-TRUST:trust": object{"id": user.trust(t, good, other, web, role)}}))
	rules := object{"access_rules": []object{{"path": "/v2.1/servers", "method": "GET", "service": "compute"}}}
	tests := map[string]struct {
		token string
		// asked says whether it is Keystone that knows.
		asked bool
	}{
		"empty":                 {"", false},
		"huge":                  {strings.Repeat("g", 10<<20), false},
		"just too long":         {strings.Repeat("g", maxToken+1), false},
		"as long as may be":     {strings.Repeat("g", maxToken), true},
		"a header of one's own": {good + "\r\nX-Auth-Token: " + good, false},
		"space":                 {good + " ", false},
		"not ASCII":             {good + "é", false},
		"binary":                {"gAAAA\x00\xff", false},
		// {"alg":"RS256"} . {"iss":"https://kubernetes.default.svc"}
		"ServiceAccount": {"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJodHRwczovL2t1YmVybmV0ZXMuZGVmYXVsdC5zdmMifQ.c2ln", false},
		// {"alg":"ES256"} . {"sub":"x"}, as Keystone's own JWS provider makes them.
		"a JWT without issuer":         {"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", true},
		"garbage":                      {"garbage", true},
		"path":                         {"../../../etc/passwd", true},
		"another's signature":          {flip(good, len(good)-20), true},
		"another's time":               {flip(good, 8), true},
		"truncated":                    {good[:len(good)/2], true},
		"unscoped":                     {user.token(t, nil), true},
		"access rules of a credential": {must[string](t)(login(t, user.byCredential(t, good, rules), nil)), true},
		"the system's":                 {systemToken(t), true},
		"a trust's":                    {trusted, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			before := gate.questions.Load()
			id, err := v.Validate(t.Context(), test.token)
			refusal := new(Refusal)
			if !errors.As(err, &refusal) || id != nil {
				t.Fatalf("%+v, %v, want a refusal", id, err)
			}
			if len(test.token) > 8 && strings.Contains(err.Error(), test.token) {
				t.Errorf("the reason has the token in it: %v", err)
			}
			if asked := gate.questions.Load() > before; asked != test.asked {
				t.Errorf("Keystone was asked: %t, want %t", asked, test.asked)
			}
			// Once more: remembered.
			before = gate.questions.Load()
			if _, again := v.Validate(t.Context(), test.token); again == nil || again.Error() != err.Error() {
				t.Errorf("the second time: %v, the first time: %v", again, err)
			}
			if gate.questions.Load() > before {
				t.Error("Keystone was asked twice")
			}
		})
	}
	if gate.logins.Load() != 1 {
		t.Errorf("the service user logged in %d times, want once: a bad token is no reason to", gate.logins.Load())
	}
	if _, err := v.Validate(t.Context(), good); err != nil {
		t.Errorf("the good one: %v", err)
	}
}

// TestDelegated: whom another acts for is not who asks.
func TestDelegated(t *testing.T) {
	const user = `"user":{"id":"u","name":"ann","domain":{"id":"default","name":"Default"}},
		"project":{"id":"p","name":"web","domain":{"id":"default","name":"Default"}},"expires_at":"2030-01-01T00:00:00.000000Z"`
	for name, test := range map[string]struct {
		more string
		want error
	}{
		"nobody's":              {"", nil},
		"a trust's":             {`,"OS-TRUST:trust":{"id":"t","impersonation":true,"trustor_user":{"id":"u"},"trustee_user":{"id":"x"}}`, errDelegated},
		"one as oneself":        {`,"OS-TRUST:trust":{"id":"t","impersonation":false}`, errDelegated},
		"an OAuth1 consumer's":  {`,"OS-OAUTH1":{"consumer_id":"c","access_token_id":"a"}`, errDelegated},
		"a null, which is none": {`,"OS-TRUST:trust":null,"OS-OAUTH1":null`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var answer token
			ok(t, json.Unmarshal([]byte("{"+user+test.more+"}"), &answer))
			if _, err := Prefix(DefaultPrefix).identify(&answer); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
		})
	}
}

func systemToken(t *testing.T) string {
	t.Helper()
	return must[string](t)(login(t, object{"methods": []string{"password"}, "password": object{"user": object{
		"name": "admin", "domain": object{"id": "default"}, "password": server.AdminPassword(),
	}}}, object{"system": object{"all": true}}))
}

// TestServiceUser: what is wrong with our own access is no verdict on anybody's token.
func TestServiceUser(t *testing.T) {
	domain := newDomain(t, unique("domain"))
	web := newProject(t, domain, "web")
	user := newPerson(t, domain, "user")
	assign(t, newRole(t, unique("role")), roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
	token := user.token(t, project(web))

	t.Run("its token is revoked", func(t *testing.T) {
		gate := newGate(t)
		service, _ := gate.service(t)
		v := must[*Validator](t)(New(service, Options{Deadline: patience}))
		for range 2 {
			if _, err := v.Validate(t.Context(), token); err != nil {
				t.Fatal(err)
			}
		}
		if n := gate.logins.Load(); n != 1 {
			t.Fatalf("%d logins for two questions, want one", n)
		}
		ok(t, tokens.Revoke(t.Context(), admin, *gate.seen.Load()).Err)
		if _, err := v.Validate(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		if n := gate.logins.Load(); n != 2 {
			t.Errorf("%d logins, want another", n)
		}
	})
	t.Run("its token is renewed before it ends", func(t *testing.T) {
		gate := newGate(t)
		service, _ := gate.service(t)
		var clock clock
		service.now = clock.now
		v := must[*Validator](t)(New(service, Options{Deadline: patience}))
		for hours, want := range []int64{1, 2} {
			clock.advance(time.Duration(hours) * 55 * time.Minute)
			if _, err := v.Validate(t.Context(), token); err != nil {
				t.Fatal(err)
			}
			if n := gate.logins.Load(); n != want {
				t.Errorf("%d logins, want %d", n, want)
			}
		}
	})
	t.Run("it is refused, then has new credentials", func(t *testing.T) {
		gate := newGate(t)
		service, path := gate.service(t)
		v := must[*Validator](t)(New(service, Options{Deadline: patience}))
		good := must[[]byte](t)(os.ReadFile(path))
		bad := regexp.MustCompile(`password: .*`).ReplaceAll(good, []byte("password: wrong"))
		ok(t, os.WriteFile(path, bad, 0o600))
		for range 3 {
			if _, err := v.Validate(t.Context(), token); !errors.Is(err, ErrUnavailable) || errors.As(err, ptr.To(new(Refusal))) {
				t.Fatalf("with a wrong password: %v", err)
			}
		}
		if n := gate.logins.Load(); n > 2 {
			t.Errorf("%d logins with a wrong password at one time", n)
		}
		ok(t, os.WriteFile(path, good, 0o600))
		eventually(t, func() error {
			_, err := v.Validate(t.Context(), token)
			return err
		})
	})
	t.Run("it may not validate", func(t *testing.T) {
		gate := newGate(t)
		service, path := gate.service(t)
		v := must[*Validator](t)(New(service, Options{Deadline: patience}))
		if _, err := v.Validate(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		name := regexp.MustCompile(`username: (.*)`).FindSubmatch(must[[]byte](t)(os.ReadFile(path)))[1]
		pages, err := users.List(admin, users.ListOpts{Name: string(name)}).AllPages(t.Context())
		ok(t, err)
		found := must[[]users.User](t)(users.ExtractUsers(pages))
		assignments, err := roles.ListAssignments(admin, roles.ListAssignmentsOpts{UserID: found[0].ID}).AllPages(t.Context())
		ok(t, err)
		list := must[[]roles.RoleAssignment](t)(roles.ExtractRoleAssignments(assignments))
		if len(list) != 1 {
			t.Fatalf("the service user has %d roles, want one", len(list))
		}
		assign(t, newRole(t, unique("useless")), roles.AssignOpts{UserID: found[0].ID, ProjectID: list[0].Scope.Project.ID})
		ok(t, roles.Unassign(t.Context(), admin, list[0].Role.ID, roles.UnassignOpts{UserID: found[0].ID, ProjectID: list[0].Scope.Project.ID}).ExtractErr())
		v = must[*Validator](t)(New(service, Options{Deadline: patience})) // that knows nothing yet
		_, err = v.Validate(t.Context(), token)
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "role `service`") {
			t.Errorf("without the role: %v", err)
		}
	})
}

// patience with a busy machine, where a deadline is not what is tested.
const patience = 2 * time.Minute

func eventually(t *testing.T, check func() error) {
	t.Helper()
	deadline, ticker := time.After(patience), time.NewTicker(50*time.Millisecond)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatal(err)
		case <-ticker.C:
		}
	}
}

// TestFaults: Keystone that fails is neither a yes nor a no. Known tokens live on, for
// ten seconds.
func TestFaults(t *testing.T) {
	domain := newDomain(t, unique("domain"))
	web := newProject(t, domain, "web")
	user := newPerson(t, domain, "user")
	assign(t, newRole(t, unique("role")), roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
	known, unknown := user.token(t, project(web)), user.token(t, project(web))
	status := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
		}
	}
	faults := map[string]http.HandlerFunc{
		"error":           status(http.StatusInternalServerError, ""),
		"busy":            status(http.StatusTooManyRequests, ""),
		"maintenance":     status(http.StatusServiceUnavailable, "<html>"),
		"always 401":      status(http.StatusUnauthorized, ""),
		"empty":           status(http.StatusOK, ""),
		"not JSON":        status(http.StatusOK, "<html>"),
		"no token":        status(http.StatusOK, "{}"),
		"connection lost": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"hangs":           func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			gate := newGate(t)
			service, _ := gate.service(t)
			var clock clock
			v := must[*Validator](t)(New(service, Options{Now: clock.now}))
			// On a busy machine the first login may take longer than the deadline, which is as
			// short here as in real life.
			eventually(t, func() error {
				_, err := v.Validate(t.Context(), known)
				return err
			})
			gate.fault.Store(&fault)
			if _, err := v.Validate(t.Context(), known); err != nil {
				t.Errorf("a known token: %v", err)
			}
			if _, err := v.Validate(t.Context(), unknown); !errors.Is(err, ErrUnavailable) {
				t.Errorf("an unknown token: %v", err)
			}
			clock.advance(MaxCache)
			if _, err := v.Validate(t.Context(), known); !errors.Is(err, ErrUnavailable) {
				t.Errorf("a known token after %s: %v", MaxCache, err)
			}
			gate.fault.Store(nil)
			for name, token := range map[string]string{"known": known, "unknown": unknown} {
				eventually(t, func() error {
					if _, err := v.Validate(t.Context(), token); err != nil {
						return fmt.Errorf("the %s token, when Keystone works again: %w", name, err)
					}
					return nil
				})
			}
		})
	}
}

// TestRestart stops Keystone and starts it again, now with tokens of a short life. It
// comes last: the others need Keystone.
func TestRestart(t *testing.T) {
	service, _ := newGate(t).service(t)
	v := must[*Validator](t)(New(service, Options{Deadline: patience}))
	domain := newDomain(t, unique("domain"))
	web := newProject(t, domain, "web")
	user := newPerson(t, domain, "user")
	assign(t, newRole(t, unique("role")), roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
	known, unknown := user.token(t, project(web)), user.token(t, project(web))
	if _, err := v.Validate(t.Context(), known); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	if _, err := v.Validate(t.Context(), known); err != nil {
		t.Errorf("a known token while Keystone is down: %v", err)
	}
	if _, err := v.Validate(t.Context(), unknown); !errors.Is(err, ErrUnavailable) {
		t.Errorf("an unknown token while Keystone is down: %v", err)
	}
	fresh := must[*Validator](t)(New(service, Options{Deadline: patience}))
	if _, err := fresh.Validate(t.Context(), known); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a controller that starts while Keystone is down: %v", err)
	}
	ok(t, server.SetTokenLifetime(t.Context(), 4*time.Second))
	ok(t, server.Start(t.Context()))
	for _, v := range []*Validator{v, fresh} {
		for _, token := range []string{known, unknown} {
			if _, err := v.Validate(t.Context(), token); err != nil {
				t.Errorf("when Keystone is up again: %v", err)
			}
		}
	}
	remembering := must[*Validator](t)(New(service, Options{Deadline: patience, Fresh: MaxCache}))
	var short string
	var id *Identity
	eventually(t, func() (err error) { // on a busy machine a token may end before it is looked at
		short = user.token(t, project(web))
		id, err = remembering.Validate(t.Context(), short)
		return err
	})
	eventually(t, func() error {
		if _, err := remembering.Validate(t.Context(), short); err == nil {
			return errors.New("the token lives past its end")
		} else if !errors.Is(err, errExpired) {
			t.Fatalf("after its end: %v", err)
		}
		return nil
	})
	if time.Now().Before(id.Expires) {
		t.Error("the token ended before its time")
	}
	if _, err := v.Validate(t.Context(), short); !errors.Is(err, errUnknown) {
		t.Errorf("Keystone about a token that has expired: %v", err)
	}
}

// TestThousand reviews of one token at one time are one question.
func TestThousand(t *testing.T) {
	gate := newGate(t)
	service, _ := gate.service(t)
	v := must[*Validator](t)(New(service, Options{Deadline: patience, Fresh: MaxCache}))
	domain := newDomain(t, unique("domain"))
	web := newProject(t, domain, "web")
	user := newPerson(t, domain, "user")
	assign(t, newRole(t, unique("role")), roles.AssignOpts{UserID: user.ID, ProjectID: web.ID})
	token := user.token(t, project(web))
	errs := make([]error, 1000)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { _, errs[i] = v.Validate(t.Context(), token) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if n := gate.questions.Load(); n != 1 {
		t.Errorf("%d questions, want one", n)
	}
	if n := gate.logins.Load(); n != 1 {
		t.Errorf("%d logins, want one", n)
	}
}

func TestPrefix(t *testing.T) {
	tests := map[string]bool{
		"keystone:": true, "k2-east:": true,
		"": false, ":": false, "keystone": false, "system:": false, "system:keystone:": false, "Keystone:": false,
		"kubernetes:": false, "h8s:": false, "-x:": false, "a b:": false, "a/b:": false, "système:": false, "system:\n": false, "x:\n": false,
	}
	for prefix, want := range tests {
		t.Run(prefix, func(t *testing.T) {
			if _, err := ParsePrefix(prefix); (err == nil) != want {
				t.Errorf("%v, want acceptable: %t", err, want)
			}
		})
	}
}

// TestUnambiguous: no two things of Keystone's have one name, whatever they are called.
func TestUnambiguous(t *testing.T) {
	names := []string{"a", "b", "a/b", "a%2Fb", "%", "%25", "/", "//", ".", "..", " ", "a b", "a+b", "project:a", ":", "é", "e\u0301", "system:masters", "a/b/c"}
	usernames, groups := map[string][]string{}, map[string][]string{}
	note := func(in map[string][]string, name string, parts ...string) {
		t.Helper()
		if had, there := in[name]; there && !slices.Equal(had, parts) {
			t.Errorf("%q is both %q and %q", name, had, parts)
		}
		if !strings.HasPrefix(name, DefaultPrefix) {
			t.Errorf("%q does not begin with the prefix", name)
		}
		in[name] = parts
	}
	for _, domain := range names {
		for _, name := range names {
			for _, role := range names {
				d := named{"d-" + domain, domain}
				base := token{User: owned{named{"u", name}, d}, Roles: []named{{"r", role}}, ExpiresAt: time.Now()}
				inProject, inDomain := base, base
				inProject.Project = &owned{named{"p-" + name, name}, d}
				inDomain.Domain = &d
				p := must[*Identity](t)(Prefix(DefaultPrefix).identify(&inProject))
				q := must[*Identity](t)(Prefix(DefaultPrefix).identify(&inDomain))
				note(usernames, p.Username, domain, name)
				for i, parts := range [][]string{{"project", domain, name}, {"project-id", name}, {"role", domain, name, role}, {"role-id", name, role}} {
					note(groups, p.Groups[i], parts...)
				}
				for i, parts := range [][]string{{"domain-role", domain, role}, {"domain-role-id", domain, role}} {
					note(groups, q.Groups[i], parts...)
				}
			}
		}
	}
	if want := len(names) * len(names); len(usernames) != want {
		t.Errorf("%d user names of %d users", len(usernames), want)
	}
}
