// Command containerd-shim-hyper-v1 is the containerd shim whose pods are virtual
// machines: runtime type io.containerd.hyper.v1, with sandboxer = "shim".
package main

import (
	"context"

	containerd "github.com/containerd/containerd/v2/pkg/shim"

	"h8s.io/hypernetes/internal/hyper/shim"
)

func main() {
	shim.Register()
	containerd.RunShim(context.Background(), shim.NewManager("io.containerd.hyper.v1"), func(c *containerd.Config) {
		// The children are QEMU and mkfs.erofs, which their parents in this process wait for.
		c.NoReaper, c.NoSubreaper = true, true
	})
}
