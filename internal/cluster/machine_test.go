package cluster

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestCheckDNSPort(t *testing.T) {
	tests := map[string]struct {
		udp, tcp string // where somebody listens
		want     string
	}{
		"nobody listens":                     {"", "", ""},
		"a resolver of the machine alone":    {"127.0.0.1:53", "127.0.0.1:53", ""},
		"a resolver on every address":        {"0.0.0.0:53", "0.0.0.0:53", "on every address"},
		"a resolver on every address of tcp": {"", "0.0.0.0:53", "on every address"},
		"one on another port":                {"0.0.0.0:5353", "0.0.0.0:5353", ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			inScratchNamespace(t, func(t *testing.T) {
				if lo, err := netlink.LinkByName("lo"); err != nil || netlink.LinkSetUp(lo) != nil {
					t.Errorf("set lo up: %v", err)
					return
				}
				if test.udp != "" {
					packets, err := net.ListenPacket("udp4", test.udp)
					if err != nil {
						t.Error(err)
						return
					}
					defer packets.Close()
				}
				if test.tcp != "" {
					listener, err := net.Listen("tcp4", test.tcp)
					if err != nil {
						t.Error(err)
						return
					}
					defer listener.Close()
				}
				// No link has this address, as before the first `h8s up`.
				err := checkDNSPort(t.Context(), netip.MustParseAddr("172.30.0.1"))
				if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
					t.Errorf("error = %v, want %q", err, test.want)
				}
			})
		})
	}
}

func TestCheckInotify(t *testing.T) {
	tests := map[string]struct {
		limit string
		used  int
		want  string
	}{
		"plenty":   {"128", 20, ""},
		"too few":  {"128", 100, "100 of 128"},
		"raised":   {"1024", 100, ""},
		"damaged":  {"many", 0, "many"},
		"no limit": {"", 0, "max_user_instances"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			proc := t.TempDir()
			fds := filepath.Join(proc, "7", "fd")
			for _, dir := range []string{fds, filepath.Join(proc, "sys/fs/inotify")} {
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if test.limit != "" {
				if err := os.WriteFile(filepath.Join(proc, "sys/fs/inotify/max_user_instances"), []byte(test.limit+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			for i := range test.used + 5 {
				target := "anon_inode:inotify"
				if i >= test.used {
					target = "anon_inode:[eventpoll]"
				}
				if err := os.Symlink(target, filepath.Join(fds, strings.Repeat("1", i+1))); err != nil {
					t.Fatal(err)
				}
			}
			err := checkInotify(proc)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q", err, test.want)
			}
		})
	}
}
