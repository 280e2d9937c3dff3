package vm

import (
	"io"
	"path/filepath"
	"strings"
	"testing"
)

func TestUsers(t *testing.T) {
	u := Users{First: 1000, Count: 3, File: filepath.Join(t.TempDir(), "not/yet/users")}
	taken := map[uint32]io.Closer{}
	for range u.Count {
		id, giveBack, err := u.take()
		if err != nil {
			t.Fatal(err)
		}
		if id < 1000 || id > 1002 || taken[id] != nil {
			t.Fatalf("user %d beside %v", id, taken)
		}
		taken[id] = giveBack
	}
	if id, _, err := u.take(); err == nil {
		t.Fatalf("there is a fourth: %d", id)
	} else if !strings.Contains(err.Error(), "larger range") {
		t.Error(err)
	}
	if err := taken[1001].Close(); err != nil {
		t.Fatal(err)
	}
	id, giveBack, err := u.take()
	if err != nil || id != 1001 {
		t.Fatalf("user %d (%v), want the one that was given back", id, err)
	}
	giveBack.Close()
	taken[1000].Close()
	taken[1002].Close()
}

func TestUsersRange(t *testing.T) {
	for name, tt := range map[string]struct {
		first, count uint32
		ok           bool
	}{
		"default":          {0, 0, true},
		"the highest":      {1<<32 - 3, 2, true},
		"the invalid user": {1<<32 - 2, 2, false},
		"beyond the end":   {1<<32 - 2, 100, false},
	} {
		t.Run(name, func(t *testing.T) {
			u := Users{First: tt.first, Count: tt.count, File: filepath.Join(t.TempDir(), "users")}
			id, giveBack, err := u.take()
			if (err == nil) != tt.ok {
				t.Fatalf("user %d, %v", id, err)
			}
			if err == nil {
				giveBack.Close()
			}
		})
	}
}
