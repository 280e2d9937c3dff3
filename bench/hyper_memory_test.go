package main

import (
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOfPod(t *testing.T) {
	table := processTable{
		{pid: 11, parent: 10, program: "qemu-system-x86_64", cgroups: "1:cpu:/other"},
		{pid: 10, parent: 1, program: "containerd-shim-hyper-v1", args: []string{"containerd-shim-hyper-v1", "-id", "one"}, cgroups: "1:cpu:/system"},
		{pid: 20, parent: 1, program: "containerd-shim-runc-v2", args: []string{"containerd-shim-runc-v2", "-id", "two"}, cgroups: "1:cpu:/system"},
		{pid: 30, parent: 1, program: "runsc-sandbox", cgroups: "1:cpu:/kubepods/podb/x"},
		{pid: 40, parent: 1, program: "mkfs.erofs", args: []string{"mkfs.erofs", "one"}, cgroups: "1:cpu:/system"},
	}
	tests := map[string]struct {
		uid, sandbox string
		want         []int
	}{
		"shim and its children":  {"a", "one", []int{11, 10}},
		"by cgroup":              {"b", "three", []int{30}},
		"both":                   {"b", "two", []int{20, 30}},
		"the sandbox is unknown": {"a", "", nil},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var got []int
			for _, p := range table.ofPod(tc.uid, tc.sandbox) {
				got = append(got, p.pid)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("processes (-want +got)\n%s", d)
			}
		})
	}
}

func TestReadProcesses(t *testing.T) {
	table, err := readProcesses("/") // every cgroup's path has one
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(table, func(p process) bool { return p.pid == os.Getpid() })
	if i < 0 {
		t.Fatal("this process is not among them")
	}
	if table[i].parent != os.Getppid() || table[i].args[0] != os.Args[0] {
		t.Errorf("this process is %+v, its parent is %d", table[i], os.Getppid())
	}
}
