package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	keystoneprojects "github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/projects"
)

// syncLab is a synchronization with a real Keystone and the real API server, with the
// rights that Keystone gives to a reader and the chart to the controller. Tests say when
// there is a round.
type syncLab struct {
	*keystoneLab
	t        *testing.T
	sync     *projectSync
	events   *events.FakeRecorder
	roles    map[string]string // ids by name
	readerID string
}

func newSyncLab(t *testing.T) *syncLab {
	t.Helper()
	lab := &syncLab{t: t, roles: map[string]string{}, events: events.NewFakeRecorder(1000)}
	lab.keystoneLab = newKeystoneLab(t)
	clouds, err := lab.server.EnsureReader(t.Context(), "h8s-sync", "h8s-sync")
	lab.ok(err)
	path := filepath.Join(t.TempDir(), "clouds.yaml")
	lab.ok(os.WriteFile(path, clouds, 0o600))
	service, err := identity.NewService(path, "h8s-sync")
	lab.ok(err)
	config, err := projects.ParseConfig([]byte(`{"tag": "h8s", "cloud": "h8s-sync", "interval": "1s", "roles": {"admin": "admin", "member": "edit", "reader": "view"},
		"tenant": {"network": {"cidrs": ["10.0.0.0/16"]}, "quota": {"namespaces": 3}}}`))
	lab.ok(err)
	c := impersonate(t, rest.ImpersonationConfig{UserName: controllerUser, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + release, "system:authenticated"}, Extra: map[string][]string{extraPodName: {"h8s-controller"}}})
	lab.sync = &projectSync{
		objects: objects{Client: c, live: c}, events: lab.events,
		ProjectOptions: ProjectOptions{Config: *config, Directory: identity.NewDirectory(service, identity.DefaultPrefix)},
	}
	for _, name := range []string{"admin", "member", "reader"} {
		pages, err := roles.List(lab.admin, roles.ListOpts{Name: name}).AllPages(t.Context())
		lab.ok(err)
		found, err := roles.ExtractRoles(pages)
		lab.ok(err)
		lab.roles[name] = found[0].ID
	}
	pages, err := users.List(lab.admin, users.ListOpts{Name: "h8s-sync"}).AllPages(t.Context())
	lab.ok(err)
	found, err := users.ExtractUsers(pages)
	lab.ok(err)
	lab.readerID = found[0].ID
	t.Cleanup(func() {
		var all v1alpha1.TenantList
		err := cluster.admin.List(context.Background(), &all, client.HasLabels{v1alpha1.LabelProject})
		for i := range all.Items {
			err = errors.Join(err, client.IgnoreNotFound(cluster.admin.Delete(context.Background(), &all.Items[i])))
		}
		if err != nil {
			t.Errorf("delete the Tenants: %v", err)
		}
	})
	return lab
}

func (l *syncLab) ok(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *syncLab) newProject(domain *domains.Domain, name string, tags ...string) *keystoneprojects.Project {
	l.t.Helper()
	p, err := keystoneprojects.Create(l.t.Context(), l.admin, keystoneprojects.CreateOpts{Name: name, DomainID: domain.ID, Tags: tags}).Extract()
	l.ok(err)
	return p
}

func (l *syncLab) change(p *keystoneprojects.Project, opts keystoneprojects.UpdateOpts) {
	l.t.Helper()
	_, err := keystoneprojects.Update(l.t.Context(), l.admin, p.ID, opts).Extract()
	l.ok(err)
}

func (l *syncLab) assign(user *users.User, role string, p *keystoneprojects.Project) {
	l.t.Helper()
	l.ok(roles.Assign(l.t.Context(), l.admin, l.roles[role], roles.AssignOpts{UserID: user.ID, ProjectID: p.ID}).ExtractErr())
}

func (l *syncLab) unassign(user *users.User, role string, p *keystoneprojects.Project) {
	l.t.Helper()
	l.ok(roles.Unassign(l.t.Context(), l.admin, l.roles[role], roles.UnassignOpts{UserID: user.ID, ProjectID: p.ID}).ExtractErr())
}

func (l *syncLab) round() {
	l.t.Helper()
	l.ok(l.sync.round(l.t.Context()))
}

