package login

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/cert"
)

func TestCredentialIsForOneCluster(t *testing.T) {
	mine := Cluster{Server: "https://prod:6443", CA: "CA\n"}
	for name, test := range map[string]struct {
		cluster Cluster
		refused bool
	}{
		"the same":            {cluster: mine},
		"written differently": {cluster: Cluster{Server: "https://prod:6443/", CA: "CA"}},
		"another server":      {Cluster{Server: "https://evil:6443", CA: "CA\n"}, true},
		"another CA":          {Cluster{Server: "https://prod:6443", CA: "EVIL\n"}, true},
		"no CA":               {Cluster{Server: "https://prod:6443"}, true},
		"nothing":             {Cluster{}, true},
	} {
		t.Run(name, func(t *testing.T) {
			cache := newCache(t, Session{Cluster: mine, Credential: goodFor(time.Hour)})
			got, err := cache.Credential(t.Context(), "s", test.cluster, nil)
			if !test.refused && err != nil {
				t.Error(err)
			}
			if test.refused && (err == nil || got != nil || !strings.Contains(err.Error(), "h8s login")) {
				t.Errorf("%v, %v, want a refusal that says what to do", got, err)
			}
		})
	}
}

func TestLoginReplaces(t *testing.T) {
	for name, test := range map[string]struct {
		cluster Cluster
		refused bool
	}{
		"the same cluster":                       {cluster: Cluster{Server: "https://prod:6443", CA: "CA"}},
		"the same server, the cluster made anew": {cluster: Cluster{Server: "https://prod:6443", CA: "NEW"}},
		"another server":                         {Cluster{Server: "https://dev:6443", CA: "CA"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			cache := newCache(t, Session{Cluster: Cluster{Server: "https://prod:6443", CA: "CA"}, Credential: goodFor(time.Hour)})
			if err := cache.replaceable("s", test.cluster); (err != nil) != test.refused {
				t.Error(err)
			}
			if err := cache.replaceable("another", test.cluster); err != nil {
				t.Errorf("a new name: %v", err)
			}
		})
	}
}

func TestLogoutRevokes(t *testing.T) {
	for name, test := range map[string]struct {
		spent bool
		down  bool
		want  string // part of the error
	}{
		"a credential that is good":              {},
		"only the refresh token is good":         {spent: true},
		"that cannot be, and the person is told": {spent: true, down: true, want: "could not be revoked and stays valid until its issuer ends it"},
	} {
		t.Run(name, func(t *testing.T) {
			issuer := newIssuer(t)
			cache := newCache(t, issuer.session(test.spent))
			if test.down {
				issuer.Close()
			}
			err := cache.Logout(t.Context(), "s")
			if (err != nil) != test.down || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("logout: %v", err)
			}
			if !test.down && !slices.Equal(issuer.revoked, []string{"refresh-0"}) {
				t.Errorf("revoked are %q, want the refresh token", issuer.revoked)
			}
			if _, err := cache.load("s"); !errors.Is(err, errNoSession) {
				t.Errorf("the session is not forgotten: %v", err)
			}
		})
	}
}

// TestRenewalOutlivesKeys renews twice, at an issuer whose key is another than that of the
// last ID token.
func TestRenewalOutlivesKeys(t *testing.T) {
	issuer := newIssuer(t)
	cache := newCache(t, issuer.session(true))
	for n := range 2 {
		issuer.rotateKey(t)
		got, err := cache.Credential(t.Context(), "s", Cluster{}, nil)
		if err != nil {
			t.Fatalf("renewal %d: %v", n, err)
		}
		if got.Subject != "ann" || got.Refresh != issuer.refresh {
			t.Errorf("renewal %d: %+v, want ann's, with the refresh token %q", n, got, issuer.refresh)
		}
		age(t, cache, "s", 24*time.Hour)
	}

	// Somebody else's token is not taken.
	issuer.subject = "eve"
	if got, err := cache.Credential(t.Context(), "s", Cluster{}, nil); err == nil || !errors.Is(err, ErrPersonNeeded) || got != nil {
		t.Errorf("%v, %v, want that eve's token is refused", got, err)
	}
}

