package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/tenancy"
)

// NewWebhookServer serves with the certificate tls.crt and tls.key of the
// directory, which is read anew for each connection: a replaced Secret counts
// without a restart, and without an inotify watch, of which a node has few (128
// by default). The API server keeps its connections open, so this costs nothing.
// If clientCA, a file that is read likewise, is named, only who has a client certificate of it
// with one of the common names is answered; our own probe, which has none, only connects.
func NewWebhookServer(host string, port int, certDir, clientCA string, clientNames []string) webhook.Server {
	server := webhook.NewServer(webhook.Options{Host: host, Port: port, TLSOpts: []func(*tls.Config){func(c *tls.Config) {
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(filepath.Join(certDir, corev1.TLSCertKey), filepath.Join(certDir, corev1.TLSPrivateKeyKey))
			if err != nil {
				return nil, fmt.Errorf("read the certificate of the webhooks: %w", err)
			}
			return &cert, nil
		}
		if clientCA == "" {
			return
		}
		base := c.Clone()
		c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			data, err := os.ReadFile(clientCA)
			if err != nil {
				return nil, fmt.Errorf("read whose certificates the webhooks' clients must have: %w", err)
			}
			config := base.Clone()
			config.ClientAuth, config.ClientCAs = tls.VerifyClientCertIfGiven, x509.NewCertPool()
			if !config.ClientCAs.AppendCertsFromPEM(data) {
				return nil, fmt.Errorf("%s has no PEM certificate", clientCA)
			}
			return config, nil
		}
	}}})
	if clientCA == "" {
		return server
	}
	return &guardedServer{server, clientNames}
}

// guardedServer answers those whose certificate was verified and has one of the names: the
// CA may sign others, which extension API servers refuse by name, too.
type guardedServer struct {
	webhook.Server
	clients []string
}

// Register implements webhook.Server.
func (s *guardedServer) Register(path string, hook http.Handler) {
	s.Server.Register(path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || !slices.Contains(s.clients, r.TLS.VerifiedChains[0][0].Subject.CommonName) {
			http.Error(w, "only API servers are answered: show a client certificate of the CA in the chart's value webhooks.clientCA with a name in webhooks.clientNames", http.StatusUnauthorized)
			return
		}
		hook.ServeHTTP(w, r)
	}))
}

// namespaceWebhook puts a namespace into the tenant of the user who creates it.
// The API server does not call it for operators.
type namespaceWebhook struct {
	objects
	decoder admission.Decoder
}

// Handle implements admission.Handler.
func (w *namespaceWebhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	if req.Operation != admissionv1.Create {
		return admission.Allowed("")
	}
	var ns corev1.Namespace
	if err := w.decoder.Decode(req, &ns); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	tenant, refusal, err := w.choose(ctx, req, &ns)
	switch {
	case err != nil:
		return admission.Errored(http.StatusInternalServerError, err)
	case refusal != nil:
		return admission.Denied(refusal.Error())
	}
	tenancy.Complete(&ns.ObjectMeta, tenant)
	if ns.Annotations == nil {
		ns.Annotations = map[string]string{}
	}
	ns.Annotations[v1alpha1.AnnotationCreator] = req.UserInfo.Username
	raw, err := json.Marshal(&ns)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	return admission.PatchResponseFromRaw(req.Object.Raw, raw)
}