// tenant is the project's, of which there must be one.
func (l *syncLab) tenant(p *keystoneprojects.Project) *v1alpha1.Tenant {
	l.t.Helper()
	var all v1alpha1.TenantList
	l.ok(cluster.admin.List(l.t.Context(), &all, client.MatchingLabels{v1alpha1.LabelProject: p.ID}))
	if len(all.Items) != 1 {
		l.t.Fatalf("the project %s has %d Tenants, want one", p.Name, len(all.Items))
	}
	return &all.Items[0]
}

// want is the state of the project's Tenant after another round.
func (l *syncLab) want(p *keystoneprojects.Project, what string, suspended bool, because string, members ...v1alpha1.Member) {
	l.t.Helper()
	l.round()
	l.is(p, what, suspended, because, members...)
}

func (l *syncLab) is(p *keystoneprojects.Project, what string, suspended bool, because string, members ...v1alpha1.Member) {
	l.t.Helper()
	spec := l.tenant(p).Spec
	slices.SortFunc(spec.Members, func(a, b v1alpha1.Member) int { return strings.Compare(a.Name, b.Name) })
	if diff := cmp.Diff(members, spec.Members); diff != "" {
		l.t.Errorf("%s: members:\n%s", what, diff)
	}
	if spec.Suspended != suspended || spec.SuspendedBecause != because {
		l.t.Errorf("%s: suspended %t, because %q; want %t, %q", what, spec.Suspended, spec.SuspendedBecause, suspended, because)
	}
}

// operator changes the Tenant as `kubectl patch` does.
func (l *syncLab) operator(t *v1alpha1.Tenant, patch string) {
	l.t.Helper()
	l.ok(cluster.admin.Patch(l.t.Context(), t, client.RawPatch("application/merge-patch+json", []byte(patch)), client.FieldOwner("kubectl-patch")))
}

func (l *syncLab) wantEvent(want string) {
	l.t.Helper()
	var seen []string
	for {
		select {
		case e := <-l.events.Events:
			if strings.Contains(e, want) {
				return
			}
			seen = append(seen, e)
		default:
			l.t.Errorf("no event with %q in %q", want, seen)
			return
		}
	}
}

