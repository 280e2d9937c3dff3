package shim

import (
	"runtime"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	mebibyte = int64(1) << 20

	// defaultMemory is what a guest has whose pod has no memory limit. QEMU takes it from
	// the node as the guest uses it, and gives back what the guest frees.
	defaultMemory = 512 * mebibyte
	// minMemory is the least that a guest boots with and has something left.
	minMemory = 128 * mebibyte
	// hypervisorMemory is the part of a pod's cgroup that is QEMU's own. Under TCG, 64 MiB
	// of it are for translated code.
	hypervisorMemory = 96 * mebibyte
	// memoryStep is what a guest's memory is a multiple of.
	memoryStep = 2 * mebibyte

	defaultCPUs = 1
	// cpuPeriod is the period of a quota that names none, in microseconds.
	cpuPeriod = 100_000
)

// size is how many processors and how much memory (bytes) a pod's machine has: the
// pod's limits and its RuntimeClass's overhead, less what QEMU takes for itself. A
// pod without limits gets the defaults. limited is whether all containers have a
// memory limit: the CRI's is the sum of those that have one, and the others need a
// machine, too.
func size(config *cri.PodSandboxConfig, limited bool) (cpus int, memory int64) {
	limits, overhead := config.GetLinux().GetResources(), config.GetLinux().GetOverhead()
	memory = defaultMemory
	if limit := limits.GetMemoryLimitInBytes(); limit > 0 {
		least := minMemory
		if !limited {
			least = defaultMemory
		}
		memory = max(limit+overhead.GetMemoryLimitInBytes()-hypervisorMemory, least)
	}
	memory -= memory % memoryStep

	cpus = defaultCPUs
	if limits.GetCpuQuota() > 0 {
		cpus = int((milliCPUs(limits) + 999) / 1000)
	}
	return min(max(cpus, 1), runtime.NumCPU()), memory
}

func milliCPUs(r *cri.LinuxContainerResources) int64 {
	period := r.GetCpuPeriod()
	if period <= 0 {
		period = cpuPeriod
	}
	return max(r.GetCpuQuota(), 0) * 1000 / period
}
