package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/network"
	"h8s.io/hypernetes/internal/portal"
)

// recover takes over what an earlier run left: Blocks, attachments, portals. It
// needs full caches.
func (a *Agent) recover(ctx context.Context) error {
	records, err := a.store.Load()
	if err != nil {
		return err
	}
	// Of two records of one address, which a loss of power can leave, the later is true.
	slices.SortFunc(records, func(x, y network.Attachment) int { return y.Created.Compare(x.Created) })
	cidrs := map[string]netip.Prefix{}
	for _, at := range records {
		a.attachments[at.Key()] = at
		cidrs[at.Network] = at.CIDR
	}
	for _, n := range list[v1alpha1.Network](a.caches.networks) {
		if cidr, err := networkCIDR(n); err == nil {
			cidrs[n.Name] = cidr
		}
	}

	own, err := a.registry().own(ctx)
	if err != nil {
		return err
	}
	// Blocks with pods first: should two overlap, the idle one has to go.
	slices.SortFunc(own, func(x, y v1alpha1.Block) int {
		return cmp.Or(cmp.Compare(a.podsIn(y), a.podsIn(x)), strings.Compare(x.Name, y.Name))
	})
	for i := range own {
		if err := a.takeOver(ctx, &own[i], cidrs); err != nil {
			return err
		}
	}
	for _, at := range records {
		if err := a.reserve(ctx, at); err != nil {
			a.log.Error("an address is in doubt: delete the pod", "pod", at.Namespace+"/"+at.Pod, "network", at.Network, "address", at.Address, "err", err)
		}
	}

	if err := a.reconcileGuard(ctx); err != nil {
		return err
	}
	for _, name := range a.ledger.Networks() {
		a.lockLocal(name).mu.Unlock()
	}
	for _, at := range records {
		l := a.lockLocal(at.Network)
		a.setID(l, at.NetworkID)
		l.mu.Unlock()
	}
	if err := a.removeStrayPortals(ctx); err != nil {
		a.log.Error("leftover portals are not removed yet", "err", err)
	}
	a.enqueueAll()
	a.log.Info("recovered", "attachments", len(records), "blocks", len(own), "networks", len(a.networks))
	return nil
}

func (a *Agent) podsIn(b v1alpha1.Block) int {
	cidr, err := netip.ParsePrefix(b.Spec.CIDR)
	if err != nil {
		return 0
	}
	n := 0
	for _, at := range a.allAttachments() {
		if at.Network == b.Spec.Network && cidr.Contains(at.Address) {
			n++
		}
	}
	return n
}

// takeOver holds a Block that this node claimed earlier, or gives it back if
// there is no use for it.
func (a *Agent) takeOver(ctx context.Context, b *v1alpha1.Block, cidrs map[string]netip.Prefix) error {
	block, err := netip.ParsePrefix(b.Spec.CIDR)
	cidr, known := cidrs[b.Spec.Network]
	if err == nil && known {
		if err = a.ledger.Hold(b.Spec.Network, cidr, block); err == nil {
			return nil
		}
	}
	if a.podsIn(*b) > 0 {
		a.log.Error("a Block with pods cannot be used", "block", b.Name, "err", err)
		return nil
	}
	a.log.Info("releasing Block without use", "block", b.Name, "err", err)
	return a.registry().delete(ctx, b)
}

// reserve puts a recorded address back into use. Should its Block have been
// deleted behind the agent's back, it is claimed again.
func (a *Agent) reserve(ctx context.Context, at network.Attachment) error {
	err := a.ledger.Reserve(at.Network, at.Address)
	if err == nil || slices.ContainsFunc(a.ledger.Blocks(at.Network), func(b netip.Prefix) bool { return b.Contains(at.Address) }) {
		return err
	}
	block, err := at.Address.Prefix(network.BlockBits(at.CIDR))
	if err != nil {
		return err
	}
	if err := a.registry().Claim(ctx, at.Network, block); err != nil {
		return fmt.Errorf("claim Block %s again: %w", block, err)
	}
	if err := a.ledger.Hold(at.Network, at.CIDR, block); err != nil {
		return err
	}
	return a.ledger.Reserve(at.Network, at.Address)
}

