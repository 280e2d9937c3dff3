package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	sandbox "github.com/containerd/containerd/api/runtime/sandbox/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerd "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// replyGrace is what the answer to ShutdownSandbox has to reach containerd before the
// process ends.
const replyGrace = 200 * time.Millisecond

// bundleInterval is how often a shim looks whether its bundle is still there.
const bundleInterval = 5 * time.Second

// service is containerd's Sandbox service, for the one sandbox that a shim has, and,
// for the containers in it, the Task service.
type service struct {
	config    Config
	namespace string
	events    chan topical
	stop      shutdown.Service
	socket    string // on which containerd calls this process

	mu  sync.Mutex
	pod *pod
}

type topical struct {
	topic string
	event any
}

var (
	_ sandbox.TTRPCSandboxService = (*service)(nil)
	_ task.TTRPCTaskService       = (*service)(nil)
)

func newService(ctx context.Context, config Config, publisher containerd.Publisher, stop shutdown.Service) *service {
	namespace, _ := namespaces.Namespace(ctx)
	s := &service{config: config, namespace: namespace, events: make(chan topical, 256), stop: stop}
	go func() { //nolint:contextcheck // for as long as the process lives
		for e := range s.events {
			ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), namespace), callTimeout)
			if err := publisher.Publish(ctx, e.topic, e.event); err != nil {
				log.L.WithError(err).WithField("topic", e.topic).Warn("publish an event; it is tried again")
			}
			cancel()
		}
	}()
	go endWithBundle(stop.Done(), bundleInterval, stop.Shutdown)
	// Package shim removes the socket, too, but finds it by the bundle, which containerd has
	// removed by then.
	if address, err := listenAddress(); err == nil {
		s.socket = address
		stop.RegisterCallback(func(context.Context) error {
			_ = os.Remove(address)
			return nil
		})
	}
	stop.RegisterCallback(func(ctx context.Context) error {
		// A shim that is told to end (SIGTERM) takes its machine with it.
		if p, err := s.sandbox(""); err == nil {
			return p.stop(ctx)
		}
		return nil
	})
	return s
}

// endWithBundle calls end when the directory in which the process runs has been removed:
// the bundle, which containerd removes when it has done with a sandbox. It does not always
// tell the shim first: where a call to start a sandbox is cancelled (the kubelet was killed),
// those that should end the shim are cancelled with it.
func endWithBundle(done <-chan struct{}, every time.Duration, end func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			var bundle unix.Stat_t
			if err := unix.Stat(".", &bundle); err == nil && bundle.Nlink == 0 {
				log.L.Warn("containerd has removed the bundle and told nobody: the shim ends")
				end()
				return
			}
		}
	}
}

// EndUnserved ends the process when its bundle has been removed before loaded is closed, which is
// for Register to tell. Package shim of containerd waits for containerd to read the shim's log before
// it loads the service, and would wait for ever for a containerd that was killed meanwhile: the next
// one knows nothing of the sandbox, and removes the bundle alone. Processes that serve no sandbox
// are left in peace: containerd runs this program for other things, too.
func EndUnserved(loaded <-chan struct{}) {
	socket, err := listenAddress()
	if err != nil {
		return
	}
	go endWithBundle(loaded, bundleInterval, func() {
		_ = os.Remove(socket)
		os.Exit(1)
	})
}

// listenAddress is the path of the socket on which containerd calls this process:
// descriptor 3, by containerd's convention. That is so until package shim listens: it makes
// another descriptor of this one, and a garbage collection closes it.
func listenAddress() (string, error) {
	address, err := unix.Getsockname(3)
	if err != nil {
		return "", os.NewSyscallError("getsockname", err)
	}
	local, ok := address.(*unix.SockaddrUnix)
	if !ok {
		return "", fmt.Errorf("descriptor 3 is a socket of type %T, not a unix socket", address)
	}
	return local.Name, nil
}

// RegisterTTRPC implements containerd's TTRPCService.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	sandbox.RegisterTTRPCSandboxService(server, s)
	task.RegisterTTRPCTaskService(server, s)
	return nil
}

func (s *service) publish(topic string, event any) { s.events <- topical{topic, event} }

