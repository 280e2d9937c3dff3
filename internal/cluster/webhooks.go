package cluster

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
)

// The API server is told at its start how to reach the controller's authorization
// webhook, long before there is a controller. So address and certificate are
// settled here, and the chart gets both: a Service with this address, a Secret of
// this name.
const (
	webhooksService = "10.96.0.11"
	webhooksHost    = "h8s-controller." + productNamespace + ".svc"
	webhooksSecret  = "h8s-webhooks"
	webhooksCert    = "h8s-controller"
)

// webhooksKubeconfig leads the API server to the controller's webhook of the path.
func (c *Config) webhooksKubeconfig(p *pki, path string) ([]byte, error) {
	conf := clientcmdapi.NewConfig()
	conf.Clusters["h8s"] = &clientcmdapi.Cluster{
		Server: "https://" + webhooksService + path, TLSServerName: webhooksHost, CertificateAuthorityData: p.pairs[clusterCA].cert,
	}
	conf.Contexts["h8s"] = &clientcmdapi.Context{Cluster: "h8s"}
	if c.GuardedWebhooks {
		conf.AuthInfos["h8s"] = apiServerUser()
		conf.Contexts["h8s"].AuthInfo = "h8s"
	}
	conf.CurrentContext = "h8s"
	return renderWebhooks(conf)
}

// admissionKubeconfig has what the API server's admission shows to the controller's
// webhooks, which it finds by the Service's name. To others it shows nothing, for want of
// a current-context.
func admissionKubeconfig() ([]byte, error) {
	conf := clientcmdapi.NewConfig()
	conf.AuthInfos[webhooksHost] = apiServerUser()
	return renderWebhooks(conf)
}

// apiServerUser has the certificate by which the API server proves to extensions that it is
// one, whose CA signs nothing else.
func apiServerUser() *clientcmdapi.AuthInfo {
	return &clientcmdapi.AuthInfo{ClientCertificate: nodePKI + "/front-proxy-client.crt", ClientKey: nodePKI + "/front-proxy-client.key"}
}

func renderWebhooks(conf *clientcmdapi.Config) ([]byte, error) {
	data, err := clientcmd.Write(*conf)
	if err != nil {
		return nil, fmt.Errorf("render the kubeconfig of the webhooks: %w", err)
	}
	return data, nil
}

// ensureWebhooksSecret puts the certificate into the cluster, for the chart.
func (b *bringUp) ensureWebhooksSecret(ctx context.Context, p *pki) error {
	pair := p.pairs[webhooksCert]
	return b.ensureSecret(ctx, webhooksSecret, corev1.SecretTypeTLS, map[string][]byte{corev1.TLSCertKey: pair.cert, corev1.TLSPrivateKeyKey: pair.key})
}

// ensureSecret writes a Secret of the product's namespace, which is made if need be.
func (b *bringUp) ensureSecret(ctx context.Context, name string, kind corev1.SecretType, data map[string][]byte) error {
	operator, err := b.objectClient()
	if err != nil {
		return err
	}
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: productNamespace}}
	if err := operator.Create(ctx, namespace); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make the namespace %s: %w", productNamespace, err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: productNamespace, Name: name}}
	secret.Type = kind // cannot be changed later
	_, err = controllerutil.CreateOrUpdate(ctx, operator, secret, func() error {
		secret.Data = data
		return nil
	})
	if err != nil {
		return fmt.Errorf("write the Secret %s: %w", client.ObjectKeyFromObject(secret), err)
	}
	return nil
}
