package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Down removes a cluster: processes and with them their namespaces, links, mounts,
// cgroups and files, whatever state it is in. Removing what is not there is no error.
func Down(ctx context.Context, name string) error {
	if err := ValidateName(name); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("`h8s down` removes namespaces, links and cgroups: run it as root")
	}
	unlock, err := lockCluster(name)
	if err != nil {
		return err
	}
	defer func() {
		unlock()
		// An `h8s up` that was killed may have left this lock's file.
		if unlock, err := lockCluster(subnetsLock); err == nil {
			unlock()
		}
		_ = os.Remove(StateRoot) // stays if another cluster is in it
	}()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := killCluster(ctx, name); err != nil {
		return err
	}
	c, err := loadConfig(name)
	if err != nil {
		c = &Config{Name: name} // links are known by their alias as well
	}
	state := c.state()
	return errors.Join(
		removeLinks(name, c.Nodes),
		removeCgroup(ctx, clusterCgroup(name)),
		removeState(string(state)),
	)
}

// killCluster ends the cluster's processes: the supervisor first, because it starts
// the others again.
func killCluster(ctx context.Context, name string) error {
	supervisor := clusterCgroup(name) + "/supervisor"
	pids, err := cgroupProcesses(supervisor)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stop supervisor: %w", err)
		}
	}
	return killCgroup(ctx, clusterCgroup(name))
}

// removeState removes a cluster's files. Nothing that is mounted below, which the
// cluster itself never does in the machine's namespace, is removed with them.
func removeState(dir string) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	slices.Reverse(mounts)
	for _, m := range mounts {
		if m.target == dir || strings.HasPrefix(m.target, dir+string(filepath.Separator)) {
			if err := unix.Unmount(m.target, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", m.target, err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove files: %w", err)
	}
	return nil
}
