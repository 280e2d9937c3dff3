package keystone

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	"github.com/gophercloud/gophercloud/v2/pagination"
)

// ServiceRole is the role that lets a service validate other people's tokens, and
// ServiceProject the project in which services have it.
const (
	ServiceRole    = "service"
	ServiceProject = "service"
	// readerRole is one that every Keystone has. On the system, it reads everything.
	readerRole = "reader"
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
	return k.ensureAccess(ctx, user, cloud, inProject(ServiceProject), grantService)
}

// EnsureReader makes a user that may read projects and who has which role in them, and
// everything else that is in Keystone but secrets, and change nothing. It returns its
// clouds.yaml, with one cloud of the given name. Keystone must run.
func (k *Keystone) EnsureReader(ctx context.Context, user, cloud string) ([]byte, error) {
	return k.ensureAccess(ctx, user, cloud, onSystem, grantReading)
}

// ensureAccess makes a user, grants it what it is for, and returns its clouds.yaml with
// one cloud, which is of that scope.
func (k *Keystone) ensureAccess(ctx context.Context, user, cloud, scope string, grant func(ctx context.Context, admin *gophercloud.ServiceClient, userID string) error) ([]byte, error) {
	admin, err := k.Admin(ctx)
	if err != nil {
		return nil, err
	}
	password, err := k.ensurePassword(user)
	if err != nil {
		return nil, err
	}
	userID, err := ensureUser(ctx, admin, user, password)
	if err == nil {
		err = grant(ctx, admin, userID)
	}
	if err != nil {
		return nil, fmt.Errorf("make the user %s in Keystone: %w", user, err)
	}
	return k.clouds(cloud, user, password, scope), nil
}

// Clouds puts the clouds of several of this package's clouds.yaml into one.
func Clouds(files ...[]byte) []byte {
	all := []byte(cloudsHeader)
	for _, file := range files {
		all = append(all, bytes.TrimPrefix(file, []byte(cloudsHeader))...)
	}
	return all
}

// there says that what was to be created is there: a conflict means that it was before.
func there(err error) bool { return err == nil || gophercloud.ResponseCodeIs(err, http.StatusConflict) }

// grantService lets the user validate tokens. The role and the project for that may not be there yet.
func grantService(ctx context.Context, admin *gophercloud.ServiceClient, userID string) error {
	if _, err := roles.Create(ctx, admin, roles.CreateOpts{Name: ServiceRole}).Extract(); !there(err) {
		return err
	}
	if _, err := projects.Create(ctx, admin, projects.CreateOpts{Name: ServiceProject, DomainID: defaultDomainID}).Extract(); !there(err) {
		return err
	}
	roleID, err := findRole(ctx, admin, ServiceRole)
	if err != nil {
		return err
	}
	project, err := only(ctx, projects.List(admin, projects.ListOpts{Name: ServiceProject, DomainID: defaultDomainID}), projects.ExtractProjects)
	if err != nil {
		return fmt.Errorf("the project %s: %w", ServiceProject, err)
	}
	return roles.Assign(ctx, admin, roleID, roles.AssignOpts{UserID: userID, ProjectID: project.ID}).ExtractErr()
}

// grantReading lets the user read the whole system.
func grantReading(ctx context.Context, admin *gophercloud.ServiceClient, userID string) error {
	roleID, err := findRole(ctx, admin, readerRole)
	if err != nil {
		return err
	}
	return roles.Assign(ctx, admin, roleID, roles.AssignOpts{UserID: userID, System: true}).ExtractErr()
}

// ensureUser is the id of the user, which is in the domain Default.
func ensureUser(ctx context.Context, admin *gophercloud.ServiceClient, name, password string) (string, error) {
	if _, err := users.Create(ctx, admin, users.CreateOpts{Name: name, DomainID: defaultDomainID, Password: password}).Extract(); !there(err) {
		return "", err
	}
	user, err := only(ctx, users.List(admin, users.ListOpts{Name: name, DomainID: defaultDomainID}), users.ExtractUsers)
	if err != nil {
		return "", fmt.Errorf("the user %s: %w", name, err)
	}
	return user.ID, nil
}

func findRole(ctx context.Context, admin *gophercloud.ServiceClient, name string) (string, error) {
	role, err := only(ctx, roles.List(admin, roles.ListOpts{Name: name}), roles.ExtractRoles)
	if err != nil {
		return "", fmt.Errorf("the role %s: %w", name, err)
	}
	return role.ID, nil
}

// only is the one thing of a list that should have no other.
func only[T any](ctx context.Context, list pagination.Pager, extract func(pagination.Page) ([]T, error)) (one T, err error) {
	pages, err := list.AllPages(ctx)
	if err != nil {
		return one, err
	}
	found, err := extract(pages)
	if err != nil {
		return one, err
	}
	if len(found) != 1 {
		return one, fmt.Errorf("%d are listed, not one", len(found))
	}
	return found[0], nil
}