// TestProjects follows projects of a real Keystone through what may happen to them.
func TestProjects(t *testing.T) {
	lab := newSyncLab(t)
	user := func(name string, role v1alpha1.Role) v1alpha1.Member { return member("User", "keystone:"+name, role) }
	acme, globex := lab.domains[0], lab.domains[1]
	untagged := lab.newProject(acme, "untagged", "h8s-not")
	web, otherWeb := lab.newProject(acme, "web", "h8s"), lab.newProject(globex, "web", "h8s", "other")
	lab.assign(lab.alice, "admin", web)
	lab.assign(lab.other, "reader", web)
	lab.want(web, "new", false, "", user("acme/alice", "admin"), user("globex/alice", "view"))
	lab.is(otherWeb, "of the same name, in another domain", false, "")
	if a, b := lab.tenant(web).Name, lab.tenant(otherWeb).Name; a == b || a != "web" && b != "web" {
		t.Errorf("two projects called web have the Tenants %s and %s", a, b)
	}
	var all v1alpha1.TenantList
	lab.ok(cluster.admin.List(t.Context(), &all, client.MatchingLabels{v1alpha1.LabelProject: untagged.ID}))
	if len(all.Items) > 0 {
		t.Errorf("a project without the tag has a Tenant")
	}
	// It is hers for real, when she is logged in elsewhere, too.
	name := lab.tenant(web).Name
	eventually(t, func() error { return tenantReady(t.Context(), name) })
	alice, _ := lab.as(t, lab.alice, lab.project.ID)
	newNamespace(t, alice, namespaceOf("keystone-web", "", nil))

	t.Run("names", func(t *testing.T) {
		lab.t = t
		// The name of one is an operator's Tenant's, that of another a Network's.
		own := func(name string) {
			operators := tenantOf(name, "")
			operators.Spec.Network = v1alpha1.TenantNetwork{Name: "taken-by-network"}
			lab.ok(cluster.admin.Create(t.Context(), operators))
			t.Cleanup(func() {
				if err := cluster.admin.Delete(context.Background(), operators); err != nil {
					t.Errorf("delete the Tenant: %v", err)
				}
			})
		}
		own("taken")
		lab.ok(cluster.admin.Create(t.Context(), networkOf("taken-by-network", "taken", "10.84.0.0/16")))
		taken, takenByNetwork := lab.newProject(acme, "taken", "h8s"), lab.newProject(acme, "taken-by-network", "h8s")
		odd := lab.newProject(acme, "Ünï/code & Co.", "h8s")
		oddUser, err := users.Create(t.Context(), lab.admin, users.CreateOpts{Name: "a/b c%ü", DomainID: acme.ID, Password: keystonePassword}).Extract()
		lab.ok(err)
		lab.assign(oddUser, "member", odd)
		lab.want(odd, "of an odd name", false, "", user("acme/a%2Fb%20c%25%C3%BC", "edit"))
		lab.wantEvent("the name taken of the project is taken")
		if title := lab.tenant(odd).Annotations[v1alpha1.AnnotationProject]; title != "acme/%C3%9Cn%C3%AF%2Fcode%20&%20Co." {
			t.Errorf("the Tenant says its project is %s", title)
		}
		var theirs v1alpha1.Tenant
		lab.ok(cluster.admin.Get(t.Context(), client.ObjectKey{Name: "taken"}, &theirs))
		if _, ours := theirs.Labels[v1alpha1.LabelProject]; ours || len(theirs.Spec.Members) > 0 {
			t.Errorf("the operator's Tenant was taken over: %+v", theirs)
		}
		for p, want := range map[*keystoneprojects.Project]string{taken: "taken-", takenByNetwork: "taken-by-network-", odd: "n-code-co-"} {
			tenant := lab.tenant(p)
			if !strings.HasPrefix(tenant.Name, want) || tenant.Name == "taken-by-network" || len(tenant.Name) > 40 {
				t.Errorf("the Tenant of %s is called %s, want %s", p.Name, tenant.Name, want)
			}
			// Each costs every later round some questions.
			lab.ok(keystoneprojects.Delete(t.Context(), lab.admin, p.ID).ExtractErr())
			lab.ok(cluster.admin.Delete(t.Context(), tenant))
		}
		hopeless := lab.newProject(acme, "No Name", "h8s")
		own(projects.Names(&identity.Project{ID: hopeless.ID, Name: hopeless.Name})[0])
		if err := lab.sync.round(t.Context()); err == nil || !strings.Contains(err.Error(), "left alone: to give a Tenant of such a name to the project, label it") {
			t.Errorf("a project whose names are taken: %v", err)
		}
		lab.ok(keystoneprojects.Delete(t.Context(), lab.admin, hopeless.ID).ExtractErr())
	})
	t.Run("roles", func(t *testing.T) {
		lab.t = t
		lab.unassign(lab.alice, "admin", web)
		lab.want(web, "a role is removed", false, "", user("globex/alice", "view"))
		lab.assign(lab.other, "member", web)
		lab.want(web, "a role is added", false, "", user("globex/alice", "edit"))
		lab.assign(lab.alice, "reader", web)
		lab.want(web, "somebody is added", false, "", user("acme/alice", "view"), user("globex/alice", "edit"))
	})
	t.Run("an operator's fields", func(t *testing.T) {
		lab.t = t
		tenant := lab.tenant(web)
		lab.operator(tenant, `{"spec": {"quota": {"namespaces": 7}}}`)
		// To one member that is ours the operator gives another role, and adds one.
		lab.operator(tenant, `{"spec": {"members": [{"kind": "User", "name": "keystone:acme/alice", "role": "owner"}, {"kind": "User", "name": "keystone:globex/alice", "role": "edit"}, {"kind": "User", "name": "ops", "role": "admin"}]}}`)
		lab.want(web, "changed by an operator", false, "", user("acme/alice", "owner"), user("globex/alice", "edit"), member("User", "ops", "admin"))
		lab.sync.settled = nil
		lab.want(web, "once more", false, "", user("acme/alice", "owner"), user("globex/alice", "edit"), member("User", "ops", "admin"))
		// A role that an operator has changed is Keystone's to take away nevertheless.
		lab.unassign(lab.alice, "reader", web)
		lab.unassign(lab.other, "member", web)
		lab.want(web, "roles removed", false, "", user("globex/alice", "view"), member("User", "ops", "admin"))
		if quota := lab.tenant(web).Spec.Quota.Namespaces; ptr.Deref(quota, 0) != 7 {
			t.Errorf("quota %v", quota)
		}
		lab.operator(lab.tenant(web), `{"spec": {"members": []}}`)
		lab.want(web, "members taken out by an operator", false, "", user("globex/alice", "view"))
	})
	t.Run("gone and back", func(t *testing.T) {
		lab.t = t
		bystander := lab.tenant(otherWeb).Generation
		members := []v1alpha1.Member{user("globex/alice", "view")}
		untaggedBecause := "its project has no tag h8s in Keystone any more"
		otherAlice, _ := lab.as(t, lab.other, lab.other.DefaultProjectID)
		access := func(want bool) {
			t.Helper()
			eventually(t, func() error {
				if err := otherAlice.List(t.Context(), &corev1.PodList{}, client.InNamespace("keystone-web")); (err == nil) != want || err != nil && !apierrors.IsForbidden(err) {
					return fmt.Errorf("she lists pods: %w, want access: %t", err, want)
				}
				return nil
			})
		}
		access(true)
		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(false)})
		lab.want(web, "disabled", true, projects.Disabled, members...)
		lab.wantEvent("Suspended its project, or the project's domain, is disabled")
		access(false)
		eventually(t, func() error {
			c := apimeta.FindStatusCondition(lab.tenant(web).Status.Conditions, v1alpha1.ConditionSuspended)
			if c == nil || c.Status != metav1.ConditionTrue || !strings.Contains(c.Message, projects.Disabled) {
				return fmt.Errorf("the condition does not say so: %+v", c)
			}
			return nil
		})
		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(true)})
		lab.want(web, "enabled", false, "", members...)
		lab.wantEvent("Resumed")
		access(true)
		lab.change(web, keystoneprojects.UpdateOpts{Tags: &[]string{"other"}})
		lab.want(web, "the tag is taken off", true, untaggedBecause, members...)
		// Nobody gets in because an operator means well; for that the label has to go.
		lab.operator(lab.tenant(web), `{"spec": {"suspended": false}}`)
		lab.want(web, "unsuspended by an operator", true, untaggedBecause, members...)
		lab.change(web, keystoneprojects.UpdateOpts{Tags: &[]string{"h8s"}})
		lab.want(web, "the tag is there again", false, "", members...)

		_, err := domains.Update(t.Context(), lab.admin, acme.ID, domains.UpdateOpts{Enabled: ptr.To(false)}).Extract()
		lab.ok(err)
		lab.want(web, "its domain is disabled", true, projects.Disabled, members...)
		_, err = domains.Update(t.Context(), lab.admin, acme.ID, domains.UpdateOpts{Enabled: ptr.To(true)}).Extract()
		lab.ok(err)
		lab.want(web, "its domain is enabled", false, "", members...)
		if after := lab.tenant(otherWeb).Generation; after != bystander {
			t.Errorf("the Tenant of a project that nothing happened to was changed: generation %d, then %d", bystander, after)
		}
	})
	t.Run("suspended by an operator", func(t *testing.T) {
		lab.t = t
		members := []v1alpha1.Member{user("globex/alice", "view")}
		lab.operator(lab.tenant(web), `{"spec": {"suspended": true, "suspendedBecause": "unpaid"}}`)
		lab.want(web, "suspended by an operator", true, "unpaid", members...)
		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(false)})
		lab.want(web, "and disabled", true, "unpaid", members...)
		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(true)})
		lab.want(web, "and enabled", true, "unpaid", members...)
		lab.operator(lab.tenant(web), `{"spec": {"suspended": null, "suspendedBecause": null}}`)
		lab.want(web, "and paid", false, "", members...)

		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(false)})
		lab.want(web, "disabled first", true, projects.Disabled, members...)
		lab.operator(lab.tenant(web), `{"spec": {"suspended": true, "suspendedBecause": "unpaid"}}`)
		lab.want(web, "then suspended by an operator", true, "unpaid", members...)
		lab.change(web, keystoneprojects.UpdateOpts{Enabled: ptr.To(true)})
		lab.want(web, "and enabled", true, "unpaid", members...)
		lab.operator(lab.tenant(web), `{"spec": {"suspended": null, "suspendedBecause": null}}`)
		lab.want(web, "and paid", false, "", members...)
	})
	t.Run("an operator's Tenant is given to a project", func(t *testing.T) {
		lab.t = t
		newTenant(t, tenantOf("given", "10.85.0.0/16", member("User", "ops", "admin")))
		given := lab.newProject(globex, "whatever", "h8s")
		lab.assign(lab.alice, "member", given)
		lab.operator(&v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: "given"}}, `{"metadata": {"labels": {"`+v1alpha1.LabelProject+`": "`+given.ID+`"}}}`)
		lab.want(given, "given", false, "", user("acme/alice", "edit"), member("User", "ops", "admin"))
		lab.ok(keystoneprojects.Delete(t.Context(), lab.admin, given.ID).ExtractErr())
		lab.want(given, "deleted", true, projects.Deleted, member("User", "ops", "admin"))
	})
	t.Run("Keystone says nothing", func(t *testing.T) {
		lab.t = t
		members := []v1alpha1.Member{user("globex/alice", "view")}
		silent := func(what, want string) {
			t.Helper()
			if err := lab.sync.round(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want an error with %q", what, err, want)
			}
			lab.is(web, what, false, "", members...)
		}
		// The service user may read no more: in mid-session, and when it logs in.
		lab.ok(roles.Unassign(t.Context(), lab.admin, lab.roles["reader"], roles.UnassignOpts{UserID: lab.readerID, System: true}).ExtractErr())
		silent("without its role", "")
		lab.ok(roles.Assign(t.Context(), lab.admin, lab.roles["reader"], roles.AssignOpts{UserID: lab.readerID, System: true}).ExtractErr())
		eventually(t, func() error { return lab.sync.round(t.Context()) })

		sighted := lab.sync.Directory
		defer func() { lab.sync.Directory = sighted }()
		lab.sync.Directory = blind{sighted, errors.New("forbidden")}
		silent("what may not be read", "forbidden")
		lab.sync.Directory = blind{sighted, nil}
		lab.round()
		lab.is(web, "a list that has lost sight of all", false, "", members...)
		lab.sync.Directory = blind{sighted, identity.ErrNoProject}
		silent("another Keystone, which knows none of the projects", "knows none of the projects of")
		lab.sync.Directory = sighted

		lab.server.Stop()
		silent("down", "connection refused")
		lab.ok(lab.server.Start(t.Context()))
		eventually(t, func() error { return lab.sync.round(t.Context()) })
		lab.is(web, "up again", false, "", members...)
	})
	t.Run("deleted", func(t *testing.T) {
		lab.t = t
		lab.ok(keystoneprojects.Delete(t.Context(), lab.admin, web.ID).ExtractErr())
		lab.want(web, "deleted", true, projects.Deleted)
		before := lab.tenant(web)
		lab.sync.settled = nil // as after a restart
		lab.want(web, "still deleted", true, projects.Deleted)
		if after := lab.tenant(web); after.Generation != before.Generation {
			t.Errorf("written again without need: %s", cmp.Diff(before.Spec, after.Spec))
		}
		// And while nothing changes, not even asked about.
		lab.sync.live = unasked{}
		lab.round()
		// The workloads are where they were.
		var ns unstructured.Unstructured
		ns.SetAPIVersion("v1")
		ns.SetKind("Namespace")
		lab.ok(cluster.admin.Get(t.Context(), client.ObjectKey{Name: "keystone-web"}, &ns))
		if ns.GetDeletionTimestamp() != nil {
			t.Error("its namespace is being deleted")
		}
	})
}

