package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// neighboursSuite measures what one tenant's flood of requests does to another's.
const neighboursSuite = "neighbours"

// floodCommand makes this program the noisy tenant: a process of its own, of the
// lowest priority, so that what is measured is the API server's work and not the
// client's.
const floodCommand = "flood"

const (
	noisy, quiet = "bench-noisy", "bench-quiet"
	// floodWorkers send requests one after the other, all at once.
	floodWorkers = 64
	// floodObjects are what each list returns.
	floodObjects = 500
	// window is how long each side of a round is measured.
	window = 8 * time.Second
	// pace of the quiet tenant's requests.
	pace = 20 * time.Millisecond
	// floodRounds of both sides.
	floodRounds = 8
	// raise is by how much the quiet tenant's p99 may rise.
	raise = 2
)

// What the quiet tenant asks for.
const smallGet, smallCreate = "get", "create"

// measureFlood compares a small get and a creation of one tenant with and without
// another's flood of lists and creates.
func measureFlood(ctx context.Context, l *lab, _ options, p *progress) (rows []Row, err error) {
	for i, name := range []string{noisy, quiet} {
		if err := l.ensureNeighbour(ctx, name, fmt.Sprintf("10.%d.0.0/16", i)); err != nil {
			return nil, err
		}
		defer func() {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			err = errors.Join(err, client.IgnoreNotFound(l.Delete(clean, &v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}})))
			// The next run makes them again, and a User goes after the Tenants that list it.
			err = errors.Join(err, apiwait.PollUntilContextCancel(clean, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
				return apierrors.IsNotFound(l.Get(ctx, client.ObjectKey{Name: name}, &v1alpha1.Tenant{})), nil
			}))
			err = errors.Join(err, client.IgnoreNotFound(l.Delete(clean, &v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: name}})))
		}()
	}
	p.say("making %d objects for the noisy tenant to list", floodObjects)
	for i := range floodObjects {
		m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: noisy, Name: fmt.Sprintf("listed-%d", i)}, Data: map[string]string{"x": strings.Repeat("x", 1024)}}
		if err := l.Create(ctx, m); err != nil && !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("make an object to list: %w", err)
		}
	}
	dir, err := os.MkdirTemp("", "h8s-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	kubeconfigs := map[string]string{}
	for _, name := range []string{noisy, quiet} {
		data, err := exec.CommandContext(ctx, filepath.Join(l.bin, "h8s"), "kubeconfig", "--name", l.name, "--user", name).Output()
		if err != nil {
			return nil, fmt.Errorf("h8s kubeconfig --user %s: %w", name, err)
		}
		kubeconfigs[name] = filepath.Join(dir, name)
		if err := os.WriteFile(kubeconfigs[name], data, 0o600); err != nil {
			return nil, err
		}
	}
	victim, err := newRequester(kubeconfigs[quiet])
	if err != nil {
		return nil, err
	}
	var sent, refused []float64
	results, err := interleave(ctx, floodRounds, []variant{
		{"alone", func(ctx context.Context, _ int) (map[string]float64, error) { return victim.latencies(ctx) }},
		{"beside a flood", func(ctx context.Context, _ int) (values map[string]float64, err error) {
			stop, err := startFlood(ctx, kubeconfigs[noisy])
			if err != nil {
				return nil, err
			}
			values, err = victim.latencies(ctx)
			counts, stopErr := stop()
			sent, refused = append(sent, counts.rate()), append(refused, 100*counts.refusedShare())
			return values, errors.Join(err, stopErr)
		}},
	})
	if err != nil {
		return nil, err
	}
	for _, what := range []string{smallGet, smallCreate} {
		for _, metric := range []string{"p50", "p99"} {
			var target *Target
			if metric == "p99" {
				target = &Target{Value: raise}
			}
			sample := what + " " + metric
			r, err := row(what+" of a ConfigMap", metric, "ms", results.side("beside a flood", sample), results.side("alone", sample), target)
			if err != nil {
				return rows, err
			}
			rows = append(rows, r)
		}
	}
	return append(rows,
		absolute("the flood", "requests answered", "1/s", newSide("noisy tenant", sent), nil),
		absolute("the flood", "of those 429", "%", newSide("noisy tenant", refused), nil)), nil
}

