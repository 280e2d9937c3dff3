// Package login gets a person's credentials for a cluster and keeps them fresh: a
// Keystone token, an OpenID Connect ID token, or a client certificate that the
// cluster itself renews. kubectl asks for them through the exec credential plugin
// `h8s credential` (client.authentication.k8s.io/v1, KEP-541).
//
// A session is one way in, by name. Its file in the user's cache directory holds how
// to log in, which is not secret, and the last credential, which is. Passwords and
// one-time codes are asked on the terminal, used once and never stored.
package login

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrPersonNeeded means that a provider cannot go on without somebody to ask.
var ErrPersonNeeded = errors.New("nobody can be asked")

// Credential is what a provider gave: a bearer token, or a certificate with its key.
type Credential struct {
	Token string `json:"token,omitempty"`
	// Certificate and Key are PEM.
	Certificate string `json:"certificate,omitempty"`
	Key         string `json:"key,omitempty"`
	// Refresh is an OAuth refresh token (RFC 6749, section 1.5).
	Refresh string `json:"refresh,omitempty"`
	// Subject is whose ID token it is (OpenID Connect Core 1.0, section 2).
	Subject string `json:"subject,omitempty"`
	// Renew is when it should be replaced, Expires when it is worth nothing.
	Renew   time.Time `json:"renew"`
	Expires time.Time `json:"expires"`
}

// skew is for how long before its end a credential is no longer handed out: the
// request that it is for takes time, and clocks differ.
const skew = 10 * time.Second

func (c *Credential) usable(now time.Time) bool {
	return c != nil && (c.Token != "" || c.Certificate != "") && now.Before(c.Expires.Add(-skew))
}

// revocable says whether it may be worth something to somebody else: how long a
// refresh token lives, only its issuer knows.
func (c *Credential) revocable(now time.Time) bool {
	return c.usable(now) || c != nil && c.Refresh != ""
}

func (c *Credential) fresh(now time.Time) bool { return c.usable(now) && now.Before(c.Renew) }

// Provider is a place that credentials come from.
type Provider interface {
	// Login gets a credential and may ask.
	Login(ctx context.Context, person Person) (*Credential, error)
	// Renew gets another without asking; ErrPersonNeeded if it cannot. Have is the
	// last credential, nil if there is none. What of it is spent, such as a refresh token,
	// is replaced in it even if Renew fails.
	Renew(ctx context.Context, have *Credential) (*Credential, error)
	// Revoke makes the credential worthless where it came from, if that is possible.
	Revoke(ctx context.Context, have *Credential) error
}

// Person is who sits at the terminal.
type Person interface {
	// Ask returns a line; a secret one is not shown.
	Ask(ctx context.Context, question string, secret bool) (string, error)
	// Tell shows a message.
	Tell(message string)
}

// Cluster is an API server that credentials are for. Its name in a kubeconfig says
// nothing: every kubeadm's is "kubernetes".
type Cluster struct {
	Server string `json:"server"`
	// CA is PEM; the machine's own if empty.
	CA string `json:"ca,omitempty"`
}

func (c Cluster) sameServer(other Cluster) bool {
	return strings.TrimRight(c.Server, "/") == strings.TrimRight(other.Server, "/")
}

func (c Cluster) same(other Cluster) bool {
	return c.sameServer(other) && strings.TrimSpace(c.CA) == strings.TrimSpace(other.CA)
}

// Session is how one gets into a cluster. Exactly one of the providers is set.
type Session struct {
	Cluster Cluster `json:"cluster"`

	Keystone    *Keystone    `json:"keystone,omitempty"`
	OIDC        *OIDC        `json:"oidc,omitempty"`
	Certificate *Certificate `json:"certificate,omitempty"`

	Credential *Credential `json:"credential,omitempty"`
}

func (s *Session) provider() (Provider, error) {
	switch {
	case s.Keystone != nil:
		return s.Keystone, nil
	case s.OIDC != nil:
		return s.OIDC, nil
	case s.Certificate != nil:
		return s.Certificate, nil
	}
	return nil, errors.New("the session says nothing of where its credentials come from")
}

// Timeouts of one exchange with a provider. A person needs longer, and nobody shall
// wait for what is not needed yet.
const (
	machineTime = 30 * time.Second
	personTime  = 10 * time.Minute
	spareTime   = 2 * time.Second
	// respite is for how long a renewal is not tried again after one that failed.
	respite = 30 * time.Second
)

