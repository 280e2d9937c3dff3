package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/projects"
)

// ProjectDirectory is what knows Keystone's projects: see identity.Directory.
type ProjectDirectory interface {
	Tagged(ctx context.Context, tag string) ([]identity.Project, error)
	Project(ctx context.Context, id string) (*identity.Project, error)
	Assignments(ctx context.Context, project string) ([]identity.Assignment, error)
}

// ProjectOptions turn on the synchronization of Tenants with Keystone's projects.
type ProjectOptions struct {
	projects.Config
	Directory ProjectDirectory
}

const (
	// projectManager sets what follows Keystone, projectDefaults what a Tenant is made
	// with. The latter is never set again, so it is an operator's to change.
	projectManager  = "h8s-keystone-sync"
	projectDefaults = "h8s-keystone-sync-defaults"
	// roundTimeout bounds one round: one that is stuck shall not be the last.
	roundTimeout = 5 * time.Minute
	// questionsAtOnce is how many requests Keystone gets at a time.
	questionsAtOnce = 4
)

// projectSync keeps Tenants in step with Keystone's projects, by asking: Keystone tells
// nobody what has changed. It deletes nothing, and takes away only what Keystone has
// said, in so many words, is no more: what is not in a list is asked about by its id,
// and an error changes nothing.
type projectSync struct {
	objects
	ProjectOptions
	events events.EventRecorder
	// settled is what was last applied to Tenants: while neither Keystone says anything
	// else nor anybody has changed the Tenant, the API server is not bothered.
	settled map[types.UID]settled
}

type settled struct {
	wish       projects.Wish
	generation int64
}

// Start implements manager.Runnable; the manager runs it in the leader only. A round that
// fails is tried again at the next one's time: it costs Keystone no more than a good one.
func (s *projectSync) Start(ctx context.Context) error {
	logger := log.FromContext(ctx).WithName("keystone-sync")
	wait.JitterUntilWithContext(log.IntoContext(ctx, logger), func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, roundTimeout)
		defer cancel()
		if err := s.round(ctx); err != nil {
			logger.Error(err, "not all Tenants are in step with Keystone's projects; what could not be read stays as it is")
		}
	}, s.Interval.Duration, 0.1, true)
	return nil
}

// round brings all Tenants in step with Keystone once.
func (s *projectSync) round(ctx context.Context) error {
	tagged, err := s.Directory.Tagged(ctx, s.Tag)
	if err != nil {
		return err
	}
	slices.SortFunc(tagged, func(a, b identity.Project) int { return strings.Compare(a.ID, b.ID) })
	var all v1alpha1.TenantList
	if err := s.List(ctx, &all); err != nil {
		return fmt.Errorf("list Tenants: %w", err)
	}
	tenants := map[string][]*v1alpha1.Tenant{}
	for i := range all.Items {
		if id := all.Items[i].Labels[v1alpha1.LabelProject]; id != "" {
			tenants[id] = append(tenants[id], &all.Items[i])
		}
	}
	wishes, errs := s.wishes(ctx, tagged)
	for _, p := range tagged {
		wish, ok := wishes[p.ID]
		if !ok || wish.Gone != "" || len(tenants[p.ID]) > 0 {
			continue
		}
		made, err := s.create(ctx, &p)
		if err != nil {
			errs = append(errs, fmt.Errorf("make a Tenant for the project %s: %w", projects.Title(&p), err))
			continue
		}
		tenants[p.ID] = []*v1alpha1.Tenant{made}
	}
	errs = append(errs, s.missing(ctx, tagged, tenants, wishes)...)

	before := s.settled
	s.settled = map[types.UID]settled{}
	for _, id := range slices.Sorted(maps.Keys(tenants)) {
		for _, t := range tenants[id] {
			if known, ok := before[t.UID]; ok {
				s.settled[t.UID] = known
			}
			wish, ok := wishes[id]
			if !ok || t.DeletionTimestamp != nil {
				continue
			}
			if err := s.follow(ctx, t, wish); err != nil {
				errs = append(errs, fmt.Errorf("bring the Tenant %s in step: %w", t.Name, err))
			}
		}
	}
	return summary(errs)
}

