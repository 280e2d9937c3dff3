package controller

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/login"
	"h8s.io/hypernetes/internal/tenancy"
)

// signingCA makes what kube-controller-manager signs with and adds it to what the API
// server believes, beside envtest's own CA, whose key nobody gets.
func signingCA(dir string) (path string, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test cluster"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return "", err
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "signing")
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(path+".crt", cert, 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}), 0o600); err != nil {
		return "", err
	}
	bundle := filepath.Join(cluster.env.ControlPlane.GetAPIServer().CertDir, "client-cert-auth-ca.crt")
	have, err := os.ReadFile(bundle)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(bundle, append(have, cert...), 0o600) // the API server watches the file
}

// newMember is a User in a Tenant of its own, which has its name.
func newMember(t *testing.T, name string) *v1alpha1.User {
	t.Helper()
	newTenant(t, tenantOf(name, "10.0.0.0/16", member("User", name, v1alpha1.RoleView)))
	return newUser(t, name)
}

// newUser is a User that a Tenant lists already.
func newUser(t *testing.T, name string) *v1alpha1.User {
	t.Helper()
	u := &v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if err := cluster.admin.Create(t.Context(), u); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), u) })
	eventually(t, func() error {
		// The role is bound, but the API server's authorizer learns of it by a watch.
		err := as(t, name).Get(t.Context(), client.ObjectKey{Name: tenancy.RenewalPrefix + name}, &certificatesv1.CertificateSigningRequest{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("the User %s may not renew yet: %w", name, err)
	})
	return u
}

// begin is a provider with the certificate that an operator gave to the user.
func begin(t *testing.T, user string) *login.Certificate {
	t.Helper()
	u, err := cluster.env.AddUser(userNamed(user), nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := login.NewCertificate(u.Config())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// withCredential is a client with what the credential plugin hands to kubectl.
func withCredential(t *testing.T, c *login.Credential) client.Client {
	t.Helper()
	config := rest.AnonymousClientConfig(cluster.env.Config)
	config.CertData, config.KeyData, config.BearerToken = []byte(c.Certificate), []byte(c.Key), c.Token
	out, err := client.New(config, client.Options{Scheme: cluster.scheme})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRenewalOfCertificate(t *testing.T) {
	ctx := t.Context()
	user := newMember(t, "renew-ann")
	cache := login.Cache(filepath.Join(t.TempDir(), "sessions"))
	first := begin(t, user.Name)
	if err := cache.Login(ctx, "ann", &login.Session{Certificate: first}, nil); err != nil {
		t.Fatal(err)
	}
	have, err := cache.Credential(ctx, "ann", login.Cluster{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(have.Expires); left > tenancy.CertificateLifetime || left < tenancy.CertificateLifetime/2 {
		t.Errorf("the certificate is valid for %s, want %s", left, tenancy.CertificateLifetime)
	}
	eventually(t, func() error { // the API server reads the signer's CA
		review := &authenticationv1.SelfSubjectReview{}
		if err := withCredential(t, have).Create(ctx, review); err != nil {
			return err
		}
		if got := review.Status.UserInfo; got.Username != user.Name || len(got.Groups) != 1 || got.Groups[0] != "system:authenticated" {
			return fmt.Errorf("the cluster takes the holder for %+v", got)
		}
		return nil
	})
	if again, err := cache.Credential(ctx, "ann", login.Cluster{}, nil); err != nil || again.Certificate != have.Certificate {
		t.Errorf("a fresh certificate was replaced (%v)", err)
	}

	// Several machines at once: the User has one name for requests.
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			got, err := first.Renew(ctx, have)
			if err != nil || got.Certificate == have.Certificate || got.Key == have.Key {
				t.Errorf("renewed beside others: %v", err)
			}
		})
	}
	wg.Wait()
	eventually(t, func() error {
		err := cluster.admin.Get(ctx, client.ObjectKey{Name: tenancy.RenewalPrefix + user.Name}, &certificatesv1.CertificateSigningRequest{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("a request was left behind: %w", err)
		}
		return nil
	})

	disable := func(disabled bool) {
		t.Helper()
		before := user.DeepCopy()
		user.Spec.Disabled = disabled
		if err := cluster.admin.Patch(ctx, user, client.MergeFrom(before)); err != nil {
			t.Fatal(err)
		}
	}
	// Disabled: refused at once by the authorizer, and by the controller before that.
	disable(true)
	if _, err := first.Renew(ctx, have); !errors.Is(err, login.ErrPersonNeeded) {
		t.Errorf("a disabled User renewed: %v", err)
	}
	eventually(t, func() error {
		_, err := first.Renew(ctx, have)
		if err == nil || !strings.Contains(err.Error(), "removed or disabled") && !strings.Contains(err.Error(), "no such User") {
			return fmt.Errorf("the disabled User still has its role: %w", err)
		}
		return nil
	})
	disable(false)
	eventually(t, func() error { _, err := first.Renew(ctx, have); return err })

	// In no tenant any more. The authorizer learns of it by a watch.
	forbidden := func(what string) {
		t.Helper()
		eventually(t, func() error {
			err := withCredential(t, have).Get(ctx, client.ObjectKey{Name: tenancy.RenewalPrefix + user.Name}, &certificatesv1.CertificateSigningRequest{})
			if !apierrors.IsForbidden(err) {
				return fmt.Errorf("%s keeps its role: %w", what, err)
			}
			return nil
		})
	}
	members := func(list string) {
		t.Helper()
		tenant := &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: user.Name}}
		if err := cluster.admin.Patch(ctx, tenant, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"members":[`+list+`]}}`))); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(tenant), tenant)
			if err != nil || tenant.Status.ObservedGeneration != tenant.Generation {
				return fmt.Errorf("nobody has looked at the members: %w", err)
			}
			return nil
		})
	}
	members("")
	forbidden("a User whom no Tenant lists")
	if _, err := first.Renew(ctx, have); !errors.Is(err, login.ErrPersonNeeded) {
		t.Errorf("a User whom no Tenant lists renewed: %v", err)
	}
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(user), user); err != nil {
			return err
		}
		if c := apimeta.FindStatusCondition(user.Status.Conditions, v1alpha1.ConditionReady); c == nil || c.Reason != "InNoTenant" {
			return fmt.Errorf("Ready = %+v", c)
		}
		return nil
	})
	members(fmt.Sprintf(`{"kind":"User","name":%q,"role":"view"}`, user.Name))
	eventually(t, func() error { _, err := first.Renew(ctx, have); return err })

	// Removed, which takes that no Tenant lists it. Whoever lists the name again lists no User.
	members("")
	eventually(t, func() error { return cluster.admin.Delete(ctx, user) })
	members(fmt.Sprintf(`{"kind":"User","name":%q,"role":"view"}`, user.Name))
	if _, err := first.Renew(ctx, have); !errors.Is(err, login.ErrPersonNeeded) {
		t.Errorf("a removed User renewed: %v", err)
	}
	eventually(t, func() error { // that the User is gone is learned apart from who lists it
		err := cluster.admin.Get(ctx, client.ObjectKey{Name: tenancy.RenewalName(user.Name)}, &rbacv1.ClusterRole{})
		if err == nil {
			return errors.New("a removed User may renew")
		}
		return client.IgnoreNotFound(err)
	})
	if _, err := first.Renew(ctx, have); !errors.Is(err, login.ErrPersonNeeded) {
		t.Errorf("a removed User renewed in the end: %v", err)
	}
}

// TestFirstCertificate begins as docs/operations.md tells operators of other clusters than ours to.
func TestFirstCertificate(t *testing.T) {
	ctx := t.Context()
	newMember(t, "first-ann")
	pkcs10, key, err := tenancy.CertificateRequest("first-ann")
	if err != nil {
		t.Fatal(err)
	}
	csr := tenancy.Renewal("first-ann", pkcs10)
	csr.Name = "first-ann"
	if err := cluster.admin.Create(ctx, csr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), csr) })
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Operator"}}
	if err := cluster.admin.SubResource("approval").Update(ctx, csr); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(csr), csr); err != nil {
			return err
		}
		if len(csr.Status.Certificate) == 0 {
			return fmt.Errorf("the request is not signed: %+v", csr.Status)
		}
		return nil
	})
	config := rest.AnonymousClientConfig(cluster.env.Config)
	config.CertData, config.KeyData = csr.Status.Certificate, key
	first, err := login.NewCertificate(config)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the API server reads the signer's CA
		_, err := first.Login(ctx, nil)
		return err
	})
}

// A User asks for more than its own renewal: the policy refuses what it can see, the
// controller the rest, which is in the encoded request.
func TestCertificateForgery(t *testing.T) {
	ctx := t.Context()
	newTenant(t, tenantOf("forge", "10.0.0.0/16", member("User", "forge-ann", v1alpha1.RoleOwner), member("User", "forge-bob", v1alpha1.RoleView)))
	newUser(t, "forge-ann")
	newUser(t, "forge-bob") // of the same tenant: strangers' requests are not even named in the role
	newMember(t, "forge-carl")
	ann := as(t, "forge-ann")
	type attempt struct {
		change func(*certificatesv1.CertificateSigningRequest)
		pkcs10 *x509.CertificateRequest
		want   string // part of the refusal, of the policy or of the controller
	}
	named := func(n pkix.Name) *x509.CertificateRequest { return &x509.CertificateRequest{Subject: n} }
	own := named(pkix.Name{CommonName: "forge-ann"})
	for name, a := range map[string]attempt{
		"another's request": {func(c *certificatesv1.CertificateSigningRequest) { c.Name = "h8s:user:forge-bob" }, named(pkix.Name{CommonName: "forge-bob"}), "for yourself only"},
		"a free name":       {func(c *certificatesv1.CertificateSigningRequest) { c.Name = "anything" }, own, "for yourself only"},
		"a kubelet's signer": {func(c *certificatesv1.CertificateSigningRequest) {
			c.Spec.SignerName = certificatesv1.KubeletServingSignerName
		}, own, "correct spec.signerName"},
		"a longer life":     {func(c *certificatesv1.CertificateSigningRequest) { c.Spec.ExpirationSeconds = ptr.To[int32](7200) }, own, "an hour at most"},
		"an unlimited life": {func(c *certificatesv1.CertificateSigningRequest) { c.Spec.ExpirationSeconds = nil }, own, "an hour at most"},
		"a server's usage": {func(c *certificatesv1.CertificateSigningRequest) {
			c.Spec.Usages = append(c.Spec.Usages, certificatesv1.UsageServerAuth)
		}, own, "leave the others out"},
		"another's name":      {nil, named(pkix.Name{CommonName: "forge-bob"}), "must be for the common name"},
		"a component's name":  {nil, named(pkix.Name{CommonName: "system:kube-controller-manager"}), "must be for the common name"},
		"system:masters":      {nil, named(pkix.Name{CommonName: "forge-ann", Organization: []string{"system:masters"}}), "system:masters"},
		"a group":             {nil, named(pkix.Name{CommonName: "forge-ann", Organization: []string{"club"}}), "no organization"},
		"a second name":       {nil, named(pkix.Name{CommonName: "forge-ann", ExtraNames: []pkix.AttributeTypeAndValue{{Type: []int{2, 5, 4, 3}, Value: "forge-bob"}}}), "must be for the common name"},
		"an alternative name": {nil, &x509.CertificateRequest{Subject: own.Subject, DNSNames: []string{"kubernetes.default"}}, "no alternative names"},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.CreateCertificateRequest(rand.Reader, a.pkcs10, key)
			if err != nil {
				t.Fatal(err)
			}
			csr := tenancy.Renewal("forge-ann", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
			if a.change != nil {
				a.change(csr)
			}
			if err := ann.Create(ctx, csr); err != nil {
				wantRefusal(t, err, a.want)
				return
			}
			t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), csr) })
			eventually(t, func() error {
				if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(csr), csr); err != nil {
					return err
				}
				if len(csr.Status.Conditions) == 0 {
					return errors.New("nobody has judged the request")
				}
				return nil
			})
			verdict := csr.Status.Conditions[0]
			if verdict.Type != certificatesv1.CertificateDenied || !strings.Contains(verdict.Message, a.want) {
				t.Errorf("the controller says %s: %s; want a denial with %q", verdict.Type, verdict.Message, a.want)
			}
		})
	}

	var got certificatesv1.CertificateSigningRequest
	if err := ann.Get(ctx, client.ObjectKey{Name: "h8s:user:forge-carl"}, &got); !apierrors.IsForbidden(err) {
		t.Errorf("get of a stranger's request: %v", err)
	}
	if err := ann.List(ctx, &certificatesv1.CertificateSigningRequestList{}); !apierrors.IsForbidden(err) {
		t.Errorf("list of requests: %v", err)
	}
	if err := ann.Delete(ctx, &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "h8s:user:forge-carl"}}); !apierrors.IsForbidden(err) {
		t.Errorf("delete of a stranger's request: %v", err)
	}
	// One of a colleague's that nobody judges, for as long as this takes: it is of no signer that anybody serves.
	bobs := tenancy.Renewal("forge-bob", nil)
	pkcs10, _, err := tenancy.CertificateRequest("forge-bob")
	if err != nil {
		t.Fatal(err)
	}
	bobs.Spec.Request, bobs.Spec.SignerName, bobs.Spec.ExpirationSeconds = pkcs10, "example.com/nobody", nil
	if err := cluster.admin.Create(ctx, bobs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), bobs) })
	wantRefusal(t, ann.Delete(ctx, bobs), "of your own renewal only")
	if err := as(t, "forge-bob").Delete(ctx, bobs); err != nil {
		t.Errorf("delete of one's own request: %v", err)
	}
	if err := as(t, "forge-nobody").Create(ctx, tenancy.Renewal("forge-nobody", []byte("x"))); !apierrors.IsForbidden(err) {
		t.Errorf("a request of one who is no User: %v", err)
	}
}

// Requests of those who have their right from elsewhere are RBAC's business, but for
// the names of Users' renewals.
func TestCertificatesOfOthers(t *testing.T) {
	ctx := t.Context()
	newMember(t, "csr-ann")
	// Kubernetes' own role for kubelets that join, and one as an operator may write it.
	keeper := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "csr-keeper"}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{certificatesv1.GroupName}, Resources: []string{"certificatesigningrequests"}, Verbs: []string{"*"}},
	}}
	bind := func(name, role string, subject rbacv1.Subject) *rbacv1.ClusterRoleBinding {
		subject.APIGroup = rbacv1.GroupName
		return &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: []rbacv1.Subject{subject},
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
		}
	}
	// A tenant's role when a User is in the binding, and its request's name not in the role yet.
	renewer := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "csr-renewer"}, Rules: tenancy.RenewalRole("x", []string{"y"}).Rules}
	for _, obj := range []client.Object{
		keeper, renewer,
		bind("csr-renewer", renewer.Name, rbacv1.Subject{Kind: rbacv1.UserKind, Name: "csr-renewer"}),
		bind("csr-keeper", keeper.Name, rbacv1.Subject{Kind: rbacv1.UserKind, Name: "csr-keeper"}),
		bind("csr-bootstrap", "system:node-bootstrapper", rbacv1.Subject{Kind: rbacv1.GroupKind, Name: "system:bootstrappers"}),
	} {
		if err := cluster.admin.Create(ctx, obj); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), obj) })
	}
	pkcs10, _, err := tenancy.CertificateRequest("system:node:n1", "system:nodes")
	if err != nil {
		t.Fatal(err)
	}
	csr := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "node-csr-"},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: certificatesv1.KubeAPIServerClientKubeletSignerName, Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageDigitalSignature},
			Request: pkcs10,
		},
	}
	for name, c := range map[string]client.Client{
		"a kubelet that joins": as(t, "kubelet-bootstrap", "system:bootstrappers"),
		"who keeps requests":   as(t, "csr-keeper"),
	} {
		t.Run(name, func(t *testing.T) {
			eventually(t, func() error { // the API server's authorizer learns of the role by a watch
				err := c.Create(ctx, csr.DeepCopy(), client.DryRunAll)
				if err != nil && !strings.Contains(err.Error(), "cannot create resource") {
					t.Fatal(err)
				}
				return err
			})
			anns := csr.DeepCopy()
			anns.Name = tenancy.RenewalPrefix + "csr-ann"
			wantRefusal(t, c.Create(ctx, anns, client.DryRunAll), "for yourself only")
		})
	}
	t.Run("a User half bound", func(t *testing.T) {
		eventually(t, func() error {
			err := as(t, "csr-renewer").Create(ctx, csr.DeepCopy(), client.DryRunAll)
			if err == nil || strings.Contains(err.Error(), "cannot create resource") {
				return fmt.Errorf("not refused by the policy: %w", err)
			}
			wantRefusal(t, err, "for yourself only")
			return nil
		})
	})
}

// Somebody who has the controller's token makes no certificates of components with it.
func TestControllerApprovesNothingElse(t *testing.T) {
	ctx := t.Context()
	robber := impersonate(t, rest.ImpersonationConfig{UserName: controllerUser, Groups: []string{"system:serviceaccounts", "system:authenticated"}})
	pkcs10, _, err := tenancy.CertificateRequest("system:kube-controller-manager")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"robbery", "h8s:user:" + controllerUser} {
		csr := tenancy.Renewal("x", pkcs10)
		csr.Name = name
		if err := robber.Create(ctx, csr); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cluster.admin.Delete(context.Background(), csr) })
		eventually(t, func() error {
			if err := robber.Get(ctx, client.ObjectKeyFromObject(csr), csr); err != nil {
				return err
			}
			csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Mine"}}
			err := robber.SubResource("approval").Update(ctx, csr)
			if apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
				// The true controller has denied it in the meantime.
				return cluster.admin.Get(ctx, client.ObjectKeyFromObject(csr), csr)
			}
			if err == nil || !strings.Contains(err.Error(), "approves nothing but renewals") {
				t.Errorf("%s: approval: %v", name, err)
			}
			return nil
		})
		if err := cluster.admin.Get(ctx, client.ObjectKeyFromObject(csr), csr); err != nil || bytes.Contains(csr.Status.Certificate, []byte("CERTIFICATE")) {
			t.Errorf("%s: the request was signed (%v)", name, err)
		}
	}
}
