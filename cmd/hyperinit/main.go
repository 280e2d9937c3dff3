// Command hyperinit is PID 1 of a pod's virtual machine. See package guest.
package main

import (
	"fmt"
	"os"

	"h8s.io/hypernetes/internal/hyper/guest"
)

func main() {
	// When PID 1 ends the kernel panics, and the machine ends with it.
	fmt.Fprintln(os.Stderr, "hyperinit:", guest.Run())
	os.Exit(1)
}
