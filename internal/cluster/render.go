package cluster

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"h8s.io/hypernetes/deploy/apiserver"
	"h8s.io/hypernetes/internal/hyper/install"
)

// file is a file to write, its path relative to a node's /etc.
type file struct {
	path string
	mode os.FileMode
	data []byte
}

// program is an upstream program that node init runs.
type program struct {
	name string
	args []string
	// needs is what it waits for before it starts for the first time. Each of them
	// tries again by itself too, but at intervals that soon get long.
	needs []endpoint
}

// endpoint is something that gets ready: a socket (network, address) that accepts
// connections, or a URL ("https", URL) that answers 200.
type endpoint struct{ network, address string }

// Where things are inside a node: the same places as on any machine.
const (
	nodeBinDir       = "/opt/h8s/bin"
	nodePKI          = "/etc/kubernetes/pki"
	containerdSocket = "/run/containerd/containerd.sock"
	pauseImage       = "localhost/pause:latest"
)

// nodeCgroup is the cgroup that holds everything of a node; its pods are below
// kubepods, its programs in system.
func nodeCgroup(cluster, node string) string { return clusterCgroup(cluster) + "/" + node }

func clusterCgroup(cluster string) string { return "/h8s-" + cluster }

// nodeFiles are the files that belong into a node's /etc.
func nodeFiles(c *Config, n Node, p *pki, snapshotter string) ([]file, error) {
	files := []file{
		{"containerd/config.toml", 0o644, []byte(containerdConfig(snapshotter))},
		{"containerd/runsc.toml", 0o644, []byte(runscConfig)},
		{"containerd/conf.d/00-hyper.toml", 0o644, install.Containerd("")},
		{"cni/net.d/10-default.conflist", 0o644, defaultNetwork(n)},
		{"kubernetes/kubelet.yaml", 0o644, []byte(kubeletConfig(c, n))},
		{"kubernetes/kube-proxy.yaml", 0o644, []byte(kubeProxyConfig(n))},
		{"kubernetes/pki/ca.crt", 0o644, p.pairs[clusterCA].cert},
		{"kubernetes/pki/kubelet.crt", 0o644, p.pairs["kubelet-serving-"+n.Name].cert},
		{"kubernetes/pki/kubelet.key", 0o600, p.pairs["kubelet-serving-"+n.Name].key},
		{"hostname", 0o644, []byte(n.Name + "\n")},
		{"hosts", 0o644, []byte(hosts(c))},
		{"resolv.conf", 0o644, []byte("nameserver " + c.gateway().String() + "\n")},
	}
	kubeconfigs := map[string]string{"kubelet": "kubelet-" + n.Name, "kube-proxy": "kube-proxy"}
	if isControlPlane(c, n) {
		kubeconfigs["kube-controller-manager"] = "kube-controller-manager"
		kubeconfigs["kube-scheduler"] = "kube-scheduler"
		for _, name := range []string{
			clusterCA, etcdCA, frontProxyCA, "apiserver", "apiserver-kubelet-client",
			"front-proxy-client", "etcd", "apiserver-etcd-client",
		} {
			files = append(files,
				file{"kubernetes/pki/" + name + ".crt", 0o644, p.pairs[name].cert},
				file{"kubernetes/pki/" + name + ".key", 0o600, p.pairs[name].key})
		}
		webhooks, err := c.webhooksKubeconfig(p, apiserver.AuthorizePath)
		if err != nil {
			return nil, err
		}
		files = append(files,
			file{"kubernetes/authorization.yaml", 0o644, apiserver.Authorization},
			file{strings.TrimPrefix(apiserver.WebhooksKubeconfig, "/etc/"), 0o600, webhooks})
		if c.GuardedWebhooks {
			admission, err := admissionKubeconfig()
			if err != nil {
				return nil, err
			}
			files = append(files,
				file{"kubernetes/admission.yaml", 0o644, apiserver.Admission},
				file{strings.TrimPrefix(apiserver.AdmissionKubeconfig, "/etc/"), 0o600, admission})
		}
		if c.Keystone {
			reviews, err := c.webhooksKubeconfig(p, apiserver.TokenReviewPath)
			if err != nil {
				return nil, err
			}
			files = append(files, file{tokenReviewKubeconfig, 0o600, reviews})
		}
		files = append(files,
			file{"kubernetes/pki/sa.pub", 0o644, p.saPub},
			file{"kubernetes/pki/sa.key", 0o600, p.saKey})
		if c.OIDC != nil {
			data, err := c.OIDC.AuthenticationConfiguration()
			if err != nil {
				return nil, err
			}
			files = append(files, file{"kubernetes/authentication.yaml", 0o644, data})
		}
	}
	for name, cert := range kubeconfigs {
		data, err := p.kubeconfigFor(c, cert)
		if err != nil {
			return nil, fmt.Errorf("render kubeconfig of %s: %w", name, err)
		}
		files = append(files, file{"kubernetes/" + name + ".kubeconfig", 0o600, data})
	}
	return files, nil
}

