package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMounts(t *testing.T) {
	const info = `22 27 0:21 / /proc rw,relatime - proc proc rw
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:1 master:2 - cgroup2 cgroup2 rw
51 31 0:39 / /mnt/with\040blank rw - tmpfs tmpfs rw
damaged
`
	want := []mount{{"/proc", "proc"}, {"/sys/fs/cgroup/unified", "cgroup2"}, {"/mnt/with blank", "tmpfs"}}
	if diff := cmp.Diff(want, parseMounts([]byte(info)), cmp.AllowUnexported(mount{})); diff != "" {
		t.Error(diff)
	}
}

func TestCgroup(t *testing.T) {
	ctx := testContext(t)
	top := fmt.Sprintf("/h8s-test-%d", os.Getpid())
	leaf := top + "/a/b" // unlike a cluster's, which the doctor looks for
	cleanUp(t, func(ctx context.Context) error { return removeCgroup(ctx, top) })
	for range 2 { // it may be there already
		if err := ensureCgroup(leaf); err != nil {
			t.Fatal(err)
		}
	}
	sleep := exec.Command("sleep", "1000")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	if err := joinCgroup(leaf, sleep.Process.Pid); err != nil {
		t.Fatal(err)
	}
	pids, err := cgroupProcesses(top)
	if err != nil || !slices.Equal(pids, []int{sleep.Process.Pid}) {
		t.Errorf("processes = %v, %v, want %d", pids, err, sleep.Process.Pid)
	}
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		_ = sleep.Wait()
	}()
	if err := killCgroup(ctx, top); err != nil {
		t.Fatal(err)
	}
	<-waited
	for range 2 { // removing nothing is no error
		if err := removeCgroup(ctx, top); err != nil {
			t.Fatal(err)
		}
	}
	v1, v2, err := cgroupMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, root := range append(v1, v2...) {
		if _, err := os.Stat(filepath.Join(root, top)); !os.IsNotExist(err) {
			t.Errorf("%s%s is still there: %v", root, top, err)
		}
	}
}
