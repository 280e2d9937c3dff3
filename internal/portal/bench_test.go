package portal

import (
	"net/netip"
	"runtime"
	"testing"
)

func BenchmarkPod(b *testing.B) {
	for name, timed := range map[string]struct{ attach, detach, free bool }{"attach": {attach: true}, "detach": {detach: true}, "end connections": {free: true}} {
		b.Run(name, func(b *testing.B) {
			lab := newLab(b)
			m := lab.nodes[0].m
			if err := m.Ensure(b.Context(), Spec{ID: 7, CIDR: networkCIDR, Blocks: prefixes("10.0.0.0/24")}); err != nil {
				b.Fatal(err)
			}
			a := Attachment{ContainerID: "x", IfName: "eth0", Netns: newPlace(b, "pod").path(), Address: netip.MustParseAddr("10.0.0.9")}
			stopped := false
			timer := func(run bool) {
				if run && stopped {
					b.StartTimer()
				} else if !run && !stopped {
					b.StopTimer()
				}
				stopped = !run
			}
			for b.Loop() {
				timer(timed.attach)
				if _, err := m.Attach(b.Context(), 7, a); err != nil {
					b.Fatal(err)
				}
				timer(timed.detach)
				if err := m.Detach(b.Context(), 7, a); err != nil {
					b.Fatal(err)
				}
				timer(timed.free)
				if err := m.EndConnections(b.Context(), 7, a.Address); err != nil {
					b.Fatal(err)
				}
				timer(true)
			}
		})
	}
}

// BenchmarkEnsure makes idle portals and tells what one costs in memory of the process.
func BenchmarkEnsure(b *testing.B) {
	for name, again := range map[string]bool{"new": false, "unchanged": true} {
		b.Run(name, func(b *testing.B) {
			m := newLab(b).nodes[0].m
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			id := int32(0)
			for b.Loop() {
				if id++; again {
					id = 1
				}
				s := Spec{ID: id, CIDR: networkCIDR, Blocks: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(id >> 4), byte(id << 4)}), 28)}, ServiceCIDRs: []netip.Prefix{serviceCIDR}}
				if err := m.Ensure(b.Context(), s); err != nil {
					b.Fatal(err)
				}
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(int64(after.HeapInuse+after.StackInuse)-int64(before.HeapInuse+before.StackInuse))/float64(id), "heap+stack-B/portal")
		})
	}
}