// wishes are what Keystone says about each project that is there, by its id. There is
// none of a project that Tenants may have and whose roles could not be read.
func (s *projectSync) wishes(ctx context.Context, tagged []identity.Project) (map[string]*projects.Wish, []error) {
	wishes, errs := make([]*projects.Wish, len(tagged)), make([]error, len(tagged))
	var group errgroup.Group
	group.SetLimit(questionsAtOnce)
	for i := range tagged {
		group.Go(func() error {
			wishes[i], errs[i] = s.wish(ctx, &tagged[i])
			return nil
		})
	}
	_ = group.Wait()
	byID := map[string]*projects.Wish{}
	for i, wish := range wishes {
		if wish != nil {
			byID[tagged[i].ID] = wish
		}
	}
	return byID, slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

// wish is what Keystone says about a project. Also one that is disabled has users with
// roles: a Tenant that is suspended tells its members why. An error that comes with a
// wish is about the members: that a project is gone is known without them.
func (s *projectSync) wish(ctx context.Context, p *identity.Project) (*projects.Wish, error) {
	wish := &projects.Wish{ProjectID: p.ID, Title: projects.Title(p), Gone: s.Gone(p)}
	assignments, err := s.Directory.Assignments(ctx, p.ID)
	if err != nil {
		if wish.Gone == "" {
			return nil, err
		}
		wish.Unread = true
		return wish, err
	}
	var unnamed []string
	if wish.Members, unnamed = s.Members(assignments); len(unnamed) > 0 {
		return wish, fmt.Errorf("%d users of the project %s have names that are too long for members: list the groups of their roles in its Tenant", len(unnamed), wish.Title)
	}
	return wish, nil
}

// missing adds what becomes of Tenants whose projects are not in the list. Each project
// is asked about: only Keystone's word that it is gone suspends a Tenant.
//
// A Keystone that knows none of several projects is another one than they are of, or one
// that was restored, and suspends nobody.
func (s *projectSync) missing(ctx context.Context, tagged []identity.Project, tenants map[string][]*v1alpha1.Tenant, wishes map[string]*projects.Wish) (errs []error) {
	listed := map[string]bool{}
	for _, p := range tagged {
		listed[p.ID] = true
	}
	known := false
	var deleted []string
	for _, id := range slices.Sorted(maps.Keys(tenants)) {
		if listed[id] {
			known = true
			continue
		}
		p, err := s.Directory.Project(ctx, id)
		switch {
		case errors.Is(err, identity.ErrNoProject):
			if slices.ContainsFunc(tenants[id], func(t *v1alpha1.Tenant) bool { return !t.Spec.Suspended }) {
				deleted = append(deleted, id)
			} else {
				wishes[id] = &projects.Wish{ProjectID: id, Gone: projects.Deleted}
			}
		case err != nil:
			errs = append(errs, err)
		default:
			known = true
			wish, err := s.wish(ctx, p)
			if err != nil {
				errs = append(errs, err)
			}
			if wish != nil {
				wishes[id] = wish
			}
		}
	}
	if !known && len(deleted) > 1 {
		return append(errs, fmt.Errorf("Keystone knows none of the projects of %d Tenants: if it is the right Keystone, and they were deleted, set spec.suspended of the Tenants, or delete them", len(deleted)))
	}
	for _, id := range deleted {
		wishes[id] = &projects.Wish{ProjectID: id, Gone: projects.Deleted}
	}
	return errs
}

// create makes the Tenant of a project that has none, with what is an operator's from
// then on. What follows Keystone comes after it.
func (s *projectSync) create(ctx context.Context, p *identity.Project) (*v1alpha1.Tenant, error) {
	// The cache may not know yet what we have made.
	var made v1alpha1.TenantList
	if err := s.live.List(ctx, &made, client.MatchingLabels{v1alpha1.LabelProject: p.ID}); err != nil {
		return nil, fmt.Errorf("list Tenants: %w", err)
	}
	if len(made.Items) > 0 {
		return &made.Items[0], nil
	}
	names := projects.Names(p)
	for _, name := range names {
		taken, err := s.taken(ctx, name)
		if err != nil {
			return nil, err
		}
		if taken {
			continue
		}
		t := &v1alpha1.Tenant{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelProject: p.ID}},
			Spec:       *s.Tenant.DeepCopy(),
		}
		err = s.Create(ctx, t, client.FieldOwner(projectDefaults))
		if apierrors.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		log.FromContext(ctx).Info("the project has a Tenant", "project", projects.Title(p), "tenant", name)
		if name != names[0] {
			s.events.Eventf(t, nil, corev1.EventTypeNormal, "NameTaken", "Synchronize", "the name %s of the project is taken by another Tenant or Network, or by a namespace that names such a Tenant, which were left alone", names[0])
		}
		return t, nil
	}
	return nil, fmt.Errorf("the names %s are taken by other Tenants or Networks, or by namespaces whose label %s names such a Tenant, which are left alone: to give a Tenant of such a name to the project, label it %s=%s",
		strings.Join(names, " and "), v1alpha1.LabelTenant, v1alpha1.LabelProject, p.ID)
}

