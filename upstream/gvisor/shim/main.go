// Command containerd-shim-runsc-v1 is gVisor's containerd shim, built from gVisor's own packages, with three
// differences: it starts on hosts without CAP_SYS_RESOURCE (manager.go); connections to the loopback
// address of a pod's network namespace reach the pod, as kubectl port-forward needs; and one of a pod's
// containers can be deleted before the others (service.go). docs/decisions/0002-gvisor-shim.md says why.
package main

import (
	"context"

	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
)

func main() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			stop, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			return newService(ic.Context, publisher.(shim.Publisher), stop.(shutdown.Service))
		},
	})
	shim.Run(context.Background(), newManager("io.containerd.runsc.v1"))
}
