package login

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
	"sigs.k8s.io/yaml"
)

// Keystone gets tokens of OpenStack's Identity API v3. It implements Provider. Where
// and who stands in clouds.yaml, as of the name of a cloud in it, or in OS_*
// variables, as OpenStack's own clients have it. Secrets of the file or the environment are
// read each time and not kept.
type Keystone struct {
	// Cloud is the name in File, the absolute path of clouds.yaml.
	Cloud string `json:"cloud,omitempty"`
	File  string `json:"file,omitempty"`
	// Environment has the OS_* variables of the login that are not secret, if Cloud
	// is empty.
	Environment map[string]string `json:"environment,omitempty"`
	// TOTP asks for a one-time code (RFC 6238) besides the password, if there is one.
	TOTP bool `json:"totp,omitempty"`

	lookup func(string) string
}

// The variables that say where and who, and those that are secret.
var (
	osSettings = []string{
		"OS_AUTH_URL", "OS_AUTH_TYPE", "OS_USERNAME", "OS_USER_ID", "OS_USER_DOMAIN_NAME", "OS_USER_DOMAIN_ID",
		"OS_PROJECT_NAME", "OS_PROJECT_ID", "OS_PROJECT_DOMAIN_NAME", "OS_PROJECT_DOMAIN_ID", "OS_DOMAIN_NAME", "OS_DOMAIN_ID",
		"OS_SYSTEM_SCOPE", "OS_TRUST_ID", "OS_APPLICATION_CREDENTIAL_ID", "OS_APPLICATION_CREDENTIAL_NAME", "OS_CACERT",
	}
	errNoKeystone = errors.New("it is not said which Keystone: name a cloud of clouds.yaml with --os-cloud, or set OS_AUTH_URL and the other OS_* variables")
)

// NewKeystone reads which cloud is meant: the one named, or that of OS_CLOUD, or what the
// other OS_* variables say. Lookup is os.Getenv.
func NewKeystone(cloud string, totp bool, lookup func(string) string) (*Keystone, error) {
	k := &Keystone{Cloud: cloud, TOTP: totp, lookup: lookup}
	if k.Cloud == "" {
		k.Cloud = lookup("OS_CLOUD")
	}
	if k.Cloud != "" {
		var err error
		k.File, err = cloudsFile(lookup)
		return k, err
	}
	k.Environment = map[string]string{}
	for _, name := range osSettings {
		if value := lookup(name); value != "" {
			k.Environment[name] = value
		}
	}
	if k.Environment["OS_AUTH_URL"] == "" {
		return nil, errNoKeystone
	}
	return k, nil
}

