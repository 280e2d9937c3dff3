package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

const (
	caLifetime   = 10 * 365 * 24 * time.Hour
	certLifetime = 5 * 365 * 24 * time.Hour
)

// keyPair is a certificate and its key, as PEM.
type keyPair struct{ cert, key []byte }

// certSpec is what a certificate says.
type certSpec struct {
	name   string // of its files
	ca     string // name of the CA that signs it
	cn     string
	groups []string
	server bool
	client bool
	dns    []string
	ips    []netip.Addr
}

// Names of the certificate authorities. etcd and the aggregation layer have their
// own, as in a kubeadm cluster: whoever holds a certificate of the cluster's CA
// is no client of etcd, and cannot speak for other users through request headers.
const (
	clusterCA    = "ca"
	etcdCA       = "etcd-ca"
	frontProxyCA = "front-proxy-ca"
)

// certSpecs are the certificates of a cluster.
func certSpecs(c *Config) []certSpec {
	first := c.Nodes[0]
	loopback := netip.MustParseAddr("127.0.0.1")
	specs := []certSpec{
		{
			name: "apiserver", ca: clusterCA, cn: "kube-apiserver", server: true,
			dns: []string{
				"localhost", first.Name, "kubernetes", "kubernetes.default", "kubernetes.default.svc",
				"kubernetes.default.svc." + Domain,
			},
			ips: []netip.Addr{loopback, netip.MustParseAddr(firstService), first.Address, c.gateway()},
		},
		{name: "apiserver-kubelet-client", ca: clusterCA, cn: kubeletClientUser, client: true},
		{name: "front-proxy-client", ca: frontProxyCA, cn: "front-proxy-client", client: true},
		{name: "etcd", ca: etcdCA, cn: "etcd", server: true, client: true, dns: []string{"localhost"}, ips: []netip.Addr{loopback}},
		{name: "apiserver-etcd-client", ca: etcdCA, cn: "kube-apiserver", client: true},
		{name: "admin", ca: clusterCA, cn: "kubernetes-admin", groups: []string{"system:masters"}, client: true},
		{name: "kube-controller-manager", ca: clusterCA, cn: "system:kube-controller-manager", client: true},
		{name: "kube-scheduler", ca: clusterCA, cn: "system:kube-scheduler", client: true},
		{name: "kube-proxy", ca: clusterCA, cn: "system:kube-proxy", client: true},
		{name: webhooksCert, ca: clusterCA, cn: "h8s-controller", server: true, dns: []string{webhooksHost}},
	}
	for _, n := range c.Nodes {
		specs = append(specs,
			certSpec{name: "kubelet-" + n.Name, ca: clusterCA, cn: "system:node:" + n.Name, groups: []string{"system:nodes"}, client: true},
			certSpec{name: "kubelet-serving-" + n.Name, ca: clusterCA, cn: "system:node:" + n.Name, groups: []string{"system:nodes"}, server: true, dns: []string{n.Name}, ips: []netip.Addr{n.Address}},
		)
	}
	return specs
}

// kubeletClientUser is who the API server is when it calls kubelets.
const kubeletClientUser = "kube-apiserver-kubelet-client"

// pki is every certificate and key of a cluster, by name.
type pki struct {
	pairs map[string]keyPair
	// saKey and saPub sign and verify service account tokens.
	saKey, saPub []byte
}

// ensurePKI loads what is in dir and makes what is missing.
func ensurePKI(dir string, c *Config, now time.Time) (*pki, error) {
	p := &pki{pairs: map[string]keyPair{}}
	for _, name := range []string{clusterCA, etcdCA, frontProxyCA} {
		pair, err := ensurePair(dir, name, func() (keyPair, error) { return newCA(name, now) })
		if err != nil {
			return nil, err
		}
		p.pairs[name] = pair
	}
	for _, spec := range certSpecs(c) {
		pair, err := ensurePair(dir, spec.name, func() (keyPair, error) { return p.pairs[spec.ca].sign(spec, now) })
		if err != nil {
			return nil, err
		}
		p.pairs[spec.name] = pair
	}
	sa, err := ensurePair(dir, "sa", newTokenKey)
	if err != nil {
		return nil, err
	}
	p.saKey, p.saPub = sa.key, sa.cert
	return p, nil
}

