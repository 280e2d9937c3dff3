package shim

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestNodesNamespaces asks for what is the node's: the pod's author reads why not.
func TestNodesNamespaces(t *testing.T) {
	for name, test := range map[string]struct {
		netns   string
		options *cri.NamespaceOption
		want    string // "": it is a pod
	}{
		"none":        {"/run/netns/a", &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}, ""},
		"a pod's PID": {"/run/netns/a", &cri.NamespaceOption{Pid: cri.NamespaceMode_POD}, ""},
		"hostNetwork": {"", &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}, "hostNetwork is not for this runtime"},
		"hostPID":     {"/run/netns/a", &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}, "hostPID is not for this runtime"},
		"hostIPC":     {"/run/netns/a", &cri.NamespaceOption{Ipc: cri.NamespaceMode_NODE}, "hostIPC is not for this runtime"},
	} {
		t.Run(name, func(t *testing.T) {
			config := &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
				SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: test.options},
			}}
			_, err := newPod("id", config, test.netns, Config{CacheDir: t.TempDir()}, t.TempDir(), func(string, any) {})
			switch {
			case test.want == "" && err != nil:
				t.Errorf("error %v, want a pod", err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}