// taken says that a Tenant of that name would come into what it has not made: a Network,
// which is its default one's name, or namespaces that were labelled before there is
// such a Tenant.
func (s *projectSync) taken(ctx context.Context, name string) (bool, error) {
	var networks v1alpha1.NetworkList
	if err := s.List(ctx, &networks); err != nil {
		return false, fmt.Errorf("list Networks: %w", err)
	}
	if slices.ContainsFunc(networks.Items, func(n v1alpha1.Network) bool { return n.Name == name }) {
		return true, nil
	}
	var namespaces corev1.NamespaceList
	if err := s.live.List(ctx, &namespaces, client.MatchingLabels{v1alpha1.LabelTenant: name}, client.Limit(1)); err != nil {
		return false, fmt.Errorf("list the namespaces of a Tenant %s: %w", name, err)
	}
	return len(namespaces.Items) > 0, nil
}

// follow applies to the Tenant what Keystone says.
func (s *projectSync) follow(ctx context.Context, t *v1alpha1.Tenant, wish *projects.Wish) error {
	title := cmp.Or(wish.Title, t.Annotations[v1alpha1.AnnotationProject])
	if known, ok := s.settled[t.UID]; ok && known.generation == t.Generation && reflect.DeepEqual(known.wish, *wish) && t.Annotations[v1alpha1.AnnotationProject] == title {
		return nil
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		var now v1alpha1.Tenant
		if err := s.live.Get(ctx, client.ObjectKeyFromObject(t), &now); err != nil {
			return client.IgnoreNotFound(err)
		}
		if now.UID != t.UID || now.DeletionTimestamp != nil || now.Labels[v1alpha1.LabelProject] != wish.ProjectID {
			return nil // an operator has decided otherwise
		}
		owners, err := projects.OwnersOf(now.ManagedFields, projectManager)
		if err != nil {
			return err
		}
		want := wish.Spec(&now, owners)
		spec, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&want)
		if err != nil {
			return err
		}
		applied := &unstructured.Unstructured{Object: map[string]any{"spec": spec}}
		applied.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("Tenant"))
		applied.SetName(now.Name)
		applied.SetLabels(map[string]string{v1alpha1.LabelProject: wish.ProjectID})
		applied.SetAnnotations(map[string]string{v1alpha1.AnnotationProject: title})
		// What was decided holds for this version of this object only.
		applied.SetUID(now.UID)
		applied.SetResourceVersion(now.ResourceVersion)
		if err := s.Apply(ctx, client.ApplyConfigurationFromUnstructured(applied), client.FieldOwner(projectManager), client.ForceOwnership); err != nil {
			return err
		}
		s.settled[t.UID] = settled{*wish, applied.GetGeneration()}
		suspended, _, err := unstructured.NestedBool(applied.Object, "spec", "suspended")
		if err != nil {
			return err
		}
		switch {
		case suspended && !now.Spec.Suspended:
			s.events.Eventf(&now, nil, corev1.EventTypeWarning, "Suspended", "Synchronize", "%s", wish.Gone)
		case !suspended && now.Spec.Suspended:
			s.events.Eventf(&now, nil, corev1.EventTypeNormal, "Resumed", "Synchronize", "its project is there again in Keystone")
		}
		return nil
	})
}

// summary is one error of them all: thousands of projects may have one each.
func summary(errs []error) error {
	const show = 3
	if more := len(errs) - show; more > 0 {
		return fmt.Errorf("%w\nand %d errors more", errors.Join(errs[:show]...), more)
	}
	return errors.Join(errs...)
}