func ensurePair(dir, name string, create func() (keyPair, error)) (keyPair, error) {
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	cert, certErr := os.ReadFile(certFile)
	key, keyErr := os.ReadFile(keyFile)
	if certErr == nil && keyErr == nil {
		return keyPair{cert, key}, nil
	}
	if err := errors.Join(notMissing(certErr), notMissing(keyErr)); err != nil {
		return keyPair{}, fmt.Errorf("read certificate %s: %w", name, err)
	}
	pair, err := create()
	if err != nil {
		return keyPair{}, fmt.Errorf("make certificate %s: %w", name, err)
	}
	// The key first: a certificate without its key would never be made again.
	if err := errors.Join(writeFile(keyFile, pair.key, 0o600), writeFile(certFile, pair.cert, 0o644)); err != nil {
		return keyPair{}, fmt.Errorf("write certificate %s: %w", name, err)
	}
	return pair, nil
}

func notMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func newCA(name string, now time.Time) (keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	template, err := certTemplate("h8s-"+name, nil, now, caLifetime)
	if err != nil {
		return keyPair{}, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return keyPair{}, err
	}
	return encodePair(der, key)
}

// sign makes a certificate with the pair, which is a CA's.
func (ca keyPair) sign(spec certSpec, now time.Time) (keyPair, error) {
	caCert, err := parseCert(ca.cert)
	if err != nil {
		return keyPair{}, err
	}
	caKey, err := parseKey(ca.key)
	if err != nil {
		return keyPair{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	template, err := certTemplate(spec.cn, spec.groups, now, certLifetime)
	if err != nil {
		return keyPair{}, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	if spec.server {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if spec.client {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	template.DNSNames = spec.dns
	for _, ip := range spec.ips {
		template.IPAddresses = append(template.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, caCert, key.Public(), caKey)
	if err != nil {
		return keyPair{}, err
	}
	return encodePair(der, key)
}

func certTemplate(cn string, groups []string, now time.Time, lifetime time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: cn, Organization: groups},
		// Clocks of this one machine agree, but they may be set back a little.
		NotBefore: now.Add(-5 * time.Minute),
		NotAfter:  now.Add(lifetime),
	}, nil
}

// newTokenKey makes the key of service account tokens; its public half is in the
// place of the certificate.
func newTokenKey() (keyPair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return keyPair{}, err
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return keyPair{}, err
	}
	return keyPair{cert: pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), key: keyPEM}, nil
}

func encodePair(der []byte, key *ecdsa.PrivateKey) (keyPair, error) {
	keyPEM, err := encodeKey(key)
	if err != nil {
		return keyPair{}, err
	}
	return keyPair{cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key: keyPEM}, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func parseCert(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block in certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

func parseKey(data []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block in key")
	}
	return x509.ParseECPrivateKey(block.Bytes)
}

// kubeconfig is a kubeconfig with everything inside it.
func kubeconfig(c *Config, ca []byte, user string, pair keyPair) ([]byte, error) {
	entry := "h8s-" + c.Name
	conf := clientcmdapi.NewConfig()
	conf.Clusters[entry] = &clientcmdapi.Cluster{Server: c.apiServer(), CertificateAuthorityData: ca}
	conf.AuthInfos[user] = &clientcmdapi.AuthInfo{ClientCertificateData: pair.cert, ClientKeyData: pair.key}
	conf.Contexts[entry] = &clientcmdapi.Context{Cluster: entry, AuthInfo: user}
	conf.CurrentContext = entry
	return clientcmd.Write(*conf)
}

// kubeconfigFor is the kubeconfig of one of the cluster's own certificates.
func (p *pki) kubeconfigFor(c *Config, name string) ([]byte, error) {
	return kubeconfig(c, p.pairs[clusterCA].cert, name, p.pairs[name])
}
