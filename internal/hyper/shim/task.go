package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2/stats"
	events "github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// find returns the process that a request is about.
func (s *service) find(id, execID string) (*process, error) {
	p, err := s.sandbox("")
	if err != nil {
		return nil, err
	}
	c, err := p.container(id)
	if err != nil {
		return nil, err
	}
	return c.process(execID)
}

// ask calls the guest about a process, which must not have ended.
func ask[T any](ctx context.Context, p *process, call func(context.Context, task.TTRPCTaskService) (T, error)) (T, error) {
	return askWithin(ctx, callTimeout, p, call)
}

func askWithin[T any](ctx context.Context, timeout time.Duration, p *process, call func(context.Context, task.TTRPCTaskService) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if p.ended() {
		var none T
		return none, toGRPC(fmt.Errorf("process %s has ended: %w", p.eventID(), errdefs.ErrNotFound))
	}
	answer, err := call(ctx, p.container.pod.guest.tasks)
	return answer, toGRPC(err)
}

// Create implements the Task service.
func (s *service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	p, err := s.sandbox("")
	if err != nil {
		return nil, toGRPC(refusal("this runtime is for pods: a container needs a sandbox"))
	}
	c, err := p.create(ctx, r)
	if err != nil {
		return nil, toGRPC(err)
	}
	pid := c.init.state().Pid
	s.publish("/tasks/create", &events.TaskCreate{
		ContainerID: c.id, Bundle: c.bundle, Rootfs: r.Rootfs, Pid: pid,
		IO: &events.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	return &task.CreateTaskResponse{Pid: pid}, nil
}

// Start implements the Task service.
func (s *service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	started, err := askWithin(ctx, startTimeout, p, func(ctx context.Context, guest task.TTRPCTaskService) (*task.StartResponse, error) {
		return guest.Start(ctx, &task.StartRequest{ID: r.ID, ExecID: r.ExecID})
	})
	if err != nil {
		return nil, err
	}
	p.set(tasktypes.Status_RUNNING, started.Pid)
	if r.ExecID == "" {
		s.publish("/tasks/start", &events.TaskStart{ContainerID: r.ID, Pid: started.Pid})
	} else {
		s.publish("/tasks/exec-started", &events.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: started.Pid})
		go p.container.await(p) //nolint:contextcheck // for as long as the pod lives
	}
	return started, nil
}

// Exec implements the Task service.
func (s *service) Exec(ctx context.Context, r *task.ExecProcessRequest) (_ *emptypb.Empty, err error) {
	init, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	if init.ended() {
		return nil, toGRPC(fmt.Errorf("container %s has ended: %w", r.ID, errdefs.ErrFailedPrecondition))
	}
	c := init.container
	p := newProcess(c, r.ExecID, stdio{r.Stdin, r.Stdout, r.Stderr, r.Terminal})
	c.mu.Lock()
	taken := c.execs[r.ExecID] != nil
	if !taken {
		c.execs[r.ExecID] = p
	}
	c.mu.Unlock()
	if taken {
		return nil, toGRPC(fmt.Errorf("process %s in container %s: %w", r.ExecID, r.ID, errdefs.ErrAlreadyExists))
	}
	defer func() {
		if err != nil {
			c.removeExec(p)
		}
	}()
	spec, err := execSpec(r.Spec)
	if err != nil {
		return nil, toGRPC(err)
	}
	opening, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	streams, inside, err := openStreams(opening, c.pod.guest.channel, p.stdio, r.ID+"."+r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	p.setStreams(streams)
	_, err = askWithin(ctx, startTimeout, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.Exec(ctx, &task.ExecProcessRequest{
			ID: r.ID, ExecID: r.ExecID, Spec: spec,
			Terminal: inside.terminal, Stdin: inside.stdin, Stdout: inside.stdout, Stderr: inside.stderr,
		})
	})
	if err != nil {
		return nil, err
	}
	s.publish("/tasks/exec-added", &events.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return &emptypb.Empty{}, nil
}

// execSpec is a process's specification without what means something on the node alone.
func execSpec(onNode *anypb.Any) (*anypb.Any, error) {
	var spec specs.Process
	if err := json.Unmarshal(onNode.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("specification of the process: %w", err)
	}
	spec.ApparmorProfile, spec.SelinuxLabel = "", ""
	text, err := json.Marshal(spec)
	return &anypb.Any{TypeUrl: onNode.GetTypeUrl(), Value: text}, err
}

func (c *container) removeExec(p *process) {
	c.mu.Lock()
	delete(c.execs, p.execID)
	c.mu.Unlock()
	p.closeStreams()
	p.end(killed, time.Now()) // for who waits
}

// Delete implements the Task service.
func (s *service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	c := p.container
	if state := p.state(); r.ExecID == "" && state.Status == tasktypes.Status_RUNNING {
		return nil, toGRPC(fmt.Errorf("container %s is running: %w", r.ID, errdefs.ErrFailedPrecondition))
	}
	if c.pod.ctx.Err() == nil {
		if err := p.deleteInGuest(ctx); err != nil && c.pod.ctx.Err() == nil {
			return nil, toGRPC(err)
		}
	}
	if streams := p.getStreams(); streams != nil && p.ended() {
		if err := streams.drain(c.pod.ctx); err != nil && c.pod.ctx.Err() == nil { //nolint:contextcheck // also when the caller has given up
			log.G(ctx).WithError(err).WithField("id", p.eventID()).Warn("output of a process is cut off")
		}
	}
	if r.ExecID != "" {
		c.removeExec(p)
	} else {
		p.end(killed, time.Now()) // one that was made and never started
		c.pod.forget(c)           //nolint:contextcheck // also when the caller has given up
	}
	state := p.state()
	s.publish("/tasks/delete", &events.TaskDelete{
		ContainerID: r.ID, ID: r.ExecID, Pid: state.Pid, ExitStatus: state.ExitStatus, ExitedAt: state.ExitedAt,
	})
	return &task.DeleteResponse{Pid: state.Pid, ExitStatus: state.ExitStatus, ExitedAt: state.ExitedAt}, nil
}

func (p *process) deleteInGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := p.container.pod.guest.tasks.Delete(ctx, &task.DeleteRequest{ID: p.container.id, ExecID: p.execID})
	if errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return nil
	}
	return err
}

