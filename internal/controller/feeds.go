package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/quota"
)

// tickInterval is how often time alone is looked at: pods that should have ended.
const tickInterval = 30 * time.Second

// errCounting means that the first list of a resource has not come yet, or cannot be had,
// or that somebody has not told yet what it has granted by an earlier quota.
var errCounting = errors.New("what exists in the cluster is still being counted, try again")

// feeds tells the View what exists, of the resources that some quota bounds. It
// drives Reflectors without the informers around them: the View gets a list whole
// and knows at each moment of which revision it is, and nobody keeps the objects.
type feeds struct {
	core   kubernetes.Interface
	meta   metadata.Interface
	view   *quota.View
	wanted chan string
}

func newFeeds(config *rest.Config, view *quota.View) (*feeds, error) {
	typed := rest.CopyConfig(config)
	typed.ContentType, typed.AcceptContentTypes = runtime.ContentTypeProtobuf, runtime.ContentTypeProtobuf+","+runtime.ContentTypeJSON
	core, err := kubernetes.NewForConfig(typed)
	if err != nil {
		return nil, fmt.Errorf("make a client of pods: %w", err)
	}
	meta, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("make a client of metadata: %w", err)
	}
	return &feeds{core: core, meta: meta, view: view, wanted: make(chan string)}, nil
}

// NeedLeaderElection implements manager.LeaderElectionRunnable: every replica answers webhooks.
func (*feeds) NeedLeaderElection() bool { return false }

// Start implements manager.Runnable.
func (f *feeds) Start(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	started := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case kind := <-f.wanted:
			if started[kind] {
				continue
			}
			lw, example, err := f.source(kind)
			if err != nil {
				return err
			}
			started[kind] = true
			store := feed{kind, f.view}
			reflector := cache.NewReflectorWithOptions(lw, example, store, cache.ReflectorOptions{Name: "quota of " + kind, ResyncPeriod: tickInterval})
			running.Go(func() { reflector.RunWithContext(ctx) })
		}
	}
}

// sync returns when the View knows the resources as they were at some time.
func (f *feeds) sync(ctx context.Context, kinds ...string) error {
	for {
		moved := f.view.Moved()
		err := f.ready(ctx, kinds...)
		if !errors.Is(err, errCounting) {
			return err
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return err
		}
	}
}

// ready fails with errCounting if the View does not know the resources yet, and
// has them listed.
func (f *feeds) ready(ctx context.Context, kinds ...string) error {
	var missing []string
	for _, kind := range kinds {
		if f.view.Synced(kind) {
			continue
		}
		select {
		case f.wanted <- kind:
			missing = append(missing, kind)
		case <-ctx.Done():
			return fmt.Errorf("have the %s of the cluster counted, try again: %w", kind, ctx.Err())
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: %s", errCounting, strings.Join(missing, ", "))
	}
	return nil
}

// namespace asks the API server.
func (f *feeds) namespace(ctx context.Context, name string) (*metav1.PartialObjectMetadata, error) {
	return f.meta.Resource(corev1.SchemeGroupVersion.WithResource(quota.Namespaces)).Get(ctx, name, metav1.GetOptions{})
}

func (f *feeds) source(kind string) (cache.ListerWatcher, runtime.Object, error) {
	core := f.core.CoreV1().RESTClient()
	switch kind {
	case quota.Pods:
		return cache.NewListWatchFromClient(core, kind, metav1.NamespaceAll, fields.Everything()), &corev1.Pod{}, nil
	case quota.Services:
		return cache.NewListWatchFromClient(core, kind, metav1.NamespaceAll, fields.Everything()), &corev1.Service{}, nil
	case quota.Claims:
		return cache.NewListWatchFromClient(core, kind, metav1.NamespaceAll, fields.Everything()), &corev1.PersistentVolumeClaim{}, nil
	}
	gvr := corev1.SchemeGroupVersion.WithResource(quota.Namespaces)
	if kind != quota.Namespaces {
		var ok bool
		if gvr, ok = quota.Find(kind); !ok {
			return nil, nil, fmt.Errorf("%s are not counted", kind)
		}
	}
	resource := f.meta.Resource(gvr)
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			return resource.List(ctx, options)
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return resource.Watch(ctx, options)
		},
	}, f.meta), &metav1.PartialObjectMetadata{}, nil
}

// feed is one resource of the View, as a Reflector's store.
type feed struct {
	kind string
	view *quota.View
}

// Add implements cache.ReflectorStore.
func (f feed) Add(obj any) error {
	o, err := objectOf(f.kind, obj)
	if err != nil {
		return err
	}
	f.view.Put(f.kind, o)
	return nil
}

// Update implements cache.ReflectorStore.
func (f feed) Update(obj any) error { return f.Add(obj) }

// Delete implements cache.ReflectorStore.
func (f feed) Delete(obj any) error {
	o, err := objectOf(f.kind, obj)
	if err != nil {
		return err
	}
	f.view.Delete(f.kind, o.UID, o.Revision)
	return nil
}

// Replace implements cache.ReflectorStore.
func (f feed) Replace(list []any, resourceVersion string) error {
	revision, err := quota.ParseRevision(resourceVersion)
	if err != nil {
		return err
	}
	objects := make([]quota.Object, 0, len(list))
	for _, obj := range list {
		o, err := objectOf(f.kind, obj)
		if err != nil {
			return err
		}
		objects = append(objects, o)
	}
	f.view.Replace(f.kind, objects, revision)
	return nil
}

// Resync implements cache.ReflectorStore.
func (f feed) Resync() error {
	f.view.Tick(f.kind)
	return nil
}

// Bookmark implements cache.ReflectorBookmarkStore.
func (f feed) Bookmark(resourceVersion string) error {
	revision, err := quota.ParseRevision(resourceVersion)
	if err != nil {
		return err
	}
	f.view.Advance(f.kind, revision)
	return nil
}

// objectOf is what quotas want to know of an object.
func objectOf(kind string, obj any) (quota.Object, error) {
	meta, err := apimeta.Accessor(obj)
	if err != nil {
		return quota.Object{}, errors.New("the API server has sent something that is no object")
	}
	revision, err := quota.ParseRevision(meta.GetResourceVersion())
	if err != nil {
		return quota.Object{}, err
	}
	o := quota.Object{UID: meta.GetUID(), Namespace: meta.GetNamespace(), Name: meta.GetName(), Revision: revision}
	switch obj := obj.(type) {
	case *corev1.Pod:
		now := time.Now()
		o.Usage, o.Ends = quota.UsageOfPod(obj, now)
		if !o.Ends.IsZero() {
			o.Rest = quota.UsageOfObject(quota.Pods)
		}
	case *corev1.Service:
		o.Usage = quota.UsageOfService(obj)
	case *corev1.PersistentVolumeClaim:
		o.Usage = quota.UsageOfClaim(obj)
	default:
		if kind == quota.Namespaces {
			o.Tenant = meta.GetLabels()[v1alpha1.LabelTenant]
		} else {
			o.Usage = quota.UsageOfObject(kind)
		}
	}
	return o, nil
}
