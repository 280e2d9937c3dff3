//go:build linux

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

func TestGuestSpec(t *testing.T) {
	for name, test := range map[string]struct{ spec, want string }{
		"ours win": {
			spec: `{"ociVersion":"1.2.1","root":{"path":"/host","readonly":true},"linux":{"cgroupsPath":"/host","x":1},"process":{"oomScoreAdj":5}}`,
			want: `{"linux":{"cgroupsPath":"/h8s/c","x":1},"ociVersion":"1.0.2","process":{"oomScoreAdj":5},"root":{"path":"rootfs","readonly":true}}`,
		},
		"unknown and large stay": {
			spec: `{"future":{"n":18446744073709551615}}`,
			want: `{"future":{"n":18446744073709551615},"linux":{"cgroupsPath":"/h8s/c"},"ociVersion":"1.0.2","process":{"oomScoreAdj":1},"root":{"path":"rootfs"}}`,
		},
		"no badness": {
			spec: `{"process":{"oomScoreAdj":0}}`,
			want: `{"linux":{"cgroupsPath":"/h8s/c"},"ociVersion":"1.0.2","process":{"oomScoreAdj":1},"root":{"path":"rootfs"}}`,
		},
		"no object": {spec: `{"root":1}`},
		"null":      {spec: `null`},
		"no JSON":   {spec: `{`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := newContainers(t.TempDir(), t.TempDir(), 0).guestSpec(guestapi.Container{Spec: []byte(test.spec)}, "c")
			if (err == nil) != (test.want != "") {
				t.Fatalf("error: %v", err)
			}
			if string(got) != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
		})
	}
}

// TestSeal: what was sealed runs, cannot be written, and has the seals by which crun knows
// that it need not copy itself.
func TestSeal(t *testing.T) {
	code, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "busybox")
	if err := os.WriteFile(program, code, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := seal(program); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(program, "echo", "runs").CombinedOutput(); err != nil || string(out) != "runs\n" {
		t.Errorf("run what was sealed: %v: %q", err, out)
	}
	f, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	have, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if want := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE; err != nil || have != want {
		t.Errorf("seals %#x, want %#x: %v", have, want, err)
	}
	if f, err := os.OpenFile(program, os.O_RDWR, 0); err == nil {
		defer f.Close()
		if _, err := f.WriteString("changed"); err == nil {
			t.Error("what was sealed can be written")
		}
	}
}

