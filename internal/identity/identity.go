// Package identity says who a Keystone token is of, in Kubernetes' terms. It asks
// Keystone's API, version 3 (https://docs.openstack.org/api-ref/identity/v3/), and
// knows nothing of Kubernetes' objects.
package identity

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"
)

// DefaultPrefix begins every name that comes from Keystone.
const DefaultPrefix = "keystone:"

// Keys of an Identity's Extra. Names may be given to another after a deletion; ids
// are not.
const (
	ExtraUserID       = "h8s.io/keystone-user-id"
	ExtraUserDomainID = "h8s.io/keystone-user-domain-id"
	// ExtraProjectID is absent from tokens that are scoped to a domain; ExtraDomainID is
	// the scope's domain, or that of the scope's project.
	ExtraProjectID = "h8s.io/keystone-project-id"
	ExtraDomainID  = "h8s.io/keystone-domain-id"
	ExtraRoles     = "h8s.io/keystone-roles"
	// ExtraCredentialID is there if the token was made with an application credential.
	ExtraCredentialID = "h8s.io/keystone-application-credential-id"
)

// Identity is who a token is of. It is shared and must not be changed.
//
// With the prefix "keystone:", the Username is keystone:DOMAIN/USER. Groups of a token
// that is scoped to a project are
//
//	keystone:project:DOMAIN/PROJECT
//	keystone:project-id:PROJECT-ID
//	keystone:role:DOMAIN/PROJECT/ROLE        for each role
//	keystone:role-id:PROJECT-ID/ROLE         for each role
//
// and of one that is scoped to a domain
//
//	keystone:domain-role:DOMAIN/ROLE         for each role
//	keystone:domain-role-id:DOMAIN-ID/ROLE   for each role
//
// Each part is escaped as a segment of a URL's path (RFC 3986, url.PathEscape), so that
// a name with a slash in it is not two names, and different parts never make the same
// name.
type Identity struct {
	Username string
	// UID is Keystone's id of the user.
	UID    string
	Groups []string
	Extra  map[string][]string
	// Expires is when the token ends.
	Expires time.Time
}

// Prefix begins every name of a user or group that comes from Keystone, so that none
// can be another authenticator's, nor one of Kubernetes' own.
type Prefix string

// The last character ends the prefix: no prefix begins another that way.
var prefixRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?:$`)

// Reserved are the prefixes of names that Kubernetes or Hypernetes itself gives, and
// that no authenticator of people may have. The chart's schema has the same list.
func Reserved() []Prefix { return []Prefix{"system:", "kubernetes:", "h8s:"} }

// Begins says whether the name of a user or group is one of the prefix's.
func (p Prefix) Begins(name string) bool { return strings.HasPrefix(name, string(p)) }

// ParsePrefix says what is wrong with a prefix of an authenticator's names, Keystone's
// or another's, if anything. Two different ones never make the same name.
func ParsePrefix(s string) (Prefix, error) {
	switch {
	case !prefixRE.MatchString(s):
		return "", fmt.Errorf("prefix %q: it must be lower-case letters, digits and '-' with a ':' at the end, such as %q", s, DefaultPrefix)
	case slices.Contains(Reserved(), Prefix(s)):
		return "", fmt.Errorf("prefix %q: names that begin so are Kubernetes' or ours: choose another, such as %q", s, DefaultPrefix)
	}
	return Prefix(s), nil
}

// named is a thing of Keystone's that has a name and an id.
type named struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

// owned is a thing of Keystone's that is in a domain.
type owned struct {
	named
	Domain named `json:"domain"`
}

// token is what Keystone says about a token.
type token struct {
	User                  owned     `json:"user"`
	Project               *owned    `json:"project"`
	Domain                *named    `json:"domain"`
	Roles                 []named   `json:"roles"`
	ExpiresAt             time.Time `json:"expires_at"`
	ApplicationCredential *named    `json:"application_credential"`
	// Trust and OAuth1 are there if another acts for the user by a delegation of some roles
	// (https://docs.openstack.org/api-ref/identity/v3-ext/).
	Trust  *struct{} `json:"OS-TRUST:trust"`
	OAuth1 *struct{} `json:"OS-OAUTH1"`
}

var (
	errUnscoped   = errors.New("the token is scoped to neither a project nor a domain: log in with one")
	errDelegated  = errors.New("the token was made by a trust or an OAuth1 delegation, and here it would be the whole user: log in as the user itself, or with an application credential")
	errIncomplete = errors.New("Keystone does not say all of the user, the scope and their domains")
)

// identify translates a token. It fails if the token says too little for a name
// that is only one user's, or if it is not the user who has it.
func (p Prefix) identify(t *token) (*Identity, error) {
	if t.Trust != nil || t.OAuth1 != nil {
		return nil, errDelegated
	}
	if !t.User.complete() || t.ExpiresAt.IsZero() {
		return nil, errIncomplete
	}
	id := &Identity{
		Username: p.user(t.User),
		UID:      t.User.ID,
		Extra: map[string][]string{
			ExtraUserID:       {t.User.ID},
			ExtraUserDomainID: {t.User.Domain.ID},
		},
		Expires: t.ExpiresAt,
	}
	for _, role := range t.Roles {
		if role.Name == "" {
			return nil, errIncomplete
		}
		id.Extra[ExtraRoles] = append(id.Extra[ExtraRoles], role.Name)
	}
	if c := t.ApplicationCredential; c != nil {
		id.Extra[ExtraCredentialID] = []string{c.ID}
	}
	switch {
	case t.Project != nil:
		project := t.Project
		if !project.complete() {
			return nil, errIncomplete
		}
		id.Extra[ExtraProjectID] = []string{project.ID}
		id.Extra[ExtraDomainID] = []string{project.Domain.ID}
		id.Groups = append(id.Groups, p.join("project:", project.Domain.Name, project.Name), p.join("project-id:", project.ID))
		for _, role := range t.Roles {
			id.Groups = append(id.Groups, p.join("role:", project.Domain.Name, project.Name, role.Name), p.roleByID(project.ID, role.Name))
		}
	case t.Domain != nil:
		domain := t.Domain
		if !domain.complete() {
			return nil, errIncomplete
		}
		id.Extra[ExtraDomainID] = []string{domain.ID}
		for _, role := range t.Roles {
			id.Groups = append(id.Groups, p.join("domain-role:", domain.Name, role.Name), p.join("domain-role-id:", domain.ID, role.Name))
		}
	default:
		return nil, errUnscoped
	}
	return id, nil
}

func (n named) complete() bool { return n.ID != "" && n.Name != "" }

func (o owned) complete() bool { return o.named.complete() && o.Domain.complete() }

func (p Prefix) user(u owned) string { return p.join("", u.Domain.Name, u.Name) }

func (p Prefix) roleByID(project, role string) string { return p.join("role-id:", project, role) }

// join makes one name of the parts.
func (p Prefix) join(kind string, parts ...string) string {
	escaped := make([]string, len(parts))
	for i, part := range parts {
		escaped[i] = url.PathEscape(part)
	}
	return string(p) + kind + strings.Join(escaped, "/")
}
