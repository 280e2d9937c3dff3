package main

import (
	"context"

	runc "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/pkg/shim"
	gvisor "gvisor.dev/gvisor/pkg/shim/v1"
)

// taskAPIVersion is the version of containerd's task API that gVisor's service speaks.
const taskAPIVersion = 2

// manager is gVisor's shim manager, except that shims are started the way containerd starts its own runc
// shims. gVisor's Start gives every shim the OOM score -999, which takes CAP_SYS_RESOURCE, and kills
// the shim where it may not. containerd's gives it one more than containerd has itself, which is always
// allowed: on a usual host, where containerd has -999, that is -998.
type manager struct {
	shim.Manager
	runc shim.Manager
}

func newManager(name string) shim.Manager {
	return &manager{Manager: gvisor.NewShimManager(name), runc: runc.NewShimManager(name)}
}

// Start starts a shim for a pod, or finds the one that the pod has already.
func (m *manager) Start(ctx context.Context, id string, opts shim.StartOpts) (shim.BootstrapParams, error) {
	params, err := m.runc.Start(ctx, id, opts)
	params.Version = taskAPIVersion
	return params, err
}
