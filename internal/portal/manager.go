package portal

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

const (
	netnsPrefix  = "h8s-"
	uplinkPrefix = "h8su"
)

// Manager owns every portal of one node and the node's guard rules. Its methods may be called concurrently.
type Manager struct {
	cfg  NodeConfig
	log  *slog.Logger
	nft  knftables.Interface
	ns   netns.NsHandle // the node's
	link *netlink.Handle
	nf   *netfilter

	guard struct {
		sync.Mutex
		state   tableState
		ensured bool
	}

	mu      sync.Mutex
	portals map[int32]*portal // entries stay when their portal is removed
}

// portal is what the Manager holds of one portal.
type portal struct {
	id   int32
	path string

	// changing is held by what changes the portal as a whole, so that slow changes do not hold up pods.
	changing sync.Mutex
	rules    tableState

	// mu guards the following. Attach and Detach hold it for reading.
	mu     sync.RWMutex
	ns     netns.NsHandle // None: not open
	link   *netlink.Handle
	nf     *netfilter
	ready  bool // Ensure has succeeded
	blocks []netip.Prefix
	mtu    int
}

// NewManager returns a Manager for the network namespace of the calling thread, which is the node's.
func NewManager(cfg NodeConfig, log *slog.Logger) (_ *Manager, err error) {
	if !cfg.NodeIP.Is4() || !cfg.ClusterDNS.Is4() {
		return nil, fmt.Errorf("portal: node address %v and cluster DNS address %v must both be IPv4", cfg.NodeIP, cfg.ClusterDNS)
	}
	if cfg.NetnsDir == "" {
		cfg.NetnsDir = "/run/netns"
	}
	if cfg.VXLANPort == 0 {
		cfg.VXLANPort = 4789
	}
	m := &Manager{cfg: cfg, log: log, ns: netns.None(), portals: map[int32]*portal{}}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	// /proc/self would be the first thread's, which may be in another namespace.
	if m.ns, err = netns.GetFromPath("/proc/thread-self/ns/net"); err != nil {
		return nil, fmt.Errorf("portal: open the node's network namespace: %w", err)
	}
	if m.link, err = netlink.NewHandleAt(m.ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("portal: open netlink socket: %w", err)
	}
	if m.nf, err = newNetfilter(m.ns); err != nil {
		return nil, fmt.Errorf("portal: %w", err)
	}
	if err := inNetns(m.ns, func() (err error) {
		m.nft, err = knftables.New(knftables.InetFamily, table)
		return err
	}); err != nil {
		return nil, fmt.Errorf("portal: nftables cannot be used, install the nft program: %w", err)
	}
	return m, nil
}

// Close releases what the Manager holds in the process; portals live on.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.portals {
		p.changing.Lock()
		p.mu.Lock()
		p.close()
		p.mu.Unlock()
		p.changing.Unlock()
	}
	if m.nf != nil {
		m.nf.close()
	}
	if m.link != nil {
		m.link.Close()
	}
	if m.ns.IsOpen() {
		return m.ns.Close()
	}
	return nil
}

// EnsureGuard replaces table inet h8s of the node's namespace, in one transaction, if it differs. It must have
// succeeded once before Ensure.
func (m *Manager) EnsureGuard(ctx context.Context, g Guard) error {
	m.guard.Lock()
	defer m.guard.Unlock()
	underlay, err := m.underlay()
	if err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	r := guardRules(g, m.cfg.NodeIP, underlay.Attrs().Name, m.cfg.VXLANPort)
	if _, err := m.apply(ctx, m.ns, m.nf, &m.guard.state, r); err != nil {
		return fmt.Errorf("guard: %w", err)
	}
	m.guard.ensured = true
	return nil
}

// underlay is the link that carries the overlay.
func (m *Manager) underlay() (netlink.Link, error) {
	if m.cfg.Underlay != "" {
		l, err := m.link.LinkByName(m.cfg.Underlay)
		if err != nil {
			return nil, fmt.Errorf("underlay link %s: %w", m.cfg.Underlay, err)
		}
		return l, nil
	}
	addrs, err := m.link.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the node's addresses: %w", err)
	}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && ip == m.cfg.NodeIP {
			return m.link.LinkByIndex(a.LinkIndex)
		}
	}
	return nil, fmt.Errorf("no link of this node has its address %v; is the node's address right?", m.cfg.NodeIP)
}

// portal returns the entry of id.
func (m *Manager) portal(id int32) *portal {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.portals[id]
	if p == nil {
		p = &portal{id: id, path: filepath.Join(m.cfg.NetnsDir, netnsPrefix+strconv.Itoa(int(id))), ns: netns.None()}
		m.portals[id] = p
	}
	return p
}

// open opens the portal if it exists in the kernel. p.mu must be held.
func (p *portal) open() (bool, error) {
	if p.ns.IsOpen() {
		return true, nil
	}
	if !isNetns(p.path) {
		return false, nil
	}
	ns, err := netns.GetFromPath(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open %s: %w", p.path, err)
	}
	return true, p.use(ns)
}

