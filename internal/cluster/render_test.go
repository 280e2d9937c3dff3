package cluster

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/deploy/apiserver"
)

func renderFiles(t *testing.T, c *Config, n Node) map[string]file {
	t.Helper()
	p, err := ensurePKI(t.TempDir(), c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	files, err := nodeFiles(c, n, p, "overlayfs")
	if err != nil {
		t.Fatal(err)
	}
	byPath := map[string]file{}
	for _, f := range files {
		byPath[f.path] = f
	}
	return byPath
}

// A node that runs pods has the keys of its own kubelet, and nothing with which
// to become somebody else.
func TestWorkerHasOnlyItsOwnKeys(t *testing.T) {
	c := testConfig(t, 2)
	allowed := map[string]bool{
		"kubernetes/pki/kubelet.key":       true,
		"kubernetes/kubelet.kubeconfig":    true,
		"kubernetes/kube-proxy.kubeconfig": true,
	}
	for path, f := range renderFiles(t, c, c.Nodes[1]) {
		secret := strings.Contains(string(f.data), "PRIVATE KEY") || strings.Contains(string(f.data), "client-key-data")
		if secret != allowed[path] {
			t.Errorf("%s: holds a key: %t", path, secret)
		}
		if secret && f.mode != 0o600 {
			t.Errorf("%s holds a key and has mode %v", path, f.mode)
		}
	}
	if _, ok := renderFiles(t, c, c.Nodes[0])["kubernetes/pki/ca.key"]; !ok {
		t.Error("the control plane has no key to sign certificates with")
	}
}

func TestKubeletConfig(t *testing.T) {
	c := testConfig(t, 2)
	var conf map[string]any
	if err := yaml.UnmarshalStrict([]byte(kubeletConfig(c, c.Nodes[1])), &conf); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"address":       "172.30.7.12",
		"cgroupRoot":    "/h8s-test/n2",
		"clusterDomain": Domain,
		"maxPods":       float64(120),
		"podCIDR":       "10.244.2.0/24",
		"failCgroupV1":  false,
	} {
		if conf[key] != want {
			t.Errorf("%s = %v, want %v", key, conf[key], want)
		}
	}
	if err := yaml.UnmarshalStrict([]byte(kubeProxyConfig(c.Nodes[1])), &conf); err != nil {
		t.Fatal(err)
	}
	if conf["mode"] != "nftables" {
		t.Errorf("kube-proxy's mode = %v", conf["mode"])
	}
}

func TestDefaultNetwork(t *testing.T) {
	list, err := libcni.NetworkConfFromBytes(defaultNetwork(testConfig(t, 1).Nodes[0]))
	if err != nil {
		t.Fatal(err)
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	if got := strings.Join(types, ","); got != "ptp,portmap" {
		t.Errorf("plugins = %s", got)
	}
}

func TestNodePrograms(t *testing.T) {
	c := testConfig(t, 2)
	tests := map[string]struct {
		node Node
		want string
	}{
		"first node": {c.Nodes[0], "etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet kube-proxy"},
		"other node": {c.Nodes[1], "containerd kubelet kube-proxy"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var names []string
			for _, p := range nodePrograms(c, test.node) {
				names = append(names, p.name)
				seen := map[string]bool{}
				for _, arg := range p.args {
					flag, _, _ := strings.Cut(arg, "=")
					if seen[flag] {
						t.Errorf("%s has %s twice", p.name, flag)
					}
					seen[flag] = true
				}
			}
			if got := strings.Join(names, " "); got != test.want {
				t.Errorf("programs = %s, want %s", got, test.want)
			}
		})
	}
}

func TestContainerdConfig(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "native"} {
		conf := containerdConfig(snapshotter)
		for _, want := range []string{
			`snapshotter = "` + snapshotter + `"`, `sandbox = "localhost/pause:latest"`, "restrict_oom_score_adj = true",
			`runtime_type = "io.containerd.runsc.v1"`,
		} {
			if !strings.Contains(conf, want) {
				t.Errorf("%s: no %s", snapshotter, want)
			}
		}
	}
}

