package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/projects"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/roles"
	keystonetokens "github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/users"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/deploy/apiserver"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/keystone"
)

// tokens is what the test cluster's controller validates by, once a test has started
// a Keystone.
var tokens lateValidator

type lateValidator struct {
	current atomic.Pointer[identity.Validator]
}

func (l *lateValidator) Validate(ctx context.Context, token string) (*identity.Identity, error) {
	if v := l.current.Load(); v != nil {
		return v.Validate(ctx, token)
	}
	return nil, errors.New("no test has started a Keystone yet")
}

// reviewTokens makes the API server ask the controller about tokens, with the flags
// that docs/operations.md tells operators to set.
func reviewTokens(apiServer *envtest.APIServer, hooks *envtest.WebhookInstallOptions) error {
	config := clientcmdapi.NewConfig()
	config.Clusters["h8s"] = &clientcmdapi.Cluster{
		Server:                   fmt.Sprintf("https://%s:%d%s", hooks.LocalServingHost, hooks.LocalServingPort, apiserver.TokenReviewPath),
		CertificateAuthorityData: hooks.LocalServingCAData,
	}
	config.AuthInfos["h8s"] = &clientcmdapi.AuthInfo{ClientCertificate: filepath.Join(hooks.LocalServingCertDir, clientCert), ClientKey: filepath.Join(hooks.LocalServingCertDir, clientKey)}
	config.Contexts["h8s"] = &clientcmdapi.Context{Cluster: "h8s", AuthInfo: "h8s"}
	config.CurrentContext = "h8s"
	path := filepath.Join(hooks.LocalServingCertDir, "token-review.kubeconfig")
	apiServer.Configure().
		Set("authentication-token-webhook-config-file", path).
		Set("authentication-token-webhook-version", "v1").
		Set("authentication-token-webhook-cache-ttl", "0s")
	return clientcmd.WriteToFile(*config, path)
}

// keystoneLab is a real Keystone that the test cluster believes, with a project that has
// a user in it, and another user of the same name in another domain.
type keystoneLab struct {
	server  *keystone.Server
	admin   *gophercloud.ServiceClient
	domains []*domains.Domain // acme and globex
	project *projects.Project
	role    *roles.Role
	alice   *users.User
	other   *users.User
}

const keystonePassword = "secret"

// sharedKeystone is that of all tests of this package that need one: it takes seconds to
// start. The first of them starts it.
var sharedKeystone keystoneOfTests

type keystoneOfTests struct {
	server *keystone.Server
	admin  *gophercloud.ServiceClient
}