// Kill implements the Task service.
func (s *service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	// One that was executed and has not begun has nobody who waits for its end.
	if r.Signal == uint32(unix.SIGKILL) && (r.ExecID == "" || p.state().Status == tasktypes.Status_RUNNING) {
		// A guest that does not do this, or does not even read it, would keep its pod, and all that
		// waits for its end, for ever.
		go p.mustEnd()
	}
	return ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.Kill(ctx, &task.KillRequest{ID: r.ID, ExecID: r.ExecID, Signal: r.Signal, All: r.All})
	})
}

// mustEnd ends the machine if it does not end the process.
func (p *process) mustEnd() {
	timer := time.NewTimer(killTimeout)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-p.container.pod.ctx.Done():
	case <-timer.C:
		p.container.pod.distrust("the guest does not kill process "+p.eventID(), nil)
	}
}

// Wait implements the Task service.
func (s *service) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	select {
	case <-p.done:
		state := p.state()
		return &task.WaitResponse{ExitStatus: state.ExitStatus, ExitedAt: state.ExitedAt}, nil
	case <-ctx.Done():
		return nil, toGRPC(ctx.Err())
	}
}

// State implements the Task service.
func (s *service) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return p.state(), nil
}

// Connect implements the Task service. containerd calls it for the sandbox, too, to
// see whether the shim is there.
func (s *service) Connect(_ context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	answer := &task.ConnectResponse{ShimPid: shimPID()}
	if _, err := s.sandbox(r.ID); err == nil {
		return answer, nil
	}
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	answer.TaskPid = p.state().Pid
	return answer, nil
}

