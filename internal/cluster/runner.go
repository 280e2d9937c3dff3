package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 5 * time.Second
	// A program that ran this long was well; its next start is not held back.
	healthyAfter = 30 * time.Second
	// How long a program waits for what it needs. Then it starts all the same: a
	// kubelet, for one, runs the node's pods also without an API server.
	needTimeout = time.Minute
	// Logs larger than this are put aside when their program starts.
	maxLog = 64 << 20
)

// backoff says how long to wait before the next start of a program that ended
// after it ran for some time, given how long the wait was before.
func backoff(previous, ran time.Duration) time.Duration {
	if previous == 0 || ran >= healthyAfter {
		return minBackoff
	}
	return min(2*previous, maxBackoff)
}

// reaper is the part of a PID 1 that collects the dead, its own children's and
// everybody else's.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]chan syscall.WaitStatus
}

func newReaper() *reaper { return &reaper{waiting: map[int]chan syscall.WaitStatus{}} }

// run collects until the context ends.
func (r *reaper) run(ctx context.Context) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD)
	defer signal.Stop(signals)
	for {
		r.collect()
		select {
		case <-ctx.Done():
			return
		case <-signals:
		}
	}
}

func (r *reaper) collect() {
	for {
		var status syscall.WaitStatus
		// A child that start is about to register must not be collected before:
		// hence the lock around both.
		r.mu.Lock()
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		done := r.waiting[pid]
		delete(r.waiting, pid)
		r.mu.Unlock()
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if done != nil {
			done <- status
		}
	}
}

// start runs a program; its status arrives in the channel when it ends.
func (r *reaper) start(path string, args, env []string, out *os.File) (int, <-chan syscall.WaitStatus, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, append([]string{path}, args...), &syscall.ProcAttr{
		Dir:   "/",
		Env:   env,
		Files: []uintptr{null.Fd(), out.Fd(), out.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, nil, err
	}
	done := make(chan syscall.WaitStatus, 1)
	r.waiting[pid] = done
	return pid, done, nil
}

// runner keeps the programs of a node running.
type runner struct {
	reaper *reaper
	binDir string
	logDir string
	env    []string
	log    *slog.Logger
}

// run starts the programs, each when what it needs is ready, and each again
// whenever it ends, until the context does.
func (r *runner) run(ctx context.Context, programs []program) {
	var wg sync.WaitGroup
	for _, p := range programs {
		wg.Go(func() {
			waitCtx, cancel := context.WithTimeout(ctx, needTimeout)
			defer cancel()
			for _, need := range p.needs {
				if err := need.wait(waitCtx); err != nil {
					r.log.Warn("starting a program without what it needs", "program", p.name, "error", err)
				}
			}
			r.keep(ctx, p)
		})
	}
	wg.Wait()
}

// keep runs one program again and again.
func (r *runner) keep(ctx context.Context, p program) {
	var wait time.Duration
	for {
		began := time.Now()
		err := r.once(ctx, p)
		if ctx.Err() != nil {
			return
		}
		wait = backoff(wait, time.Since(began))
		r.log.Warn("program ended, starting it again", "program", p.name, "status", err, "ran", time.Since(began).Round(time.Millisecond), "wait", wait)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// once runs a program until it or the context ends.
func (r *runner) once(ctx context.Context, p program) error {
	out, err := openLog(filepath.Join(r.logDir, p.name+".log"))
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer out.Close()
	pid, done, err := r.reaper.start(filepath.Join(r.binDir, p.name), p.args, r.env, out)
	if err != nil {
		return fmt.Errorf("start: %w", err)
	}
	r.log.Info("program started", "program", p.name, "pid", pid)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case status := <-done:
		if status.Signaled() {
			return fmt.Errorf("killed by signal %d (%s)", status.Signal(), status.Signal())
		}
		return fmt.Errorf("exit status %d", status.ExitStatus())
	}
}

// openLog opens a log to append to.
func openLog(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}

// wait waits until the endpoint is ready.
func (e endpoint) wait(ctx context.Context) error {
	if e.network != "https" {
		return waitDial(ctx, e.network, e.address)
	}
	ca, err := os.ReadFile(nodePKI + "/" + clusterCA + ".crt")
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true},
	}
	return poll(ctx, 50*time.Millisecond, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.address, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s answers %s", e.address, resp.Status)
		}
		return nil
	})
}

// waitDial waits until something accepts connections.
func waitDial(ctx context.Context, network, address string) error {
	dialer := &net.Dialer{Timeout: time.Second}
	return poll(ctx, 50*time.Millisecond, func() error {
		conn, err := dialer.DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}