func (k *keystoneOfTests) get(t *testing.T) (*keystone.Server, *gophercloud.ServiceClient) {
	t.Helper()
	var err error
	if k.server == nil {
		// It outlives the test.
		if k.server, err = keystone.StartServer(context.WithoutCancel(t.Context()), 0); err != nil {
			t.Fatal(err)
		}
	}
	if k.admin == nil {
		if k.admin, err = k.server.Admin(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	return k.server, k.admin
}

func (k *keystoneOfTests) close() error {
	if k.server == nil {
		return nil
	}
	return k.server.Close()
}

func newKeystoneLab(t *testing.T) *keystoneLab {
	t.Helper()
	ctx := t.Context()
	server, admin := sharedKeystone.get(t)
	clouds, err := server.EnsureServiceUser(ctx, "h8s", "h8s")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "clouds.yaml")
	if err := os.WriteFile(path, clouds, 0o600); err != nil {
		t.Fatal(err)
	}
	service, err := identity.NewService(path, "h8s")
	if err != nil {
		t.Fatal(err)
	}
	validator, err := identity.New(service, identity.Options{Deadline: patience})
	if err != nil {
		t.Fatal(err)
	}
	tokens.current.Store(validator)
	t.Cleanup(func() { tokens.current.Store(nil) })

	lab := &keystoneLab{server: server, admin: admin}
	steps := func() error {
		acme, err := domains.Create(ctx, lab.admin, domains.CreateOpts{Name: "acme"}).Extract()
		if err != nil {
			return err
		}
		lab.domains = append(lab.domains, acme)
		globex, err := domains.Create(ctx, lab.admin, domains.CreateOpts{Name: "globex"}).Extract()
		if err != nil {
			return err
		}
		lab.domains = append(lab.domains, globex)
		if lab.project, err = projects.Create(ctx, lab.admin, projects.CreateOpts{Name: "web shop", DomainID: acme.ID}).Extract(); err != nil {
			return err
		}
		if lab.role, err = roles.Create(ctx, lab.admin, roles.CreateOpts{Name: "deployer"}).Extract(); err != nil {
			return err
		}
		otherProject, err := projects.Create(ctx, lab.admin, projects.CreateOpts{Name: "web shop", DomainID: globex.ID}).Extract()
		if err != nil {
			return err
		}
		if lab.alice, err = users.Create(ctx, lab.admin, users.CreateOpts{Name: "alice", DomainID: acme.ID, Password: keystonePassword}).Extract(); err != nil {
			return err
		}
		if lab.other, err = users.Create(ctx, lab.admin, users.CreateOpts{Name: "alice", DomainID: globex.ID, Password: keystonePassword, DefaultProjectID: otherProject.ID}).Extract(); err != nil {
			return err
		}
		return errors.Join(
			roles.Assign(ctx, lab.admin, lab.role.ID, roles.AssignOpts{UserID: lab.alice.ID, ProjectID: lab.project.ID}).ExtractErr(),
			roles.Assign(ctx, lab.admin, lab.role.ID, roles.AssignOpts{UserID: lab.other.ID, ProjectID: otherProject.ID}).ExtractErr(),
		)
	}
	t.Cleanup(func() {
		if err := lab.empty(context.WithoutCancel(ctx)); err != nil {
			t.Errorf("empty Keystone: %v", err)
		}
	})
	if err := steps(); err != nil {
		t.Fatalf("fill Keystone: %v", err)
	}
	return lab
}

// empty deletes what newKeystoneLab has made, and with the domains all that is in them.
func (l *keystoneLab) empty(ctx context.Context) (err error) {
	if l.role != nil {
		err = roles.Delete(ctx, l.admin, l.role.ID).ExtractErr()
	}
	for _, d := range l.domains {
		_, disabled := domains.Update(ctx, l.admin, d.ID, domains.UpdateOpts{Enabled: ptr.To(false)}).Extract()
		err = errors.Join(err, disabled, domains.Delete(ctx, l.admin, d.ID).ExtractErr())
	}
	return err
}

// as is a client with a new token of the user, scoped to the project.
func (l *keystoneLab) as(t *testing.T, user *users.User, project string) (client.Client, string) {
	t.Helper()
	token, err := keystonetokens.Create(t.Context(), l.admin, &keystonetokens.AuthOptions{
		UserID: user.ID, Password: keystonePassword, Scope: keystonetokens.Scope{ProjectID: project},
	}).ExtractToken()
	if err != nil {
		t.Fatal(err)
	}
	return bearer(t, token.ID), token.ID
}

func bearer(t *testing.T, token string) client.Client {
	t.Helper()
	config := rest.AnonymousClientConfig(cluster.env.Config)
	config.BearerToken = token
	config.QPS = -1
	c, err := client.New(config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func whoAmI(t *testing.T, c client.Client) (authenticationv1.UserInfo, error) {
	t.Helper()
	review := &authenticationv1.SelfSubjectReview{}
	err := c.Create(t.Context(), review)
	return review.Status.UserInfo, err
}

// TestKeystone: a token of a real Keystone is a user of a real API server, with what
// its Tenant gives to that user or group, and with nothing when Keystone takes it back.
func TestKeystone(t *testing.T) {
	lab := newKeystoneLab(t)
	alice, token := lab.as(t, lab.alice, lab.project.ID)
	who, err := whoAmI(t, alice)
	if err != nil {
		t.Fatal(err)
	}
	group := "keystone:role:acme/web%20shop/deployer"
	if who.Username != "keystone:acme/alice" || who.UID != lab.alice.ID || !slices.Contains(who.Groups, group) {
		t.Errorf("the API server takes her for %+v", who)
	}
	for _, g := range who.Groups {
		if g != "system:authenticated" && !strings.HasPrefix(g, "keystone:") {
			t.Errorf("she is in the group %q", g)
		}
	}
	for key, want := range map[string]string{
		identity.ExtraUserID: lab.alice.ID, identity.ExtraProjectID: lab.project.ID, identity.ExtraDomainID: lab.project.DomainID, identity.ExtraRoles: "deployer",
	} {
		if got := who.Extra[key]; len(got) != 1 || got[0] != want {
			t.Errorf("extra %s = %v, want %s", key, got, want)
		}
	}

	otherAlice, _ := lab.as(t, lab.other, lab.other.DefaultProjectID)
	if who, err := whoAmI(t, otherAlice); err != nil || who.Username != "keystone:globex/alice" {
		t.Errorf("the other alice is %q, %v", who.Username, err)
	}
	newTenant(t, tenantOf("keystone-group", "10.81.0.0/16", member("Group", group, v1alpha1.RoleAdmin)))
	newTenant(t, tenantOf("keystone-user", "10.82.0.0/16", member("User", "keystone:globex/alice", v1alpha1.RoleAdmin)))
	newNamespace(t, alice, namespaceOf("keystone-alice", "", nil))
	newNamespace(t, otherAlice, namespaceOf("keystone-other", "", nil))
	for name, test := range map[string]struct {
		client    client.Client
		namespace string
		allowed   bool
	}{
		"alice by her group":              {alice, "keystone-alice", true},
		"the other alice by her name":     {otherAlice, "keystone-other", true},
		"alice in the other's":            {alice, "keystone-other", false},
		"the other alice in the first's":  {otherAlice, "keystone-alice", false},
		"alice where no tenant is":        {alice, "default", false},
		"a person whose name is the same": {as(t, "alice"), "keystone-alice", false},
	} {
		err := test.client.List(t.Context(), &corev1.PodList{}, client.InNamespace(test.namespace))
		if (err == nil) != test.allowed || err != nil && !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want allowed: %t", name, err, test.allowed)
		}
	}

	for name, bad := range map[string]string{
		"garbage": "garbage", "another signature": token[:len(token)-4] + "AAA=", "huge": strings.Repeat("x", 100<<10),
	} {
		if _, err := whoAmI(t, bearer(t, bad)); !apierrors.IsUnauthorized(err) && !strings.Contains(fmt.Sprint(err), "431") {
			t.Errorf("%s: %v, want 401", name, err)
		}
	}

	// Others come in while Keystone is down, and she does for as long as she is known.
	lab.server.Stop()
	if _, err := whoAmI(t, as(t, "somebody")); err != nil {
		t.Errorf("a certificate while Keystone is down: %v", err)
	}
	if _, err := whoAmI(t, bearer(t, token[:len(token)-4]+"BBB=")); !apierrors.IsUnauthorized(err) {
		t.Errorf("an unknown token while Keystone is down: %v, want 401", err)
	}
	if err := lab.server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := whoAmI(t, alice); err != nil {
		t.Errorf("when Keystone is up again: %v", err)
	}

	if err := roles.Unassign(t.Context(), lab.admin, lab.role.ID, roles.UnassignOpts{UserID: lab.alice.ID, ProjectID: lab.project.ID}).ExtractErr(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if _, err := whoAmI(t, alice); !apierrors.IsUnauthorized(err) {
			return fmt.Errorf("without her role: %s, want 401", fmt.Sprint(err))
		}
		return nil
	})
	if _, err := whoAmI(t, otherAlice); err != nil {
		t.Errorf("the other alice: %v", err)
	}
}

// TestTokenReview: what the webhook itself answers. The reasons reach the API server's
// log, and no token does.
func TestTokenReview(t *testing.T) {
	if _, err := whoAmI(t, bearer(t, "a-token-before-there-is-a-keystone")); !apierrors.IsUnauthorized(err) {
		t.Errorf("%v, want 401", err)
	}
	var review authenticationv1.TokenReview
	review.Spec.Token = "a-token"
	if err := cluster.admin.Create(t.Context(), &review); err != nil {
		t.Fatal(err)
	}
	if review.Status.Authenticated || !strings.Contains(review.Status.Error, "no test has started a Keystone") {
		t.Errorf("status %+v", review.Status)
	}
}
