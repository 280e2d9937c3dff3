package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// hostState is what `h8s down` must restore, as far as one cluster can have to do
// with it: what there is on the host, and the value of what can have one.
type hostState map[string]string

// newHostState looks at the host. What other clusters have, which may come and go
// at the same time, is left out.
func newHostState(name string) (hostState, error) {
	s := hostState{}
	return s, errors.Join(s.sysctls(), s.network(), s.mounts(), s.cgroups(name), s.files(name), s.processes(name))
}

// leftovers are what after has and before has not, and the values that differ.
// What is gone was not the cluster's.
func leftovers(before, after hostState) []string {
	var left []string
	for _, key := range slices.Sorted(maps.Keys(after)) {
		was, known := before[key]
		switch {
		case strings.HasPrefix(key, "sysctl ") && !known:
			// The kernel makes those of a link with it, and a module's when it is loaded.
		case !known:
			left = append(left, key)
		case was != after[key]:
			left = append(left, fmt.Sprintf("%s was %q and is %q", key, was, after[key]))
		}
	}
	return left
}

// awaitRestored waits until nothing is left of a cluster. Its processes are dead
// when `h8s down` returns; it is the machine's init that reaps them.
func awaitRestored(before hostState, name string) error {
	return poll(patience, func() error {
		after, err := newHostState(name)
		if err != nil {
			return err
		}
		if left := leftovers(before, after); len(left) > 0 {
			return fmt.Errorf("h8s down left something on the host:\n%s", strings.Join(left, "\n"))
		}
		return nil
	})
}

// counters are the sysctls that the kernel itself writes: how much there is of
// something, random numbers, numbers that it gave out last, limits that it lowers
// when it is busy, and what it noticed.
var counters = regexp.MustCompile(`^(fs/(dentry-state|file-nr|inode-nr|inode-state|aio-nr|quota/.*)|kernel/(ns_last_pid|random/.*|pty/nr|perf_event_max_sample_rate|tainted|hung_task_detect_count)|net/netfilter/nf_conntrack_count)$`)

// sysctls adds every sysctl of the host.
func (s hostState) sysctls() error {
	const root = "/proc/sys/"
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, root)
		if err != nil || d.IsDir() || counters.MatchString(name) {
			return ignoreGone(err)
		}
		value, err := os.ReadFile(path)
		if err == nil { // some can only be written, or not be read now
			s["sysctl "+name] = strings.TrimSpace(string(value))
		}
		return nil
	})
}

// passing is what changes in the kernel's list of routes by itself.
var passing = regexp.MustCompile(` (expires \S+|linkdown|dead)`)

// network adds links, network namespaces, routes, rules and the firewall.
func (s hostState) network() error {
	for kind, command := range map[string]string{
		"link":              "ip -br link",
		"network namespace": "ip netns list",
		"route":             "ip -4 route show table all; ip -6 route show table all",
		"rule":              "ip -4 rule; ip -6 rule",
		"VXLAN entry":       "bridge fdb show | grep -w dst || true",
	} {
		out, err := hostOutput("sh", "-c", command)
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			line = strings.TrimSpace(passing.ReplaceAllString(line, ""))
			if kind == "link" || kind == "network namespace" {
				line, _, _ = strings.Cut(line, " ")
				line, _, _ = strings.Cut(line, "@") // what follows is the number of the other end
			}
			s[kind+" "+line] = ""
		}
	}
	rules, err := hostOutput("nft", "--stateless", "list", "ruleset") // without counters
	if err != nil {
		return err
	}
	for _, table := range strings.Split("\n"+rules, "\ntable ")[1:] {
		name, content, _ := strings.Cut(table, "{")
		s["nft table "+name] = content
	}
	return nil
}

func (s hostState) mounts() error {
	out, err := hostOutput("findmnt", "--raw", "--noheadings", "--output", "TARGET,FSTYPE")
	for line := range strings.Lines(out) {
		s["mount "+strings.TrimSpace(line)] = ""
	}
	return err
}

// ofAnother finds the cluster that a cgroup is of.
var ofAnother = regexp.MustCompile(`/h8s-([^/\n]+)`)

// ours are names of cgroups such as kubelet, container runtimes and we choose.
var ours = regexp.MustCompile(`h8s|kube|k8s|pod|cri|containerd|runsc|runc`)

