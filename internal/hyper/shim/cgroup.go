package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	stats1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	stats2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	// besteffort is in the names of cgroups of pods without requests and limits.
	besteffort = "besteffort"
)

// joinCgroup makes a cgroup and puts a process in it, in each hierarchy of version 1 or
// in version 2's.
func joinCgroup(path string, pid int) error {
	err := func() error {
		if cgroups.Mode() == cgroups.Unified {
			group, err := cgroup2.NewManager(cgroupRoot, path, &cgroup2.Resources{})
			if err != nil {
				return err
			}
			return group.AddProc(uint64(pid))
		}
		group, err := cgroup1.New(cgroup1.StaticPath(path), &specs.LinuxResources{})
		if err != nil {
			return err
		}
		return group.AddProc(uint64(pid))
	}()
	if err != nil {
		return fmt.Errorf("put QEMU in the pod's cgroup %s: %w", path, err)
	}
	return nil
}

// noLimit is what version 1 has instead of a memory limit, less what it rounds off.
const noLimit = int64(1) << 62

// memoryLimited is whether a pod's cgroup has a memory limit: the kubelet sets one if all
// of its containers have. In doubt it has.
func memoryLimited(parent string) bool {
	file := filepath.Join(cgroupRoot, "memory", parent, "memory.limit_in_bytes")
	if cgroups.Mode() == cgroups.Unified {
		file = filepath.Join(cgroupRoot, parent, "memory.max")
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return true
	}
	limit, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return err == nil && limit < noLimit
}

// removeCgroup removes a cgroup whose processes have ended. It is idempotent.
func removeCgroup(path string) error {
	dirs := []string{filepath.Join(cgroupRoot, path)}
	if cgroups.Mode() != cgroups.Unified {
		var err error
		if dirs, err = filepath.Glob(filepath.Join(cgroupRoot, "*", path)); err != nil {
			return err
		}
	}
	deadline := time.Now().Add(endTimeout)
	for _, dir := range dirs {
		err := os.Remove(dir)
		// A process that was reaped a moment ago may still be counted.
		for ; errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = os.Remove(dir) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the cgroup of QEMU: %w", err)
		}
	}
	return nil
}

// cgroupMetrics are the pod's as the node sees them: QEMU's.
func cgroupMetrics(path string) (any, error) {
	if cgroups.Mode() == cgroups.Unified {
		group, err := cgroup2.Load(path)
		if err != nil {
			return nil, err
		}
		return group.Stat()
	}
	group, err := cgroup1.Load(cgroup1.StaticPath(path))
	if err != nil {
		return nil, err
	}
	return group.Stat(cgroup1.IgnoreNotExist)
}

// oomKilled says whether the node's kernel has killed a process of the cgroup for want of
// memory.
func oomKilled(path string) bool {
	metrics, err := cgroupMetrics(path)
	if err != nil {
		return false
	}
	switch m := metrics.(type) {
	case *stats1.Metrics:
		return m.GetMemoryOomControl().GetOomKill() > 0
	case *stats2.Metrics:
		return m.GetMemoryEvents().GetOomKill() > 0
	}
	return false
}

// allowOOMKill makes QEMU as eligible for the OOM killer as its pod is: what it inherits
// is the shim's, which hardly is. The kubelet tells a pod's quality of service by
// its cgroup's name alone.
func allowOOMKill(pid int, cgroupParent string) error {
	score := 0
	switch {
	case strings.Contains(cgroupParent, besteffort):
		score = 1000
	case strings.Contains(cgroupParent, "burstable"):
		score = 500
	}
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	inherited, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if old, err := strconv.Atoi(strings.TrimSpace(string(inherited))); err == nil && old >= score {
		return nil // less would take CAP_SYS_RESOURCE
	}
	return os.WriteFile(path, []byte(strconv.Itoa(score)), 0)
}