// Login gets a credential for the session, asking the person what it must, sets it
// there and keeps the session under the name. It replaces what the name stood for, but not the session
// of another server.
func (c Cache) Login(ctx context.Context, name string, s *Session, person Person) error {
	provider, err := s.provider()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, personTime)
	defer cancel()
	if err := c.replaceable(name, s.Cluster); err != nil { // nobody types in vain
		return err
	}
	// Before the lock: kubectl must not wait for a person who types.
	if s.Credential, err = provider.Login(ctx, person); err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	unlock, err := c.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.replaceable(name, s.Cluster); err != nil {
		return err
	}
	return c.save(name, s)
}

// replaceable says what keeps a login to the cluster from taking the name. The same
// server with another CA is a cluster that was made anew.
func (c Cache) replaceable(name string, cluster Cluster) error {
	if have, err := c.load(name); err == nil && have.Cluster.Server != "" && !have.Cluster.sameServer(cluster) {
		return fmt.Errorf("the session %q is for %s: choose another name with --session, or end it with `h8s logout --session %s`", name, have.Cluster.Server, name)
	}
	return nil // what cannot be read is worth nothing
}

// Credential returns a credential of the session that is good for a while, and gets
// another when the last one is near its end. While that is good a renewal may take two
// seconds, every half minute. It refuses if the session is for another cluster than the
// one that shall get the credential. Several processes may call it at the same time: one
// of them renews and the others wait for it. Person is nil if nobody can be asked; the
// error then says to run `h8s login`.
func (c Cache) Credential(ctx context.Context, name string, cluster Cluster, person Person) (*Credential, error) {
	s, err := c.open(name, cluster)
	if err != nil {
		return nil, err
	}
	if s.Credential.fresh(time.Now()) {
		return s.Credential, nil
	}
	limit := machineTime
	if s.Credential.usable(time.Now()) {
		limit = spareTime
	}
	renewed, err := c.renew(ctx, name, cluster, limit)
	switch {
	case err == nil:
		return renewed, nil
	case s.Credential.usable(time.Now()):
		// There is time to try again, and whoever gets the request judges it anyway.
		return s.Credential, nil
	case person == nil || !errors.Is(err, ErrPersonNeeded):
		return nil, fmt.Errorf("the session %q has ended (%w): run `h8s login` again", name, err)
	}
	if err := c.Login(ctx, name, s, person); err != nil {
		return nil, err
	}
	return s.Credential, nil
}

// open reads a session that is for the cluster.
func (c Cache) open(name string, cluster Cluster) (*Session, error) {
	s, err := c.load(name)
	if err != nil {
		return nil, err
	}
	if !s.Cluster.same(cluster) {
		return nil, fmt.Errorf("the session %q is for the cluster at %q, with the CA of the login, and this is another at %q: log in to this one with `h8s login`, and --session if you want both", name, s.Cluster.Server, cluster.Server)
	}
	return s, nil
}

// renew gets and keeps another credential, if no other process has while this one
// waited for its turn.
func (c Cache) renew(ctx context.Context, name string, cluster Cluster, limit time.Duration) (*Credential, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	unlock, err := c.lock(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := c.open(name, cluster)
	if err != nil {
		return nil, err
	}
	if s.Credential.fresh(time.Now()) {
		return s.Credential, nil
	}
	provider, err := s.provider()
	if err != nil {
		return nil, err
	}
	renewed, err := provider.Renew(ctx, s.Credential)
	if err == nil {
		s.Credential = renewed
		return renewed, c.save(name, s)
	}
	if s.Credential != nil {
		s.Credential.Renew = time.Now().Add(respite)
		err = errors.Join(err, c.save(name, s))
	}
	return nil, err
}

// Logout revokes the session's credential and forgets the session. A session that
// does not exist is fine. It is forgotten even if its provider cannot be told; the
// error then says so.
func (c Cache) Logout(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, machineTime)
	defer cancel()
	unlock, err := c.lock(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := c.load(name)
	if errors.Is(err, errNoSession) {
		return nil
	}
	var revoked error
	if err == nil && s.Credential.revocable(time.Now()) {
		until := s.Credential.Expires.Format(time.RFC3339)
		if s.Credential.Refresh != "" {
			until = "its issuer ends it"
		}
		provider, err := s.provider()
		if err != nil {
			revoked = err
		} else if err := provider.Revoke(ctx, s.Credential); err != nil {
			revoked = fmt.Errorf("the session is forgotten here, but its credential could not be revoked and stays valid until %s: %w", until, err)
		}
	}
	return errors.Join(revoked, c.remove(name))
}