// TestSpentRefreshToken has a renewal that fails after the refresh token was replaced.
func TestSpentRefreshToken(t *testing.T) {
	for name, spent := range map[string]bool{"the credential is good": false, "it has ended": true} {
		t.Run(name, func(t *testing.T) {
			issuer := newIssuer(t)
			cache := newCache(t, issuer.session(spent))
			issuer.broken = true
			if _, err := cache.Credential(t.Context(), "s", Cluster{}, nil); (err != nil) != spent {
				t.Fatalf("credential: %v", err)
			}
			issuer.broken = false
			age(t, cache, "s", 24*time.Hour)
			if _, err := cache.Credential(t.Context(), "s", Cluster{}, nil); err != nil {
				t.Errorf("the issuer is well again: %v", err)
			}
		})
	}
}

// TestSlowRenewal has one that does not end, while the credential is good.
func TestSlowRenewal(t *testing.T) {
	for name, test := range map[string]struct {
		locked bool
		calls  int
	}{
		"the issuer":      {calls: 2},
		"another process": {locked: true, calls: 1},
	} {
		t.Run(name, func(t *testing.T) {
			issuer := newIssuer(t)
			issuer.hangs = make(chan struct{})
			defer close(issuer.hangs)
			cache := newCache(t, issuer.session(false))
			if test.locked {
				unlock, err := cache.lock(t.Context(), "s")
				if err != nil {
					t.Fatal(err)
				}
				defer unlock()
			}
			for range test.calls {
				done := make(chan error, 1)
				go func() {
					_, err := cache.Credential(t.Context(), "s", Cluster{}, nil)
					done <- err
				}()
				select {
				case err := <-done:
					if err != nil {
						t.Errorf("the credential is good, and still: %v", err)
					}
				case <-time.After(machineTime / 2):
					t.Fatal("a credential that is good is kept back by its renewal")
				}
			}
			issuer.mu.Lock()
			defer issuer.mu.Unlock()
			if issuer.asked > 1 {
				t.Errorf("the issuer was asked %d times at once", issuer.asked)
			}
		})
	}
}

// slow is somebody who types while another process wants the lock.
type slow struct {
	cache  Cache
	locked error
}

var errGone = errors.New("the person has gone")

func (p *slow) Ask(ctx context.Context, _ string, _ bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	unlock, err := p.cache.lock(ctx, "s")
	if p.locked = err; err == nil {
		unlock()
	}
	return "", errGone
}

func (*slow) Tell(string) {}

func TestNobodyWaitsForWhoTypes(t *testing.T) {
	cache := newCache(t, Session{Keystone: &Keystone{Environment: map[string]string{
		"OS_AUTH_URL": "http://127.0.0.1:1/v3", "OS_USERNAME": "ann", "OS_USER_DOMAIN_NAME": "Default",
	}}})
	person := &slow{cache: cache}
	if _, err := cache.Credential(t.Context(), "s", Cluster{}, person); !errors.Is(err, errGone) {
		t.Fatalf("%v, want that the person was asked", err)
	}
	if person.locked != nil {
		t.Error(person.locked)
	}
}

// TestCertificateByProxy renews where the kubeconfig named a proxy; the session has been
// in its file since.
func TestCertificateByProxy(t *testing.T) {
	asked := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Method + " " + r.Host
		w.WriteHeader(http.StatusForbidden)
	}))
	t.Cleanup(proxy.Close)
	address, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	pair, key, err := cert.GenerateSelfSignedCertKey("ann", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	provider, err := NewCertificate(&rest.Config{
		Host: "https://far.invalid:6443", Proxy: http.ProxyURL(address), TLSClientConfig: rest.TLSClientConfig{CertData: pair, KeyData: key},
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := newCache(t, Session{Certificate: provider, Credential: provider.first}).load("s")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Certificate.Renew(t.Context(), s.Credential); err == nil {
		t.Error("renewed without a cluster")
	}
	select {
	case got := <-asked:
		if want := "CONNECT far.invalid:6443"; got != want {
			t.Errorf("the proxy was asked to %s, want %s", got, want)
		}
	default:
		t.Error("the proxy was not asked")
	}
}

// newCache has the session "s".
func newCache(t *testing.T, s Session) Cache {
	t.Helper()
	cache := Cache(t.TempDir())
	if err := cache.save("s", &s); err != nil {
		t.Fatal(err)
	}
	return cache
}

// goodFor is a credential that is fresh for so long.
func goodFor(d time.Duration) *Credential {
	return &Credential{Token: "good", Renew: time.Now().Add(d), Expires: time.Now().Add(d + time.Hour)}
}
