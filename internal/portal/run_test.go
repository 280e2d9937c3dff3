package portal

import (
	"fmt"
	"os/exec"

	"github.com/vishvananda/netns"
)

// run runs a program in ns and returns what it printed.
func run(ns netns.NsHandle, program string, args ...string) (string, error) {
	var out []byte
	err := inNetns(ns, func() (err error) {
		out, err = exec.Command(program, args...).CombinedOutput()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s %q: %w: %s", program, args, err, out)
	}
	return string(out), err
}
