package agent

import (
	"context"
	"fmt"
	"net/netip"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/network"
)

// registry keeps Blocks as objects in the API server. Their names make claims exclusive.
type registry struct {
	clients clients
	caches  *caches
	node    string
}

// Taken implements network.Registry.
func (r *registry) Taken(name string) []netip.Prefix {
	var out []netip.Prefix
	for _, b := range indexed[v1alpha1.Block](r.caches.blocks, byNetwork, name) {
		if cidr, err := netip.ParsePrefix(b.Spec.CIDR); err == nil {
			out = append(out, cidr)
		}
	}
	return out
}

// Claim implements network.Registry.
func (r *registry) Claim(ctx context.Context, name string, block netip.Prefix) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	b := &v1alpha1.Block{
		ObjectMeta: metav1.ObjectMeta{Name: network.BlockName(name, block)},
		Spec:       v1alpha1.BlockSpec{Network: name, CIDR: block.String(), Node: r.node},
	}
	err := r.clients.h8s.Post().Resource("blocks").Body(b).Do(ctx).Error()
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	// It may be this node's own, if an answer was lost.
	held, err := r.get(ctx, b.Name)
	switch {
	case apierrors.IsNotFound(err):
		return network.ErrTaken // it was, a moment ago
	case err != nil:
		return err
	case held.Spec != b.Spec || held.DeletionTimestamp != nil:
		return network.ErrTaken
	}
	return nil
}

// release gives a Block of this node back. One that is another's by now, or
// nobody's, is left as it is.
func (r *registry) release(ctx context.Context, name string, block netip.Prefix) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	held, err := r.get(ctx, network.BlockName(name, block))
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("release Block %s of Network %s: %w", block, name, err)
	}
	return r.delete(ctx, held)
}

// delete removes exactly the Block that is given, if it is this node's.
func (r *registry) delete(ctx context.Context, b *v1alpha1.Block) error {
	if b.Spec.Node != r.node {
		return nil
	}
	err := r.clients.h8s.Delete().Resource("blocks").Name(b.Name).
		Body(&metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &b.UID}}).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("release Block %s: %w", b.Name, err)
	}
	return nil
}

func (r *registry) get(ctx context.Context, name string) (*v1alpha1.Block, error) {
	b := &v1alpha1.Block{}
	return b, r.clients.h8s.Get().Resource("blocks").Name(name).Do(ctx).Into(b)
}

// own asks the API server which Blocks this node holds.
func (r *registry) own(ctx context.Context) ([]v1alpha1.Block, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	list := &v1alpha1.BlockList{}
	err := r.clients.h8s.Get().Resource("blocks").
		Param("fieldSelector", fields.OneTermEqualSelector("spec.node", r.node).String()).Do(ctx).Into(list)
	if err != nil {
		return nil, fmt.Errorf("list this node's Blocks: %w", err)
	}
	return list.Items, nil
}
