package login

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"
)

// OIDC gets ID tokens of an OpenID Connect provider, for a public client, by the
// device flow (RFC 8628): the person approves in whatever browser there is, and
// passwords never come here. It implements Provider.
type OIDC struct {
	Issuer   string `json:"issuer"`
	ClientID string `json:"clientID"`
	// Scopes besides openid and offline_access; what the provider wants for the
	// claims that the API server reads, such as groups.
	Scopes []string `json:"scopes,omitempty"`
	// CA (PEM) of the provider; the machine's own if empty.
	CA string `json:"ca,omitempty"`
}

// client finds the provider's endpoints (OpenID Connect Discovery 1.0). The context
// that it returns carries the HTTP client.
func (o *OIDC) client(ctx context.Context) (context.Context, *oidc.Provider, *oauth2.Config, error) {
	httpClient, err := httpClient(o.CA)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx = oidc.ClientContext(ctx, httpClient)
	provider, err := oidc.NewProvider(ctx, o.Issuer)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("ask the OIDC issuer %s for its endpoints: %w", o.Issuer, err)
	}
	config := &oauth2.Config{
		ClientID: o.ClientID,
		Endpoint: provider.Endpoint(),
		Scopes:   append([]string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess}, o.Scopes...),
	}
	config.Endpoint.AuthStyle = oauth2.AuthStyleInParams // a public client has nothing to authenticate with
	return ctx, provider, config, nil
}

// Login implements Provider.
func (o *OIDC) Login(ctx context.Context, person Person) (*Credential, error) {
	ctx, provider, config, err := o.client(ctx)
	if err != nil {
		return nil, err
	}
	if config.Endpoint.DeviceAuthURL == "" {
		return nil, fmt.Errorf("the OIDC issuer %s has no device flow (RFC 8628): ask its operator to allow it", o.Issuer)
	}
	device, err := config.DeviceAuth(ctx)
	if err != nil {
		return nil, fmt.Errorf("begin the device flow: %w", err)
	}
	where := device.VerificationURI
	if device.VerificationURIComplete != "" {
		where = device.VerificationURIComplete
	}
	person.Tell(fmt.Sprintf("Open %s in a browser and confirm the code %s", where, device.UserCode))
	token, err := config.DeviceAccessToken(ctx, device)
	if err != nil {
		return nil, fmt.Errorf("wait for your approval: %w", err)
	}
	return o.credential(ctx, provider, token, "")
}

// Renew implements Provider by the refresh token. Providers may give each of them
// once only (RFC 9700, section 4.14), so the new one must be kept.
func (o *OIDC) Renew(ctx context.Context, have *Credential) (*Credential, error) {
	if have == nil || have.Refresh == "" || have.Subject == "" {
		return nil, fmt.Errorf("%w, and there is no refresh token", ErrPersonNeeded)
	}
	ctx, provider, config, err := o.client(ctx)
	if err != nil {
		return nil, err
	}
	token, err := config.TokenSource(ctx, &oauth2.Token{RefreshToken: have.Refresh}).Token()
	var refused *oauth2.RetrieveError
	// RFC 6749, section 5.2, wants invalid_grant; Dex says invalid_request.
	if errors.As(err, &refused) && refused.ErrorCode != "" && refused.Response.StatusCode < http.StatusInternalServerError {
		return nil, fmt.Errorf("%w: the OIDC issuer takes the refresh token no more: %w", ErrPersonNeeded, err)
	}
	if err != nil {
		return nil, fmt.Errorf("renew the OIDC token: %w", err)
	}
	have.Refresh = token.RefreshToken // the other is spent, whatever becomes of this renewal
	return o.credential(ctx, provider, token, have.Subject)
}

// credential verifies the ID token. Subject is whose it must be, empty for anybody's.
func (o *OIDC) credential(ctx context.Context, provider *oidc.Provider, token *oauth2.Token, subject string) (*Credential, error) {
	raw, _ := token.Extra("id_token").(string)
	if raw == "" {
		return nil, fmt.Errorf("%w: the OIDC issuer gave no ID token", ErrPersonNeeded)
	}
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: o.ClientID}).Verify(ctx, raw)
	if err != nil {
		return nil, fmt.Errorf("verify the OIDC token: %w", err)
	}
	if subject != "" && id.Subject != subject { // OpenID Connect Core 1.0, section 12.2
		return nil, fmt.Errorf("%w: the renewed OIDC token is somebody else's (sub %q, not %q)", ErrPersonNeeded, id.Subject, subject)
	}
	now := time.Now()
	return &Credential{Token: raw, Refresh: token.RefreshToken, Subject: id.Subject, Renew: renewal(now, id.Expiry), Expires: id.Expiry}, nil
}

// Revoke implements Provider for issuers that can revoke refresh tokens (RFC 7009).
// ID tokens cannot be revoked by anybody.
func (o *OIDC) Revoke(ctx context.Context, have *Credential) error {
	ctx, provider, _, err := o.client(ctx)
	if err != nil {
		return err
	}
	var endpoints struct {
		Revocation string `json:"revocation_endpoint"`
	}
	if err := provider.Claims(&endpoints); err != nil || endpoints.Revocation == "" || have.Refresh == "" {
		return err
	}
	form := url.Values{"token": {have.Refresh}, "token_type_hint": {"refresh_token"}, "client_id": {o.ClientID}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoints.Revocation, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	client, err := httpClient(o.CA)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("revoke the refresh token: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("revoke the refresh token: the OIDC issuer answers %s", response.Status)
	}
	return nil
}

// renewal is when a token should be replaced: shortly before its end, and for short
// ones not before most of their time is over.
func renewal(now, expires time.Time) time.Time {
	return expires.Add(-min(2*time.Minute, expires.Sub(now)/5))
}

func httpClient(ca string) (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if ca != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(ca)) {
			return nil, errors.New("the file of CA certificates has none: give one with PEM certificates")
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{Transport: transport, Timeout: machineTime}, nil
}
