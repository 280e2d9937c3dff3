package cluster

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

func TestPKI(t *testing.T) {
	now := time.Now()
	c := testConfig(t, 2)
	p, err := ensurePKI(t.TempDir(), c, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range certSpecs(c) {
		t.Run(spec.name, func(t *testing.T) {
			cert, err := parseCert(p.pairs[spec.name].cert)
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(p.pairs[spec.ca].cert)
			for usage, want := range map[x509.ExtKeyUsage]bool{
				x509.ExtKeyUsageServerAuth: spec.server,
				x509.ExtKeyUsageClientAuth: spec.client,
			} {
				_, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
				if (err == nil) != want {
					t.Errorf("usage %d: %v, want allowed: %t", usage, err, want)
				}
			}
			for _, other := range []string{clusterCA, etcdCA, frontProxyCA} {
				pool := x509.NewCertPool()
				pool.AppendCertsFromPEM(p.pairs[other].cert)
				_, err := cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
				if (err == nil) != (other == spec.ca) {
					t.Errorf("against %s: %v", other, err)
				}
			}
			for _, ip := range spec.ips {
				if err := cert.VerifyHostname(ip.String()); err != nil {
					t.Error(err)
				}
			}
			if cert.Subject.CommonName != spec.cn || !slices.Equal(cert.Subject.Organization, spec.groups) {
				t.Errorf("subject %s, want %s of %v", cert.Subject, spec.cn, spec.groups)
			}
			if _, err := parseKey(p.pairs[spec.name].key); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestEnsurePKIKeepsWhatIsThere(t *testing.T) {
	dir, c := t.TempDir(), testConfig(t, 1)
	first, err := ensurePKI(dir, c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "admin.crt")); err != nil {
		t.Fatal(err)
	}
	second, err := ensurePKI(dir, c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range first.pairs {
		same := string(second.pairs[name].cert) == string(pair.cert)
		if same == (name == "admin") {
			t.Errorf("%s: kept: %t", name, same)
		}
	}
	if string(first.saKey) != string(second.saKey) {
		t.Error("the key of service account tokens changed: all tokens are void")
	}
	for _, name := range []string{"ca.key", "admin.key", "sa.key"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
	}
}

func TestKubeconfig(t *testing.T) {
	c := testConfig(t, 1)
	p, err := ensurePKI(t.TempDir(), c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	data, err := p.kubeconfigFor(c, "admin")
	if err != nil {
		t.Fatal(err)
	}
	conf, err := clientcmd.RESTConfigFromKubeConfig(data)
	if err != nil {
		t.Fatal(err)
	}
	if conf.Host != c.apiServer() || string(conf.CertData) != string(p.pairs["admin"].cert) || string(conf.CAData) != string(p.pairs[clusterCA].cert) {
		t.Errorf("kubeconfig does not hold what it was made from: %s", data)
	}
}
