package login

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	certificatesclient "k8s.io/client-go/kubernetes/typed/certificates/v1"
	"k8s.io/client-go/rest"

	"h8s.io/hypernetes/internal/tenancy"
)

// Certificate renews the client certificate of a User by the cluster's CSR API, with
// the certificate that it has. It implements Provider.
type Certificate struct {
	Server     string `json:"server"`
	CA         string `json:"ca,omitempty"`
	ServerName string `json:"serverName,omitempty"`
	// ProxyURL is the way to the server; empty for what the environment says.
	ProxyURL string `json:"proxyURL,omitempty"`

	// first is the certificate that somebody was given.
	first *Credential
}

// NewCertificate begins with the client certificate in the configuration, which an
// operator has given to the User.
func NewCertificate(config *rest.Config) (*Certificate, error) {
	config = rest.CopyConfig(config)
	if err := rest.LoadTLSFiles(config); err != nil {
		return nil, fmt.Errorf("read the kubeconfig's certificates: %w", err)
	}
	if len(config.CertData) == 0 || len(config.KeyData) == 0 {
		return nil, errors.New("the kubeconfig has no client certificate to begin with: ask an operator for `h8s kubeconfig --user NAME`, and name that file with --kubeconfig or --from")
	}
	first, err := certificateCredential(config.CertData, config.KeyData)
	if err != nil {
		return nil, err
	}
	c := &Certificate{Server: config.Host, CA: string(config.CAData), ServerName: config.ServerName, first: first}
	if config.Proxy == nil {
		return c, nil
	}
	server, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, fmt.Errorf("address of the cluster: %w", err)
	}
	proxy, err := config.Proxy(&http.Request{URL: server})
	if err != nil {
		return nil, fmt.Errorf("find the proxy to the cluster: %w", err)
	}
	if proxy != nil {
		c.ProxyURL = proxy.String()
	}
	return c, nil
}

// Login implements Provider: it replaces the certificate that somebody was given by
// one whose key never was anywhere else.
func (c *Certificate) Login(ctx context.Context, _ Person) (*Credential, error) {
	if c.first == nil {
		return nil, errors.New("the certificate has expired and cannot renew itself: ask an operator for another (`h8s kubeconfig --user NAME`), then `h8s login --certificate --from FILE`")
	}
	return c.Renew(ctx, c.first)
}

// Renew implements Provider.
func (c *Certificate) Renew(ctx context.Context, have *Credential) (*Credential, error) {
	if !have.usable(time.Now()) {
		return nil, fmt.Errorf("%w: the certificate has expired", ErrPersonNeeded)
	}
	user, err := commonName([]byte(have.Certificate))
	if err != nil {
		return nil, err
	}
	config := &rest.Config{
		Host: c.Server,
		TLSClientConfig: rest.TLSClientConfig{
			CAData: []byte(c.CA), ServerName: c.ServerName,
			CertData: []byte(have.Certificate), KeyData: []byte(have.Key),
		},
		Timeout: machineTime,
	}
	if c.ProxyURL != "" {
		proxy, err := url.Parse(c.ProxyURL)
		if err != nil {
			return nil, fmt.Errorf("address of the proxy to the cluster: %w", err)
		}
		config.Proxy = http.ProxyURL(proxy)
	}
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("renew the certificate: %w", err)
	}
	request, key, err := tenancy.CertificateRequest(user)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	cert, err := sign(ctx, kube.CertificatesV1().CertificateSigningRequests(), tenancy.Renewal(user, request))
	switch {
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("%w: the cluster does not let %q renew its certificate, because there is no such User, it is disabled, or no Tenant lists it: ask an operator: %w", ErrPersonNeeded, user, err)
	case err != nil:
		return nil, fmt.Errorf("renew the certificate of %q: %w", user, err)
	}
	return certificateCredential(cert, key)
}

// Revoke implements Provider. Kubernetes revokes no certificates: they are short-lived.
func (c *Certificate) Revoke(context.Context, *Credential) error { return nil }

// abandoned is how long a request of the same name may stay before it counts as left
// behind by a process that was killed.
const abandoned = 5 * time.Second

// sign takes the request through the CSR API. A User has one name for requests, so
// two processes on different machines take turns.
func sign(ctx context.Context, csrs certificatesclient.CertificateSigningRequestInterface, request *certificatesv1.CertificateSigningRequest) ([]byte, error) {
	csr, err := create(ctx, csrs, request)
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = csrs.Delete(ctx, csr.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &csr.UID}})
	}()
	var cert []byte
	err = wait.PollUntilContextCancel(ctx, 50*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		got, err := csrs.Get(ctx, csr.Name, metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		for _, c := range got.Status.Conditions {
			if c.Status == corev1.ConditionTrue && (c.Type == certificatesv1.CertificateDenied || c.Type == certificatesv1.CertificateFailed) {
				return false, fmt.Errorf("%w: the request was not granted: %s", ErrPersonNeeded, c.Message)
			}
		}
		cert = got.Status.Certificate
		return len(cert) > 0, nil
	})
	if err != nil && ctx.Err() != nil {
		err = errors.New("the cluster did not sign it in time: are h8s-controller and kube-controller-manager up?")
	}
	return cert, err
}

func create(ctx context.Context, csrs certificatesclient.CertificateSigningRequestInterface, request *certificatesv1.CertificateSigningRequest) (*certificatesv1.CertificateSigningRequest, error) {
	var made *certificatesv1.CertificateSigningRequest
	var other types.UID
	var since time.Time
	err := wait.PollUntilContextCancel(ctx, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		var err error
		if made, err = csrs.Create(ctx, request, metav1.CreateOptions{}); err == nil || !apierrors.IsAlreadyExists(err) {
			return err == nil, err
		}
		have, err := csrs.Get(ctx, request.Name, metav1.GetOptions{})
		if err != nil {
			return false, ignoreNotFound(err)
		}
		if have.UID != other {
			other, since = have.UID, time.Now()
		}
		if time.Since(since) > abandoned {
			err = csrs.Delete(ctx, request.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &other}})
			if apierrors.IsConflict(err) {
				err = nil
			}
			return false, ignoreNotFound(err)
		}
		return false, nil
	})
	return made, err
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// certificateCredential is to be renewed when half of its time is over, so that
// somebody who uses it again and again never loses it.
func certificateCredential(cert, key []byte) (*Credential, error) {
	leaf, err := parseCertificate(cert)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &Credential{
		Certificate: string(cert), Key: string(key),
		Renew: now.Add(leaf.NotAfter.Sub(now) / 2), Expires: leaf.NotAfter,
	}, nil
}

func commonName(cert []byte) (string, error) {
	leaf, err := parseCertificate(cert)
	if err != nil {
		return "", err
	}
	return leaf.Subject.CommonName, nil
}

func parseCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("the client certificate is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parse the client certificate: %w", err)
	}
	return leaf, nil
}
