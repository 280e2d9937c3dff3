package identity

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	"github.com/gophercloud/gophercloud/v2/pagination"
)

// Project is one of Keystone's projects.
type Project struct {
	ID, Name string
	// Domain is the name of the project's domain.
	Domain string
	// Enabled says that neither the project nor its domain is disabled.
	Enabled bool
	Tags    []string
}

// Tagged says whether the project has the tag.
func (p *Project) Tagged(tag string) bool { return slices.Contains(p.Tags, tag) }

// Assignment is a role that a user has in a project: by an assignment to the user or to
// a group, inherited from the domain or a parent, or implied by another role.
type Assignment struct {
	// User is the Username of the user's tokens, whatever they are scoped to.
	User string
	// Group is a group of the user's tokens that are scoped to the project: of all who
	// have the role in it.
	Group string
	// Role is its name.
	Role string
}

// ErrNoProject is Keystone's word that there is no project of an id.
var ErrNoProject = errors.New("Keystone has no such project")

// directoryTimeout bounds the requests of one call of a Directory.
const directoryTimeout = 30 * time.Second

// Directory reads projects and their users, and names them as a Validator does that
// has the same prefix.
//
// The service user needs the role `reader` on the system. What another may see is
// narrower, and a call then fails rather than saying that there is nothing: a list that
// Keystone has cut short (its option list_limit) is an error, too.
type Directory struct {
	service *Service
	prefix  Prefix
}

// NewDirectory makes a Directory that asks as the service user does. Nothing is asked
// yet.
func NewDirectory(service *Service, prefix Prefix) *Directory {
	return &Directory{service: service, prefix: prefix}
}

// Tagged are the projects with the tag, also those that are disabled.
func (d *Directory) Tagged(ctx context.Context, tag string) ([]Project, error) {
	var found []Project
	err := d.ask(ctx, "list the projects with the tag "+tag, func(ctx context.Context, client *gophercloud.ServiceClient) error {
		found = nil
		owners := map[string]*domains.Domain{}
		return eachPage(ctx, projects.List(client, projects.ListOpts{Tags: tag}), "projects", func(page pagination.LinkedPageBase) error {
			some, err := projects.ExtractProjects(projects.ProjectPage{LinkedPageBase: page})
			if err != nil {
				return err
			}
			for _, p := range some {
				if owners[p.DomainID] == nil {
					if owners[p.DomainID], err = owner(ctx, client, &p); err != nil {
						return err
					}
				}
				project, err := describe(&p, owners[p.DomainID])
				if err != nil {
					return err
				}
				found = append(found, *project)
			}
			return nil
		})
	})
	return found, err
}

// Project is the project of the id. The error is ErrNoProject if, and only if, Keystone
// itself says that there is none.
func (d *Directory) Project(ctx context.Context, id string) (*Project, error) {
	var found *Project
	err := d.ask(ctx, "get the project "+id, func(ctx context.Context, client *gophercloud.ServiceClient) error {
		p, err := projects.Get(ctx, client, id).Extract()
		if err != nil {
			return absent(err)
		}
		if p == nil {
			return errIncomplete
		}
		domain, err := owner(ctx, client, p)
		if err != nil {
			return err
		}
		found, err = describe(p, domain)
		return err
	})
	return found, err
}

// Assignments are the roles that users have in the project. Users of whom Keystone
// knows nothing but an assignment that was left over have none.
func (d *Directory) Assignments(ctx context.Context, project string) ([]Assignment, error) {
	var found []Assignment
	err := d.ask(ctx, "list the roles in the project "+project, func(ctx context.Context, client *gophercloud.ServiceClient) error {
		found = nil
		yes := true
		opts := roles.ListAssignmentsOpts{ScopeProjectID: project, Effective: &yes, IncludeNames: &yes}
		return eachPage(ctx, roles.ListAssignments(client, opts), "role_assignments", func(page pagination.LinkedPageBase) error {
			some, err := roles.ExtractRoleAssignments(roles.RoleAssignmentPage{LinkedPageBase: page})
			if err != nil {
				return err
			}
			for _, a := range some {
				user := owned{named{a.User.ID, a.User.Name}, named{a.User.Domain.ID, a.User.Domain.Name}}
				// The filter is Keystone's; that nobody gets in by another project is ours.
				if !user.complete() || a.Role.Name == "" || a.Scope.Project.ID != project {
					continue
				}
				found = append(found, Assignment{User: d.prefix.user(user), Group: d.prefix.roleByID(project, a.Role.Name), Role: a.Role.Name})
			}
			return nil
		})
	})
	return found, err
}

