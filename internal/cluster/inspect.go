package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/cni"
	"h8s.io/hypernetes/internal/network"
)

const (
	// portalPrefix begins the names of portals' network namespaces.
	portalPrefix = "h8s-"
	// uplinkPrefix begins the names of the node's ends of portals' uplinks.
	uplinkPrefix = "h8su"
	// ownTable is the node's guard, and the table of a portal.
	ownTable = "inet h8s"
)

// found is what a node has that belongs to the node agent, a Network or a pod.
type found struct {
	node        string
	installed   []string // files by which the container runtime asks the agent
	guarded     bool     // has the nftables table of the agent
	portals     []foundPortal
	uplinks     []string // links h8su*
	routes      []blockRoute
	attachments []network.Attachment
}

// foundPortal is a network namespace in /run/netns.
type foundPortal struct {
	name     string
	podLinks []string
	tables   []string // as nft names them: family and name
}

// blockRoute is a node's route to a Block through a Network's uplink.
type blockRoute struct{ cidr, link string }

// inspect looks at the machine as the process pid has it: its network namespace
// and its mounts. What is going away meanwhile is left out.
func inspect(node string, pid int) (found, error) {
	f := found{node: node}
	root := fmt.Sprintf("/proc/%d/root", pid)
	for _, file := range []string{"/etc/cni/net.d/" + cni.ConflistName, "/opt/cni/bin/h8s-cni"} {
		if _, err := os.Stat(root + file); err == nil {
			f.installed = append(f.installed, file)
		}
	}
	// A pod's record is there before its link and goes after it: so, portals first.
	portals, err := filepath.Glob(root + "/run/netns/" + portalPrefix + "*")
	if err != nil {
		return f, err
	}
	for _, path := range portals {
		p, err := inspectPortal(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return f, fmt.Errorf("look into %s: %w", filepath.Base(path), err)
		}
		f.portals = append(f.portals, p)
	}
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return f, fmt.Errorf("open its network namespace: %w", err)
	}
	defer ns.Close()
	if f.uplinks, f.routes, err = nodeUplinks(ns); err != nil {
		return f, err
	}
	tables, err := listTables(ns)
	if err != nil {
		return f, err
	}
	for _, t := range tables {
		f.guarded = f.guarded || t == ownTable
	}
	f.attachments, err = readAttachments(root + "/var/lib/h8s/attachments")
	return f, err
}

func inspectPortal(path string) (foundPortal, error) {
	p := foundPortal{name: filepath.Base(path)}
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return p, err
	}
	if st.Type != unix.NSFS_MAGIC {
		return p, nil // an empty file, which a crash left
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return p, err
	}
	defer ns.Close()
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return p, err
	}
	defer handle.Close()
	links, err := handle.LinkList()
	if err != nil {
		return p, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if l.Type() == "veth" && l.Attrs().Name != "uplink" {
			p.podLinks = append(p.podLinks, l.Attrs().Name)
		}
	}
	p.tables, err = listTables(ns)
	return p, err
}

// nodeUplinks are the node's ends of its portals' uplinks, and the routes to Blocks through them.
func nodeUplinks(ns netns.NsHandle) (names []string, routes []blockRoute, err error) {
	handle, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, nil, fmt.Errorf("reach into its network namespace: %w", err)
	}
	defer handle.Close()
	links, err := handle.LinkList()
	if err != nil {
		return nil, nil, fmt.Errorf("list its links: %w", err)
	}
	for _, l := range links {
		name := l.Attrs().Name
		if !strings.HasPrefix(name, uplinkPrefix) {
			continue
		}
		names = append(names, name)
		through, err := handle.RouteList(l, netlink.FAMILY_V4)
		if err != nil {
			return nil, nil, fmt.Errorf("list its routes by %s: %w", name, err)
		}
		for _, r := range through {
			if r.Dst != nil && !r.Dst.IP.IsLinkLocalUnicast() {
				routes = append(routes, blockRoute{r.Dst.String(), name})
			}
		}
	}
	return names, routes, nil
}

// listTables are the nftables tables of a network namespace, as nft names them.
func listTables(ns netns.NsHandle) ([]string, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return nil, fmt.Errorf("open netfilter socket: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	families := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
		nftables.TableFamilyARP: "arp", nftables.TableFamilyNetdev: "netdev", nftables.TableFamilyBridge: "bridge",
	}
	var names []string
	for _, t := range tables {
		names = append(names, families[t.Family]+" "+t.Name)
	}
	return names, nil
}

func readAttachments(dir string) ([]network.Attachment, error) {
	records, err := filepath.Glob(dir + "/*.json")
	if err != nil {
		return nil, err
	}
	var out []network.Attachment
	for _, record := range records {
		data, err := os.ReadFile(record)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var a network.Attachment
		if err := json.Unmarshal(data, &a); err != nil {
			return nil, fmt.Errorf("attachment %s is damaged: %w", record, err)
		}
		out = append(out, a)
	}
	return out, nil
}

// names lists what was found, without asking what it is good for.
func (f *found) names() []string {
	names := append([]string(nil), f.installed...)
	if f.guarded {
		names = append(names, "nftables table "+ownTable)
	}
	for _, p := range f.portals {
		names = append(names, "network namespace "+p.name)
	}
	for _, l := range f.uplinks {
		names = append(names, "link "+l)
	}
	for _, a := range f.attachments {
		names = append(names, fmt.Sprintf("address %s of pod %s/%s", a.Address, a.Namespace, a.Pod))
	}
	return names
}