// toldDirectory is a Keystone of one project, and of what is said about it.
type toldDirectory struct {
	project     identity.Project
	assignments []identity.Assignment
	err         error // about the assignments
}

func (d *toldDirectory) Tagged(_ context.Context, tag string) ([]identity.Project, error) {
	if !d.project.Tagged(tag) {
		return nil, nil
	}
	return []identity.Project{d.project}, nil
}

func (d *toldDirectory) Project(_ context.Context, id string) (*identity.Project, error) {
	if id != d.project.ID {
		return nil, identity.ErrNoProject
	}
	return &d.project, nil
}

func (d *toldDirectory) Assignments(context.Context, string) ([]identity.Assignment, error) {
	return d.assignments, d.err
}

// newToldSync follows the project of that name, of which the user is an admin.
func newToldSync(t *testing.T, name, user string) (*projectSync, *toldDirectory) {
	t.Helper()
	told := &toldDirectory{
		project:     identity.Project{ID: "id-" + name, Name: name, Domain: "acme", Enabled: true, Tags: []string{"h8s"}},
		assignments: []identity.Assignment{{User: user, Group: "keystone:role-id:id-" + name + "/admin", Role: "admin"}},
	}
	config, err := projects.ParseConfig([]byte(`{"tag": "h8s", "cloud": "h8s-sync", "interval": "1s", "roles": {"admin": "admin"}, "tenant": {"network": {"cidrs": ["10.0.0.0/16"]}}}`))
	if err != nil {
		t.Fatal(err)
	}
	c := impersonate(t, rest.ImpersonationConfig{UserName: controllerUser, Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + release, "system:authenticated"}, Extra: map[string][]string{extraPodName: {"h8s-controller"}}})
	t.Cleanup(func() {
		for _, tenant := range tenantsOfProject(t, told.project.ID) {
			if err := cluster.admin.Delete(context.Background(), &tenant); err != nil {
				t.Errorf("delete the Tenant: %v", err)
			}
		}
	})
	return &projectSync{objects: objects{Client: c, live: c}, events: events.NewFakeRecorder(1000), ProjectOptions: ProjectOptions{Config: *config, Directory: told}}, told
}