// ensureNeighbour makes a tenant with one owner and one namespace of the same name, and what the quiet one gets.
func (l *lab) ensureNeighbour(ctx context.Context, name, cidr string) error {
	for _, obj := range []client.Object{
		&v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: name}},
		&v1alpha1.Tenant{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.TenantSpec{
			Members: []v1alpha1.Member{{Kind: "User", Name: name, Role: v1alpha1.RoleOwner}}, Network: v1alpha1.TenantNetwork{CIDRs: []v1alpha1.CIDR{v1alpha1.CIDR(cidr)}},
		}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelTenant: name}}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "small"}, Data: map[string]string{"a": "b"}},
	} {
		if err := l.Create(ctx, obj); err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("make %T %s: %w", obj, obj.GetName(), err)
		}
	}
	return apiwait.PollUntilContextTimeout(ctx, 100*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
		var t v1alpha1.Tenant
		if err := l.Get(ctx, client.ObjectKey{Name: name}, &t); err != nil {
			return false, err
		}
		for _, c := range t.Status.Conditions {
			if c.Type == v1alpha1.ConditionReady && c.Status == metav1.ConditionTrue && len(t.Status.Namespaces) == 1 {
				return true, nil
			}
		}
		return false, nil
	})
}

// requester sends requests as they are, and reads answers without looking at them.
type requester struct {
	http *http.Client
	base string
}

func newRequester(kubeconfig string) (*requester, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	return &requester{httpClient, config.Host}, nil
}

func (r *requester) do(ctx context.Context, method, path, body string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, method, r.base+path, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := r.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// latencies of small gets and of creations in milliseconds, sent in turn at an even
// pace for a window, whether or not those before have been answered: a request that
// has to wait does not keep others from being measured.
func (r *requester) latencies(ctx context.Context) (map[string]float64, error) {
	const path = "/api/v1/namespaces/" + quiet + "/configmaps"
	kinds := []struct {
		name, method, path, body string
		code                     int
	}{
		{smallGet, http.MethodGet, path + "/small", "", http.StatusOK},
		{smallCreate, http.MethodPost, path + "?dryRun=All", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"new"}}`, http.StatusCreated},
	}
	var mu sync.Mutex
	samples := map[string][]float64{}
	var failed error
	var wg sync.WaitGroup
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	for n := range int(window / pace) {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-ticker.C:
		}
		kind := kinds[n%len(kinds)]
		wg.Go(func() {
			began := time.Now()
			code, err := r.do(ctx, kind.method, kind.path, kind.body)
			took := time.Since(began)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && code != kind.code {
				err = fmt.Errorf("a %s was answered with %d", kind.name, code)
			}
			failed = errors.Join(failed, err)
			samples[kind.name] = append(samples[kind.name], float64(took)/float64(time.Millisecond))
		})
	}
	wg.Wait()
	values := map[string]float64{}
	for name, of := range samples {
		values[name+" p50"], values[name+" p99"] = median(of), quantile(of, 0.99)
	}
	return values, failed
}

// floodCounts is what a flood was.
type floodCounts struct {
	Sent, Refused int64
	Seconds       float64
}

func (c floodCounts) rate() float64         { return float64(c.Sent) / max(c.Seconds, 0.001) }
func (c floodCounts) refusedShare() float64 { return float64(c.Refused) / float64(max(c.Sent, 1)) }

// startFlood runs the flood; it is going on when this returns, and over when stop does.
func startFlood(ctx context.Context, kubeconfig string) (stop func() (floodCounts, error), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, "nice", "-n", "19", self, floodCommand, kubeconfig)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the flood: %w", err)
	}
	lines := bufio.NewReader(out)
	if _, err := lines.ReadString('\n'); err != nil { // its first answers are there
		return nil, errors.Join(fmt.Errorf("start the flood: %w: %s", err, stderr.String()), in.Close(), cmd.Wait())
	}
	return func() (floodCounts, error) {
		var counts floodCounts
		err := in.Close()
		err = errors.Join(err, json.NewDecoder(lines).Decode(&counts))
		if err = errors.Join(err, cmd.Wait()); err != nil {
			err = fmt.Errorf("end the flood: %w: %s", err, stderr.String())
		}
		return counts, err
	}, nil
}

// flood sends lists and creates until the input ends, and prints what was sent.
func flood(ctx context.Context, kubeconfig string, in io.Reader, out io.Writer) error {
	r, err := newRequester(kubeconfig)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var sent, refused atomic.Int64
	began := time.Now()
	first := sync.OnceFunc(func() { fmt.Fprintln(out, "going on") })
	var wg sync.WaitGroup
	const path = "/api/v1/namespaces/" + noisy + "/configmaps"
	for i := range floodWorkers {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				var code int
				var err error
				if i%4 == 0 {
					code, err = r.do(ctx, http.MethodPost, path+"?dryRun=All", fmt.Sprintf(`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"new-%d-%d"}}`, i, n))
				} else {
					code, err = r.do(ctx, http.MethodGet, path, "")
				}
				if err != nil {
					continue
				}
				sent.Add(1)
				if code == http.StatusTooManyRequests {
					refused.Add(1)
				}
				first()
			}
		})
	}
	_, err = io.Copy(io.Discard, in)
	cancel()
	wg.Wait()
	return errors.Join(err, json.NewEncoder(out).Encode(floodCounts{sent.Load(), refused.Load(), time.Since(began).Seconds()}))
}
