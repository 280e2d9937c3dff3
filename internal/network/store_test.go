package network

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func record(id string) Attachment {
	return Attachment{
		ContainerID: id, IfName: "eth0", Netns: "/run/netns/" + id,
		Network: "acme", NetworkID: 7, CIDR: netip.MustParsePrefix("10.0.0.0/16"), Address: netip.MustParseAddr("10.0.0.5"),
		Namespace: "shop", Pod: "web", PodUID: "u-" + id, Created: time.Unix(1000, 0).UTC(),
	}
}

var compareAddr = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func TestStore(t *testing.T) {
	dir := t.TempDir()
	store, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"c1", "c2", "c3"} {
		if err := store.Put(record(id)); err != nil {
			t.Fatal(err)
		}
	}
	changed := record("c2")
	changed.Address = netip.MustParseAddr("10.0.0.6")
	if err := store.Put(changed); err != nil {
		t.Fatal(err)
	}
	for range 2 { // deleting twice is no error
		if err := store.Delete("c3", "eth0"); err != nil {
			t.Fatal(err)
		}
	}
	// What a crash in the middle of Put leaves behind.
	torn := filepath.Join(dir, ".c4-eth0.json123")
	if err := os.WriteFile(torn, []byte(`{"containerID":`), 0o600); err != nil {
		t.Fatal(err)
	}

	store, err = OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := store.Load()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Attachment{record("c1"), changed}, got, compareAddr); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(torn); !os.IsNotExist(err) {
		t.Errorf("the torn file is still there: %v", err)
	}
}

func TestStoreDamaged(t *testing.T) {
	for name, content := range map[string]string{
		"empty":          "",
		"cut":            `{"containerID":"c1","ifName":"eth0","addr`,
		"another's":      `{"containerID":"c2","ifName":"eth0","address":"10.0.0.5"}`,
		"no address":     `{"containerID":"c1","ifName":"eth0","cidr":"10.0.0.0/16"}`,
		"no CIDR":        `{"containerID":"c1","ifName":"eth0","address":"10.0.0.5"}`,
		"not an address": `{"containerID":"c1","ifName":"eth0","address":"x"}`,
	} {
		t.Run(name, func(t *testing.T) {
			store, err := OpenStore(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(store.dir, "c1-eth0.json")
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := store.Load(); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want an error that names the file", err)
			}
		})
	}
}

func TestStoreRefusesNames(t *testing.T) {
	store, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, key := range map[string][2]string{
		"no container":        {"", "eth0"},
		"no interface":        {"c1", ""},
		"path in container":   {"../c1", "eth0"},
		"path in interface":   {"c1", "../x"},
		"dots":                {"..", "eth0"},
		"interface too long":  {"c1", "eth0123456789abcd"},
		"container too long":  {strings.Repeat("c", 201), "eth0"},
		"blank in interface":  {"c1", "eth 0"},
		"newline in the name": {"c1\n", "eth0"},
	} {
		t.Run(name, func(t *testing.T) {
			a := record(key[0])
			a.IfName = key[1]
			if err := store.Put(a); err == nil {
				t.Error("Put succeeded")
			}
			if err := store.Delete(key[0], key[1]); err == nil {
				t.Error("Delete succeeded")
			}
		})
	}
}