func tenantsOfProject(t *testing.T, id string) []v1alpha1.Tenant {
	t.Helper()
	var all v1alpha1.TenantList
	if err := cluster.admin.List(context.Background(), &all, client.MatchingLabels{v1alpha1.LabelProject: id}); err != nil {
		t.Fatal(err)
	}
	return all.Items
}

// TestProjectNamedLikeNamespaces: who may tag projects does not get namespaces that were
// labelled before their Tenant was made, by calling a project so.
func TestProjectNamedLikeNamespaces(t *testing.T) {
	const user = "keystone:acme/mallory"
	early := namespaceOf("early-shop", "early", nil)
	if err := cluster.admin.Create(t.Context(), early); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.admin.Delete(context.Background(), early); err != nil {
			t.Errorf("delete the namespace: %v", err)
		}
	})
	s, told := newToldSync(t, "early", user)
	for range 2 {
		if err := s.round(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	all := tenantsOfProject(t, told.project.ID)
	if len(all) != 1 || !strings.HasPrefix(all[0].Name, "early-") {
		t.Fatalf("the project has the Tenants %v, want one early-…", names(all, func(t *v1alpha1.Tenant) string { return t.Name }))
	}
	eventually(t, func() error { return tenantReady(t.Context(), all[0].Name) })
	mallory := as(t, user)
	newNamespace(t, mallory, namespaceOf("early-of-mallory", "", nil))
	eventually(t, func() error {
		return mallory.List(t.Context(), &corev1.SecretList{}, client.InNamespace("early-of-mallory"))
	})
	if err := mallory.List(t.Context(), &corev1.SecretList{}, client.InNamespace(early.Name)); !apierrors.IsForbidden(err) {
		t.Errorf("he lists the Secrets of %s: %v", early.Name, err)
	}

	// A cache that does not know the Tenant yet, which has a namespace by now, makes no other.
	again, err := s.create(t.Context(), &told.project)
	if err != nil || again.UID != all[0].UID {
		t.Errorf("once more: %v, %v", again, err)
	}
}

// TestProjectGoneAndUnread: that a project is gone suspends its Tenant, also while nobody
// can say who has roles in it.
func TestProjectGoneAndUnread(t *testing.T) {
	const user = "keystone:acme/eve"
	s, told := newToldSync(t, "unread", user)
	round := func(wantErr string) {
		t.Helper()
		if err := s.round(t.Context()); (err == nil) != (wantErr == "") || err != nil && !strings.Contains(err.Error(), wantErr) {
			t.Errorf("%v, want an error with %q", err, wantErr)
		}
	}
	members := []v1alpha1.Member{member("User", user, "admin"), member("User", "ops", "view")}
	is := func(what, because string, members []v1alpha1.Member) {
		t.Helper()
		spec := tenantsOfProject(t, told.project.ID)[0].Spec
		slices.SortFunc(spec.Members, func(a, b v1alpha1.Member) int { return strings.Compare(a.Name, b.Name) })
		if diff := cmp.Diff(members, spec.Members); diff != "" {
			t.Errorf("%s: members:\n%s", what, diff)
		}
		if spec.Suspended != (because != "") || spec.SuspendedBecause != because {
			t.Errorf("%s: suspended %t, because %q; want %q", what, spec.Suspended, spec.SuspendedBecause, because)
		}
	}
	round("")
	tenant := tenantsOfProject(t, told.project.ID)[0]
	adds := client.RawPatch("application/json-patch+json", []byte(`[{"op": "add", "path": "/spec/members/-", "value": {"kind": "User", "name": "ops", "role": "view"}}]`))
	if err := cluster.admin.Patch(t.Context(), &tenant, adds, client.FieldOwner("kubectl-patch")); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return tenantReady(t.Context(), tenant.Name) })
	eve := as(t, user)
	newNamespace(t, eve, namespaceOf("unread-shop", "", nil))
	reads := func(want bool) {
		t.Helper()
		eventually(t, func() error {
			if err := eve.List(t.Context(), &corev1.SecretList{}, client.InNamespace("unread-shop")); (err == nil) != want || err != nil && !apierrors.IsForbidden(err) {
				return fmt.Errorf("she lists Secrets: %w, want access: %t", err, want)
			}
			return nil
		})
	}
	reads(true)

	assignments := told.assignments
	told.assignments, told.err = nil, errors.New("no roles today")
	round("no roles today")
	is("there, unread", "", members)
	told.project.Enabled = false
	round("no roles today")
	is("disabled, unread", projects.Disabled, members)
	reads(false)
	s.settled = nil // as after a restart
	round("no roles today")
	is("and after a restart", projects.Disabled, members)
	told.err = nil
	round("")
	is("read again", projects.Disabled, members[1:])
	told.project.Enabled, told.assignments = true, assignments
	round("")
	reads(true)

	told.project.Tags, told.err = nil, errors.New("no roles today") // it is asked about by its id
	round("no roles today")
	is("untagged, unread", "its project has no tag h8s in Keystone any more", members)
	reads(false)
}

