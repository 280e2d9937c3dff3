package portal

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

// objects are the names of what stands in a table.
type objects struct{ chains, sets, maps map[string]bool }

func (r *ruleset) objects() objects {
	o := objects{chains: map[string]bool{}, sets: map[string]bool{}, maps: map[string]bool{}}
	for _, c := range r.chains {
		o.chains[c.Name] = true
	}
	for _, s := range r.sets {
		o.sets[s.Name] = true
	}
	for _, m := range r.maps {
		o.maps[m.Name] = true
	}
	return o
}

// write adds to tx what turns a table that holds old into r. Sets filled by packets keep their content.
func (r *ruleset) write(tx *knftables.Transaction, old objects) {
	tx.Add(&knftables.Table{})
	for _, c := range r.chains {
		tx.Add(c)
		tx.Flush(c)
	}
	for _, s := range r.sets {
		tx.Add(s)
		if !dynamic(s) {
			tx.Flush(s)
		}
	}
	for _, m := range r.maps {
		tx.Add(m)
		tx.Flush(m)
	}
	for _, rule := range r.rules {
		tx.Add(rule)
	}
	for _, e := range r.elements {
		tx.Add(e)
	}
	// What is stale goes last, when nothing refers to it any more; chains before sets, all empty before any is deleted.
	now := r.objects()
	for name := range old.chains {
		if !now.chains[name] {
			tx.Flush(&knftables.Chain{Name: name})
		}
	}
	for name := range old.chains {
		if !now.chains[name] {
			tx.Delete(&knftables.Chain{Name: name})
		}
	}
	for name := range old.maps {
		if !now.maps[name] {
			tx.Delete(&knftables.Map{Name: name})
		}
	}
	for name := range old.sets {
		if !now.sets[name] {
			tx.Delete(&knftables.Set{Name: name})
		}
	}
}

// tableState remembers what was applied to a namespace, so that applying it again costs one small netlink message.
type tableState struct {
	// digest of the rules, and the kernel's generation of the namespace's ruleset after they were applied: it moves
	// whenever anybody changes a rule.
	digest     [sha256.Size]byte
	generation uint32
	objects    objects
}

// nftTimeout bounds the nft program. Another transaction in the same namespace may hold it up, for a short time.
const nftTimeout = 30 * time.Second

// apply makes table inet h8s of namespace ns hold r, in one transaction, unless it does. It reports whether it wrote.
func (m *Manager) apply(ctx context.Context, ns netns.NsHandle, nf *netfilter, state *tableState, r *ruleset) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	full := m.nft.NewTransaction()
	r.write(full, objects{})
	digest := sha256.Sum256([]byte(full.String()))
	generation, err := nf.generation()
	if err != nil {
		return false, err
	}
	known := generation == state.generation && state.objects.chains != nil
	if known && digest == state.digest {
		return false, nil
	}
	err = inNetns(ns, func() error {
		old := state.objects
		if !known {
			if old, err = m.listObjects(ctx); err != nil {
				return err
			}
		}
		tx := m.nft.NewTransaction()
		r.write(tx, old)
		err := m.nft.Run(ctx, tx)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// The table does not look as we thought, perhaps another version made it: start over, still in one transaction.
		m.log.Warn("nftables: replacing the whole table", "cause", err)
		tx = m.nft.NewTransaction()
		tx.Add(&knftables.Table{})
		tx.Delete(&knftables.Table{})
		r.write(tx, objects{})
		return m.nft.Run(ctx, tx)
	})
	if err != nil {
		*state = tableState{}
		return false, fmt.Errorf("nftables: apply table inet %s: %w", table, err)
	}
	if generation, err = nf.generation(); err != nil {
		return true, err
	}
	*state = tableState{digest: digest, generation: generation, objects: r.objects()}
	return true, nil
}

// listObjects lists the table in the current thread's namespace.
func (m *Manager) listObjects(ctx context.Context) (objects, error) {
	all, err := m.nft.ListAll(ctx)
	if err != nil && !knftables.IsNotFound(err) {
		return objects{}, err
	}
	names := func(typ string) map[string]bool {
		out := map[string]bool{}
		for _, n := range all[typ] {
			out[n] = true
		}
		return out
	}
	return objects{chains: names("chain"), sets: names("set"), maps: names("map")}, nil
}

// netfilter is a netlink socket to the packet filter of one namespace.
type netfilter struct{ sockets map[int]*nl.SocketHandle }

func newNetfilter(ns netns.NsHandle) (*netfilter, error) {
	s, err := nl.GetNetlinkSocketAt(ns, netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	return &netfilter{sockets: map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}}, nil
}

func (n *netfilter) close() {
	for _, s := range n.sockets {
		s.Close()
	}
}

func (n *netfilter) request(subsystem, message, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(subsystem<<8|message, flags)
	req.Sockets = n.sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET, Version: nl.NFNETLINK_V0})
	return req
}

// generation is the number that the kernel gives to the namespace's current ruleset; packets do not change it.
func (n *netfilter) generation() (uint32, error) {
	msgs, err := n.request(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, 0).Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("nftables: read the ruleset's generation: %w", err)
	}
	for _, msg := range msgs {
		if len(msg) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(msg[nl.SizeofNfgenmsg:])
		if err != nil {
			return 0, fmt.Errorf("nftables: read the ruleset's generation: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.NFTA_GEN_ID && len(a.Value) == 4 {
				return uint32(a.Value[0])<<24 | uint32(a.Value[1])<<16 | uint32(a.Value[2])<<8 | uint32(a.Value[3]), nil
			}
		}
	}
	return 0, errors.New("nftables: the kernel did not tell the ruleset's generation")
}
