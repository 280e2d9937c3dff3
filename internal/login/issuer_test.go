package login

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

const clientID = "h8s" // of the issuer

// issuer is an OpenID Connect provider that does what a real one does too seldom, or
// never when it is asked to. It gives each refresh token once only.
type issuer struct {
	*httptest.Server

	mu      sync.Mutex
	key     ed25519.PrivateKey
	keyID   int
	subject string // whose ID tokens it gives
	refresh string // the only one that it takes
	issued  int
	broken  bool // its ID tokens' signature is not its keys'
	revoked []string
	asked   int           // how often somebody began to talk to it
	hangs   chan struct{} // if not nil, it answers when that is closed
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{subject: "ann", refresh: "refresh-0"}
	i.rotateKey(t)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		i.asked++
		i.mu.Unlock()
		if i.hangs != nil {
			select {
			case <-i.hangs:
			case <-r.Context().Done():
			}
		}
		answer(w, http.StatusOK, map[string]any{
			"issuer": i.URL, "jwks_uri": i.URL + "/keys", "token_endpoint": i.URL + "/token", "revocation_endpoint": i.URL + "/revoke",
			"id_token_signing_alg_values_supported": []string{"EdDSA"},
		})
	})
	mux.HandleFunc("GET /keys", func(w http.ResponseWriter, _ *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		answer(w, http.StatusOK, map[string]any{"keys": []map[string]any{{ // RFC 8037
			"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": fmt.Sprint(i.keyID),
			"x": base64.RawURLEncoding.EncodeToString(i.key.Public().(ed25519.PublicKey)),
		}}})
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		if r.FormValue("refresh_token") != i.refresh {
			answer(w, http.StatusBadRequest, map[string]any{"error": "invalid_grant"})
			return
		}
		i.issued++
		i.refresh = fmt.Sprintf("refresh-%d", i.issued)
		answer(w, http.StatusOK, map[string]any{
			"access_token": "access", "token_type": "Bearer", "expires_in": 3600, "refresh_token": i.refresh, "id_token": i.idToken(),
		})
	})
	mux.HandleFunc("POST /revoke", func(w http.ResponseWriter, r *http.Request) {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.revoked = append(i.revoked, r.FormValue("token"))
		w.WriteHeader(http.StatusOK)
	})
	i.Server = httptest.NewServer(mux)
	t.Cleanup(i.Close)
	return i
}

func answer(w http.ResponseWriter, code int, body map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

// rotateKey forgets the key that it signed with.
func (i *issuer) rotateKey(t *testing.T) {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	i.key, i.keyID = key, i.keyID+1
}

// idToken is a JWT (RFC 7519).
func (i *issuer) idToken() string {
	part := func(fields map[string]any) string {
		data, _ := json.Marshal(fields)
		return base64.RawURLEncoding.EncodeToString(data)
	}
	now := time.Now()
	signed := part(map[string]any{"alg": "EdDSA", "kid": fmt.Sprint(i.keyID)}) + "." + part(map[string]any{
		"iss": i.URL, "aud": clientID, "sub": i.subject, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "jti": fmt.Sprint(i.issued),
	})
	signature := ed25519.Sign(i.key, []byte(signed))
	if i.broken {
		signature[0]++
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// session is one whose credential is at the end of its time, if spent, or only near it.
func (i *issuer) session(spent bool) Session {
	expires := time.Now().Add(time.Hour)
	if spent {
		expires = time.Now().Add(-time.Hour)
	}
	return Session{
		OIDC:       &OIDC{Issuer: i.URL, ClientID: clientID},
		Credential: &Credential{Token: i.idToken(), Refresh: i.refresh, Subject: i.subject, Renew: time.Now().Add(-time.Hour), Expires: expires},
	}
}