// unasked is an API server that nobody shall ask.
type unasked struct{ client.Reader }

func (unasked) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("the API server was asked")
}

// blind is a Directory that lists nothing, and says of each project what err says.
type blind struct {
	ProjectDirectory
	err error
}

func (b blind) Tagged(context.Context, string) ([]identity.Project, error) { return nil, nil }

func (b blind) Project(ctx context.Context, id string) (*identity.Project, error) {
	if b.err != nil {
		return nil, b.err
	}
	return b.ProjectDirectory.Project(ctx, id)
}

// TestProjectRounds: rounds go on after errors, and end with the manager.
func TestProjectRounds(t *testing.T) {
	asked := make(chan struct{})
	s := &projectSync{ProjectOptions: ProjectOptions{Directory: askedDirectory{asked: asked}}}
	s.Interval.Duration = time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- s.Start(ctx) }()
	for range 3 {
		<-asked
	}
	cancel()
	for {
		select {
		case <-asked:
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
			return
		}
	}
}

// askedDirectory says when it is asked, and fails.
type askedDirectory struct {
	ProjectDirectory
	asked chan<- struct{}
}

func (d askedDirectory) Tagged(context.Context, string) ([]identity.Project, error) {
	d.asked <- struct{}{}
	return nil, errors.New("Keystone is down")
}
