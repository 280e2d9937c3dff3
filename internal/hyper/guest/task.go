//go:build linux

package guest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	eventing "github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// namespace is containerd's, of which a guest needs one. crun keeps its state under
// it in /run/containerd/runc.
const namespace = "h8s"

// newTasks serves containerd's Task service to all streams that its handle is given.
func newTasks(ctx context.Context, e *eventLog, p *pipes) (*streams, error) {
	ctx, sd := shutdown.WithShutdown(namespaces.WithNamespace(ctx, namespace))
	inner, err := task.NewTaskService(ctx, publisher{e}, sd)
	if err != nil {
		return nil, fmt.Errorf("task service: %w", err)
	}
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(
		func(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
			return method(namespaces.WithNamespace(ctx, namespace), unmarshal)
		}))
	if err != nil {
		return nil, fmt.Errorf("task service: %w", err)
	}
	taskapi.RegisterTTRPCTaskService(server, &tasks{TTRPCTaskService: inner, events: e, pipes: p})
	listener := newStreams()
	go func() {
		// It ends with the listener, which nobody closes.
		if err := server.Serve(ctx, listener); err != nil {
			fmt.Fprintln(os.Stderr, "hyperinit: task service:", err)
		}
	}()
	return listener, nil
}

// tasks is containerd's service less what only a host has.
type tasks struct {
	taskapi.TTRPCTaskService
	events *eventLog
	pipes  *pipes
}

// Create makes a container from the bundle that PUT /v1/containers made. The host's
// paths and options mean nothing here.
func (t *tasks) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	r.Bundle = filepath.Join(guestapi.BundleDir, filepath.Base(r.ID))
	options, err := anypb.New(&runcoptions.Options{BinaryName: guestapi.Runtime})
	if err != nil {
		return nil, err
	}
	r.Rootfs, r.Options = nil, options
	answer, err := t.TTRPCTaskService.Create(ctx, r)
	if err == nil {
		t.closeAfter(r.Stdin, &taskapi.CloseIORequest{ID: r.ID, Stdin: true}) //nolint:contextcheck // for as long as the input lasts
	}
	return answer, err
}

// Exec adds a process, whose input ends with its stream.
func (t *tasks) Exec(ctx context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	answer, err := t.TTRPCTaskService.Exec(ctx, r)
	if err == nil {
		t.closeAfter(r.Stdin, &taskapi.CloseIORequest{ID: r.ID, ExecID: r.ExecID, Stdin: true}) //nolint:contextcheck // for as long as the input lasts
	}
	return answer, err
}

// closeAfter closes the writer that containerd's service has of a process's input when the
// host's has written all. Before the FIFO has its reader, that would throw the input away,
// and its end: containerd closes what it has not opened yet by being a reader for a moment,
// which the host's writer takes for the process's.
func (t *tasks) closeAfter(stdin string, r *taskapi.CloseIORequest) {
	written := t.pipes.written(stdin)
	if written == nil {
		return
	}
	go func() {
		<-written
		// A process that is gone has closed it.
		_, _ = t.TTRPCTaskService.CloseIO(context.Background(), r)
	}()
}

// CloseIO does nothing: an input ends with its stream.
func (t *tasks) CloseIO(context.Context, *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Wait answers when the process has ended, and, if it was its container's first one
// and the kernel had killed in it for want of memory, after that was told as an Event.
func (t *tasks) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	w, err := t.TTRPCTaskService.Wait(ctx, r)
	if err == nil && r.ExecID == "" && killedForMemory(filepath.Join(cgroupRoot, podCgroup, filepath.Base(r.ID))) {
		t.events.add(guestapi.Event{OOM: r.ID})
	}
	return w, err
}

// Shutdown does nothing: the machine ends by POST /v1/shutdown.
func (t *tasks) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// killedForMemory reports whether memory.events of a cgroup counts a kill. A cgroup
// that is gone, or cannot be read, counts none.
func killedForMemory(cgroup string) bool {
	f, err := os.Open(filepath.Join(cgroup, "memory.events"))
	if err != nil {
		return false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if n, ok := strings.CutPrefix(lines.Text(), "oom_kill "); ok {
			return n != "0"
		}
	}
	return false
}

// publisher turns the Task service's events of memory into ours, and drops the others:
// the host knows what it asked for, and waits for exits.
type publisher struct{ events *eventLog }

// Publish implements containerd's events.Publisher.
func (p publisher) Publish(_ context.Context, _ string, event eventing.Event) error {
	if oom, ok := event.(*events.TaskOOM); ok {
		p.events.add(guestapi.Event{OOM: oom.ContainerID})
	}
	return nil
}

// Close implements io.Closer.
func (publisher) Close() error { return nil }