// cgroups adds those of every hierarchy: all at the top, and at any depth those that
// have such a name; what else is deeper is for who has the place above it.
func (s hostState) cgroups(name string) error {
	const root = "/sys/fs/cgroup"
	top := 2 // each version 1 hierarchy has a directory of its own
	if _, err := os.Stat(root + "/cgroup.controllers"); err == nil {
		top = 1
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return ignoreGone(err)
		}
		if cluster := ofAnother.FindStringSubmatch(path); cluster != nil && cluster[1] != name {
			return fs.SkipDir
		}
		name := strings.TrimPrefix(path, root)
		if strings.Count(name, "/") <= top || ours.MatchString(name) {
			s["cgroup "+name] = ""
		}
		return nil
	})
}

// scratch are names, in a directory that everybody writes to, that one of the
// programs of a cluster may have chosen. Names with h8s are those of tests; for our
// own programs TestMain has another TMPDIR, which must be empty in the end.
var scratch = regexp.MustCompile(`kube|etcd|containerd|runc|runsc|gvisor|helm|ctr|cni|overlay|netns`)

// files adds what programs of a cluster would write, were they not told to write
// elsewhere: their directories on a machine, scratch files, caches.
func (s hostState) files(name string) error {
	home, err := os.UserHomeDir()
	if err != nil {
		return err
	}
	for _, dir := range []string{"/run", "/run/lock", "/var/lib", "/var/lib/h8s", "/var/lib/cni", "/var/log", "/var/cache", "/etc", "/opt", "/srv", "/mnt", home, home + "/.cache", home + "/.config"} {
		entries, err := os.ReadDir(dir)
		if err := ignoreGone(err); err != nil {
			return err
		}
		for _, e := range entries {
			if dir == "/var/lib/h8s" && e.Name() != name && e.Name() != name+".lock" && e.Name() != ".subnets.lock" {
				continue
			}
			s["file "+filepath.Join(dir, e.Name())] = ""
		}
	}
	if _, others := s["file /var/lib/h8s"]; others {
		delete(s, "file /var/lib/h8s") // other clusters'
		if entries, err := os.ReadDir("/var/lib/h8s"); err == nil && len(entries) == 0 {
			s["file /var/lib/h8s, which is empty,"] = ""
		}
	}
	for _, dir := range []string{"/etc/cni", "/opt/cni", "/etc/containerd", "/etc/kubernetes"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				s["file "+path] = ""
			}
			return ignoreGone(err)
		})
		if err != nil {
			return err
		}
	}
	for _, dir := range []string{"/tmp", "/var/tmp", "/dev/shm"} {
		entries, err := os.ReadDir(dir)
		if err := ignoreGone(err); err != nil {
			return err
		}
		for _, e := range entries {
			if scratch.MatchString(e.Name()) && !strings.HasPrefix(e.Name(), "h8s-") {
				s["file "+filepath.Join(dir, e.Name())] = ""
			}
		}
	}
	return nil
}

// processes adds those in a cgroup of the cluster, and those in no cluster's that
// run our or the upstream programs, kubectl excepted.
func (s hostState) processes(name string) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		groups, err1 := os.ReadFile(filepath.Join(dir, "cgroup"))
		exe, err2 := os.Readlink(filepath.Join(dir, "exe"))
		if err1 != nil || err2 != nil {
			continue // gone, a zombie, or the kernel's
		}
		of := ofAnother.FindSubmatch(groups)
		switch {
		case of != nil && string(of[1]) != name:
			continue
		case of == nil && (filepath.Base(exe) == "kubectl" || !strings.HasPrefix(exe, cluster.bin+"/") && !strings.HasPrefix(exe, "/opt/h8s/") && !strings.HasPrefix(exe, "/var/lib/h8s/")):
			continue
		}
		command, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		s[fmt.Sprintf("process %s: %s", filepath.Base(dir), bytes.ReplaceAll(command, []byte{0}, []byte{' '}))] = ""
	}
	return err
}

// ignoreGone forgives that something went away while it was looked at.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	return err
}

// hostOutput is what a command prints, run on the host.
func hostOutput(argv ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
	}
	return string(out), nil
}