// Pids implements the Task service. A sandbox is none of its containers and has no
// processes.
func (s *service) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if _, err := s.sandbox(r.ID); err == nil {
		return &task.PidsResponse{}, nil
	}
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	if p.ended() {
		return &task.PidsResponse{}, nil
	}
	return ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*task.PidsResponse, error) {
		answer, err := guest.Pids(ctx, &task.PidsRequest{ID: r.ID})
		if err != nil {
			return nil, err
		}
		for _, process := range answer.Processes {
			process.Info = nil // of whatever type the guest says
		}
		return answer, nil
	})
}

// metricsType is the one type of metrics that a guest may answer with.
const metricsType = "io.containerd.cgroups.v2.Metrics"

// checkMetrics returns a guest's metrics as what they say they are, and nothing else.
func checkMetrics(answer *anypb.Any) (*anypb.Any, error) {
	if answer.GetTypeUrl() != metricsType {
		return nil, fmt.Errorf("the guest answers with metrics of type %q", bounded(answer.GetTypeUrl()))
	}
	var metrics stats.Metrics
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(answer.GetValue(), &metrics); err != nil {
		return nil, fmt.Errorf("the guest's metrics: %w", err)
	}
	value, err := proto.Marshal(&metrics)
	return &anypb.Any{TypeUrl: metricsType, Value: value}, err
}

// Stats implements the Task service. It is answered after the end of a container, too:
// containerd looks there for an out-of-memory kill.
func (s *service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := p.container.pod.guest.tasks.Stats(ctx, &task.StatsRequest{ID: r.ID})
	if err != nil {
		return nil, toGRPC(err)
	}
	metrics, err := checkMetrics(answer.GetStats())
	if err != nil {
		return nil, toGRPC(err)
	}
	return &task.StatsResponse{Stats: metrics}, nil
}

// Pause implements the Task service.
func (s *service) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	answer, err := ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.Pause(ctx, &task.PauseRequest{ID: r.ID})
	})
	if err == nil {
		p.set(tasktypes.Status_PAUSED, 0)
		s.publish("/tasks/paused", &events.TaskPaused{ContainerID: r.ID})
	}
	return answer, err
}

// Resume implements the Task service.
func (s *service) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	answer, err := ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.Resume(ctx, &task.ResumeRequest{ID: r.ID})
	})
	if err == nil {
		p.set(tasktypes.Status_RUNNING, 0)
		s.publish("/tasks/resumed", &events.TaskResumed{ContainerID: r.ID})
	}
	return answer, err
}

// ResizePty implements the Task service.
func (s *service) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.ResizePty(ctx, r)
	})
}

// CloseIO implements the Task service. The guest learns of it by the end of the stream.
func (s *service) CloseIO(_ context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if streams := p.getStreams(); streams != nil && r.Stdin {
		streams.closeInput()
	}
	return &emptypb.Empty{}, nil
}

// Update implements the Task service.
func (s *service) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	p, err := s.find(r.ID, "")
	if err != nil {
		return nil, toGRPC(err)
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.GetResources().GetValue(), &resources); err != nil {
		return nil, toGRPC(fmt.Errorf("the container's resources: %w: %w", errdefs.ErrInvalidArgument, err))
	}
	resourcesInGuest(&resources)
	text, err := json.Marshal(resources)
	if err != nil {
		return nil, toGRPC(err)
	}
	return ask(ctx, p, func(ctx context.Context, guest task.TTRPCTaskService) (*emptypb.Empty, error) {
		return guest.Update(ctx, &task.UpdateTaskRequest{ID: r.ID, Resources: &anypb.Any{TypeUrl: r.Resources.TypeUrl, Value: text}})
	})
}

// Checkpoint implements the Task service.
func (s *service) Checkpoint(context.Context, *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, toGRPC(fmt.Errorf("checkpoint a container of a virtual machine: %w", errdefs.ErrNotImplemented))
}

// Shutdown implements the Task service. The shim stays as long as its sandbox; only for
// a sandbox that containerd has forgotten does this end it.
func (s *service) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	if p, err := s.sandbox(r.ID); err == nil && r.ID == p.id {
		if err := p.stop(ctx); err != nil {
			return nil, toGRPC(err)
		}
		s.exit()
	}
	return &emptypb.Empty{}, nil
}