func isControlPlane(c *Config, n Node) bool { return n.Name == c.Nodes[0].Name }

// nodePrograms are the programs of a node.
func nodePrograms(c *Config, n Node) []program {
	var programs []program
	if isControlPlane(c, n) {
		programs = controlPlane(c, n)
	}
	return append(programs,
		program{
			name: "containerd",
			args: []string{"--config=/etc/containerd/config.toml"},
		},
		program{
			name: "kubelet",
			args: []string{
				"--config=/etc/kubernetes/kubelet.yaml",
				"--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
				"--hostname-override=" + n.Name,
				"--node-ip=" + n.Address.String(),
			},
			needs: []endpoint{{"unix", containerdSocket}, apiReady(c)},
		},
		program{
			name:  "kube-proxy",
			args:  []string{"--config=/etc/kubernetes/kube-proxy.yaml"},
			needs: []endpoint{apiReady(c)},
		},
	)
}

// apiReady: the API server accepts connections long before it knows who may do what.
func apiReady(c *Config) endpoint { return endpoint{"https", c.apiServer() + "/readyz"} }

func controlPlane(c *Config, n Node) []program {
	pki := func(f string) string { return nodePKI + "/" + f }
	conf := func(f string) string { return "/etc/kubernetes/" + f }
	// It excludes the flags --oidc-* and --anonymous-auth.
	var authentication []string
	if c.OIDC != nil {
		authentication = []string{"--authentication-config=" + conf("authentication.yaml")}
	}
	if c.Keystone {
		authentication = append(authentication, keystoneFlags()...)
	}
	if c.GuardedWebhooks {
		authentication = append(authentication, "--admission-control-config-file="+conf("admission.yaml"))
	}
	return []program{
		{
			name: "etcd",
			args: []string{
				"--name=" + n.Name,
				"--data-dir=/var/lib/etcd",
				"--listen-client-urls=https://127.0.0.1:2379",
				"--advertise-client-urls=https://127.0.0.1:2379",
				"--listen-peer-urls=https://127.0.0.1:2380",
				"--initial-advertise-peer-urls=https://127.0.0.1:2380",
				"--initial-cluster=" + n.Name + "=https://127.0.0.1:2380",
				"--client-cert-auth",
				"--trusted-ca-file=" + pki("etcd-ca.crt"),
				"--cert-file=" + pki("etcd.crt"),
				"--key-file=" + pki("etcd.key"),
				"--peer-client-cert-auth",
				"--peer-trusted-ca-file=" + pki("etcd-ca.crt"),
				"--peer-cert-file=" + pki("etcd.crt"),
				"--peer-key-file=" + pki("etcd.key"),
			},
		},
		{
			name: "kube-apiserver",
			args: append([]string{
				"--secure-port=" + strconv.Itoa(apiPort),
				"--advertise-address=" + n.Address.String(),
				"--etcd-servers=https://127.0.0.1:2379",
				"--etcd-cafile=" + pki("etcd-ca.crt"),
				"--etcd-certfile=" + pki("apiserver-etcd-client.crt"),
				"--etcd-keyfile=" + pki("apiserver-etcd-client.key"),
				"--client-ca-file=" + pki("ca.crt"),
				"--tls-cert-file=" + pki("apiserver.crt"),
				"--tls-private-key-file=" + pki("apiserver.key"),
				"--kubelet-certificate-authority=" + pki("ca.crt"),
				"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"),
				"--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
				"--kubelet-preferred-address-types=InternalIP",
				"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"),
				"--requestheader-allowed-names=front-proxy-client",
				"--requestheader-username-headers=X-Remote-User",
				"--requestheader-group-headers=X-Remote-Group",
				"--requestheader-extra-headers-prefix=X-Remote-Extra-",
				"--proxy-client-cert-file=" + pki("front-proxy-client.crt"),
				"--proxy-client-key-file=" + pki("front-proxy-client.key"),
				"--service-account-issuer=https://kubernetes.default.svc." + Domain,
				"--service-account-key-file=" + pki("sa.pub"),
				"--service-account-signing-key-file=" + pki("sa.key"),
				"--service-cluster-ip-range=" + serviceCIDR,
				"--authorization-config=" + conf("authorization.yaml"),
				"--enable-admission-plugins=NodeRestriction",
				"--allow-privileged=true",
				// Kubernetes' defaults, 400 and 200, are for more than 2 processors: what is let
				// in takes turns on those, and not in the queues, which are fair.
				"--max-requests-inflight=" + strconv.Itoa(50*runtime.NumCPU()),
				"--max-mutating-requests-inflight=" + strconv.Itoa(25*runtime.NumCPU()),
			}, authentication...),
			needs: []endpoint{{"tcp", "127.0.0.1:2379"}},
		},
		{name: "kube-controller-manager", needs: []endpoint{apiReady(c)}, args: []string{
			"--flex-volume-plugin-dir=/var/lib/kubelet/volume-plugins",
			"--kubeconfig=" + conf("kube-controller-manager.kubeconfig"),
			"--authentication-kubeconfig=" + conf("kube-controller-manager.kubeconfig"),
			"--authorization-kubeconfig=" + conf("kube-controller-manager.kubeconfig"),
			"--bind-address=127.0.0.1",
			"--leader-elect=false",
			"--use-service-account-credentials",
			"--root-ca-file=" + pki("ca.crt"),
			"--service-account-private-key-file=" + pki("sa.key"),
			"--cluster-signing-cert-file=" + pki("ca.crt"),
			"--cluster-signing-key-file=" + pki("ca.key"),
			"--allocate-node-cidrs=false",
			"--service-cluster-ip-range=" + serviceCIDR,
		}},
		{name: "kube-scheduler", needs: []endpoint{apiReady(c)}, args: []string{
			"--kubeconfig=" + conf("kube-scheduler.kubeconfig"),
			"--authentication-kubeconfig=" + conf("kube-scheduler.kubeconfig"),
			"--authorization-kubeconfig=" + conf("kube-scheduler.kubeconfig"),
			"--bind-address=127.0.0.1",
			"--leader-elect=false",
		}},
	}
}

