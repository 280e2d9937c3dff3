package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	gvisor "gvisor.dev/gvisor/pkg/shim/v1"
	"gvisor.dev/gvisor/pkg/shim/v1/extension"
	"gvisor.dev/gvisor/pkg/shim/v1/proc"
	"gvisor.dev/gvisor/pkg/shim/v1/runsc"
	"gvisor.dev/gvisor/pkg/shim/v1/utils"
	"gvisor.dev/gvisor/runsc/specutils"
)

// service is gVisor's task service with a port forwarder beside every sandbox.
type service struct {
	extension.TaskServiceExt
}

func newService(ctx context.Context, publisher shim.Publisher, stop shutdown.Service) (*service, error) {
	inner, err := gvisor.NewShimRedirector(ctx, publisher, stop)
	if err != nil {
		return nil, err
	}
	if address, err := listenAddress(); err == nil {
		stop.RegisterCallback(func(context.Context) error { return shim.RemoveSocket(address) })
	}
	return &service{inner}, nil
}

// listenAddress is the address of the socket on which containerd calls this process: descriptor 3, by
// containerd's convention. The file that gVisor's service would remove at the end is not made known to it by
// containerd's way of starting a shim.
func listenAddress() (string, error) {
	addr, err := unix.Getsockname(3)
	if err != nil {
		return "", err
	}
	local, ok := addr.(*unix.SockaddrUnix)
	if !ok {
		return "", fmt.Errorf("descriptor 3 is a socket of type %T, not a unix socket", addr)
	}
	return "unix://" + local.Name, nil
}

// RegisterTTRPC implements shim.TTRPCService.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error { //nolint:unparam // the interface of containerd's plugins
	task.RegisterTaskService(server, s)
	if sandboxes, ok := s.TaskServiceExt.(sandbox.TTRPCSandboxService); ok {
		sandbox.RegisterTTRPCSandboxService(server, sandboxes)
	}
	return nil
}

// Create creates a container. If it is the one that makes a pod's sandbox, the pod's ports are forwarded
// until it ends; a pod whose ports cannot be forwarded runs all the same.
func (s *service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	response, err := s.TaskServiceExt.Create(ctx, r)
	if err != nil {
		return nil, err
	}
	if err := s.forwardPorts(ctx, r); err != nil {
		log.G(ctx).WithError(err).WithField("id", r.ID).Warn("kubectl port-forward will not work for this pod")
	}
	return response, nil
}

// Shutdown asks the shim to end, which it does once its last container is gone. gVisor's answer while there are
// others is no message and no error, which cannot be sent: containerd would take it for a failure to
// delete the container.
func (s *service) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	response, err := s.TaskServiceExt.Shutdown(ctx, r)
	if response == nil && err == nil {
		response = &emptypb.Empty{}
	}
	return response, err
}

func (s *service) forwardPorts(ctx context.Context, r *task.CreateTaskRequest) error {
	spec, err := utils.ReadSpec(r.Bundle)
	if err != nil {
		return fmt.Errorf("read the container's specification: %w", err)
	}
	var state runsc.State
	if err := state.Load(r.Bundle); err != nil {
		return fmt.Errorf("read the shim's state: %w", err)
	}
	netns := sandboxNetwork(spec, state.Options.RunscConfig)
	if netns == "" {
		return nil
	}
	containerdNamespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return err
	}
	root := state.Options.Root
	if root == "" {
		root = proc.RunscRoot
	}
	f, err := newForwarder(netns, sandboxControl{
		socket:    filepath.Join(root, containerdNamespace, "runsc-"+r.ID+".sock"),
		container: r.ID,
	})
	if err != nil {
		return err
	}
	go f.serve()
	go func() {
		defer f.close()
		// Returns when the sandbox has ended, or never, if this process ends first and the kernel cleans up.
		_, _ = s.TaskServiceExt.Wait(context.WithoutCancel(ctx), &task.WaitRequest{ID: r.ID})
	}()
	return nil
}

// sandboxNetwork is the path of the network namespace around the sandbox that this container makes. It is empty
// if the container joins a sandbox, if the pod uses the node's network, or if runsc is told to use the
// namespace's own network stack: then applications themselves are on its loopback.
func sandboxNetwork(spec *specs.Spec, runscConfig map[string]string) string {
	if !specutils.IsRootContainer(spec) || spec.Linux == nil {
		return ""
	}
	if network := runscConfig["network"]; network != "" && network != "sandbox" {
		return ""
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			return ns.Path
		}
	}
	return ""
}
