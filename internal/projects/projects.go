// Package projects says what a Tenant has of its project in Keystone: a name, members,
// and whether it is suspended. Its functions are pure; package identity asks Keystone,
// and package controller writes the Tenants.
package projects

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/identity"
)

// Config is what is to be synchronized.
type Config struct {
	// Tag is what a project must have to be a Tenant.
	Tag string `json:"tag"`
	// Cloud in clouds.yaml is the service user that may read.
	Cloud string `json:"cloud"`
	// Interval between two rounds.
	Interval metav1.Duration `json:"interval"`
	// Roles are the members' roles, by the names of Keystone's. Who has none of those is
	// no member.
	Roles map[string]v1alpha1.Role `json:"roles"`
	// Tenant is what new Tenants are made with.
	Tenant v1alpha1.TenantSpec `json:"tenant"`
}

// minInterval keeps a mistake from becoming a flood of requests.
const minInterval = time.Second

var (
	roleNames = []v1alpha1.Role{v1alpha1.RoleOwner, v1alpha1.RoleAdmin, v1alpha1.RoleEdit, v1alpha1.RoleView} // the most powerful first
	tagRE     = regexp.MustCompile(`^[^,/]{1,255}$`)
)

// ParseConfig reads a Config from JSON or YAML, and says what is wrong with it.
func ParseConfig(data []byte) (*Config, error) {
	var c Config
	if err := yaml.UnmarshalStrict(data, &c); err != nil {
		return nil, err
	}
	switch {
	case !tagRE.MatchString(c.Tag):
		return nil, fmt.Errorf("tag %q: Keystone's tags have 1 to 255 characters, and neither ',' nor '/'", c.Tag)
	case c.Cloud == "":
		return nil, errors.New("cloud: name the cloud of clouds.yaml that lists projects")
	case c.Interval.Duration < minInterval:
		return nil, fmt.Errorf("interval %s: %s is the least", c.Interval.Duration, minInterval)
	case len(c.Roles) == 0:
		return nil, errors.New("roles: name at least one of Keystone's, such as {member: edit}")
	case len(c.Tenant.Network.CIDRs) != 1 || c.Tenant.Network.Name != "":
		return nil, errors.New("tenant.network: give one range in cidrs, such as [10.0.0.0/16]; each Tenant gets a Network of its own with it")
	case c.Tenant.Suspended || c.Tenant.SuspendedBecause != "":
		return nil, errors.New("tenant: a new Tenant cannot be suspended")
	}
	for keystones, ours := range c.Roles {
		if !slices.Contains(roleNames, ours) {
			return nil, fmt.Errorf("roles: %s: a Tenant has no role %q, but %v", keystones, ours, roleNames)
		}
	}
	return &c, nil
}

// Title names a project for people: DOMAIN/PROJECT, each escaped as in names of users.
func Title(p *identity.Project) string {
	return url.PathEscape(p.Domain) + "/" + url.PathEscape(p.Name)
}

const (
	maxTenantName = 40
	hashLength    = 10
)

var (
	tenantNameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	otherRE      = regexp.MustCompile(`[^a-z0-9]+`)
)

// Names are those that the project's Tenant may have, the best first: the project's own,
// if a Tenant can be called so, and one that no other project's Tenant has.
func Names(p *identity.Project) []string {
	var names []string
	if len(p.Name) <= maxTenantName && tenantNameRE.MatchString(p.Name) {
		names = append(names, p.Name)
	}
	sum := sha256.Sum256([]byte(p.ID))
	readable := otherRE.ReplaceAllString(strings.ToLower(p.Name), "-")
	readable = strings.Trim(readable[:min(len(readable), maxTenantName-1-hashLength)], "-")
	return append(names, cmp.Or(readable, "project")+"-"+hex.EncodeToString(sum[:])[:hashLength])
}

const (
	// maxUsers leaves a Tenant, which has 500 members at most, some of an operator's.
	maxUsers = 400
	// maxMemberName is the longest name of a member.
	maxMemberName = 253
)

// Members are the project's users with the most powerful of their roles, sorted. Where
// there are too many of them for a Tenant, the groups of all who have a role take their
// place. Unnamed are users whose name is too long for a member.
func (c *Config) Members(assignments []identity.Assignment) (members []v1alpha1.Member, unnamed []string) {
	users, groups := map[string]v1alpha1.Role{}, map[string]v1alpha1.Role{}
	for _, a := range assignments {
		role, ok := c.Roles[a.Role]
		switch {
		case !ok:
		case len(a.User) > maxMemberName:
			unnamed = append(unnamed, a.User)
		default:
			users[a.User] = strongest(users[a.User], role)
		}
		if ok {
			groups[a.Group] = role
		}
	}
	kind, all := "User", users
	if len(users) > maxUsers {
		kind, all, unnamed = "Group", groups, nil
	}
	for name, role := range all {
		members = append(members, v1alpha1.Member{Kind: kind, Name: name, Role: role})
	}
	slices.SortFunc(members, func(a, b v1alpha1.Member) int { return strings.Compare(a.Name, b.Name) })
	slices.Sort(unnamed)
	return members, slices.Compact(unnamed)
}