// containerdConfig lowers no oom_score_adj below its own (restrict_oom_score_adj):
// that takes CAP_SYS_RESOURCE, which not every machine gives away. AppArmor
// profiles are the machine's, not a namespace's, so the nodes leave them alone.
func containerdConfig(snapshotter string) string {
	return fmt.Sprintf(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
imports = ["/etc/containerd/conf.d/*.toml"]

# A sandbox's shim may answer late on a busy machine; the default, 2s, fails an exec then.
[timeouts]
  "io.containerd.timeout.task.state" = "10s"
  # And what a killed shim leaves may take as long; the default is 5s.
  "io.containerd.timeout.shim.cleanup" = "30s"

[grpc]
  address = %q

[plugins."io.containerd.cri.v1.images"]
  snapshotter = %q

[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = %q

[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true

[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["/opt/cni/bin"]
  conf_dir = "/etc/cni/net.d"
  max_conf_num = 1

[plugins."io.containerd.cri.v1.runtime".containerd]
  default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
  SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc]
  runtime_type = "io.containerd.runsc.v1"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc.options]
  TypeUrl = "io.containerd.runsc.v1.options"
  ConfigPath = "/etc/containerd/runsc.toml"

# Nobody is plugged in there. It looks at each pod often, and for one whose sandbox is a
# shim's it logs an error every time.
[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.transfer.v1.local"]
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = %q
`, containerdSocket, snapshotter, pauseImage, snapshotter)
}

// runscConfig: systrap is the platform that works everywhere, also in a virtual
// machine without nested virtualisation.
const runscConfig = `log_path = "/var/log/h8s/runsc/%ID%.log"

[runsc_config]
  platform = "systrap"
  network = "sandbox"
  # ping and traceroute; a forged source is dropped outside the sandbox, by the portal.
  net-raw = "true"
  # Nothing of the host is to be had in the sandbox.
  host-uds = "none"
  host-fifo = "none"
`

// defaultNetwork is where pods of no tenant live: upstream's plugins, reached from
// other nodes by a route. Masquerading is node init's (masqueradeRules), because
// ptp would hide the source of pod-to-pod traffic as well.
func defaultNetwork(n Node) []byte {
	type object = map[string]any
	conf := object{
		"cniVersion": "1.0.0",
		"name":       "default",
		"plugins": []object{
			{
				"type":   "ptp",
				"ipMasq": false,
				"ipam": object{
					"type":   "host-local",
					"ranges": [][]object{{{"subnet": n.PodCIDR.String()}}},
					"routes": []object{{"dst": "0.0.0.0/0"}},
				},
			},
			{"type": "portmap", "capabilities": object{"portMappings": true}, "backend": "nftables"},
		},
	}
	data, err := json.MarshalIndent(conf, "", "  ")
	if err != nil {
		panic(err) // maps of strings always marshal
	}
	return append(data, '\n')
}

// kubeletConfig: images are loaded from files and cannot be pulled again, so
// kubelet never removes one, and a full disk of the machine is not the node's. A node
// that was short of memory takes pods again after seconds: upstream's five minutes keep
// load off that would come back at once, which a cluster of two nodes has not to spare.
func kubeletConfig(c *Config, n Node) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %s
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: %s
clusterDNS: [%s]
clusterDomain: %s
containerRuntimeEndpoint: unix://%s
evictionHard: {memory.available: 100Mi, nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%"}
evictionPressureTransitionPeriod: 10s
failCgroupV1: false
failSwapOn: false
healthzBindAddress: 127.0.0.1
imageGCHighThresholdPercent: 100
maxPods: 120
oomScoreAdj: 0
podCIDR: %s
resolvConf: /etc/resolv.conf
rotateCertificates: false
serverTLSBootstrap: false
serializeImagePulls: false
tlsCertFile: /etc/kubernetes/pki/kubelet.crt
tlsPrivateKeyFile: /etc/kubernetes/pki/kubelet.key
volumePluginDir: /var/lib/kubelet/volume-plugins
`, n.Address, nodeCgroup(c.Name, n.Name), dnsService, Domain, containerdSocket, n.PodCIDR)
}

// kubeProxyConfig leaves conntrack's limits alone: they are the machine's.
func kubeProxyConfig(n Node) string {
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
bindAddress: 0.0.0.0
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clientConnection: {kubeconfig: /etc/kubernetes/kube-proxy.kubeconfig}
clusterCIDR: %s
hostnameOverride: %s
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, podCIDR, n.Name)
}

func hosts(c *Config) string {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for _, n := range c.Nodes {
		fmt.Fprintf(&b, "%s %s\n", n.Address, n.Name)
	}
	return b.String()
}

// masqueradeRules hide pods of the default network behind their node's address
// when they speak to anything that has no route to them.
func masqueradeRules(n Node) string {
	return fmt.Sprintf(`table ip h8s-default-network
delete table ip h8s-default-network
table ip h8s-default-network {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr %s ip daddr != { %s, 224.0.0.0/4 } masquerade
	}
}
`, n.PodCIDR, podCIDR)
}
