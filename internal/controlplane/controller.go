package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"

	"h8s.io/hypernetes/deploy/apiserver"
)

// Controller is the process of h8s-controller.
type Controller struct {
	*process
	// Started is just before the process was.
	Started                time.Time
	health, metrics, pprof string
	http                   *http.Client
}

// EnsureController starts h8s-controller, as the chart's ServiceAccount, unless it runs.
// It returns when the controller is ready: its webhooks answer, and they do before it has
// reconciled anything.
func (p *Plane) EnsureController(ctx context.Context) error {
	if p.Controller == nil || p.Controller.hasEnded() {
		if err := p.startController(ctx); err != nil {
			return err
		}
	}
	c := p.Controller
	return p.await(ctx, c.process, account, func(ctx context.Context) error {
		_, err := c.get(ctx, c.health, "/readyz")
		return err
	})
}

func (p *Plane) startController(ctx context.Context) error {
	var err error
	addresses := make([]string, 3)
	for i := range addresses {
		if addresses[i], err = freeAddress(ctx); err != nil {
			return err
		}
	}
	args := []string{
		"--namespace=" + namespace, "--service-cidr=10.96.0.0/16", "--pod-cidr=10.244.0.0/16", "--infrastructure-cidr=198.18.0.0/24",
		"--webhook-cert-dir=" + p.hooks.LocalServingCertDir, "--webhook-host=" + p.hooks.LocalServingHost, "--webhook-port=" + strconv.Itoa(p.hooks.LocalServingPort),
		"--health-address=" + addresses[0], "--metrics-address=" + addresses[1], "--pprof-address=" + addresses[2], "--log-level=warn",
	}
	if p.opts.KeystoneClouds != "" {
		args = append(args, "--keystone-clouds="+p.opts.KeystoneClouds, "--keystone-fresh=10s")
	}
	c := &Controller{Started: time.Now(), health: addresses[0], metrics: addresses[1], pprof: addresses[2], http: &http.Client{Timeout: startTimeout, Transport: &http.Transport{DisableCompression: true}}}
	if c.process, err = p.run(account, []string{"KUBECONFIG=" + p.controllerKubeconfig()}, args...); err != nil {
		return err
	}
	p.Controller = c
	return nil
}

// StopController ends the controller as Kubernetes does: it gives up the lease.
func (p *Plane) StopController() error {
	if p.Controller == nil {
		return nil
	}
	defer func() { p.Controller = nil }()
	return p.Controller.stop()
}

func freeAddress(ctx context.Context) (string, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a free port: %w", err)
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

// PID is the process's.
func (c *Controller) PID() int { return c.cmd.Process.Pid }

func (c *Controller) get(ctx context.Context, address, path string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s", path, resp.Status)
	}
	return string(body), err
}

// Metrics are what it exports now (Prometheus' text format).
func (c *Controller) Metrics(ctx context.Context) (Metrics, error) {
	text, err := c.get(ctx, c.metrics, "/metrics")
	return Metrics(text), err
}

// Heap is what is reachable on its heap in bytes, after a garbage collection.
func (c *Controller) Heap(ctx context.Context) (float64, error) {
	// The second collection frees what the first has found finalizers of.
	var text string
	for range 2 {
		var err error
		if text, err = c.get(ctx, c.pprof, "/debug/pprof/heap?gc=1&debug=1"); err != nil {
			return 0, fmt.Errorf("heap of the controller: %w", err)
		}
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "# HeapAlloc = "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, errors.New("the controller's heap profile has no HeapAlloc")
}

// Profile writes a profile of the process to a file: "profile?seconds=5", say.
func (c *Controller) Profile(ctx context.Context, what, path string) error {
	data, err := c.get(ctx, c.pprof, "/debug/pprof/"+what)
	if err != nil {
		return fmt.Errorf("profile of the controller: %w", err)
	}
	return os.WriteFile(path, []byte(data), 0o644)
}

// Metrics is text in Prometheus' format.
type Metrics string

// Sum adds up the values of a metric, of the series that have all the labels, each
// written as `name="value"`.
func (m Metrics) Sum(name string, labels ...string) float64 {
	var sum float64
	for line := range strings.Lines(string(m)) {
		series, ok := strings.CutPrefix(line, name)
		if !ok || series[0] != '{' && series[0] != ' ' {
			continue
		}
		end := strings.LastIndex(series, " ")
		has := true
		for _, label := range labels {
			has = has && strings.Contains(series[:end], label)
		}
		if value, err := strconv.ParseFloat(strings.TrimSpace(series[end:]), 64); has && err == nil {
			sum += value
		}
	}
	return sum
}

// ServerMetrics are those of the API server.
func (p *Plane) ServerMetrics(ctx context.Context) (Metrics, error) {
	core, err := kubernetes.NewForConfig(p.Config)
	if err != nil {
		return "", err
	}
	data, err := core.RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return "", fmt.Errorf("metrics of the API server: %w", err)
	}
	return Metrics(data), nil
}

// Requests are how many the controller has sent so far, in all its lives, as the API
// server counts them: the chart's FlowSchema h8s-system has no others here.
func (p *Plane) Requests(ctx context.Context) (float64, error) {
	m, err := p.ServerMetrics(ctx)
	if err != nil {
		return 0, err
	}
	return m.Sum("apiserver_flowcontrol_dispatched_requests_total", `flow_schema="h8s-system"`), nil
}

// TokenReviews is a client of the controller's webhooks, and the address of the one
// that validates tokens.
func (p *Plane) TokenReviews() (*http.Client, string) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.hooks.LocalServingCAData)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, MaxIdleConnsPerHost: 64, ForceAttemptHTTP2: true}
	return &http.Client{Transport: transport, Timeout: startTimeout}, webhookURL(p.hooks, apiserver.TokenReviewPath)
}