func strongest(a, b v1alpha1.Role) v1alpha1.Role {
	for _, role := range roleNames {
		if a == role || b == role {
			return role
		}
	}
	return b
}

// Reasons why a Tenant has no project any more. The Tenant's members read them.
const (
	Deleted  = "its project was deleted in Keystone, which has none of this id"
	Disabled = "its project, or the project's domain, is disabled in Keystone"
)

// Gone says why the project is none that a Tenant may have, and nothing if it is one.
func (c *Config) Gone(p *identity.Project) string {
	switch {
	case !p.Enabled:
		return Disabled
	case !p.Tagged(c.Tag):
		return fmt.Sprintf("its project has no tag %.64s in Keystone any more", c.Tag)
	}
	return ""
}

// Wish is what Keystone says about a Tenant.
type Wish struct {
	// ProjectID and Title are the project's. Title is empty if nobody knows it any more.
	ProjectID, Title string
	Members          []v1alpha1.Member
	// Unread says that Keystone has not told the members: those that it told last stay.
	Unread bool
	// Gone is why the Tenant shall be suspended, and empty if it shall not.
	Gone string
}

// Spec is the part of a Tenant's spec that is applied (server-side apply: a field that
// is left out is taken away, unless others have set it as well).
type Spec struct {
	Members          []v1alpha1.Member `json:"members,omitempty"`
	Suspended        bool              `json:"suspended,omitempty"`
	SuspendedBecause string            `json:"suspendedBecause,omitempty"`
}

// Owners are who has set which fields of an object: the manager, and others
// (https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management).
type Owners struct{ ours, others *fieldpath.Set }

// OwnersOf reads them from an object's managed fields.
func OwnersOf(managers []metav1.ManagedFieldsEntry, manager string) (*Owners, error) {
	o := &Owners{&fieldpath.Set{}, &fieldpath.Set{}}
	for _, m := range managers {
		if m.Subresource != "" || m.FieldsV1 == nil {
			continue
		}
		set := &fieldpath.Set{}
		if err := set.FromJSON(m.FieldsV1.GetRawReader()); err != nil {
			return nil, fmt.Errorf("read which fields %s has set: %w", m.Manager, err)
		}
		if m.Manager == manager {
			o.ours = o.ours.Union(set)
		} else {
			o.others = o.others.Union(set)
		}
	}
	return o, nil
}

func specPath(path ...any) fieldpath.Path {
	return fieldpath.MakePathOrDie(append([]any{"spec"}, path...)...)
}

func memberKey(m v1alpha1.Member) any { return fieldpath.KeyByFields("kind", m.Kind, "name", m.Name) }

// Spec is what to apply to a Tenant as it is now, whose fields the owners have set.
//
// A member whose role somebody else has set keeps that role, and is a member as long as
// Keystone or somebody else says so. A Tenant whose project is gone is
// suspended, whoever wants what. One whose project is there is not, unless somebody else
// has suspended it, or has given the suspension a reason of his own.
func (w *Wish) Spec(t *v1alpha1.Tenant, owners *Owners) Spec {
	theirs := func(path ...any) bool { return owners.others.Has(specPath(path...)) }
	members := w.Members
	if w.Unread {
		members = slices.DeleteFunc(slices.Clone(t.Spec.Members), func(m v1alpha1.Member) bool {
			return !owners.ours.Has(specPath("members", memberKey(m)))
		})
	}
	var s Spec
	for _, m := range members {
		if theirs("members", memberKey(m), "role") {
			for _, now := range t.Spec.Members {
				if now.Kind == m.Kind && now.Name == m.Name {
					m.Role = now.Role
				}
			}
		}
		s.Members = append(s.Members, m)
	}
	theirReason := t.Spec.Suspended && t.Spec.SuspendedBecause != "" && theirs("suspendedBecause")
	switch {
	case w.Gone != "":
		s.Suspended = true
		if !theirReason {
			s.SuspendedBecause = w.Gone
		}
	case theirReason && !theirs("suspended"):
		s.Suspended = true
	}
	return s
}
