package cluster

import (
	"context"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"

	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/keystone"
)

// A cluster with a Keystone has it beside the nodes, on the machine: at the first
// address of the bridge, where the controller's pod and the machine's own people reach
// it, and tenants do not.
const (
	keystonePort = 5000 // OpenStack's own
	// keystoneUser validates tokens for the controller, which finds the credentials in the
	// Secret, as the cloud of this name.
	keystoneUser   = "h8s"
	keystoneCloud  = "h8s"
	keystoneSecret = "h8s-keystone"
	// keystoneReader is the user, and its cloud, that reads which projects are Tenants.
	keystoneReader = "h8s-sync"
	// tokenReviewKubeconfig leads the API server to the controller's token reviews.
	tokenReviewKubeconfig = "kubernetes/token-review.kubeconfig"
)

// keystoneFlags make the API server ask the controller about tokens that it does not
// know itself. It remembers a good one for ten seconds whatever the flags say; that
// shall be all.
func keystoneFlags() []string {
	return []string{
		"--authentication-token-webhook-config-file=/etc/" + tokenReviewKubeconfig,
		"--authentication-token-webhook-version=v1",
		"--authentication-token-webhook-cache-ttl=0s",
	}
}

// keystonePrefix begins the names that Keystone gives, or would.
func (c *Config) keystonePrefix() identity.Prefix {
	if c.KeystonePrefix == "" {
		return identity.DefaultPrefix
	}
	return c.KeystonePrefix
}

func (c *Config) keystoneOptions() keystone.Options {
	return keystone.Options{Dir: c.state().path("keystone"), Address: netip.AddrPortFrom(c.gateway(), keystonePort)}
}

func (c *Config) keystoneURL() string {
	return "http://" + c.keystoneOptions().Address.String() + "/v3"
}

// runKeystone is for the supervisor.
func (c *Config) runKeystone(ctx context.Context) error {
	k, err := keystone.Prepare(ctx, c.keystoneOptions())
	if err != nil {
		return err
	}
	return k.Run(ctx)
}

// keystoneCloudsFile is the administrator's way into Keystone, in which the cloud has
// the name of keystoneAdminCloud.
func (c *Config) keystoneCloudsFile() string { return c.state().path("clouds.yaml") }

func (c *Config) keystoneAdminCloud() string { return "h8s-" + c.Name }

// prepareKeystone makes Keystone's database before the supervisor starts it: not two at
// once.
func (b *bringUp) prepareKeystone(ctx context.Context) error {
	k, err := keystone.Prepare(ctx, b.keystoneOptions())
	if err != nil {
		return err
	}
	return writeFile(b.keystoneCloudsFile(), k.AdminCloud(b.keystoneAdminCloud()), 0o600)
}

// startKeystone waits for Keystone and gives the controller what it needs there.
func (b *bringUp) startKeystone(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	k, err := keystone.Prepare(ctx, b.keystoneOptions())
	if err != nil {
		return err
	}
	if err := k.Await(ctx); err != nil {
		return err
	}
	clouds, err := k.EnsureServiceUser(ctx, keystoneUser, keystoneCloud)
	if err != nil {
		return err
	}
	reader, err := k.EnsureReader(ctx, keystoneReader, keystoneReader)
	if err != nil {
		return err
	}
	return b.ensureSecret(ctx, keystoneSecret, corev1.SecretTypeOpaque, map[string][]byte{"clouds.yaml": keystone.Clouds(clouds, reader)})
}
