// h8s-cni is the CNI plugin that the container runtime executes for every pod. It
// asks the node agent h8s-node, and runs the default network's plugins for pods
// that are no tenant's.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"h8s.io/hypernetes/internal/cni"
)

func main() {
	plugin := cni.Plugin{Stdout: os.Stdout}
	skel.PluginMainFuncs(plugin.Funcs(), cni.Versions, "h8s-cni: the CNI plugin of Hypernetes")
}
