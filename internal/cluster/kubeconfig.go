package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/tenancy"
)

// AdminKubeconfig returns the kubeconfig of the cluster's administrator.
func AdminKubeconfig(name string) ([]byte, error) {
	c, err := loadConfig(name)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(c.state().adminKubeconfig())
	if err != nil {
		return nil, fmt.Errorf("cluster %q is not complete, `h8s up --name %s` completes it: %w", name, name, err)
	}
	return data, nil
}

// checkSubject refuses names that are not ours to certify: Kubernetes' own, such as
// system:masters, and those that Keystone or the identity provider alone gives.
func (c *Config) checkSubject(name string) error {
	if name == "" {
		return errors.New("a User or group must have a name")
	}
	taken := append(identity.Reserved(), identity.DefaultPrefix, c.keystonePrefix())
	if c.OIDC != nil {
		taken = append(taken, identity.Prefix(c.OIDC.Prefix))
	}
	for _, prefix := range taken {
		if prefix.Begins(name) {
			return fmt.Errorf("%q cannot be the name of a User or group: names that start with %s are not an operator's to give, but Kubernetes', Hypernetes' or those of whom people log in with", name, prefix)
		}
	}
	return nil
}

// UserKubeconfig returns a kubeconfig for a User that exists and is not disabled,
// with a client certificate that the cluster signs for one hour. The groups are
// those that the certificate says the user is in.
func UserKubeconfig(ctx context.Context, name, user string, groups []string) ([]byte, error) {
	c, err := loadRunning(name)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return c.userKubeconfig(ctx, user, groups)
}

func (c *Config) userKubeconfig(ctx context.Context, user string, groups []string) ([]byte, error) {
	objects, err := c.objectClient()
	if err != nil {
		return nil, err
	}
	var u v1alpha1.User
	switch err := objects.Get(ctx, client.ObjectKey{Name: user}, &u); {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("there is no User %q: an operator makes one (kind User, %s)", user, v1alpha1.GroupVersion)
	case meta.IsNoMatchError(err):
		return nil, fmt.Errorf("cluster %q has no Users, because Hypernetes is not installed: run `h8s up --name %s`", c.Name, c.Name)
	case err != nil:
		return nil, fmt.Errorf("look up User %q: %w", user, err)
	case u.Spec.Disabled:
		return nil, fmt.Errorf("the User %q is disabled (spec.disabled)", user)
	}
	for _, n := range append([]string{user}, groups...) {
		if err := c.checkSubject(n); err != nil {
			return nil, err
		}
	}
	request, key, err := tenancy.CertificateRequest(user, groups...)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	kube, err := c.client()
	if err != nil {
		return nil, err
	}
	signed, err := signRequest(ctx, kube, user, request)
	if err != nil {
		return nil, fmt.Errorf("have the certificate of %q signed: %w", user, err)
	}
	ca, err := os.ReadFile(c.state().path("pki", clusterCA+".crt"))
	if err != nil {
		return nil, err
	}
	return kubeconfig(c, ca, user, keyPair{cert: signed, key: key})
}

// signRequest takes a request through the cluster's CSR API, as its administrator.
func signRequest(ctx context.Context, kube kubernetes.Interface, user string, request []byte) ([]byte, error) {
	csrs := kube.CertificatesV1().CertificateSigningRequests()
	seconds := int32(tenancy.CertificateLifetime / time.Second)
	csr, err := csrs.Create(ctx, &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "h8s-user-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:           request,
			SignerName:        certificatesv1.KubeAPIServerClientSignerName,
			ExpirationSeconds: &seconds,
			Usages:            []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	defer func() {
		// It has served; also when the caller's time is up.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = csrs.Delete(ctx, csr.Name, metav1.DeleteOptions{})
	}()
	csr.Status.Conditions = append(csr.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue,
		Reason: "Kubeconfig", Message: "h8s kubeconfig --user " + user,
	})
	if _, err := csrs.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
		return nil, fmt.Errorf("approve: %w", err)
	}
	var certificate []byte
	err = poll(ctx, 50*time.Millisecond, func() error {
		signed, err := csrs.Get(ctx, csr.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if certificate = signed.Status.Certificate; len(certificate) == 0 {
			return errors.New("kube-controller-manager has not signed it")
		}
		return nil
	})
	return certificate, err
}

// objectClient is the administrator's client for every kind.
func (c *Config) objectClient() (client.Client, error) {
	conf, err := c.restConfig()
	if err != nil {
		return nil, err
	}
	return newObjectClient(conf)
}
