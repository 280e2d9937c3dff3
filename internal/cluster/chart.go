package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
	agentDaemonSet   = "h8s-node"
)

// chartValues are what the chart has to know about an embedded cluster, where the
// product's image has the given tag. Tenants do not reach the machine: not at its
// address on the bridge, which is of the cluster's own network, nor at its other
// addresses, nor clusters beside this one.
func chartValues(c *Config, machine []netip.Prefix, tag string, p *pki) map[string]any {
	type object = map[string]any
	denied := []string{subnets.String()}
	for _, address := range machine {
		denied = append(denied, address.String())
	}
	webhooks := object{"clusterIP": webhooksService, "tls": object{"secret": webhooksSecret, "ca": string(p.pairs[clusterCA].cert)}}
	if c.GuardedWebhooks {
		webhooks["clientCA"] = string(p.pairs[frontProxyCA].cert)
	}
	values := object{
		"infrastructureCIDRs": []string{c.Subnet.String()},
		"deniedCIDRs":         denied,
		"clusterDNS":          dnsService,
		"clusterDomain":       Domain,
		"serviceCIDRs":        []string{serviceCIDR},
		"podCIDRs":            []string{podCIDR},
		"image":               object{"repository": "localhost/h8s", "tag": tag, "pullPolicy": "Never"},
		"webhooks":            webhooks,
		"node":                object{"apiServer": object{"host": c.Nodes[0].Address.String(), "port": apiPort}},
	}
	if c.Keystone {
		values["keystone"] = object{
			"secretName": keystoneSecret, "cloud": keystoneCloud, "prefix": c.keystonePrefix(),
			"sync": object{"enabled": true, "cloud": keystoneReader, "tenant": object{"network": object{"cidrs": []string{demoCIDR}}}},
		}
	}
	return values
}

// valuesFor is the values file for the chart: the same as long as the machine has
// the same addresses.
func valuesFor(c *Config, tag string) ([]byte, error) {
	machine, err := machineAddresses()
	if err != nil {
		return nil, fmt.Errorf("list the machine's addresses: %w", err)
	}
	slices.SortFunc(machine, netip.Prefix.Compare)
	p, err := ensurePKI(c.state().pki(), c, time.Now())
	if err != nil {
		return nil, err
	}
	return yaml.Marshal(chartValues(c, machine, tag, p))
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
	values, err := valuesFor(b.Config, imageTag(b.images[productImage]))
	if err != nil {
		return err
	}
	valuesFile := b.state().path("values.yaml")
	if err := writeFile(valuesFile, values, 0o644); err != nil {
		return err
	}
	if err := b.forgetInterrupted(ctx); err != nil {
		return err
	}
	p, err := ensurePKI(b.state().pki(), b.Config, time.Now())
	if err != nil {
		return err
	}
	if err := b.ensureWebhooksSecret(ctx, p); err != nil {
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
	if err := b.waitForAgents(ctx); err != nil {
		return err
	}
	return b.waitForWebhooks(ctx)
}

// forgetInterrupted removes Helm's record of an operation that was interrupted: it
// would refuse every further one. Nobody else is at work, this process has the
// cluster's lock.
func (b *bringUp) forgetInterrupted(ctx context.Context) error {
	client, err := b.client()
	if err != nil {
		return err
	}
	err = client.CoreV1().Secrets(productNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{
		LabelSelector: "owner=helm,name=" + releaseName + ",status in (pending-install,pending-upgrade,pending-rollback)",
	})
	if err != nil {
		return fmt.Errorf("remove Helm's record of an interrupted installation: %w", err)
	}
	return nil
}

// waitForAgents waits until every node has the node agent that was installed, and is
// Ready with it. Helm is content when one node still has an older one.
func (b *bringUp) waitForAgents(ctx context.Context) error {
	client, err := b.client()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return poll(ctx, 100*time.Millisecond, func() error {
		agents, err := client.AppsV1().DaemonSets(productNamespace).Get(ctx, agentDaemonSet, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("wait for the node agents: %w", err)
		}
		s := agents.Status
		if s.ObservedGeneration < agents.Generation || s.UpdatedNumberScheduled < s.DesiredNumberScheduled || s.NumberAvailable < s.DesiredNumberScheduled {
			return fmt.Errorf("%d of %d node agents are up to date and %d available: `kubectl -n %s describe pods` says why",
				s.UpdatedNumberScheduled, s.DesiredNumberScheduled, s.NumberAvailable, productNamespace)
		}
		return b.nodesReady(ctx, client)
	})
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
