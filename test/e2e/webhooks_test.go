package e2e

import (
	"crypto/tls"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestWebhooks asks the controller what the API server asks it, from a node: it answers
// the API server, as every other test shows, and nobody else.
func TestWebhooks(t *testing.T) {
	awaitCluster(t)
	host := "https://" + kubectl(t, admin, "get", "service", "h8s-controller", "-n", systemNamespace, "-o", "jsonpath={.spec.clusterIP}")
	dial := dialIn(nodeNetns(t, nodes(t)[0]))
	for name, test := range map[string]struct {
		certificate string // of the cluster's
		answered    bool
	}{
		"nobody":         {"", false},
		"an operator":    {"admin", false},
		"a kubelet":      {"kubelet-" + nodes(t)[0], false},
		"the API server": {"front-proxy-client", true},
	} {
		t.Run(name, func(t *testing.T) {
			config := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // an attacker does not care who answers
			if test.certificate != "" {
				file := filepath.Join("/var/lib/h8s", cluster.cluster, "pki", test.certificate)
				certificate, err := tls.LoadX509KeyPair(file+".crt", file+".key")
				if err != nil {
					t.Fatal(err)
				}
				// Whoever the server says that it wants.
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &certificate, nil }
			}
			client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DialContext: dial, TLSClientConfig: config, DisableKeepAlives: true}}
			for _, path := range []string{"/authorize", "/token-review", "/validate-usage", "/mutate-namespace"} {
				const review = `{"apiVersion":"authorization.k8s.io/v1","kind":"SubjectAccessReview","spec":{"user":"alice"}}`
				response, err := client.Post(host+path, "application/json", strings.NewReader(review))
				if err != nil {
					if test.answered { // a refusal may be told, or meet what is still being sent
						t.Errorf("%s: %v", path, err)
					}
					continue
				}
				response.Body.Close()
				if refused := response.StatusCode == http.StatusUnauthorized; refused == test.answered {
					t.Errorf("%s: %s", path, response.Status)
				}
			}
		})
	}
}
