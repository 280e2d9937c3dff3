package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/install"
)

const (
	machineCache   = "/var/lib/h8s/hyper"
	machinePrefix  = "h8s-" // begins the names of QEMU's cgroups
	machineIDChars = 20     // of a sandbox's ID are in names
)

// machineLeftovers describes what pods' virtual machines have on the nodes although no
// shim accounts for it. A tap goes with its QEMU, and what redirects packets to it with
// the pod's network namespace: neither can be left alone.
func (c *Config) machineLeftovers() ([]string, error) {
	var left []string
	for _, n := range c.Nodes {
		pid := nodePID(c.Name, n.Name)
		if pid == 0 {
			return nil, fmt.Errorf("node %s does not run", n.Name)
		}
		found, err := machineNode{root: fmt.Sprintf("/proc/%d/root", pid), cgroup: nodeCgroup(c.Name, n.Name)}.leftovers()
		if err != nil {
			return nil, fmt.Errorf("look for virtual machines on node %s: %w", n.Name, err)
		}
		for _, what := range found {
			left = append(left, fmt.Sprintf("%s on node %s is of no virtual machine", what, n.Name))
		}
	}
	return left, nil
}

// machineNode is a node as far as pods' virtual machines are concerned.
type machineNode struct {
	root   string // of its files
	cgroup string
}

func (n machineNode) leftovers() ([]string, error) {
	// A shim comes before what is its, and goes after it: what is there before and after
	// the look at the shims is none's.
	before, _, err := n.look()
	if err != nil {
		return nil, err
	}
	after, shims, err := n.look()
	if err != nil {
		return nil, err
	}
	var left []string
	for what, owner := range after {
		if _, ok := before[what]; ok && !shims[owner] {
			left = append(left, what)
		}
	}
	slices.Sort(left)
	return left, nil
}

// look returns what there is for virtual machines, each with the shim that it belongs to;
// and the shims, by process ID and by sandbox.
func (n machineNode) look() (owners map[string]string, shims map[string]bool, err error) {
	owners, shims = map[string]string{}, map[string]bool{}
	// Before the processes: each of these has a process that made it.
	dirs, err := os.ReadDir(n.root + accel.DefaultDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	for _, d := range dirs {
		if !d.IsDir() || len(d.Name()) != machineIDChars {
			continue // what all machines share
		}
		owners["directory "+filepath.Join(accel.DefaultDir, d.Name())] = d.Name()
	}
	groups, err := cgroupDirs(n.cgroup + "/kubepods")
	if err != nil {
		return nil, nil, err
	}
	for _, g := range groups {
		if id, ok := strings.CutPrefix(filepath.Base(g), machinePrefix); ok {
			owners["cgroup "+filepath.Base(filepath.Dir(g))+"/"+machinePrefix+id] = id
		}
	}
	if err := n.halfWritten(owners); err != nil {
		return nil, nil, err
	}
	pids, err := cgroupProcesses(n.cgroup)
	if err != nil {
		return nil, nil, err
	}
	for _, pid := range pids {
		n.process(pid, owners, shims)
	}
	return owners, shims, nil
}

// process adds a process, if it is one of a virtual machine.
func (n machineNode) process(pid int, owners map[string]string, shims map[string]bool) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(line) == 0 {
		return // gone, or a zombie
	}
	args := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
	program := filepath.Base(args[0])
	switch what := fmt.Sprintf("process %d (%s)", pid, program); {
	case program == install.Shim:
		i := slices.Index(args, "-id") + 1
		if i == 0 || i >= len(args) || slices.Contains(args, "start") || slices.Contains(args, "delete") {
			return // starts a shim, or cleans up after one
		}
		shims[args[i][:min(len(args[i]), machineIDChars)]] = true
		shims[fmt.Sprint(pid)] = true
		if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil && strings.HasSuffix(dir, " (deleted)") {
			owners[what+", whose sandbox containerd has forgotten,"] = ""
		}
	case strings.HasPrefix(program, "qemu-system-"), program == "mkfs.erofs":
		owners[what] = parentPID(pid)
	}
}

func parentPID(pid int) string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(status)) {
		if parent, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strings.TrimSpace(parent)
		}
	}
	return ""
}

// halfWritten adds images of layers, and templates, that somebody has begun to write
// and nobody is writing: a writer holds a lock.
func (n machineNode) halfWritten(owners map[string]string) error {
	for pattern, lockOf := range map[string]func(string) string{
		"layers/*.partial": func(file string) string { return strings.TrimSuffix(file, ".partial") + ".lock" },
		"templates/*/.*":   func(dir string) string { return dir + ".lock" },
	} {
		found, err := filepath.Glob(filepath.Join(n.root+machineCache, pattern))
		if err != nil {
			return err
		}
		for _, path := range found {
			if strings.HasSuffix(path, ".lock") {
				continue
			}
			held, err := isLocked(lockOf(path))
			if err != nil {
				return err
			}
			if !held {
				owners["half-written "+strings.TrimPrefix(path, n.root)] = ""
			}
		}
	}
	return nil
}

// isLocked says whether somebody has a lock on the file, if it is there.
func isLocked(path string) (bool, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("look whether %s is locked: %w", path, err)
	}
	return false, nil
}
