package main

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// twoPlaces are two network namespaces with a cable in between.
func twoPlaces(t *testing.T) (a, b place) {
	t.Helper()
	namespaces := make([]*os.File, 2)
	for i := range namespaces {
		ns, err := newNetns()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ns.Close() })
		namespaces[i] = ns
	}
	a = place{netnsPath(namespaces[0]), netip.MustParseAddr("192.0.2.1")}
	b = place{netnsPath(namespaces[1]), netip.MustParseAddr("192.0.2.2")}
	err := inNetns(a.netns, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "cable"}, PeerName: "cable", PeerNamespace: netlink.NsFd(namespaces[1].Fd()),
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []place{a, b} {
		err := inNetns(p.netns, func() error {
			link, err := netlink.LinkByName("cable")
			if err != nil {
				return err
			}
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.addr.AsSlice(), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
			return netlink.LinkSetUp(link)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

func TestMeasurements(t *testing.T) {
	a, b := twoPlaces(t)
	if err := reachable(t.Context(), a, b, b.port()); err != nil {
		t.Fatal(err)
	}
	gbits, err := throughput(a, b, b.port(), 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if gbits <= 0 {
		t.Errorf("throughput %v Gbit/s, want more than none", gbits)
	}
	trips, err := latency(a, b, b.port(), 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if len(trips) == 0 || median(trips) <= 0 {
		t.Errorf("%d round trips of %v µs, want some", len(trips), median(trips))
	}
	rate, err := connectRate(a, b, b.port(), 20)
	if err != nil {
		t.Fatal(err)
	}
	if rate <= 0 {
		t.Errorf("%v connections per second, want more than none", rate)
	}
}

func TestMeasurementFails(t *testing.T) {
	a, b := twoPlaces(t)
	closed := netip.AddrPortFrom(b.addr, benchPort+1)
	nowhere := place{netns: "/proc/self/ns/no-such-namespace", addr: b.addr}
	tests := map[string]struct {
		to     place
		target netip.AddrPort
	}{
		"nobody listens there":       {b, closed},
		"the far end does not exist": {nowhere, b.port()},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if v, err := throughput(a, tc.to, tc.target, time.Second); err == nil {
				t.Errorf("throughput = %v without an error", v)
			}
			if v, err := latency(a, tc.to, tc.target, time.Second); err == nil {
				t.Errorf("latency = %v without an error", v)
			}
			if v, err := connectRate(a, tc.to, tc.target, 1); err == nil {
				t.Errorf("connectRate = %v without an error", v)
			}
		})
	}
}