// sandbox returns the sandbox, if its ID is id, or id is empty.
func (s *service) sandbox(id string) (*pod, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod == nil || (id != "" && s.pod.id != id) {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	return s.pod, nil
}

// CreateSandbox implements the Sandbox service.
func (s *service) CreateSandbox(ctx context.Context, r *sandbox.CreateSandboxRequest) (*sandbox.CreateSandboxResponse, error) {
	config := &cri.PodSandboxConfig{}
	if r.Options == nil {
		return nil, toGRPC(refusal("this runtime is for pods: its sandboxes are made by the CRI"))
	}
	if err := proto.Unmarshal(r.Options.Value, config); err != nil {
		return nil, toGRPC(fmt.Errorf("the sandbox's options are not the configuration of a pod: %w", err))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pod != nil {
		return nil, toGRPC(fmt.Errorf("sandbox %s: %w", s.pod.id, errdefs.ErrAlreadyExists))
	}
	p, err := newPod(r.SandboxID, config, r.NetnsPath, s.config, r.BundlePath, s.publish)
	if err != nil {
		return nil, toGRPC(err)
	}
	p.left.Socket = s.socket
	s.pod = p
	return &sandbox.CreateSandboxResponse{}, nil
}

// StartSandbox implements the Sandbox service.
func (s *service) StartSandbox(ctx context.Context, r *sandbox.StartSandboxRequest) (*sandbox.StartSandboxResponse, error) {
	p, err := s.sandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := p.start(ctx); err != nil {
		return nil, toGRPC(err)
	}
	return &sandbox.StartSandboxResponse{Pid: uint32(p.vm.Pid()), CreatedAt: timestamppb.New(p.created)}, nil
}

// Platform implements the Sandbox service.
func (s *service) Platform(context.Context, *sandbox.PlatformRequest) (*sandbox.PlatformResponse, error) {
	return &sandbox.PlatformResponse{Platform: &types.Platform{OS: "linux", Architecture: runtime.GOARCH}}, nil
}

// StopSandbox implements the Sandbox service.
func (s *service) StopSandbox(ctx context.Context, r *sandbox.StopSandboxRequest) (*sandbox.StopSandboxResponse, error) {
	p, err := s.sandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &sandbox.StopSandboxResponse{}, toGRPC(p.stop(ctx))
}

// WaitSandbox implements the Sandbox service.
func (s *service) WaitSandbox(ctx context.Context, r *sandbox.WaitSandboxRequest) (*sandbox.WaitSandboxResponse, error) {
	p, err := s.sandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	select {
	case <-p.finished:
	case <-ctx.Done():
		return nil, toGRPC(ctx.Err())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return &sandbox.WaitSandboxResponse{ExitStatus: p.exitStatus, ExitedAt: timestamppb.New(p.exited)}, nil
}

// SandboxStatus implements the Sandbox service.
func (s *service) SandboxStatus(_ context.Context, r *sandbox.SandboxStatusRequest) (*sandbox.SandboxStatusResponse, error) {
	p, err := s.sandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	status := &sandbox.SandboxStatusResponse{SandboxID: p.id, State: cri.PodSandboxState_SANDBOX_NOTREADY.String()}
	if !p.created.IsZero() {
		status.CreatedAt = timestamppb.New(p.created)
	}
	switch p.phase {
	case ready:
		status.State = cri.PodSandboxState_SANDBOX_READY.String()
		status.Pid = uint32(p.vm.Pid())
	case ended:
		status.ExitedAt = timestamppb.New(p.exited)
	}
	if r.Verbose {
		info, err := json.Marshal(map[string]any{"pid": status.Pid, "sandboxConfig": p.config})
		if err != nil {
			return nil, toGRPC(err)
		}
		status.Info = map[string]string{"info": string(info)}
	}
	return status, nil
}

// PingSandbox implements the Sandbox service.
func (s *service) PingSandbox(_ context.Context, r *sandbox.PingRequest) (*sandbox.PingResponse, error) {
	_, err := s.sandbox(r.SandboxID)
	return &sandbox.PingResponse{}, toGRPC(err)
}

// ShutdownSandbox implements the Sandbox service: it ends the shim.
func (s *service) ShutdownSandbox(ctx context.Context, r *sandbox.ShutdownSandboxRequest) (*sandbox.ShutdownSandboxResponse, error) {
	if p, err := s.sandbox(r.SandboxID); err == nil {
		if err := p.stop(ctx); err != nil {
			return nil, toGRPC(err)
		}
	}
	s.exit()
	return &sandbox.ShutdownSandboxResponse{}, nil
}

func (s *service) exit() { time.AfterFunc(replyGrace, s.stop.Shutdown) }

// SandboxMetrics implements the Sandbox service. The pod's metrics are QEMU's, as the
// node pays for them.
func (s *service) SandboxMetrics(_ context.Context, r *sandbox.SandboxMetricsRequest) (*sandbox.SandboxMetricsResponse, error) {
	p, err := s.sandbox(r.SandboxID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if p.left.Cgroup == "" {
		return nil, toGRPC(fmt.Errorf("the pod has no cgroup: %w", errdefs.ErrUnavailable))
	}
	metrics, err := cgroupMetrics(p.left.Cgroup)
	if err != nil {
		return nil, toGRPC(err)
	}
	data, err := typeurl.MarshalAnyToProto(metrics)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &sandbox.SandboxMetricsResponse{Metrics: &types.Metric{ID: p.id, Timestamp: timestamppb.Now(), Data: data}}, nil
}

// UpdateSandbox implements the Sandbox service.
func (s *service) UpdateSandbox(context.Context, *sandbox.UpdateSandboxRequest) (*sandbox.UpdateSandboxResponse, error) {
	return nil, toGRPC(fmt.Errorf("a virtual machine keeps its size: %w", errdefs.ErrNotImplemented))
}

// toGRPC makes an error one that containerd understands. The guest's own errors
// already are.
func toGRPC(err error) error {
	if r := refusal(""); errors.As(err, &r) {
		return errgrpc.ToGRPC(fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err))
	}
	return errgrpc.ToGRPC(err)
}

// shimPID is what containerd calls the shim's process ID.
func shimPID() uint32 { return uint32(os.Getpid()) }
