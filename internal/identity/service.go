package identity

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/tokens"
)

// Service is a service user's access to Keystone. It logs in when it is first needed,
// and again when its token ends or is refused; the credentials are read anew each
// time, so that they may be replaced at any time.
//
// To validate tokens the user needs the role `service` in some project, and no other; to
// be a Directory's, the role `reader` on the system.
type Service struct {
	path, cloud string
	now         func() time.Time

	mu      sync.Mutex
	current *session
	// failed is the outcome of a login that failed at a time: a wrong password is not
	// tried again for each token, some Keystones would lock the user out.
	failed   error
	failedAt time.Time
}

// session is one login.
type session struct {
	client *gophercloud.ServiceClient
	// renew is when another login takes its place: well before the token ends.
	renew time.Time
}

const (
	// loginPause is how long a failed login stands for the next ones.
	loginPause = time.Second
	// maxConns is how many connections to Keystone there may be.
	maxConns = 32
)

// NewService reads the credentials of a cloud from a clouds.yaml, of which it says at
// once if it cannot be used.
func NewService(path, cloud string) (*Service, error) {
	s := &Service{path: path, cloud: cloud, now: time.Now}
	if _, _, err := s.credentials(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Service) credentials() (*gophercloud.AuthOptions, *tls.Config, error) {
	auth, _, tlsConfig, err := clouds.Parse(clouds.WithLocations(s.path), clouds.WithCloudName(s.cloud))
	if err != nil {
		return nil, nil, fmt.Errorf("read the credentials of cloud %q in %s: %w", s.cloud, s.path, err)
	}
	if auth.IdentityEndpoint == "" {
		return nil, nil, fmt.Errorf("cloud %q in %s has no auth_url", s.cloud, s.path)
	}
	return &auth, tlsConfig, nil
}

// ask implements asker.
func (s *Service) ask(ctx context.Context, subject string) (t *token, err error) {
	err = s.use(ctx, func(client *gophercloud.ServiceClient) (err error) {
		t, err = question(ctx, client, subject)
		return err
	})
	if unexpected := (gophercloud.ErrUnexpectedResponseCode{}); errors.As(err, &unexpected) {
		return nil, verdict(unexpected.Actual)
	}
	return t, err
}

// use makes requests as the service user. If Keystone answers that it does not accept
// our own token, which may have been revoked, the requests are made once more with
// another.
func (s *Service) use(ctx context.Context, requests func(*gophercloud.ServiceClient) error) error {
	session, err := s.session(ctx)
	if err != nil {
		return err
	}
	err = requests(session.client)
	if !gophercloud.ResponseCodeIs(err, http.StatusUnauthorized) {
		return err
	}
	s.forget(session)
	if session, err = s.session(ctx); err != nil {
		return err
	}
	return requests(session.client)
}

// question is one request about a token.
func question(ctx context.Context, client *gophercloud.ServiceClient, subject string) (*token, error) {
	var body struct {
		Token *token `json:"token"`
	}
	// Without the catalogue the answer is a tenth as long.
	resp, err := client.Get(ctx, client.ServiceURL("auth", "tokens")+"?nocatalog", &body, &gophercloud.RequestOpts{
		MoreHeaders: map[string]string{"X-Subject-Token": subject},
		OkCodes:     []int{http.StatusOK, http.StatusNonAuthoritativeInfo},
	})
	if resp != nil {
		_ = resp.Body.Close()
	}
	switch {
	case err != nil:
		return nil, err
	case body.Token == nil:
		return nil, errors.New("Keystone's answer has no token in it")
	}
	return body.Token, nil
}

// forget ends the use of a session, unless another has replaced it already.
func (s *Service) forget(old *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current == old {
		s.current = nil
	}
	old.client.HTTPClient.CloseIdleConnections()
}

// session is a login that is good, or the reason why there is none. Others wait while
// one logs in: for its deadline at most.
func (s *Service) session(ctx context.Context) (*session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	if s.current != nil && now.Before(s.current.renew) {
		return s.current, nil
	}
	if s.failed != nil && now.Sub(s.failedAt) < loginPause {
		return nil, s.failed
	}
	next, err := s.login(ctx)
	if err != nil {
		s.failed, s.failedAt = err, s.now()
		return nil, err
	}
	if s.current != nil {
		s.current.client.HTTPClient.CloseIdleConnections()
	}
	s.current, s.failed = next, nil
	return next, nil
}

func (s *Service) login(ctx context.Context) (*session, error) {
	auth, tlsConfig, err := s.credentials()
	if err != nil {
		return nil, err
	}
	provider, err := openstack.NewClient(auth.IdentityEndpoint)
	if err != nil {
		return nil, fmt.Errorf("use the auth_url of cloud %q: %w", s.cloud, err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = tlsConfig
	transport.MaxConnsPerHost = maxConns
	transport.MaxIdleConnsPerHost = maxConns
	transport.DialContext = (&net.Dialer{Timeout: 2 * time.Second}).DialContext
	provider.HTTPClient = http.Client{Transport: transport}
	if err := openstack.AuthenticateV3(ctx, provider, auth, gophercloud.EndpointOpts{}); err != nil {
		transport.CloseIdleConnections()
		var unexpected gophercloud.ErrUnexpectedResponseCode
		if errors.As(err, &unexpected) {
			return nil, fmt.Errorf("Keystone refuses the service user's login with status %d: look at the credentials of cloud %q", unexpected.Actual, s.cloud)
		}
		return nil, fmt.Errorf("log in as the service user: %w", err)
	}
	client, err := openstack.NewIdentityV3(provider, gophercloud.EndpointOpts{})
	if err != nil {
		return nil, err
	}
	result, ok := provider.GetAuthResult().(tokens.CreateResult)
	if !ok {
		return nil, errors.New("Keystone's answer to the service user's login is not of version 3")
	}
	own, err := result.ExtractToken()
	if err != nil {
		return nil, fmt.Errorf("read the service user's token: %w", err)
	}
	now := s.now()
	return &session{client: client, renew: now.Add(own.ExpiresAt.Sub(now) * 9 / 10)}, nil
}
