//go:build hyper

package hyper

import (
	"bytes"
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// execInput is kubectl exec -i, as the kubelet's stream of it reaches containerd.
func (p *pod) execInput(ctx context.Context, container, input string, command ...string) (string, error) {
	r, err := p.runtime.Exec(ctx, &cri.ExecRequest{ContainerId: container, Cmd: command, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		return "", err
	}
	at, err := url.Parse(r.Url)
	if err != nil {
		return "", err
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{Host: at.Host}, "POST", at)
	if err != nil {
		return "", err
	}
	var stdout, stderr bytes.Buffer
	err = inNet(p.net, func() error {
		return executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: strings.NewReader(input), Stdout: &stdout, Stderr: &stderr})
	})
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, &stderr)
	}
	return stdout.String(), nil
}

// TestExecInput: an exec with input ends when its process does, whatever that reads of it,
// also if many are executed at once.
func TestExecInput(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("exec"))
	c := p.startContainer(p.containerConfig("main", "sleep", "1000"))
	large := strings.Repeat("x", 4<<20) // more than all buffers on the way
	t.Run("at once", func(t *testing.T) {
		for name, tt := range map[string]struct {
			input   string
			command string
			want    string
		}{
			"nothing is read to its end": {"", "cat", ""},
			"a byte is":                  {"x", "cat", "x"},
			"a document is":              {`[{"a": 1}]`, "cat", `[{"a": 1}]`},
			"much is":                    {large, "wc -c", fmt.Sprintln(len(large))},
			"of much, a byte is read":    {large, "head -c 1", "x"},
			"of much, nothing is":        {large, "true", ""},
			"of little, nothing is":      {"x", "true", ""},
			"of little, nothing is, and the process lasts": {"x", "echo it lasts; exec sleep 1 > /dev/null", "it lasts\n"},
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
				defer cancel()
				got, err := p.execInput(ctx, c, tt.input, "sh", "-c", tt.command)
				if err != nil || got != tt.want {
					t.Errorf("%.100q, %v, want %q", got, err, tt.want)
				}
			})
		}
	})
	p.remove()
	n.nothingLeft()
}
