package main

import (
	"os"
	"testing"

	"github.com/vishvananda/netlink"
)

func linkNames(t *testing.T, netns string) []string {
	t.Helper()
	var names []string
	err := inNetns(netns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestFlannel(t *testing.T) {
	a, b := twoPlaces(t)
	nodes := []node{{name: "a", address: a.addr, netns: a.netns}, {name: "b", address: b.addr, netns: b.netns}}
	for _, n := range nodes {
		err := inNetns(n.netns, func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	before := len(linkNames(t, a.netns))
	// Twice: what a killed run left is replaced.
	for range 2 {
		f, err := layFlannel(nodes)
		t.Cleanup(func() { _ = f.remove() })
		if err != nil {
			t.Fatal(err)
		}
		for _, way := range [][2]place{{f.pods[0], f.pods[1]}, {f.pods[1], f.pods[0]}} {
			if err := reachable(t.Context(), way[0], way[1], way[1].port()); err != nil {
				t.Fatal(err)
			}
		}
		var encapsulated uint64
		err = inNetns(a.netns, func() error {
			link, err := netlink.LinkByName(flannelLink)
			if err == nil {
				encapsulated = link.Attrs().Statistics.TxPackets
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if encapsulated == 0 {
			t.Errorf("no packet left by %s", flannelLink)
		}
		if err := f.remove(); err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes {
			if left := linkNames(t, n.netns); len(left) != before {
				t.Errorf("links of node %s after removal: %v, want %d", n.name, left, before)
			}
		}
	}
}

func TestFlannelNeedsTheUnderlay(t *testing.T) {
	a, b := twoPlaces(t)
	f, err := layFlannel([]node{{name: "a", address: b.addr, netns: a.netns}})
	if err == nil {
		t.Error("laid out on a node without the address of its VXLAN device")
	}
	if err := f.remove(); err != nil {
		t.Error(err)
	}
}
