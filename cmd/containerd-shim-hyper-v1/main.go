// Command containerd-shim-hyper-v1 is the containerd shim whose pods are virtual
// machines: runtime type io.containerd.hyper.v1, with sandboxer = "shim".
package main

import (
	"context"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/pkg/shim"

	"h8s.io/hypernetes/internal/hyper/shim"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "probe" {
		if err := probe(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "containerd-shim-hyper-v1:", err)
			os.Exit(1)
		}
		return
	}
	loaded := make(chan struct{})
	shim.EndUnserved(loaded)
	shim.Register(loaded)
	containerd.RunShim(context.Background(), shim.NewManager("io.containerd.hyper.v1"), func(c *containerd.Config) {
		// The children are QEMU, mkfs.erofs and seccomp-filter, which their parents in this process wait for.
		c.NoReaper, c.NoSubreaper = true, true
	})
}

// probe is for who sets a node up: what will execute the guests here, and why? It also
// records the answer, so that the node agent can label the node before its first pod.
func probe(args []string) error {
	var path string
	switch len(args) {
	case 0:
	case 1:
		path = args[0]
	default:
		return fmt.Errorf("usage: probe [FILE], where FILE is the runtime's configuration (default: %s)", shim.DefaultConfigPath)
	}
	config, err := shim.LoadConfig(path)
	if err != nil {
		return err
	}
	choice, err := shim.Accelerator(context.Background(), config)
	if err != nil {
		return err
	}
	fmt.Printf("%s: %s\n", choice.Accelerator, choice.Reason)
	return nil
}