// cloudsFile finds clouds.yaml where OpenStack's clients do.
func cloudsFile(lookup func(string) string) (string, error) {
	if named := lookup("OS_CLIENT_CONFIG_FILE"); named != "" {
		return filepath.Abs(named)
	}
	config := lookup("XDG_CONFIG_HOME")
	if config == "" {
		config = filepath.Join(lookup("HOME"), ".config")
	}
	candidates := []string{"clouds.yaml", filepath.Join(config, "openstack", "clouds.yaml"), "/etc/openstack/clouds.yaml"}
	for _, path := range candidates {
		if _, err := os.Stat(path); err == nil {
			return filepath.Abs(path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look for clouds.yaml: %w", err)
		}
	}
	return "", fmt.Errorf("there is no clouds.yaml (looked for %s): name it in OS_CLIENT_CONFIG_FILE", strings.Join(candidates, ", "))
}

// resolve reads what to log in with; what only a person knows is missing.
func (k *Keystone) resolve() (opts gophercloud.AuthOptions, totp bool, tlsConfig *tls.Config, err error) {
	name := k.Cloud
	var data []byte
	var parse []clouds.ParseOption
	if name != "" {
		if data, err = os.ReadFile(k.File); err != nil {
			return opts, false, nil, fmt.Errorf("read clouds.yaml: %w", err)
		}
		parse = append(parse, clouds.WithLocations(k.File))
	} else {
		name = "environment"
		if data, err = json.Marshal(clouds.Clouds{Clouds: map[string]clouds.Cloud{name: k.environment()}}); err != nil {
			return opts, false, nil, err
		}
		parse = append(parse, clouds.WithCloudsYAML(bytes.NewReader(data)), clouds.WithSecureYAML(strings.NewReader("{}")))
	}
	if opts, _, tlsConfig, err = clouds.Parse(append(parse, clouds.WithCloudName(name))...); err != nil {
		return opts, false, nil, fmt.Errorf("read how to log in to Keystone: %w", err)
	}
	var all clouds.Clouds // the one thing that Parse does not tell
	if err := yaml.Unmarshal(data, &all); err != nil {
		return opts, false, nil, fmt.Errorf("parse clouds.yaml: %w", err)
	}
	kind := string(all.Clouds[name].AuthType)
	return opts, k.TOTP || strings.Contains(kind, "totp") || strings.Contains(kind, "multifactor"), tlsConfig, nil
}

// environment is the OS_* variables as a cloud. Secrets are taken only while the
// variables mean what they meant when the session began: nobody's password goes to
// another's Keystone because a shell has changed.
func (k *Keystone) environment() clouds.Cloud {
	lookup := k.lookup
	if lookup == nil {
		lookup = os.Getenv
	}
	secret := lookup
	for _, name := range osSettings {
		if lookup(name) != k.Environment[name] {
			secret = func(string) string { return "" }
		}
	}
	env := k.Environment
	return clouds.Cloud{
		AuthType:   clouds.AuthType(env["OS_AUTH_TYPE"]),
		CACertFile: env["OS_CACERT"],
		AuthInfo: &clouds.AuthInfo{
			AuthURL:  env["OS_AUTH_URL"],
			Username: env["OS_USERNAME"], UserID: env["OS_USER_ID"],
			UserDomainName: env["OS_USER_DOMAIN_NAME"], UserDomainID: env["OS_USER_DOMAIN_ID"],
			ProjectName: env["OS_PROJECT_NAME"], ProjectID: env["OS_PROJECT_ID"],
			ProjectDomainName: env["OS_PROJECT_DOMAIN_NAME"], ProjectDomainID: env["OS_PROJECT_DOMAIN_ID"],
			DomainName: env["OS_DOMAIN_NAME"], DomainID: env["OS_DOMAIN_ID"],
			SystemScope: env["OS_SYSTEM_SCOPE"], TrustID: env["OS_TRUST_ID"],
			ApplicationCredentialID: env["OS_APPLICATION_CREDENTIAL_ID"], ApplicationCredentialName: env["OS_APPLICATION_CREDENTIAL_NAME"],
			Password: secret("OS_PASSWORD"), Token: secret("OS_TOKEN"), ApplicationCredentialSecret: secret("OS_APPLICATION_CREDENTIAL_SECRET"),
		},
	}
}

// Login implements Provider.
func (k *Keystone) Login(ctx context.Context, person Person) (*Credential, error) {
	opts, totp, tlsConfig, err := k.resolve()
	if err != nil {
		return nil, err
	}
	switch isUser := opts.TokenID == "" && opts.ApplicationCredentialID == "" && opts.ApplicationCredentialName == ""; {
	case !isUser && opts.TokenID == "" && opts.ApplicationCredentialSecret == "":
		opts.ApplicationCredentialSecret, err = person.Ask(ctx, "Secret of the application credential at "+opts.IdentityEndpoint, true)
	case isUser:
		err = k.askUser(ctx, person, &opts, totp)
	}
	if err != nil {
		return nil, err
	}
	return authenticate(ctx, opts, tlsConfig)
}

func (k *Keystone) askUser(ctx context.Context, person Person, opts *gophercloud.AuthOptions, totp bool) (err error) {
	if opts.Username == "" && opts.UserID == "" {
		if opts.Username, err = person.Ask(ctx, "User name at "+opts.IdentityEndpoint, false); err != nil {
			return err
		}
	}
	who := opts.Username + opts.UserID + " at " + opts.IdentityEndpoint
	if opts.Password == "" {
		question := "Password of " + who
		if totp {
			question += " (empty if it needs only a one-time code)"
		}
		if opts.Password, err = person.Ask(ctx, question, true); err != nil {
			return err
		}
	}
	if totp {
		opts.Passcode, err = person.Ask(ctx, "One-time code of "+who, true)
	}
	return err
}

// Renew implements Provider, where clouds.yaml or the environment has all that it takes.
// A token does not prolong itself: one that it gets ends when it does itself.
func (k *Keystone) Renew(ctx context.Context, _ *Credential) (*Credential, error) {
	opts, totp, tlsConfig, err := k.resolve()
	switch {
	case err != nil:
		return nil, err
	case totp, opts.TokenID != "", opts.Password == "" && opts.ApplicationCredentialSecret == "":
		return nil, fmt.Errorf("%w for what Keystone wants", ErrPersonNeeded)
	}
	return authenticate(ctx, opts, tlsConfig)
}

func authenticate(ctx context.Context, opts gophercloud.AuthOptions, tlsConfig *tls.Config) (*Credential, error) {
	if opts.TokenID != "" { // gophercloud takes no other names with it
		opts.Username, opts.UserID, opts.DomainID, opts.DomainName, opts.Password = "", "", "", "", ""
	}
	if opts.UserID != "" {
		opts.DomainID, opts.DomainName = "", ""
	}
	identity, err := identityClient(opts.IdentityEndpoint, tlsConfig)
	if err != nil {
		return nil, err
	}
	token, err := tokens.Create(ctx, identity, &opts).ExtractToken()
	switch {
	case gophercloud.ResponseCodeIs(err, http.StatusUnauthorized):
		// Keystone does not say what of it is wrong; nor does gophercloud's error help.
		return nil, fmt.Errorf("%w: Keystone at %s refuses: the user, domain, password, code or project is wrong, or the user is disabled", ErrPersonNeeded, opts.IdentityEndpoint)
	case err != nil:
		return nil, fmt.Errorf("get a token of Keystone at %s: %w", opts.IdentityEndpoint, err)
	}
	return &Credential{Token: token.ID, Renew: renewal(time.Now(), token.ExpiresAt), Expires: token.ExpiresAt}, nil
}

// Revoke implements Provider (Identity API v3, DELETE /v3/auth/tokens).
func (k *Keystone) Revoke(ctx context.Context, have *Credential) error {
	opts, _, tlsConfig, err := k.resolve()
	if err != nil {
		return err
	}
	identity, err := identityClient(opts.IdentityEndpoint, tlsConfig)
	if err != nil {
		return err
	}
	identity.SetToken(have.Token)
	err = tokens.Revoke(ctx, identity, have.Token).Err
	if gophercloud.ResponseCodeIs(err, http.StatusNotFound) || gophercloud.ResponseCodeIs(err, http.StatusUnauthorized) {
		return nil // it is worth nothing already
	}
	return err
}

func identityClient(url string, tlsConfig *tls.Config) (*gophercloud.ServiceClient, error) {
	if url == "" {
		return nil, errNoKeystone
	}
	client, err := openstack.NewClient(url)
	if err != nil {
		return nil, fmt.Errorf("address of Keystone: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = tlsConfig
	client.HTTPClient = http.Client{Transport: transport, Timeout: machineTime}
	return openstack.NewIdentityV3(client, gophercloud.EndpointOpts{})
}
