package shim

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func to[T any](v T) *T { return &v }

func linuxSpec(change func(*specs.Spec)) *specs.Spec {
	s := &specs.Spec{Process: &specs.Process{}, Root: &specs.Root{}, Linux: &specs.Linux{}}
	change(s)
	return s
}

func TestNamespaces(t *testing.T) {
	type namespaces = []specs.LinuxNamespace
	always := namespaces{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	for name, test := range map[string]struct {
		given  namespaces
		shared bool
		want   namespaces // beyond those that a container always has
		refuse string
	}{
		"the machine's": {given: namespaces{
			{Type: specs.NetworkNamespace, Path: "/proc/9/ns/net"},
			{Type: specs.IPCNamespace, Path: "/proc/9/ns/ipc"},
			{Type: specs.UTSNamespace, Path: "/proc/9/ns/uts"},
			{Type: specs.MountNamespace},
		}},
		"own PIDs":                   {given: namespaces{{Type: specs.PIDNamespace}}, want: namespaces{{Type: specs.PIDNamespace}}},
		"the pod's PIDs":             {given: namespaces{{Type: specs.PIDNamespace, Path: "/proc/9/ns/pid"}}, shared: true},
		"another container's PIDs":   {given: namespaces{{Type: specs.PIDNamespace, Path: "/proc/77/ns/pid"}}, want: namespaces{{Type: specs.PIDNamespace, Path: "/proc/77/ns/pid"}}},
		"PIDs of somewhere else":     {given: namespaces{{Type: specs.PIDNamespace, Path: "/run/pid"}}, refuse: "not of this pod"},
		"a user namespace":           {given: namespaces{{Type: specs.UserNamespace}}, refuse: "hostUsers: false"},
		"a namespace of the unknown": {given: namespaces{{Type: specs.TimeNamespace}}, refuse: "type time"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := linuxSpec(func(s *specs.Spec) { s.Linux.Namespaces = test.given })
			err := inGuest(spec, test.shared)
			if test.refuse != "" {
				if err == nil || !strings.Contains(err.Error(), test.refuse) {
					t.Fatalf("error %v, want one with %q", err, test.refuse)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(append(always[:2:2], test.want...), spec.Linux.Namespaces); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What is the node's goes; what confines the container stays.
func TestSpecInGuest(t *testing.T) {
	spec := linuxSpec(func(s *specs.Spec) {
		s.Hostname = "h"
		s.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "/bin/sh"}}} //nolint:staticcheck // must go all the more
		s.Process.ApparmorProfile, s.Process.SelinuxLabel = "a", "b"
		s.Process.User = specs.User{UID: 1000}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}
		s.Process.NoNewPrivileges = true
		s.Root.Readonly = true
		s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda"}}
		s.Linux.Sysctl = map[string]string{"net.x": "1"}
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, ListenerPath: "/run/s"}
		s.Linux.MaskedPaths = []string{"/proc/kcore"}
		s.Linux.Resources = &specs.LinuxResources{
			CPU:    &specs.LinuxCPU{Quota: to(int64(5)), Cpus: "0-63", Mems: "1"},
			Memory: &specs.LinuxMemory{Limit: to(int64(100)), Swap: to(int64(100))},
			Pids:   &specs.LinuxPids{Limit: to(int64(9))},
		}
	})
	if err := inGuest(spec, false); err != nil {
		t.Fatal(err)
	}
	want := linuxSpec(func(s *specs.Spec) {
		s.Process.User = specs.User{UID: 1000}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_KILL"}}
		s.Process.NoNewPrivileges = true
		s.Root.Readonly = true
		s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
		s.Linux.MaskedPaths = []string{"/proc/kcore"}
		s.Linux.Resources = &specs.LinuxResources{
			CPU:    &specs.LinuxCPU{Quota: to(int64(5))},
			Memory: &specs.LinuxMemory{Limit: to(int64(100))},
			Pids:   &specs.LinuxPids{Limit: to(int64(9))},
		}
	})
	if diff := cmp.Diff(want, spec); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The guest has other devices by the node's numbers.
func TestTakeDevices(t *testing.T) {
	all := specs.LinuxDeviceCgroup{Access: "rwm"}
	null := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: to(int64(1)), Minor: to(int64(3)), Access: "rwm"}
	disk := specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: to(int64(8)), Minor: to(int64(1)), Access: "r"}
	sda1 := specs.LinuxDevice{Path: "/dev/x", Type: "b", Major: 8, Minor: 1}
	for name, test := range map[string]struct {
		rules, left []specs.LinuxDeviceCgroup
		want        []device
	}{
		"asked for":     {rules: []specs.LinuxDeviceCgroup{all, null, disk}, left: []specs.LinuxDeviceCgroup{all, null}, want: []device{{sda1, "r", false}}},
		"without rules": {want: []device{{sda1, "rwm", false}}},
		"privileged": {
			rules: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, left: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}},
			want: []device{{sda1, "rwm", true}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			spec := linuxSpec(func(s *specs.Spec) {
				s.Linux.Devices, s.Linux.Resources = []specs.LinuxDevice{sda1}, &specs.LinuxResources{Devices: test.rules}
			})
			if d := cmp.Diff(test.want, takeDevices(spec), cmp.AllowUnexported(device{})); d != "" {
				t.Error(d)
			}
			if d := cmp.Diff(test.left, spec.Linux.Resources.Devices, cmpopts.EquateEmpty()); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestSize(t *testing.T) {
	const mi = mebibyte
	resources := func(memory, quota int64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: 100_000}
	}
	for name, test := range map[string]struct {
		limits, overhead *cri.LinuxContainerResources
		unlimited        bool
		cpus             int
		memory           int64
	}{
		"no limits":              {cpus: 1, memory: 512 * mi},
		"overhead without limit": {overhead: resources(100*mi, 50_000), cpus: 1, memory: 512 * mi},
		"limit and overhead":     {limits: resources(300*mi, 50_000), overhead: resources(128*mi, 0), cpus: 1, memory: 332 * mi},
		"rounded down":           {limits: resources(300*mi+5, 50_000), overhead: resources(67*mi, 0), cpus: 1, memory: 270 * mi},
		"not of all":             {limits: resources(300*mi, 50_000), overhead: resources(128*mi, 0), unlimited: true, cpus: 1, memory: 512 * mi},
		"much, and not of all":   {limits: resources(600*mi, 50_000), overhead: resources(128*mi, 0), unlimited: true, cpus: 1, memory: 632 * mi},
		"very small":             {limits: resources(mi, 1000), cpus: 1, memory: 128 * mi},
		"a part makes a whole":   {limits: resources(0, 110_000), cpus: 2, memory: 512 * mi},
	} {
		t.Run(name, func(t *testing.T) {
			cpus, memory := size(&cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Resources: test.limits, Overhead: test.overhead}}, !test.unlimited)
			if cpus != test.cpus || memory != test.memory {
				t.Errorf("%d processors, %d MiB; want %d, %d", cpus, memory/mi, test.cpus, test.memory/mi)
			}
		})
	}
}
