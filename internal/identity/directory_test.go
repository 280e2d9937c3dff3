package identity

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/groups"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/osinherit"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	"github.com/gophercloud/gophercloud/v2/pagination"
	"k8s.io/utils/ptr"
)

// newDirectory asks as a user who may read, by way of the gate.
func (g *gate) newDirectory(t *testing.T) *Directory {
	t.Helper()
	service, _ := g.serviceOf(t, must[[]byte](t)(server.EnsureReader(t.Context(), unique("reader"), "h8s")))
	return NewDirectory(service, DefaultPrefix)
}

func newTaggedProject(t *testing.T, domain *domains.Domain, name string, tags ...string) *projects.Project {
	t.Helper()
	return must[*projects.Project](t)(projects.Create(t.Context(), admin, projects.CreateOpts{Name: name, DomainID: domain.ID, Tags: tags}).Extract())
}

func TestTagged(t *testing.T) {
	d := newGate(t).newDirectory(t)
	acme, odd := newDomain(t, unique("acme")), newDomain(t, unique("Ac/me: 1% é"))
	tag := unique("tag")
	web := newTaggedProject(t, acme, "web", "other", tag)
	oddWeb := newTaggedProject(t, odd, "web/../x", tag)
	disabled := newTaggedProject(t, acme, "disabled", tag)
	newTaggedProject(t, acme, "another", "other", tag+"-not")
	_, err := projects.Update(t.Context(), admin, disabled.ID, projects.UpdateOpts{Enabled: ptr.To(false)}).Extract()
	ok(t, err)
	want := func(change func(map[string]Project)) {
		t.Helper()
		wanted := map[string]Project{
			web.ID:      {web.ID, "web", acme.Name, true, []string{"other", tag}},
			oddWeb.ID:   {oddWeb.ID, "web/../x", odd.Name, true, []string{tag}},
			disabled.ID: {disabled.ID, "disabled", acme.Name, false, []string{tag}},
		}
		change(wanted)
		got := map[string]Project{}
		for _, p := range must[[]Project](t)(d.Tagged(t.Context(), tag)) {
			slices.Sort(p.Tags)
			got[p.ID] = p
			one := must[*Project](t)(d.Project(t.Context(), p.ID))
			slices.Sort(one.Tags)
			if diff := cmp.Diff(p, *one); diff != "" {
				t.Errorf("asked for by its id, and in the list:\n%s", diff)
			}
		}
		if diff := cmp.Diff(wanted, got); diff != "" {
			t.Error(diff)
		}
	}
	want(func(map[string]Project) {})
	// A project is as disabled as its domain.
	_, err = domains.Update(t.Context(), admin, odd.ID, domains.UpdateOpts{Enabled: ptr.To(false)}).Extract()
	ok(t, err)
	want(func(all map[string]Project) {
		p := all[oddWeb.ID]
		p.Enabled = false
		all[oddWeb.ID] = p
	})
	ok(t, projects.Delete(t.Context(), admin, disabled.ID).ExtractErr())
	if _, err := d.Project(t.Context(), disabled.ID); !errors.Is(err, ErrNoProject) {
		t.Errorf("deleted: %v, want %v", err, ErrNoProject)
	}
}

// TestAssignments: the names are those that the users' tokens have, whatever way the
// role has come to them.
func TestAssignments(t *testing.T) {
	gate := newGate(t)
	d := gate.newDirectory(t)
	service, _ := gate.service(t)
	v := must[*Validator](t)(New(service, Options{Deadline: patience}))
	acme, odd := newDomain(t, unique("acme")), newDomain(t, unique("Ac/me: 1% é"))
	web, elsewhere := newProject(t, acme, "web"), newProject(t, odd, "elsewhere")
	deployer, oddRole, implied := newRole(t, unique("deployer")), newRole(t, unique("a/b:c ")), newRole(t, unique("implied"))
	_, err := roles.CreateRoleInferenceRule(t.Context(), admin, oddRole.ID, implied.ID).Extract()
	ok(t, err)
	// What its owner calls deployer, too, and is the domain's own.
	domainRole := must[*roles.Role](t)(roles.Create(t.Context(), admin, roles.CreateOpts{Name: deployer.Name, DomainID: acme.ID}).Extract())

	people := map[string]person{
		"directly": newPerson(t, acme, "alice"), "of the other domain": newPerson(t, odd, "alice"), "by a group": newPerson(t, acme, "a/b c%ü"),
		"inherited": newPerson(t, odd, "system:masters"), "implied": newPerson(t, acme, "bob"), "deleted": newPerson(t, acme, "carol"),
		"disabled": newPerson(t, acme, "dave"), "only elsewhere": newPerson(t, acme, "eve"), "a role of the domain": newPerson(t, acme, "mallory"),
	}
	for _, p := range people {
		assign(t, deployer, roles.AssignOpts{UserID: p.ID, ProjectID: elsewhere.ID})
	}
	group := must[*groups.Group](t)(groups.Create(t.Context(), admin, groups.CreateOpts{Name: unique("group"), DomainID: acme.ID}).Extract())
	ok(t, users.AddToGroup(t.Context(), admin, group.ID, people["by a group"].ID).ExtractErr())
	assign(t, deployer, roles.AssignOpts{GroupID: group.ID, ProjectID: web.ID})
	ok(t, osinherit.Assign(t.Context(), admin, deployer.ID, osinherit.AssignOpts{UserID: people["inherited"].ID, DomainID: acme.ID}).ExtractErr())
	assign(t, oddRole, roles.AssignOpts{UserID: people["implied"].ID, ProjectID: web.ID})
	assign(t, domainRole, roles.AssignOpts{UserID: people["a role of the domain"].ID, ProjectID: web.ID})
	for _, how := range []string{"directly", "of the other domain", "deleted", "disabled"} {
		assign(t, deployer, roles.AssignOpts{UserID: people[how].ID, ProjectID: web.ID})
	}
	ok(t, users.Delete(t.Context(), admin, people["deleted"].ID).ExtractErr())
	_, err = users.Update(t.Context(), admin, people["disabled"].ID, users.UpdateOpts{Enabled: ptr.To(false)}).Extract()
	ok(t, err)

	got := must[[]Assignment](t)(d.Assignments(t.Context(), web.ID))
	left := map[Assignment]bool{}
	for _, a := range got {
		left[a] = true
	}
	for how, wanted := range map[string][]*roles.Role{
		"directly": {deployer}, "of the other domain": {deployer}, "by a group": {deployer}, "inherited": {deployer}, "implied": {oddRole, implied},
	} {
		// Scoped to another project: a member by name is one everywhere.
		name := must[*Identity](t)(v.Validate(t.Context(), people[how].token(t, project(elsewhere)))).Username
		inWeb := must[*Identity](t)(v.Validate(t.Context(), people[how].token(t, project(web))))
		for _, role := range wanted {
			a := Assignment{User: name, Group: "keystone:role-id:" + web.ID + "/" + strings.NewReplacer("/", "%2F", " ", "%20").Replace(role.Name), Role: role.Name}
			if !left[a] {
				t.Errorf("%s: no %+v in %+v", how, a, got)
			}
			if !slices.Contains(inWeb.Groups, a.Group) {
				t.Errorf("%s: her token has the groups %v, and not %s", how, inWeb.Groups, a.Group)
			}
			delete(left, a)
		}
	}
	// Who is disabled gets no token; the role is there nevertheless.
	delete(left, Assignment{"keystone:" + acme.Name + "/dave", "keystone:role-id:" + web.ID + "/" + deployer.Name, deployer.Name})
	if len(left) > 0 {
		t.Errorf("too many: %v", left)
	}
}