// The API server asks about tokens only in a cluster that has a Keystone.
func TestTokenReviewFlags(t *testing.T) {
	for name, with := range map[string]bool{"with Keystone": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t, 2)
			c.Keystone = with
			for i, n := range c.Nodes {
				conf, there := renderFiles(t, c, n)[tokenReviewKubeconfig]
				if want := with && i == 0; there != want {
					t.Errorf("%s has the kubeconfig: %t, want %t", n.Name, there, want)
				}
				if there && !strings.Contains(string(conf.data), "https://"+webhooksService+apiserver.TokenReviewPath) {
					t.Errorf("it leads elsewhere:\n%s", conf.data)
				}
				for _, p := range nodePrograms(c, n) {
					flag := strings.Contains(strings.Join(p.args, " "), "--authentication-token-webhook-config-file=/etc/"+tokenReviewKubeconfig)
					if want := with && p.name == "kube-apiserver"; flag != want {
						t.Errorf("%s has the flag: %t, want %t", p.name, flag, want)
					}
				}
			}
		})
	}
}

// The controller answers who shows a certificate of the CA in its values: the API server
// has one to show, by both ways, and its files name no other. Admission shows it to nobody
// else's webhooks: to those, the user of a current-context would be shown.
func TestGuardedWebhooks(t *testing.T) {
	for name, guarded := range map[string]bool{"a new cluster": true, "an older one": false} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t, 2)
			c.GuardedWebhooks, c.Keystone = guarded, true
			p, err := ensurePKI(t.TempDir(), c, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			webhooks := chartValues(c, nil, "tag", p)["webhooks"].(map[string]any)
			if ca, ok := webhooks["clientCA"]; ok != guarded || ok && ca != string(p.pairs[frontProxyCA].cert) {
				t.Errorf("the controller is told the CA %v", ca)
			}
			files := renderFiles(t, c, c.Nodes[0])
			for _, path := range []string{strings.TrimPrefix(apiserver.WebhooksKubeconfig, "/etc/"), tokenReviewKubeconfig} {
				conf, err := clientcmd.Load(files[path].data)
				if err != nil {
					t.Fatal(err)
				}
				user := conf.AuthInfos[conf.Contexts[conf.CurrentContext].AuthInfo]
				if (user != nil) != guarded || guarded && user.ClientCertificate != "/etc/kubernetes/pki/front-proxy-client.crt" {
					t.Errorf("%s has the user %+v", path, user)
				}
			}
			for _, path := range []string{"kubernetes/admission.yaml", strings.TrimPrefix(apiserver.AdmissionKubeconfig, "/etc/")} {
				if _, ok := files[path]; ok != guarded {
					t.Errorf("%s is there: %t", path, ok)
				}
			}
			if guarded {
				conf, err := clientcmd.Load(files[strings.TrimPrefix(apiserver.AdmissionKubeconfig, "/etc/")].data)
				if err != nil {
					t.Fatal(err)
				}
				user := conf.AuthInfos["h8s-controller.h8s-system.svc"]
				if user == nil || user.ClientCertificate != "/etc/kubernetes/pki/front-proxy-client.crt" || len(conf.AuthInfos) != 1 || conf.CurrentContext != "" {
					t.Errorf("admission shows %+v, in the context %q", conf.AuthInfos, conf.CurrentContext)
				}
				if !strings.Contains(string(files["kubernetes/admission.yaml"].data), "kubeConfigFile: "+apiserver.AdmissionKubeconfig) {
					t.Error("admission.yaml names another kubeconfig")
				}
			}
			for _, prog := range nodePrograms(c, c.Nodes[0]) {
				if has := slices.Contains(prog.args, "--admission-control-config-file=/etc/kubernetes/admission.yaml"); has != (guarded && prog.name == "kube-apiserver") {
					t.Errorf("%s has the flag: %t", prog.name, has)
				}
			}
		})
	}
}
