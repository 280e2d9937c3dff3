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
	f, err = flock(path, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, true, nil
	}
	return f, false, err
}

// waitForLock is lockFile that sleeps until nobody else has the lock.
func waitForLock(ctx context.Context, path string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	got := make(chan result)
	go func() {
		f, err := flock(path, unix.LOCK_EX)
		select {
		case got <- result{f, err}:
		case <-ctx.Done(): // nobody wants it any more
			f.Close()
		}
	}()
	select {
	case r := <-got:
		return r.f, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func flock(path string, how int) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), how); err != nil {
			f.Close()
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return nil, err
		}
		// Whoever had the lock may have removed the file that we opened.
		opened, err1 := f.Stat()
		there, err2 := os.Stat(path)
		if err1 == nil && err2 == nil && os.SameFile(opened, there) {
			return f, nil
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
	// What this process was given itself is not the cluster's: it would hold a lock, or
	// the end of a pipe, for as long as it lives.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep inherited descriptors from the supervisor: %w", err)
	}
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
	lock, err := c.becomeSupervisor(ctx, standby)
	if err != nil {
		return err
	}
	defer lock.Close()
	bridge, err := ensureBridge(c)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		keep(ctx, log.With("process", "standby"), func() error { return runStandby(ctx, c) })
	})
	wg.Go(func() {
		log := log.With("process", "DNS forwarder")
		f := &forwarder{resolvers: c.Resolvers, log: log}
		// Without it the nodes still do all but resolve outside names.
		keep(ctx, log, func() error { return f.serve(ctx, netip.AddrPortFrom(c.gateway(), dnsPort)) })
	})
	if c.Keystone {
		wg.Go(func() {
			keep(ctx, log.With("process", "Keystone"), func() error { return c.runKeystone(ctx) })
		})
	}
	for _, n := range c.Nodes {
		log := log.With("process", "node init", "node", n.Name)
		wg.Go(func() { keep(ctx, log, func() error { return runNode(ctx, c, n, bridge, log) }) })
	}
	wg.Wait()
	return context.Cause(ctx)
}

// becomeSupervisor takes the lock that only one supervisor of a cluster has; a
// standby waits for it as long as it takes.
func (c *Config) becomeSupervisor(ctx context.Context, standby bool) (lock *os.File, err error) {
	if standby {
		return waitForLock(ctx, c.state().supervisorLock())
	}
	// Whoever looks whether there is a supervisor holds the lock for a moment.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lock, err = waitForLock(ctx, c.state().supervisorLock())
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("cluster %q has a supervisor already", c.Name)
	}
	return lock, err
}

// keep does something that is to go on for ever again and again.
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