// TestDirectoryFaults: that something is gone must have been said by Keystone.
func TestDirectoryFaults(t *testing.T) {
	acme := newDomain(t, unique("acme"))
	tag := unique("tag")
	web := newTaggedProject(t, acme, "web", tag)
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}
	}
	gate := newGate(t)
	d := gate.newDirectory(t)
	if found := must[[]Project](t)(d.Tagged(t.Context(), tag)); len(found) != 1 {
		t.Fatalf("%v, want one project", found)
	}
	for name, test := range map[string]struct {
		fault http.HandlerFunc
		want  string
	}{
		"a proxy's 404":         {answer(http.StatusNotFound, "<html>not found</html>"), ""},
		"a gateway's 404":       {answer(http.StatusNotFound, `{"message": "no route"}`), ""},
		"another error as 404":  {answer(http.StatusNotFound, `{"error": {"code": 503}}`), ""},
		"500":                   {answer(http.StatusInternalServerError, `{"error": {"code": 500}}`), "500"},
		"403":                   {answer(http.StatusForbidden, `{"error": {"code": 403}}`), "system_scope: all"},
		"a list that is cut":    {answer(http.StatusOK, `{"projects": [], "role_assignments": [], "truncated": true, "links": {}}`), ""},
		"nothing":               {answer(http.StatusOK, `{}`), ""},
		"lists of nothing":      {answer(http.StatusOK, `{"projects": null, "role_assignments": null, "project": null}`), ""},
		"no connection":         {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ""},
		"an answer that breaks": {answer(http.StatusOK, `{"projects": [`), ""},
	} {
		t.Run(name, func(t *testing.T) {
			gate.fault.Store(&test.fault)
			defer gate.fault.Store(nil)
			_, listErr := d.Tagged(t.Context(), tag)
			_, oneErr := d.Project(t.Context(), web.ID)
			_, rolesErr := d.Assignments(t.Context(), web.ID)
			for what, err := range map[string]error{"list": listErr, "one": oneErr, "roles": rolesErr} {
				if err == nil || errors.Is(err, ErrNoProject) || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: %v, want an error with %q", what, err, test.want)
				}
			}
		})
	}
}

// TestDirectoryOfOneDomain: who may read a part only does not take the rest for gone.
func TestDirectoryOfOneDomain(t *testing.T) {
	acme, globex := newDomain(t, unique("acme")), newDomain(t, unique("globex"))
	tag := unique("tag")
	newTaggedProject(t, acme, "web", tag)
	hidden := newTaggedProject(t, globex, "web", tag)
	p := newPerson(t, acme, "reader")
	pages := must[pagination.Page](t)(roles.List(admin, roles.ListOpts{Name: "reader"}).AllPages(t.Context()))
	found := must[[]roles.Role](t)(roles.ExtractRoles(pages))
	assign(t, &found[0], roles.AssignOpts{UserID: p.ID, DomainID: acme.ID})
	config := fmt.Appendf(nil, "clouds:\n  h8s:\n    auth: {auth_url: %s, username: %s, user_domain_id: %s, password: %q, domain_id: %s}\n", server.URL(), p.Name, acme.ID, password, acme.ID)
	service, _ := newGate(t).serviceOf(t, config)
	d := NewDirectory(service, DefaultPrefix)
	if seen := must[[]Project](t)(d.Tagged(t.Context(), tag)); len(seen) != 1 || seen[0].Domain != acme.Name {
		t.Errorf("sees %v, want the project of the domain", seen)
	}
	for name, id := range map[string]string{"of another domain": hidden.ID, "that nobody has": strings.Repeat("0", 32)} {
		if _, err := d.Project(t.Context(), id); err == nil || errors.Is(err, ErrNoProject) {
			t.Errorf("a project %s: %v, want an error that does not say it is gone", name, err)
		}
	}
}
