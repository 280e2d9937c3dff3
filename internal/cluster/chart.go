package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/api/v1alpha1"
)

// Where the product is in a cluster.
const (
	releaseName      = "h8s"
	productNamespace = "h8s-system"
)

// chartValues are what the chart has to know about an embedded cluster. Tenants
// do not reach the machine: not at its address on the bridge, which is of the
// cluster's own network, nor at its other addresses, nor clusters beside this one.
func chartValues(c *Config, machine []netip.Prefix) map[string]any {
	type object = map[string]any
	denied := []string{subnets.String()}
	for _, address := range machine {
		denied = append(denied, address.String())
	}
	return object{
		"infrastructureCIDRs": []string{c.Subnet.String()},
		"deniedCIDRs":         denied,
		"clusterDNS":          dnsService,
		"clusterDomain":       Domain,
		"serviceCIDRs":        []string{serviceCIDR},
		"podCIDRs":            []string{podCIDR},
		"image":               object{"repository": "localhost/h8s", "tag": "latest", "pullPolicy": "Never"},
		"node":                object{"apiServer": object{"host": c.Nodes[0].Address.String(), "port": apiPort}},
	}
}

// chartDir finds the chart: beside bin in a checkout.
func chartDir(binDir string) (string, error) {
	dir := filepath.Join(filepath.Dir(binDir), "deploy", "h8s")
	if _, err := os.Stat(filepath.Join(dir, "Chart.yaml")); err != nil {
		return "", fmt.Errorf("find the chart beside %s: %w", binDir, err)
	}
	return dir, nil
}

// installChart installs the product as on any other cluster.
func (b *bringUp) installChart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	chart, err := chartDir(b.BinDir)
	if err != nil {
		return err
	}
	machine, err := machineAddresses()
	if err != nil {
		return fmt.Errorf("list the machine's addresses: %w", err)
	}
	values, err := yaml.Marshal(chartValues(b.Config, machine))
	if err != nil {
		return err
	}
	valuesFile := b.state().path("values.yaml")
	if err := writeFile(valuesFile, values, 0o644); err != nil {
		return err
	}
	log, err := openLog(b.state().path("log", "helm.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	helm := exec.CommandContext(ctx, filepath.Join(b.BinDir, "helm"),
		"upgrade", "--install", releaseName, chart,
		"--namespace", productNamespace, "--create-namespace",
		"--values", valuesFile, "--wait", "--timeout", "4m",
		"--kubeconfig", b.state().adminKubeconfig())
	// Helm's caches belong to the cluster as well.
	helm.Env = append(os.Environ(), "HELM_CACHE_HOME="+b.state().path("helm"), "HELM_CONFIG_HOME="+b.state().path("helm"), "HELM_DATA_HOME="+b.state().path("helm"))
	helm.Stdout, helm.Stderr = log, log
	if err := helm.Run(); err != nil {
		return fmt.Errorf("install the chart %s: %w", chart, errors.Join(ctx.Err(), err))
	}
	return b.waitForWebhooks(ctx)
}

// waitForWebhooks asks until the API server reaches the controller's webhooks:
// that its pod is ready is not yet known to kube-proxy on every node.
func (b *bringUp) waitForWebhooks(ctx context.Context) error {
	operator, err := b.objectClient()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return poll(ctx, 100*time.Millisecond, func() error {
		tenant := &v1alpha1.Tenant{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "is-admission-there-"},
			Spec:       v1alpha1.TenantSpec{Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{demoCIDR}}},
		}
		if err := operator.Create(ctx, tenant, client.DryRunAll); err != nil {
			return fmt.Errorf("wait for the webhooks: %w", err)
		}
		return nil
	})
}
