package controller

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// authority is a CA with a client that has a certificate of it, all PEM.
type authority struct{ ca, cert, key []byte }

func newAuthority() (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	ca, err := cert.NewSelfSignedCACert(cert.Config{CommonName: "front-proxy-ca"}, key)
	if err != nil {
		return authority{}, err
	}
	return sign(ca, key, clientName)
}

// sign has the authority certify a client of that name, with the same key.
func sign(ca *x509.Certificate, key *ecdsa.PrivateKey, name string) (authority, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), key)
	if err != nil {
		return authority{}, err
	}
	data, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return authority{}, err
	}
	return authority{ca: encode(ca.Raw), cert: encode(der), key: data}, nil
}

func encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: cert.CertificateBlockType, Bytes: der})
}

// newWebhookClient is an authority of the test, and its client's certificate.
func newWebhookClient(t *testing.T) (authority, tls.Certificate) {
	t.Helper()
	a, err := newAuthority()
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return a, certificate
}

// another client that the authority has certified, under the name.
func (a authority) another(t *testing.T, name string) tls.Certificate {
	t.Helper()
	ca, err := cert.ParseCertsPEM(a.ca)
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyutil.ParsePrivateKeyPEM(a.key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := sign(ca[0], key.(*ecdsa.PrivateKey), name)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := tls.X509KeyPair(other.cert, other.key)
	if err != nil {
		t.Fatal(err)
	}
	return certificate
}

// Who shows no certificate of the API servers' CA with their name is not answered.
func TestWebhookClients(t *testing.T) {
	ours, apiServer := newWebhookClient(t)
	others, stranger := newWebhookClient(t)
	file := filepath.Join(t.TempDir(), "ca.crt")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().(*net.TCPAddr)
	_ = listener.Close()
	server := NewWebhookServer("127.0.0.1", address.Port, cluster.hooks.LocalServingCertDir, file, []string{"other-api-server", clientName})
	server.Register("/hook", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "answered") }))
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := server.Start(ctx); err != nil {
			t.Errorf("webhook server: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })

	ask := func(certificates ...tls.Certificate) (string, error) {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(cluster.hooks.LocalServingCAData)
		transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certificates}}
		response, err := (&http.Client{Transport: transport, Timeout: patience}).Get("https://" + address.String() + "/hook")
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		return response.Status + " " + string(body), err
	}
	if err := os.WriteFile(file, ours.ca, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { return server.StartedChecker()(nil) }) // it has no certificate to show
	refused := func(who string, certificates ...tls.Certificate) {
		t.Helper()
		if out, err := ask(certificates...); err == nil && !strings.HasPrefix(out, "401 Unauthorized only API servers are answered") {
			t.Errorf("%s: %s, %v", who, out, err)
		}
	}
	accepted := func(who string, certificate tls.Certificate) {
		t.Helper()
		if out, err := ask(certificate); err != nil || out != "200 OK answered" {
			t.Errorf("%s: %s, %v", who, out, err)
		}
	}
	refused("nobody")
	refused("a client of another CA", stranger)
	accepted("an API server", apiServer)
	accepted("an API server of another name", ours.another(t, "other-api-server"))
	for _, name := range []string{"metrics-server", "front-proxy-client2", "", "front-proxy-ca"} {
		refused("a client of the same CA called "+name, ours.another(t, name))
	}

	// A replaced CA counts at once; without one, nobody is answered.
	if err := os.WriteFile(file, others.ca, 0o600); err != nil {
		t.Fatal(err)
	}
	refused("a client of the former CA", apiServer)
	accepted("a client of the new CA", stranger)
	for name, content := range map[string]string{"an empty file": "", "a file without a certificate": "nothing"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(name, stranger)
		refused(name)
	}
}

// To webhooks of others than us the API server does not show the certificate by which it
// proves to us, and to extension API servers, what it is.
func TestOthersWebhooks(t *testing.T) {
	shown := make(chan []*x509.Certificate, 100)
	listener, err := tls.Listen("tcp", "127.0.0.1:0", othersConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown <- r.TLS.PeerCertificates
		w.WriteHeader(http.StatusTeapot)
	})}
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() { _ = server.Close(); running.Wait() })
	hook := admissionregistrationv1.ValidatingWebhook{
		Name: "others.example.com", AdmissionReviewVersions: []string{"v1"}, SideEffects: ptr.To(admissionregistrationv1.SideEffectClassNone), FailurePolicy: ptr.To(admissionregistrationv1.Ignore),
		ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: ptr.To("https://" + listener.Addr().String() + "/hook"), CABundle: cluster.hooks.LocalServingCAData},
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
		}},
	}
	config := &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "others"}, Webhooks: []admissionregistrationv1.ValidatingWebhook{hook}}
	if err := cluster.admin.Create(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cluster.admin.Delete(context.Background(), config); err != nil {
			t.Error(err)
		}
	})
	eventually(t, func() error {
		probe := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, GenerateName: "others-"}}
		if err := cluster.admin.Create(t.Context(), probe, client.DryRunAll); err != nil {
			return err
		}
		select {
		case certificates := <-shown:
			if len(certificates) > 0 {
				t.Errorf("the API server shows the certificate of %s", certificates[0].Subject)
			}
			return nil
		default:
			return errors.New("the API server has not called yet")
		}
	})
}

// othersConfig asks for a certificate, whosesoever, and has one that the API server trusts.
func othersConfig(t *testing.T) *tls.Config {
	t.Helper()
	dir := cluster.hooks.LocalServingCertDir
	certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, corev1.TLSCertKey), filepath.Join(dir, corev1.TLSPrivateKeyKey))
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{certificate}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12}
}