// choose finds the tenant. A refusal is for the user to read; an error is ours.
func (w *namespaceWebhook) choose(ctx context.Context, req admission.Request, ns *corev1.Namespace) (tenant *v1alpha1.Tenant, refusal, err error) {
	disabled, err := w.disabled(ctx)
	if err != nil {
		return nil, nil, err
	}
	if disabled[req.UserInfo.Username] {
		return nil, fmt.Errorf("the User %q is disabled: ask an operator to enable it", req.UserInfo.Username), nil
	}
	who := tenancy.Requester{Name: req.UserInfo.Username, Groups: req.UserInfo.Groups}
	tenants, err := tenantsWith(ctx, w.Client, who)
	if err != nil {
		return nil, nil, err
	}
	tenant, refusal = tenancy.ChooseTenant(tenants, who, ns.Labels[v1alpha1.LabelTenant])
	if refusal != nil {
		return nil, refusal, nil
	}
	if refusal := tenancy.CheckRequested(&ns.ObjectMeta); refusal != nil {
		return nil, refusal, nil
	}
	if name := ns.Labels[v1alpha1.LabelNetwork]; name != "" {
		network, err := w.network(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		if refusal := tenancy.CheckNetwork(tenant, name, network); refusal != nil {
			return nil, refusal, nil
		}
	}
	return tenant, nil, nil
}

// networkWebhook refuses Networks, and Tenants that would make one, whose
// addresses the cluster needs itself, and the deletion of a Network in use.
type networkWebhook struct {
	objects
	infrastructure infrastructure
	decoder        admission.Decoder
}

// Handle implements admission.Handler.
func (w *networkWebhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	var refusal, err error
	switch {
	case req.Resource.Resource == "networks" && req.Operation == admissionv1.Delete:
		var n v1alpha1.Network // a deletion of many names none in the request
		if err := w.decoder.DecodeRaw(req.OldObject, &n); err != nil {
			return admission.Errored(http.StatusBadRequest, err)
		}
		refusal, err = w.deleteNetwork(ctx, n.Name)
	case req.Resource.Resource == "networks" && req.Operation == admissionv1.Create:
		var n v1alpha1.Network
		if err := w.decoder.Decode(req, &n); err != nil {
			return admission.Errored(http.StatusBadRequest, err)
		}
		refusal, err = w.createNetwork(ctx, &n)
	case req.Resource.Resource == "tenants" && req.Operation == admissionv1.Create:
		var t v1alpha1.Tenant
		if err := w.decoder.Decode(req, &t); err != nil {
			return admission.Errored(http.StatusBadRequest, err)
		}
		refusal, err = w.createTenant(ctx, &t)
	}
	switch {
	case err != nil:
		return admission.Errored(http.StatusInternalServerError, err)
	case refusal != nil:
		return admission.Denied(refusal.Error())
	}
	return admission.Allowed("")
}

func (w *networkWebhook) createNetwork(ctx context.Context, n *v1alpha1.Network) (refusal, err error) {
	var t v1alpha1.Tenant
	switch err := w.live.Get(ctx, client.ObjectKey{Name: n.Spec.Tenant}, &t); {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the Tenant %q does not exist: create it first, or correct spec.tenant", n.Spec.Tenant), nil
	case err != nil:
		return nil, fmt.Errorf("get the Tenant: %w", err)
	case t.DeletionTimestamp != nil:
		return fmt.Errorf("the Tenant %q is being deleted and takes no new Networks", t.Name), nil
	}
	taken, err := w.infrastructure.ranges(ctx)
	if err != nil {
		return nil, err
	}
	if refusal := tenancy.CheckCIDRs(n.Spec.CIDRs, taken); refusal != nil {
		return fmt.Errorf("spec.cidrs: %w", refusal), nil
	}
	var list v1alpha1.NetworkList
	if err := w.live.List(ctx, &list, client.MatchingFields{fieldTenant: t.Name}); err != nil {
		return nil, fmt.Errorf("list Networks: %w", err)
	}
	return tenancy.CheckQuota(t.Name, "networks", len(list.Items), t.Spec.Quota.Networks), nil
}

func (w *networkWebhook) createTenant(ctx context.Context, t *v1alpha1.Tenant) (refusal, err error) {
	if len(t.Spec.Network.CIDRs) == 0 {
		return nil, nil
	}
	taken, err := w.infrastructure.ranges(ctx)
	if err != nil {
		return nil, err
	}
	if refusal := tenancy.CheckCIDRs(t.Spec.Network.CIDRs, taken); refusal != nil {
		return fmt.Errorf("spec.network.cidrs: %w", refusal), nil
	}
	n, err := w.network(ctx, tenancy.DefaultNetwork(t))
	if err != nil {
		return nil, err
	}
	if n != nil && n.Spec.Tenant != t.Name {
		return fmt.Errorf("a Network %q of the Tenant %q exists already, and this Tenant's default Network would have the same name: give the Tenant another name", n.Name, n.Spec.Tenant), nil
	}
	return nil, nil
}

func (w *networkWebhook) deleteNetwork(ctx context.Context, name string) (refusal, err error) {
	var namespaces corev1.NamespaceList
	if err := w.live.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelNetwork: name}); err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	if len(namespaces.Items) > 0 {
		return fmt.Errorf("the Network %q is in use by the namespaces %s: delete those first", name, some(names(namespaces.Items, namespaceName))), nil
	}
	return nil, nil
}

// network is nil if there is none of that name.
func (o objects) network(ctx context.Context, name string) (*v1alpha1.Network, error) {
	var n v1alpha1.Network
	if err := o.live.Get(ctx, client.ObjectKey{Name: name}, &n); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("get the Network %s: %w", name, err)
	}
	return &n, nil
}

// userWebhook refuses to delete a User whom Tenants list: whoever has that name next, or
// has it elsewhere, would have the memberships, and a disabled one would have them back.
type userWebhook struct {
	objects
	decoder admission.Decoder
}

// Handle implements admission.Handler.
func (w *userWebhook) Handle(ctx context.Context, req admission.Request) admission.Response {
	var u v1alpha1.User // a deletion of many names none in the request
	if err := w.decoder.DecodeRaw(req.OldObject, &u); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	var tenants v1alpha1.TenantList
	if err := w.live.List(ctx, &tenants); err != nil {
		return admission.Errored(http.StatusInternalServerError, fmt.Errorf("list Tenants: %w", err))
	}
	staying := slices.DeleteFunc(slices.Clone(tenants.Items), func(t v1alpha1.Tenant) bool { return t.DeletionTimestamp != nil })
	if of := tenancy.TenantsOf(staying, u.Name); len(of) > 0 {
		return admission.Denied(fmt.Sprintf("the User %q is a member of the Tenants %s: take it off their spec.members first; spec.disabled takes its access away at once", u.Name, some(of)))
	}
	if of := tenancy.TenantsOf(tenants.Items, u.Name); len(of) > 0 {
		return admission.Denied(fmt.Sprintf("the User %q is a member of the Tenants %s, each of which is being deleted: wait until they have gone; spec.disabled takes its access away at once", u.Name, some(of)))
	}
	return admission.Allowed("")
}
