package main

import (
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestSandboxNetwork(t *testing.T) {
	pod := []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace, Path: "/run/netns/a"}}
	kind := func(k string) map[string]string { return map[string]string{"io.kubernetes.cri.container-type": k} }
	tests := map[string]struct {
		spec   specs.Spec
		config map[string]string
		want   string
	}{
		"the sandbox of a pod": {
			spec: specs.Spec{Annotations: kind("sandbox"), Linux: &specs.Linux{Namespaces: pod}},
			want: "/run/netns/a",
		},
		"a sandbox without kubernetes": {
			spec: specs.Spec{Linux: &specs.Linux{Namespaces: pod}},
			want: "/run/netns/a",
		},
		"network named": {
			spec:   specs.Spec{Linux: &specs.Linux{Namespaces: pod}},
			config: map[string]string{"network": "sandbox"},
			want:   "/run/netns/a",
		},
		"applications are on the namespace's own stack": {
			spec:   specs.Spec{Annotations: kind("sandbox"), Linux: &specs.Linux{Namespaces: pod}},
			config: map[string]string{"network": "host"},
		},
		"a container that joins a sandbox": {
			spec: specs.Spec{Annotations: kind("container"), Linux: &specs.Linux{Namespaces: pod}},
		},
		"a pod on the node's network": {
			spec: specs.Spec{Annotations: kind("sandbox"), Linux: &specs.Linux{Namespaces: pod[:1]}},
		},
		"no namespaces": {spec: specs.Spec{}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := sandboxNetwork(&tt.spec, tt.config); got != tt.want {
				t.Errorf("sandboxNetwork = %q, want %q", got, tt.want)
			}
		})
	}
}
