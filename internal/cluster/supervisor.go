package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lockFile takes an exclusive lock that ends with this process. held is true if
// somebody else has it.
func lockFile(path string) (f *os.File, held bool, err error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, false, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, true, nil
			}
			return nil, false, err
		}
		// Whoever had the lock may have removed the file that we opened.
		opened, err1 := f.Stat()
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(opened, there) {
			return f, false, nil
		}
		f.Close()
	}
}

// running says whether the cluster's supervisor lives.
func (c *Config) running() (bool, error) {
	if _, err := os.Stat(string(c.state())); errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	f, held, err := lockFile(c.state().supervisorLock())
	if err != nil {
		return false, fmt.Errorf("look whether the supervisor is running: %w", err)
	}
	if !held {
		f.Close()
	}
	return held, nil
}

// startSupervisor starts the cluster's supervisor, detached from this process, and
// waits until it has its lock.
func startSupervisor(ctx context.Context, c *Config) error {
	log, err := openLog(c.state().supervisorLog())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", "supervise", "--name", c.Name)
	cmd.Args[0] = "h8s"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return poll(ctx, 20*time.Millisecond, func() error {
		select {
		case err := <-ended:
			return fmt.Errorf("supervisor ended: %w", errors.Join(err))
		default:
		}
		up, err := c.running()
		if err == nil && !up {
			err = errors.New("supervisor has not started")
		}
		return err
	})
}

// Supervise runs the cluster's supervisor until the context ends. A standby first
// waits until the supervisor is gone; every supervisor keeps one, so that the kill
// of either is mended by the other.
func Supervise(ctx context.Context, name string, standby bool, log *slog.Logger) error {
	c, err := loadConfig(name)
	if err != nil {
		return err
	}
	// First of all: `h8s down` finds the processes of a cluster by cgroup.
	cgroup := clusterCgroup(name) + "/supervisor"
	if err := ensureCgroup(cgroup); err != nil {
		return err
	}
	if err := joinCgroup(cgroup, os.Getpid()); err != nil {
		return err
	}
	patience := 5 * time.Second // whoever looks whether there is a supervisor holds the lock for a moment
	if standby {
		patience = math.MaxInt64
	}
	lock, err := c.becomeSupervisor(ctx, patience)
	if err != nil {
		return err
	}
	defer lock.Close()
	bridge, err := ensureBridge(c)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		keep(ctx, log.With("process", "standby"), func() error { return runStandby(ctx, c) })
	})
	wg.Go(func() {
		f := &forwarder{resolvers: c.Resolvers, log: log}
		if err := f.serve(ctx, netip.AddrPortFrom(c.gateway(), 53)); err != nil {
			cancel(err)
		}
	})
	for _, n := range c.Nodes {
		log := log.With("process", "node init", "node", n.Name)
		wg.Go(func() { keep(ctx, log, func() error { return runNode(ctx, c, n, bridge, log) }) })
	}
	wg.Wait()
	return context.Cause(ctx)
}

// becomeSupervisor takes the lock that only one supervisor of a cluster has.
func (c *Config) becomeSupervisor(ctx context.Context, patience time.Duration) (lock *os.File, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = poll(ctx, 50*time.Millisecond, func() error {
		f, held, err := lockFile(c.state().supervisorLock())
		if err == nil && held {
			err = fmt.Errorf("cluster %q has a supervisor already", c.Name)
		}
		lock = f
		return err
	})
	return lock, err
}

// keep runs a process again and again.
func keep(ctx context.Context, log *slog.Logger, run func() error) {
	var wait time.Duration
	for ctx.Err() == nil {
		began := time.Now()
		err := run()
		if ctx.Err() != nil {
			return
		}
		wait = backoff(wait, time.Since(began))
		log.Warn("process ended, starting it again", "error", err, "wait", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// runStandby runs the process that takes over when this one is killed.
func runStandby(ctx context.Context, c *Config) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "supervise", "--standby", "--name", c.Name)
	cmd.Args[0] = "h8s"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Run()
}

// runNode runs a node's init in new namespaces until it or the context ends.
func runNode(ctx context.Context, c *Config, n Node, bridge netlink.Link, log *slog.Logger) error {
	cgroup := nodeCgroup(c.Name, n.Name)
	if err := clearCgroup(ctx, cgroup); err != nil {
		return fmt.Errorf("clear what is left of the node's life before: %w", err)
	}
	// The programs have a cgroup of their own beside the pods': version 2 allows
	// processes in leaves only.
	if err := ensureCgroup(cgroup + "/system"); err != nil {
		return err
	}
	out, err := openLog(c.state().programLog(n.Name, "init"))
	if err != nil {
		return err
	}
	defer out.Close()
	request, lifeline, err := os.Pipe()
	if err != nil {
		return err
	}
	defer lifeline.Close()
	cmd := exec.Command("/proc/self/exe", "node-init")
	cmd.Args[0] = "h8s"
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = request, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	err = cmd.Start()
	request.Close()
	if err != nil {
		return fmt.Errorf("start node init: %w", err)
	}
	log.Info("node init started", "pid", cmd.Process.Pid)
	var exit error
	ended := make(chan struct{})
	go func() {
		exit = cmd.Wait()
		close(ended)
	}()
	stop := func() {
		_ = cmd.Process.Kill() // and with it everything in its PID namespace
		<-ended
	}
	if err := joinCgroup(cgroup+"/system", cmd.Process.Pid); err != nil {
		stop()
		return err
	}
	if err := plugNode(c, n, bridge, cmd.Process.Pid); err != nil {
		stop()
		return err
	}
	if err := json.NewEncoder(lifeline).Encode(initRequest{Config: c, Node: n.Name}); err != nil {
		stop()
		return fmt.Errorf("send request to node init: %w", err)
	}
	select {
	case <-ended:
		return exit
	case <-ctx.Done():
		stop()
		return ctx.Err()
	}
}
