package cluster

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/internal/identity"
)

// OIDC says whose ID tokens (OpenID Connect Core 1.0) the API server believes, and
// what they make of a person.
type OIDC struct {
	IssuerURL string `json:"issuerURL"`
	// ClientID is the audience that a token must be for.
	ClientID string `json:"clientID"`
	// CA of the issuer, PEM; the machine's own if empty.
	CA string `json:"ca,omitempty"`
	// UsernameClaim and GroupsClaim are where names stand in a token.
	UsernameClaim string `json:"usernameClaim"`
	GroupsClaim   string `json:"groupsClaim,omitempty"`
	// Prefix of every user and group that comes from the issuer, such as "oidc:", so
	// that nobody there is named like somebody from elsewhere.
	Prefix string `json:"prefix"`
}

// Validate says what is wrong, if anything, where names of the prefix are Keystone's.
func (o *OIDC) Validate(keystone identity.Prefix) error {
	switch u, err := url.Parse(o.IssuerURL); {
	case err != nil || u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("--oidc-issuer-url %q must be a URL that starts with https:// and has no query", o.IssuerURL)
	case o.ClientID == "":
		return errors.New("--oidc-client-id is missing: the client that tokens must be for")
	case o.UsernameClaim == "":
		return errors.New("--oidc-username-claim is empty: name the claim that has the user's name, such as email or sub")
	case o.CA != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(o.CA)):
		return errors.New("--oidc-ca-file has no PEM certificate")
	}
	// Without, or with another's, people of the issuer could have the names of others.
	switch prefix, err := identity.ParsePrefix(o.Prefix); {
	case err != nil:
		return fmt.Errorf("--oidc-username-prefix: %w", err)
	case prefix == keystone || prefix == identity.DefaultPrefix:
		return fmt.Errorf("--oidc-username-prefix %q: names that begin so are Keystone's: choose another, such as oidc:", o.Prefix)
	}
	return nil
}

// AuthenticationConfiguration is the file for the API server's flag
// --authentication-config (structured authentication, KEP-3331).
func (o *OIDC) AuthenticationConfiguration() ([]byte, error) {
	// The types of k8s.io/apiserver are not worth that dependency.
	type object = map[string]any
	issuer := object{"url": o.IssuerURL, "audiences": []string{o.ClientID}}
	if o.CA != "" {
		issuer["certificateAuthority"] = o.CA
	}
	claims := object{"username": object{"claim": o.UsernameClaim, "prefix": o.Prefix}}
	if o.GroupsClaim != "" {
		claims["groups"] = object{"claim": o.GroupsClaim, "prefix": o.Prefix}
	}
	data, err := yaml.Marshal(struct {
		metav1.TypeMeta `json:",inline"`
		JWT             []object `json:"jwt"`
	}{
		metav1.TypeMeta{APIVersion: "apiserver.config.k8s.io/v1", Kind: "AuthenticationConfiguration"},
		[]object{{"issuer": issuer, "claimMappings": claims}},
	})
	if err != nil {
		return nil, fmt.Errorf("render the API server's authentication: %w", err)
	}
	return data, nil
}