func TestSetSysctl(t *testing.T) {
	root := t.TempDir()
	for _, f := range []string{"net/core/somaxconn", "net/ipv4/conf/eth0.1/rp_filter"} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(f)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, file := range map[string]string{
		"net.core.somaxconn":              "net/core/somaxconn",
		"net/core/somaxconn":              "net/core/somaxconn",
		"net/ipv4/conf/eth0.1/rp_filter":  "net/ipv4/conf/eth0.1/rp_filter",
		"net.ipv4.conf.eth0/1.rp_filter":  "net/ipv4/conf/eth0.1/rp_filter",
		"/etc/passwd":                     "",
		"net/../../../../etc/passwd":      "",
		"net.core.there_is_none":          "",
		"net.core./././././etc.somaxconn": "",
	} {
		err := setSysctl(root, name, name)
		if file == "" {
			if err == nil {
				t.Errorf("%s is set", name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if data, err := os.ReadFile(filepath.Join(root, file)); string(data) != name {
			t.Errorf("%s did not reach %s: %q (%v)", name, file, data, err)
		}
	}
}

func TestFindDisk(t *testing.T) {
	block := t.TempDir()
	for disk, page := range map[string]string{"sda": "\x00\x80\x00\x05first", "sdb": "\x00\x80\x00\x08second  ", "sdc": "\x00"} {
		dir := filepath.Join(block, disk, "device")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "vpd_pg80"), []byte(page), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for serial, want := range map[string]string{"first": "sda", "second": "sdb", "third": "", "": ""} {
		if got, err := findDisk(block, serial); got != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %q (%v), want %q", serial, got, err, want)
		}
	}
}

func TestGiveToGroup(t *testing.T) {
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(filepath.Join(dir, "d"), 0o700))
	must(os.WriteFile(filepath.Join(dir, "d", "f"), nil, 0o400))
	must(os.Symlink("/etc", filepath.Join(dir, "link")))
	look := func(name string) string {
		var st unix.Stat_t
		must(unix.Lstat(filepath.Join(dir, name), &st))
		return fmt.Sprintf("%d %o", st.Gid, st.Mode&0o7777)
	}
	must(os.Chmod(dir, 0o755))
	must(giveToGroup(dir, 2000))
	for name, want := range map[string]string{".": "2000 2775", "d": "2000 2770", "d/f": "2000 660", "link": "2000 777"} {
		if got := look(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	must(os.Chmod(filepath.Join(dir, "d", "f"), 0o400))
	must(giveToGroup(dir, 2000))
	if got := look("d/f"); got != "2000 400" {
		t.Errorf("a volume that has its group already is gone through again: %s", got)
	}
}

func TestEvents(t *testing.T) {
	e := newEvents()
	e.add(guestapi.Event{OOM: "before"})
	e.add(guestapi.Event{OOM: "before"})
	ctx, cancel := context.WithCancel(t.Context())
	var heard []string
	err := e.listen(ctx, func(event guestapi.Event) error {
		heard = append(heard, event.OOM)
		switch event.OOM {
		case "before":
			e.add(guestapi.Event{OOM: "after"})
		case "after":
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if d := cmp.Diff([]string{"before", "after"}, heard); d != "" {
		t.Error(d)
	}
	for i := range 3 * maxEvents {
		id, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		e.add(guestapi.Event{OOM: string(id)})
	}
	if past, _, _ := e.from(0); len(past) != maxEvents {
		t.Errorf("%d events are remembered", len(past))
	}
}

func TestKilledForMemory(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want bool
	}{
		"none":  {"low 0\noom 3\noom_kill 0\noom_group_kill 0\n", false},
		"some":  {"low 0\noom 3\noom_kill 2\n", true},
		"empty": {"", false},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := killedForMemory(dir); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if killedForMemory(filepath.Join(t.TempDir(), "gone")) {
		t.Error("a cgroup that is gone counts a kill")
	}
}

// TestLink sets up a card of a network namespace of its own.
func TestLink(t *testing.T) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	// A veth stands for a card, which it is not taken for.
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "card"}, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lo", "peer"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	// As at boot. Nothing may be said before the link has its own address.
	card, err := netlink.LinkByName("card")
	if err != nil {
		t.Fatal(err)
	}
	l, err := raiseLinks()
	if err != nil {
		t.Fatal(err)
	}
	l.cards = []netlink.Link{card}
	if err := l.raise(card); err != nil {
		t.Fatal(err)
	}
	if none, err := netlink.AddrList(card, netlink.FAMILY_ALL); err != nil || len(none) > 0 {
		t.Errorf("addresses of the raised card: %v (%v)", none, err)
	}
	want := guestapi.Link{
		Name: "eth0", HardwareAddr: "02:00:00:00:00:17", MTU: 1400,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("fd00::3/128")},
		Routes: []guestapi.Route{
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("169.254.1.1"), OnLink: true},
			{Destination: netip.MustParsePrefix("10.9.0.0/16"), Gateway: netip.MustParseAddr("10.1.2.1")},
			{Destination: netip.MustParsePrefix("10.1.2.1/32"), ScopeLink: true},
		},
		Neighbours: []guestapi.Neighbour{{Address: netip.MustParseAddr("169.254.1.1"), HardwareAddr: "02:00:00:00:00:01"}},
	}
	for range 2 {
		if err := l.setUp(t.Context(), want); err != nil {
			t.Fatal(err)
		}
	}
	if card, err = netlink.LinkByName("eth0"); err != nil {
		t.Fatal(err)
	}
	a := card.Attrs()
	if a.HardwareAddr.String() != want.HardwareAddr || a.MTU != want.MTU || a.Flags&net.FlagUp == 0 {
		t.Errorf("the card is %+v", a)
	}
	addresses, err := netlink.AddrList(card, netlink.FAMILY_V4)
	if err != nil || len(addresses) != 1 || addresses[0].IPNet.String() != "10.1.2.3/32" {
		t.Errorf("addresses: %v (%v)", addresses, err)
	}
	// What it gives itself is of its own hardware address.
	own := []string{"fd00::3/128", "fe80::ff:fe00:17/64"}
	sixes, err := netlink.AddrList(card, netlink.FAMILY_V6)
	if err != nil || len(sixes) != len(own) {
		t.Errorf("addresses: %v (%v), want %v", sixes, err, own)
	}
	for _, six := range sixes {
		if !slices.Contains(own, six.IPNet.String()) {
			t.Errorf("address %s, want those of %v", six.IPNet, own)
		}
	}
	for destination, gateway := range map[string]string{"10.9.1.1": "10.1.2.1", "8.8.8.8": "169.254.1.1"} {
		routes, err := netlink.RouteGet(net.ParseIP(destination))
		if err != nil || len(routes) != 1 || routes[0].Gw.String() != gateway {
			t.Errorf("the way to %s: %v (%v)", destination, routes, err)
		}
	}
	neighbours, err := netlink.NeighList(a.Index, netlink.FAMILY_V4)
	if err != nil || len(neighbours) != 1 || neighbours[0].State != netlink.NUD_PERMANENT {
		t.Errorf("neighbours: %v (%v)", neighbours, err)
	}
}

func TestChooseLink(t *testing.T) {
	card := func(name, mac string) netlink.Link {
		hardware, err := net.ParseMAC(mac)
		if err != nil {
			t.Fatal(err)
		}
		return &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: hardware}}
	}
	one, two := card("one", "02:00:00:00:00:01"), card("two", "02:00:00:00:00:02")
	for name, test := range map[string]struct {
		cards []netlink.Link
		want  netlink.Link
	}{
		"by address":       {[]netlink.Link{one, two}, two},
		"the only one":     {[]netlink.Link{one}, one},
		"none":             {nil, nil},
		"two of no use":    {[]netlink.Link{one, one}, nil},
		"the only one, it": {[]netlink.Link{two}, two},
	} {
		if got := chooseLink(test.cards, two.Attrs().HardwareAddr); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