// ask makes the requests, within the time that there is for them.
func (d *Directory) ask(ctx context.Context, what string, requests func(context.Context, *gophercloud.ServiceClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, directoryTimeout)
	defer cancel()
	err := d.service.use(ctx, func(client *gophercloud.ServiceClient) error { return requests(ctx, client) })
	switch {
	case err == nil || errors.Is(err, ErrNoProject):
		return err
	case gophercloud.ResponseCodeIs(err, http.StatusForbidden):
		return fmt.Errorf("%s: Keystone forbids it: give the service user the role `reader` on the system, and its cloud `system_scope: all`", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// eachPage hands on each page of a list that Keystone calls key, and fails if it has not
// sent all of it.
func eachPage(ctx context.Context, list pagination.Pager, key string, handle func(pagination.LinkedPageBase) error) error {
	whole := list.WithPageCreator(func(r pagination.PageResult) pagination.Page {
		return wholePage{pagination.LinkedPageBase{PageResult: r}, key}
	})
	return whole.EachPage(ctx, func(_ context.Context, page pagination.Page) (bool, error) {
		return true, handle(page.(wholePage).LinkedPageBase)
	})
}

// wholePage is a page of a list. The library asks each whether it is empty, and takes an
// answer without a list for an empty one: that would be everybody's last day.
type wholePage struct {
	pagination.LinkedPageBase
	key string
}

// IsEmpty implements pagination.Page.
func (p wholePage) IsEmpty() (bool, error) {
	fields, _ := p.Body.(map[string]any)
	switch _, ok := fields[p.key].([]any); {
	case !ok:
		return false, fmt.Errorf("Keystone's answer has no %s in it", p.key)
	case fields["truncated"] == true:
		return false, errors.New("Keystone sends a part of the list only: raise or remove list_limit in its configuration")
	}
	return false, nil
}

// absent finds out whether it is Keystone that knows no such project, and not a proxy
// before it that knows no such page.
func absent(err error) error {
	var unexpected gophercloud.ErrUnexpectedResponseCode
	if !errors.As(err, &unexpected) || unexpected.Actual != http.StatusNotFound {
		return err
	}
	var body struct {
		Error struct {
			Code int `json:"code"`
		} `json:"error"`
	}
	if json.Unmarshal(unexpected.Body, &body) != nil || body.Error.Code != http.StatusNotFound {
		return errors.New("the answer is 404, and not one of Keystone's: look at the auth_url of the service user's cloud, and at what is before Keystone")
	}
	return ErrNoProject
}

// owner is the project's domain.
func owner(ctx context.Context, client *gophercloud.ServiceClient, p *projects.Project) (*domains.Domain, error) {
	domain, err := domains.Get(ctx, client, p.DomainID).Extract()
	switch {
	case err != nil:
		return nil, fmt.Errorf("get the domain %s: %w", p.DomainID, err)
	case domain == nil:
		return nil, errIncomplete
	}
	return domain, nil
}

func describe(p *projects.Project, domain *domains.Domain) (*Project, error) {
	if p.ID == "" || p.Name == "" || domain.Name == "" {
		return nil, errIncomplete
	}
	return &Project{ID: p.ID, Name: p.Name, Domain: domain.Name, Enabled: p.Enabled && domain.Enabled, Tags: p.Tags}, nil
}
