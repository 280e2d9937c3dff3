package tenancy

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/utils/ptr"

	"h8s.io/hypernetes/api/v1alpha1"
)

// CertificateLifetime is how long a User's certificate is valid. Kubernetes cannot
// take one back, so it is short, and renewed by its holder.
const CertificateLifetime = time.Hour

// RenewalPrefix begins the name of every request by which a User renews its
// certificate; the User's name follows. Names of Users are DNS names, so that no two
// Users share one.
const RenewalPrefix = "h8s:user:"

// CertificateRequest makes a key and a request for a certificate of the user, in the
// groups, both as PEM.
func CertificateRequest(user string, groups ...string) (request, key []byte, err error) {
	if key, err = keyutil.MakeEllipticPrivateKeyPEM(); err != nil {
		return nil, nil, err
	}
	private, err := keyutil.ParsePrivateKeyPEM(key)
	if err != nil {
		return nil, nil, err
	}
	request, err = cert.MakeCSR(private, &pkix.Name{CommonName: user, Organization: groups}, nil, nil)
	return request, key, err
}

var renewalUsages = []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature}

// Renewal is the request by which the User renews its certificate; request is PKCS #10, PEM.
func Renewal(user string, request []byte) *certificatesv1.CertificateSigningRequest {
	return &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: RenewalPrefix + user},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:           request,
			SignerName:        certificatesv1.KubeAPIServerClientSignerName,
			ExpirationSeconds: ptr.To(int32(CertificateLifetime / time.Second)),
			Usages:            slices.Clone(renewalUsages),
		},
	}
}

// CheckRenewal refuses a request that is anything but the User's own renewal: made by
// the User itself, for its own name, with no group and no other name. User is nil if
// there is none of the requester's name. The error is a sentence for the requester.
func CheckRenewal(csr *certificatesv1.CertificateSigningRequest, user *v1alpha1.User) error {
	spec := &csr.Spec
	switch {
	case user == nil || user.Name != spec.Username || user.DeletionTimestamp != nil:
		return fmt.Errorf("there is no User %q: ask an operator", spec.Username)
	case user.Spec.Disabled:
		return fmt.Errorf("the User %q is disabled: ask an operator", user.Name)
	case csr.Name != RenewalPrefix+user.Name:
		return fmt.Errorf("a User's request is named %s%s", RenewalPrefix, user.Name)
	case spec.SignerName != certificatesv1.KubeAPIServerClientSignerName:
		return fmt.Errorf("a User's certificate is signed by %s only", certificatesv1.KubeAPIServerClientSignerName)
	case spec.ExpirationSeconds == nil || time.Duration(*spec.ExpirationSeconds)*time.Second > CertificateLifetime:
		return fmt.Errorf("a User's certificate is valid for %s at most: say so in expirationSeconds", CertificateLifetime)
	case slices.ContainsFunc(spec.Usages, func(u certificatesv1.KeyUsage) bool { return !slices.Contains(renewalUsages, u) }):
		return fmt.Errorf("a User's certificate has the usages %v only", renewalUsages)
	}
	block, rest := pem.Decode(spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		return fmt.Errorf("the request is not one PEM block of a certificate request")
	}
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return fmt.Errorf("the request cannot be parsed: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return fmt.Errorf("the request is not signed with its own key: %w", err)
	}
	// The common name is the API server's user name, an organization a group of it;
	// whatever else there may be in a subject, nobody needs it.
	if names := request.Subject.Names; len(names) != 1 || request.Subject.CommonName != user.Name {
		return fmt.Errorf("the request must be for the common name %q, with no organization or other attribute", user.Name)
	}
	if len(request.Extensions) > 0 || len(request.DNSNames)+len(request.EmailAddresses)+len(request.IPAddresses)+len(request.URIs) > 0 {
		return fmt.Errorf("the request must have no alternative names or other extensions")
	}
	return nil
}

// RenewalName is the name of the ClusterRole, and of its binding, by which Users that the
// tenant lists renew their certificates.
func RenewalName(tenant string) string { return "h8s:tenant:" + tenant + ":renewal" }

// verbRenew is no verb of the API: it marks whose right to make requests is for renewals only
// (deploy/h8s/templates/policies/certificate.yaml).
const verbRenew = "renew"

// RenewalRole lets the tenant's Users make the requests that renew their certificates, and
// read and delete these only. That each makes and deletes none but its own is the admission
// policies', because RBAC knows no "own". They find whom they concern by verbRenew, which
// comes and goes with the right to make requests.
//
// It is one role for all of a tenant's Users, since the API server looks through all
// ClusterRoleBindings of a cluster at each request.
func RenewalRole(tenant string, users []string) rbacv1.ClusterRole {
	requests := make([]string, len(users))
	for i, user := range users {
		requests[i] = RenewalPrefix + user
	}
	slices.Sort(requests)
	return rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: RenewalName(tenant), Labels: ObjectLabels(tenant)},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{certificatesv1.GroupName}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"create", verbRenew}},
			{
				APIGroups: []string{certificatesv1.GroupName}, Resources: []string{"certificatesigningrequests"},
				ResourceNames: requests, Verbs: []string{"get", "delete"},
			},
		},
	}
}
