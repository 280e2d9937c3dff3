package login

import (
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
			if (err != nil) != test.refused || (got == nil) != test.refused {
				t.Errorf("%v, %v", got, err)
			}
			if test.refused && !strings.Contains(err.Error(), "h8s login") {
				t.Errorf("%v, want what to do", err)
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
