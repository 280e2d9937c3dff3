package login

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
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
