// Package seccomp compiles the seccomp profiles of containers on the node. The guest's
// crun would do it, too, but where TCG executes the guest that is a sixth of what the
// creation of a container takes, and half of it for a pod's second one.
package seccomp

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// filterAnnotation is where crun finds a filter that is compiled already, in base64.
	filterAnnotation = "run.oci.seccomp_bpf_data"
	// timeout bounds the compilation, which takes milliseconds.
	timeout = 10 * time.Second
	// instruction is the size of struct sock_filter, maxInstructions the kernel's
	// BPF_MAXINSNS.
	instruction, maxInstructions = 8, 4096
)

// Compile gives a specification the filter that program makes of its seccomp profile, in
// place of the profile's rules; the profile's flags stay. A filter that the specification
// came with is dropped. After an error the profile is as it was, and the guest can do it.
//
// program is hyper/seccomp-filter, which is made of the guest's crun: the filter is the one
// that it would have made. It reads a specification and writes struct sock_filter, and that
// may not change: shims of earlier releases run it, too. As with runc, which does the same on
// a node, the profile is containerd's default or a file of the node's administrator.
func Compile(ctx context.Context, program string, spec *specs.Spec) error {
	delete(spec.Annotations, filterAnnotation)
	if spec.Linux == nil || spec.Linux.Seccomp == nil {
		return nil
	}
	// A version that crun knows, whatever the specification's own is.
	input, err := json.Marshal(specs.Spec{Version: "1.0.0", Linux: &specs.Linux{Seccomp: spec.Linux.Seccomp}})
	if err != nil {
		return fmt.Errorf("seccomp profile: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var filter, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &filter, &complaint
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("compile a seccomp profile: %w: %s", err, strings.TrimSpace(complaint.String()))
	}
	if n := filter.Len(); n == 0 || n%instruction != 0 || n/instruction > maxInstructions {
		return fmt.Errorf("compile a seccomp profile: %s wrote %d bytes, which are no filter", program, n)
	}
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	spec.Annotations[filterAnnotation] = base64.StdEncoding.EncodeToString(filter.Bytes())
	// A runtime that did not heed the annotation would refuse everything.
	spec.Linux.Seccomp.DefaultAction, spec.Linux.Seccomp.DefaultErrnoRet = specs.ActErrno, nil
	spec.Linux.Seccomp.Architectures, spec.Linux.Seccomp.Syscalls = nil, nil
	return nil
}
