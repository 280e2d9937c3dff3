package shim

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// refusal is what a pod asks for and a virtual machine cannot give, as a sentence for the
// pod's author.
type refusal string

// Error implements error.
func (r refusal) Error() string { return string(r) }

// inGuest rewrites a container's specification, made for a node by containerd, for the
// guest: whatever is the node's is dropped, what is the pod's is the machine's, and
// what confines the container stays. sharedPID is whether the pod's containers share a PID
// namespace. Mounts are left to the volumes.
func inGuest(spec *specs.Spec, sharedPID bool) error {
	if spec.Process == nil || spec.Root == nil || spec.Linux == nil {
		return refusal("the container's specification is not one of a Linux container")
	}
	linux := spec.Linux
	namespaces, err := guestNamespaces(linux.Namespaces, sharedPID)
	if err != nil {
		return err
	}
	linux.Namespaces = namespaces

	spec.Hooks = nil
	// The machine has the pod's host name, and its sysctls: both came with the sandbox.
	spec.Hostname, spec.Domainname = "", ""
	linux.Sysctl = nil
	spec.Process.ApparmorProfile, spec.Process.SelinuxLabel, linux.MountLabel = "", "", ""
	linux.Devices = nil // see takeDevices
	linux.IntelRdt = nil
	linux.NetDevices = nil
	linux.RootfsPropagation = ""
	if linux.Seccomp != nil {
		linux.Seccomp.ListenerPath, linux.Seccomp.ListenerMetadata = "", ""
	}
	resourcesInGuest(linux.Resources)
	return nil
}

// device is a device of the node that a container is to have.
type device struct {
	specs.LinuxDevice
	access string // what its cgroup would allow: of rwm
	// sweeping is whether the container is to have all of the node's devices, being privileged:
	// then this one may not have been asked for.
	sweeping bool
}

// takeDevices returns the node's devices in a specification, and takes the rules for block
// devices out of it.
func takeDevices(spec *specs.Spec) []device {
	if spec.Linux == nil {
		return nil
	}
	var rules []specs.LinuxDeviceCgroup
	if spec.Linux.Resources != nil {
		rules = spec.Linux.Resources.Devices
	}
	sweeping := slices.ContainsFunc(rules, func(r specs.LinuxDeviceCgroup) bool {
		return r.Allow && (r.Type == "" || r.Type == "a") && r.Major == nil
	})
	var taken []device
	for _, d := range spec.Linux.Devices {
		mine := func(r specs.LinuxDeviceCgroup) bool {
			return r.Allow && r.Type == d.Type && r.Major != nil && *r.Major == d.Major && r.Minor != nil && *r.Minor == d.Minor
		}
		access := "rwm"
		if i := slices.IndexFunc(rules, mine); i >= 0 {
			access = rules[i].Access
		}
		taken = append(taken, device{d, access, sweeping})
	}
	// The guest has other devices by the node's numbers.
	rules = slices.DeleteFunc(rules, func(r specs.LinuxDeviceCgroup) bool {
		return r.Allow && r.Type == "b" && r.Major != nil
	})
	if spec.Linux.Resources != nil {
		spec.Linux.Resources.Devices = rules
	}
	return taken
}

// resourcesInGuest drops the limits that speak of the node's hardware, or that no guest has.
func resourcesInGuest(r *specs.LinuxResources) {
	if r == nil {
		return
	}
	if r.CPU != nil {
		r.CPU.Cpus, r.CPU.Mems = "", ""
		r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = nil, nil
	}
	if r.Memory != nil {
		r.Memory.Swap, r.Memory.Swappiness, r.Memory.Kernel, r.Memory.KernelTCP = nil, nil, nil, nil //nolint:staticcheck // version 1 alone knows the last two
	}
	r.BlockIO, r.HugepageLimits, r.Network, r.Rdma = nil, nil, nil, nil
}

// targetPID matches the PID namespace of a process.
var targetPID = regexp.MustCompile(`^/proc/([0-9]+)/ns/pid$`)

func guestNamespaces(onNode []specs.LinuxNamespace, sharedPID bool) ([]specs.LinuxNamespace, error) {
	inside := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	for _, ns := range onNode {
		switch ns.Type {
		case specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace:
			// The machine's own.
		case specs.MountNamespace, specs.CgroupNamespace:
		case specs.PIDNamespace:
			switch {
			case sharedPID:
				// The machine's own.
			case ns.Path == "":
				inside = append(inside, specs.LinuxNamespace{Type: specs.PIDNamespace})
			case targetPID.MatchString(ns.Path):
				// That of another container (kubectl debug --target): containerd knows the
				// process ID that the guest told it.
				inside = append(inside, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: ns.Path})
			default:
				return nil, refusal("the PID namespace " + ns.Path + " is not of this pod")
			}
		case specs.UserNamespace:
			return nil, refusal("hostUsers: false is not for this runtime: the pod is a virtual machine, whose users are not the node's anyway")
		default:
			return nil, refusal(fmt.Sprintf("a namespace of type %s is not for this runtime", ns.Type))
		}
	}
	return inside, nil
}

// bindOptions are the options of a mount of the node that mean something in the guest:
// propagation from and to the node is not among them.
func bindOptions(options []string) []string {
	kept := slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return slices.Contains([]string{"rshared", "shared", "rslave", "slave", "private", "rprivate", "idmap", "ridmap"}, o)
	})
	if !slices.Contains(kept, "rbind") && !slices.Contains(kept, "bind") {
		kept = append(kept, "rbind")
	}
	return append(kept, "rprivate")
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// resolvConf is the content of a pod's /etc/resolv.conf.
func resolvConf(servers, searches, options []string) []byte {
	var b strings.Builder
	if len(searches) > 0 {
		b.WriteString("search " + strings.Join(searches, " ") + "\n")
	}
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return []byte(b.String())
}
