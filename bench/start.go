package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/fields"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

const (
	tenantGVisor  = "tenant's gVisor pod"
	defaultGVisor = "default gVisor pod"
	defaultRunc   = "default runc pod"
)

func measureStart(ctx context.Context, l *lab, o options, p *progress) ([]Row, error) {
	p.say("start: %d pods of each kind, one after the other", o.starts)
	if err := l.ensureFixture(ctx, p); err != nil {
		return nil, err
	}
	if err := l.Get(ctx, client.ObjectKey{Name: v1alpha1.SandboxGVisor}, &nodev1.RuntimeClass{}); err != nil {
		return nil, fmt.Errorf("the RuntimeClass of gVisor: %w", err)
	}
	n := l.nodes[1]
	variants := []variant{
		l.start(tenantGVisor, n, tenantNamespace, ""),
		l.start(defaultGVisor, n, defaultNamespace, v1alpha1.SandboxGVisor),
		l.start(defaultRunc, n, defaultNamespace, ""),
	}
	// The first pods unpack the image and fill caches.
	if _, err := interleave(ctx, 1, variants); err != nil {
		return nil, err
	}
	r, err := interleave(ctx, o.starts, variants)
	if err != nil {
		return nil, err
	}
	rows, err := r.rows("pod start", tenantGVisor, defaultGVisor,
		wanted{"create → Ready", "s", "ready", &Target{Value: 1.1}},
		wanted{"create → first output", "s", "output", &Target{Value: 1.1}},
	)
	if err != nil {
		return rows, err
	}
	rows[1].Note = "the first output is the time that the container runtime wrote on the first line the process printed; " +
		"Ready is when a watch of the API server says so"
	more, err := r.rows("pod start", tenantGVisor, defaultRunc,
		wanted{"create → Ready", "s", "ready", nil},
		wanted{"create → first output", "s", "output", nil},
	)
	return append(rows, more...), err
}

// start creates a pod, waits until it is Ready, and deletes it.
func (l *lab) start(name string, n node, namespace, runtimeClass string) variant {
	starts := 0
	return variant{name, func(ctx context.Context, _ int) (values map[string]float64, err error) {
		starts++
		kind := runtimeClass
		if kind == "" {
			kind = "plain"
		}
		pod := newPod(namespace, fmt.Sprintf("start-%s-%d", kind, starts), n.name, runtimeClass)
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		ready, err := l.watchReady(ctx, pod)
		if err != nil {
			return nil, err
		}
		defer ready.stop()
		created := time.Now()
		if err := l.createPod(ctx, pod); err != nil {
			return nil, err
		}
		// The next one starts on a node that is quiet again.
		defer func() {
			err = errors.Join(err, client.IgnoreNotFound(l.Delete(ctx, pod)), l.gone(ctx, pod))
		}()
		at, err := ready.wait(ctx)
		if err != nil {
			return nil, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		output, err := firstOutput(ctx, n, pod)
		if err != nil {
			return nil, err
		}
		return map[string]float64{"ready": at.Sub(created).Seconds(), "output": output.Sub(created).Seconds()}, nil
	}}
}

// readyWatch waits for one pod; it begins before the pod is created.
type readyWatch struct {
	at   chan time.Time
	stop func()
}

func (l *lab) watchReady(ctx context.Context, pod *corev1.Pod) (*readyWatch, error) {
	w, err := l.Watch(ctx, &corev1.PodList{}, client.InNamespace(pod.Namespace),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("metadata.name", pod.Name)})
	if err != nil {
		return nil, fmt.Errorf("watch pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	r := &readyWatch{at: make(chan time.Time, 1), stop: w.Stop}
	go func() {
		defer close(r.at)
		for event := range w.ResultChan() {
			if p, ok := event.Object.(*corev1.Pod); ok && isReady(p) {
				r.at <- time.Now()
				return
			}
		}
	}()
	return r, nil
}

func (r *readyWatch) wait(ctx context.Context) (time.Time, error) {
	select {
	case at, ok := <-r.at:
		if !ok {
			return time.Time{}, errors.New("the watch ended before the pod was ready")
		}
		return at, nil
	case <-ctx.Done():
		return time.Time{}, fmt.Errorf("not ready: %w", context.Cause(ctx))
	}
}

// firstOutput is when the container runtime saw the first line that a pod's
// container printed, from the log it writes on the node.
func firstOutput(ctx context.Context, n node, pod *corev1.Pod) (time.Time, error) {
	log := filepath.Join(n.dir, "var", "log", "pods",
		fmt.Sprintf("%s_%s_%s", pod.Namespace, pod.Name, pod.UID), container, "0.log")
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var at time.Time
	err := poll(ctx, 50*time.Millisecond, func() error {
		data, err := os.ReadFile(log)
		if err != nil {
			return fmt.Errorf("read the pod's log: %w", err)
		}
		stamp, _, ok := strings.Cut(string(data), " ")
		if !ok {
			return fmt.Errorf("%s is empty", log)
		}
		at, err = time.Parse(time.RFC3339Nano, stamp)
		return err
	})
	return at, err
}
