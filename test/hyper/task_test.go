//go:build hyper

package hyper

import (
	"bufio"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestTerminal speaks to the shim as containerd does for kubectl exec -it: a terminal
// that is resized, and ^C.
func TestTerminal(t *testing.T) {
	n := newNode(t)
	p := n.run(n.podConfig("terminal"))
	c := p.startContainer(p.containerConfig("main", "sleep", "1000"))

	sockets, err := filepath.Glob(n.path("s/*"))
	must(t, err)
	conn, err := net.Dial("unix", sockets[0])
	must(t, err)
	client := ttrpc.NewClient(conn)
	defer client.Close()
	tasks := task.NewTTRPCTaskClient(client)

	text, err := os.ReadFile(n.path("state/io.containerd.runtime.v2.task/k8s.io", c, "config.json"))
	must(t, err)
	var spec specs.Spec
	must(t, json.Unmarshal(text, &spec))
	spec.Process.Args, spec.Process.Terminal = []string{"sh"}, true
	process, err := json.Marshal(spec.Process)
	must(t, err)
	stdin, stdout := n.path("stdin"), n.path("stdout")
	must(t, syscall.Mkfifo(stdin, 0o600))
	must(t, syscall.Mkfifo(stdout, 0o600))
	out, err := os.OpenFile(stdout, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	must(t, err)
	defer out.Close()
	must(t, out.SetReadDeadline(time.Now().Add(testTimeout)))

	ctx := t.Context()
	_, err = tasks.Exec(ctx, &task.ExecProcessRequest{
		ID: c, ExecID: "shell", Terminal: true, Stdin: stdin, Stdout: stdout,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: process},
	})
	must(t, err)
	_, err = tasks.Start(ctx, &task.StartRequest{ID: c, ExecID: "shell"})
	must(t, err)
	in, err := os.OpenFile(stdin, os.O_WRONLY, 0)
	must(t, err)
	defer in.Close()
	_, err = tasks.ResizePty(ctx, &task.ResizePtyRequest{ID: c, ExecID: "shell", Width: 111, Height: 33})
	must(t, err)

	lines := bufio.NewScanner(out)
	expect := func(input, want string) {
		t.Helper()
		_, err := in.WriteString(input)
		must(t, err)
		for lines.Scan() {
			if strings.Contains(lines.Text(), want) {
				return
			}
		}
		t.Fatalf("no %q on the terminal: %v", want, lines.Err())
	}
	expect("stty size; echo si''ze\n", "33 111")
	expect("trap 'echo inter''rupted; exit 5' INT; echo rea''dy; while :; do sleep 0.1; done\n", "ready")
	expect("\x03", "rupted")
	end, err := tasks.Wait(ctx, &task.WaitRequest{ID: c, ExecID: "shell"})
	must(t, err)
	if end.ExitStatus != 5 {
		t.Errorf("exit status %d, want 5", end.ExitStatus)
	}
	for lines.Scan() { // to its end, which comes with the process's
	}
	must(t, lines.Err())
	_, err = tasks.Delete(ctx, &task.DeleteRequest{ID: c, ExecID: "shell"})
	must(t, err)
	p.remove()
	n.nothingLeft()
}