// use takes ns as the portal's namespace. p.mu must be held.
func (p *portal) use(ns netns.NsHandle) (err error) {
	p.ns = ns
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if p.link, err = netlink.NewHandleAt(ns, unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return fmt.Errorf("open netlink socket in %s: %w", p.path, err)
	}
	if p.nf, err = newNetfilter(ns); err != nil {
		return fmt.Errorf("%s: %w", p.path, err)
	}
	return nil
}

// close forgets the portal. p.changing and p.mu must be held.
func (p *portal) close() {
	if p.nf != nil {
		p.nf.close()
	}
	if p.link != nil {
		p.link.Close()
	}
	if p.ns.IsOpen() {
		p.ns.Close()
	}
	p.ns, p.link, p.nf, p.ready, p.blocks, p.rules = netns.None(), nil, nil, false, nil, tableState{}
}

// forReading opens the portal if it is not and holds p.mu for reading until release is called. Without a portal in
// the kernel it returns false, and nothing is to be released.
func (p *portal) forReading() (release func(), found bool, err error) {
	p.mu.RLock()
	for !p.ns.IsOpen() {
		p.mu.RUnlock()
		p.mu.Lock()
		found, err := p.open()
		p.mu.Unlock()
		if err != nil || !found {
			return nil, false, err
		}
		p.mu.RLock()
	}
	return p.mu.RUnlock, true, nil
}

// Remove removes the portal with everything in it. A portal that does not exist is success. Sockets of Listen hold
// its namespace, empty and nameless, until they are closed.
func (m *Manager) Remove(ctx context.Context, id int32) error {
	p := m.portal(id)
	p.changing.Lock()
	defer p.changing.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := m.remove(ctx, p); err != nil {
		return fmt.Errorf("remove portal %d: %w", id, err)
	}
	return nil
}

func (m *Manager) remove(ctx context.Context, p *portal) error {
	// The node's end first: from then on nothing enters or leaves.
	if uplink, err := m.link.LinkByName(uplinkPrefix + strconv.Itoa(int(p.id))); err == nil {
		blocks, err := m.nodeRoutes(uplink)
		if err != nil {
			return err
		}
		if err := ignoreGone(m.link.LinkDel(uplink)); err != nil {
			return fmt.Errorf("delete link %s: %w", uplink.Attrs().Name, err)
		}
		for _, b := range blocks {
			if err := flushPrefix(m.link, prefixOf(b.Dst)); err != nil {
				return err
			}
		}
	} else if !isLinkNotFound(err) {
		return fmt.Errorf("find uplink: %w", err)
	}
	found, err := p.open()
	if err != nil {
		return err
	}
	if found {
		// A namespace is taken apart some time after its end. Deleting the links frees the VNI and the pods' links now.
		links, err := p.link.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			if err := ctx.Err(); err != nil {
				return err
			}
			if l.Attrs().Name == "lo" {
				err = p.link.LinkSetDown(l)
			} else {
				err = p.link.LinkDel(l)
			}
			if err := ignoreGone(err); err != nil {
				return fmt.Errorf("delete link %s: %w", l.Attrs().Name, err)
			}
		}
	}
	p.close()
	return unbindNetns(p.path)
}

// List returns the ids of the portals that exist in the kernel, also if only in part, whoever made them.
func (m *Manager) List() ([]int32, error) {
	var ids []int32
	add := func(name, prefix string) {
		digits, ok := strings.CutPrefix(name, prefix)
		id, err := strconv.ParseInt(digits, 10, 32)
		if ok && err == nil && id > 0 && strconv.FormatInt(id, 10) == digits {
			ids = append(ids, int32(id))
		}
	}
	entries, err := os.ReadDir(m.cfg.NetnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list portals: %w", err)
	}
	for _, e := range entries {
		add(e.Name(), netnsPrefix)
	}
	links, err := m.link.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list portals: list links: %w", err)
	}
	for _, l := range links {
		add(l.Attrs().Name, uplinkPrefix)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// Listen opens UDP and TCP port 53 of ClusterDNS inside the portal. The caller closes both, also before Remove.
func (m *Manager) Listen(id int32) (net.PacketConn, net.Listener, error) {
	p := m.portal(id)
	release, found, err := p.forReading()
	if err != nil {
		return nil, nil, fmt.Errorf("portal %d: listen: %w", id, err)
	}
	if !found {
		return nil, nil, fmt.Errorf("portal %d: listen: %w", id, ErrNoPortal)
	}
	defer release()
	var pc net.PacketConn
	var l net.Listener
	err = inNetns(p.ns, func() (err error) {
		addr := netip.AddrPortFrom(m.cfg.ClusterDNS, 53)
		if pc, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr)); err != nil {
			return err
		}
		if l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(addr)); err != nil {
			pc.Close()
		}
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("portal %d: listen for DNS: %w", id, err)
	}
	return pc, l, nil
}