// sweepLoop looks, now and then, for what no event tells of.
func (a *Agent) sweepLoop(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	for {
		a.sweep(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (a *Agent) sweep(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	a.labelNode(ctx)
	err := errors.Join(a.reapGone(ctx), a.removeStrayPortals(ctx), a.reconcileBlocks(ctx), a.reviewConflicts(ctx))
	if err != nil && ctx.Err() == nil {
		a.log.Error("sweep incomplete, will be tried again", "err", err)
	}
	a.queue.Add(guardKey)
	a.enqueueAll()
}

// reapGone detaches what DEL has missed. A container runtime whose ADD and DEL
// both met no agent gives the sandbox up and makes another for the same pod.
func (a *Agent) reapGone(ctx context.Context) error {
	var errs []error
	for _, at := range a.allAttachments() {
		gone, err := a.gone(at)
		if gone {
			err = a.reap(ctx, at)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// gone says whether the attachment's sandbox is no more: its network namespace has
// no name any longer, and either the API server does not know the pod, or no link
// leads there, which it does as long as a process lives in the namespace.
func (a *Agent) gone(at network.Attachment) (bool, error) {
	if _, err := os.Stat(hostPath(at.Netns)); !errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if len(indexed[corev1.Pod](a.caches.pods, byUID, at.PodUID)) == 0 {
		return true, nil
	}
	links, err := a.portals.Attachments(at.NetworkID)
	return err == nil && !slices.Contains(links, portal.HostIfName(at.ContainerID, at.IfName)), err
}

// hostPath returns a path of the container runtime as the agent's container has
// it: /run is mounted there, of which /var/run is another name.
func hostPath(path string) string {
	if rest, ok := strings.CutPrefix(filepath.Clean(path), "/var/run/"); ok {
		return "/run/" + rest
	}
	return path
}

// removeStrayPortals removes portals that nothing on this node needs.
func (a *Agent) removeStrayPortals(ctx context.Context) error {
	ids, err := a.portals.List()
	if err != nil {
		return fmt.Errorf("list portals: %w", err)
	}
	needed := map[int32]bool{}
	for _, n := range list[v1alpha1.Network](a.caches.networks) {
		if a.local(n.Name) != nil {
			needed[n.Status.ID] = true
		}
	}
	a.mu.Lock()
	for _, l := range a.networks {
		needed[l.id] = true
	}
	for _, at := range a.attachments {
		needed[at.NetworkID] = true
	}
	a.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if needed[id] {
			continue
		}
		a.log.Info("removing leftover portal", "id", id)
		errs = append(errs, a.portals.Remove(ctx, id))
	}
	return errors.Join(errs...)
}

// reconcileBlocks compares this node's Blocks with those of the API server. One
// that somebody deleted is claimed again; one that a lost answer left behind is
// given back.
func (a *Agent) reconcileBlocks(ctx context.Context) error {
	registry := a.registry()
	var errs []error
	a.ledger.WithoutClaims(func() {
		held := map[string]bool{}
		for _, name := range a.ledger.Networks() {
			for _, block := range a.ledger.Blocks(name) {
				held[network.BlockName(name, block)] = true
				if get[v1alpha1.Block](a.caches.blocks, network.BlockName(name, block)) == nil {
					if err := registry.Claim(ctx, name, block); err != nil {
						errs = append(errs, fmt.Errorf("claim Block %s of Network %s again: %w", block, name, err))
					}
				}
			}
			for _, block := range a.ledger.Retired(name) {
				held[network.BlockName(name, block)] = true
			}
		}
		for _, b := range list[v1alpha1.Block](a.caches.blocks) {
			if b.Spec.Node == a.cfg.NodeName && !held[b.Name] && a.podsIn(*b) == 0 {
				errs = append(errs, registry.delete(ctx, b))
			}
		}
	})
	return errors.Join(errs...)
}

// reviewConflicts keeps the condition of Networks in step that are on this node,
// or that this node keeps away.
func (a *Agent) reviewConflicts(ctx context.Context) error {
	uses, err := a.uses()
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range list[v1alpha1.Network](a.caches.networks) {
		if a.local(n.Name) == nil && !apimeta.IsStatusConditionTrue(n.Status.Conditions, v1alpha1.ConditionConflict) {
			continue
		}
		cidr, err := networkCIDR(n)
		if err != nil {
			continue
		}
		errs = append(errs, a.reportConflict(ctx, n, conflict(n.Name, cidr, a.cfg.NodeName, uses)))
	}
	return errors.Join(errs...)
}
