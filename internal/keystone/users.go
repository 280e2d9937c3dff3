package keystone

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
)

// ServiceRole is the role that lets a service validate other people's tokens, and
// ServiceProject the project in which services have it.
const (
	ServiceRole    = "service"
	ServiceProject = "service"
	// defaultDomainID is the id of the domain Default.
	defaultDomainID = "default"
	requestTimeout  = 30 * time.Second
)

// Admin is the administrator's access to Keystone's API. It logs in again when its
// token ends.
func (k *Keystone) Admin(ctx context.Context) (*gophercloud.ServiceClient, error) {
	provider, err := openstack.NewClient(k.URL())
	if err != nil {
		return nil, err
	}
	provider.HTTPClient = http.Client{Timeout: requestTimeout}
	err = openstack.Authenticate(ctx, provider, gophercloud.AuthOptions{
		IdentityEndpoint: k.URL(), Username: AdminUser, Password: k.password, DomainID: defaultDomainID, AllowReauth: true,
		Scope: &gophercloud.AuthScope{ProjectName: AdminUser, DomainID: defaultDomainID},
	})
	if err != nil {
		return nil, fmt.Errorf("log in to Keystone as its administrator: %w", err)
	}
	return openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
}

// EnsureServiceUser makes a user that may validate tokens and nothing else, and
// returns its clouds.yaml, with one cloud of the given name. Keystone must run.
func (k *Keystone) EnsureServiceUser(ctx context.Context, user, cloud string) ([]byte, error) {
	admin, err := k.Admin(ctx)
	if err != nil {
		return nil, err
	}
	password, err := k.ensurePassword(user)
	if err != nil {
		return nil, err
	}
	if err := ensureServiceUser(ctx, admin, user, password); err != nil {
		return nil, fmt.Errorf("make the service user %s in Keystone: %w", user, err)
	}
	return k.clouds(cloud, user, password, ServiceProject), nil
}

// ensureServiceUser creates what is not there yet: a conflict means that it is.
func ensureServiceUser(ctx context.Context, admin *gophercloud.ServiceClient, user, password string) error {
	there := func(err error) bool { return err == nil || gophercloud.ResponseCodeIs(err, http.StatusConflict) }
	if _, err := roles.Create(ctx, admin, roles.CreateOpts{Name: ServiceRole}).Extract(); !there(err) {
		return err
	}
	if _, err := projects.Create(ctx, admin, projects.CreateOpts{Name: ServiceProject, DomainID: defaultDomainID}).Extract(); !there(err) {
		return err
	}
	if _, err := users.Create(ctx, admin, users.CreateOpts{Name: user, DomainID: defaultDomainID, Password: password}).Extract(); !there(err) {
		return err
	}
	rolePages, err := roles.List(admin, roles.ListOpts{Name: ServiceRole}).AllPages(ctx)
	if err != nil {
		return err
	}
	role, err := roles.ExtractRoles(rolePages)
	if err != nil {
		return err
	}
	projectPages, err := projects.List(admin, projects.ListOpts{Name: ServiceProject, DomainID: defaultDomainID}).AllPages(ctx)
	if err != nil {
		return err
	}
	project, err := projects.ExtractProjects(projectPages)
	if err != nil {
		return err
	}
	userPages, err := users.List(admin, users.ListOpts{Name: user, DomainID: defaultDomainID}).AllPages(ctx)
	if err != nil {
		return err
	}
	found, err := users.ExtractUsers(userPages)
	if err != nil {
		return err
	}
	if len(role) != 1 || len(project) != 1 || len(found) != 1 {
		return fmt.Errorf("found %d roles, %d projects and %d users of their names, want one of each", len(role), len(project), len(found))
	}
	return roles.Assign(ctx, admin, role[0].ID, roles.AssignOpts{UserID: found[0].ID, ProjectID: project[0].ID}).ExtractErr()
}
