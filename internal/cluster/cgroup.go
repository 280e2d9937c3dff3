package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupMounts are the roots of the machine's cgroup hierarchies: one for version
// 2, one per controller for version 1, both on a hybrid machine.
func cgroupMounts() (v1, v2 []string, err error) {
	mounts, err := readMounts()
	if err != nil {
		return nil, nil, err
	}
	for _, m := range mounts {
		switch {
		case !strings.HasPrefix(m.target, "/sys/fs/cgroup"):
		case m.fstype == "cgroup":
			v1 = append(v1, m.target)
		case m.fstype == "cgroup2":
			v2 = append(v2, m.target)
		}
	}
	if len(v1)+len(v2) == 0 {
		return nil, nil, errors.New("no cgroup hierarchy is mounted below /sys/fs/cgroup: mount cgroup2 there")
	}
	return v1, v2, nil
}

// mount is one line of /proc/self/mountinfo.
type mount struct{ target, fstype string }

func readMounts() ([]mount, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	return parseMounts(data), nil
}

func parseMounts(data []byte) []mount {
	var mounts []mount
	for line := range strings.Lines(string(data)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, rest := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(rest) < 1 {
			continue
		}
		// The kernel writes blanks and backslashes in octal.
		target := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(fields[4])
		mounts = append(mounts, mount{target, rest[0]})
	}
	return mounts
}

// ensureCgroup makes a cgroup in every hierarchy, ready to hold processes or
// further cgroups.
func ensureCgroup(path string) error {
	v1, v2, err := cgroupMounts()
	if err != nil {
		return err
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	for _, root := range v2 {
		dir := root
		for _, part := range parts {
			if err := enableControllers(dir); err != nil {
				return fmt.Errorf("give controllers to the children of cgroup %s: %w", dir, err)
			}
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
		}
	}
	for _, root := range v1 {
		dir := root
		for _, part := range parts {
			parent := dir
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("make cgroup: %w", err)
			}
			// A version 1 cpuset starts empty, and then takes no process.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(parent, dir, f); err != nil {
					return fmt.Errorf("fill cpuset: %w", err)
				}
			}
		}
	}
	return nil
}

func inherit(parent, child, name string) error {
	have, err := os.ReadFile(filepath.Join(child, name))
	if errors.Is(err, fs.ErrNotExist) || len(bytes.TrimSpace(have)) > 0 {
		return nil
	}
	if err != nil {
		return err
	}
	value, err := os.ReadFile(filepath.Join(parent, name))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(child, name), value, 0o644)
}

// enableControllers gives all that a version 2 cgroup may give to its children.
func enableControllers(dir string) error {
	available, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	control := filepath.Join(dir, "cgroup.subtree_control")
	enabled, err := os.ReadFile(control)
	if err != nil {
		return err
	}
	for _, controller := range strings.Fields(string(available)) {
		if slices.Contains(strings.Fields(string(enabled)), controller) {
			continue
		}
		if err := os.WriteFile(control, []byte("+"+controller), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// joinCgroup moves a process into a cgroup, in every hierarchy.
func joinCgroup(path string, pid int) error {
	v1, v2, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, root := range append(v1, v2...) {
		procs := filepath.Join(root, path, "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(pid)), 0o644); err != nil {
			return fmt.Errorf("move process %d into cgroup %s: %w", pid, path, err)
		}
	}
	return nil
}

// cgroupDirs are the directories of a cgroup and of all below it, deepest first.
func cgroupDirs(path string) ([]string, error) {
	v1, v2, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range append(v1, v2...) {
		err := filepath.WalkDir(filepath.Join(root, path), func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed while we look
			}
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Reverse(dirs) // WalkDir names a directory before what is in it
	return dirs, nil
}

// cgroupProcesses are the processes in a cgroup or in any below it.
func cgroupProcesses(path string) ([]int, error) {
	dirs, err := cgroupDirs(path)
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	for _, dir := range dirs {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			continue // removed while we look
		}
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				seen[pid] = true
			}
		}
	}
	pids := make([]int, 0, len(seen))
	for pid := range seen {
		pids = append(pids, pid)
	}
	slices.Sort(pids)
	return pids, nil
}

// killCgroup kills every process of a cgroup and waits until none is left.
func killCgroup(ctx context.Context, path string) error {
	return poll(ctx, 20*time.Millisecond, func() error {
		pids, err := cgroupProcesses(path)
		if err != nil {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		if len(pids) > 0 {
			return fmt.Errorf("processes of cgroup %s are still there: %v", path, pids)
		}
		return nil
	})
}

// removeCgroup removes an empty cgroup and all below it.
func removeCgroup(ctx context.Context, path string) error {
	return poll(ctx, 20*time.Millisecond, func() error {
		dirs, err := cgroupDirs(path)
		if err != nil {
			return err
		}
		var errs []error
		for _, dir := range dirs {
			// EBUSY: the last process has gone, but the kernel has not noticed yet.
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
			}
		}
		return errors.Join(errs...)
	})
}

// clearCgroup removes a cgroup with all that is in it, as a reboot does. Where the
// cgroups of dead pods stay, kubelet's cAdvisor spends seconds on each of them.
func clearCgroup(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := killCgroup(ctx, path); err != nil {
		return err
	}
	return removeCgroup(ctx, path)
}

// poll calls f until it succeeds; when the context ends first, the error says
// what f said last.
func poll(ctx context.Context, interval time.Duration, f func() error) error {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", err, ctx.Err())
		case <-ticker.C:
		}
	}
}
