package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	bootstrap "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerd "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// killed is the exit status of what was killed.
const killed = 128 + uint32(unix.SIGKILL)

// Register makes the shim's services known to containerd's package shim. It closes loaded when that
// has loaded them.
func Register(loaded chan<- struct{}) {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "hyper",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			stop, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			var config Config
			text, err := os.ReadFile(configFile)
			if err == nil {
				err = json.Unmarshal(text, &config)
			}
			if err != nil {
				return nil, fmt.Errorf("configuration of the shim: %w", err)
			}
			defer close(loaded)
			return newService(ic.Context, config, publisher.(containerd.Publisher), stop.(shutdown.Service)), nil
		},
	})
}

// manager starts shims, and cleans up after those that were killed. containerd runs it
// as a short-lived process in the bundle of a sandbox or, to clean up, a container.
type manager struct{ name string }

// NewManager returns the manager of a runtime type.
func NewManager(name string) containerd.Shim { return manager{name} }

// Name implements containerd's Shim.
func (m manager) Name() string { return m.name }

// Start starts the shim of a sandbox. A sandbox's containers come to its shim without
// this.
func (m manager) Start(ctx context.Context, params *bootstrap.BootstrapParams) (_ *bootstrap.BootstrapResult, err error) {
	var options runtimeoptions.Options
	if _, err := params.FindExtension(&options); err != nil {
		return nil, fmt.Errorf("options of the runtime: %w", err)
	}
	config, err := LoadConfig(options.GetConfigPath())
	if err != nil {
		return nil, err
	}
	accelerator, err := Accelerator(ctx, config)
	if err != nil {
		return nil, err
	}
	config.Accel = accelerator.Accelerator
	text, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	if err := renameio.WriteFile(configFile, text, 0o600); err != nil {
		return nil, fmt.Errorf("configuration of the shim: %w", err)
	}

	id := params.GetInstanceID()
	socketDir := params.GetSocketDir()
	if socketDir == "" {
		socketDir = filepath.Join(defaults.DefaultStateDir, "s")
	}
	address, err := containerd.CreateSocketAddress(ctx, socketDir, params.GetContainerdGrpcAddress(), id, false)
	if err != nil {
		return nil, err
	}
	socket, err := listen(address)
	if err != nil {
		return nil, fmt.Errorf("socket of the shim: %w", err)
	}
	defer socket.Close()
	defer func() {
		if err != nil {
			_ = containerd.RemoveSocket(address)
		}
	}()
	debug := params.GetLogLevel() <= bootstrap.LogLevel_LOG_LEVEL_DEBUG
	shim, err := m.spawn(ctx, id, params.GetContainerdGrpcAddress(), debug, socket)
	if err != nil {
		return nil, fmt.Errorf("start the shim: %w", err)
	}
	// Not Release: it makes the process ID -1, and this process ends soon anyway.
	if err := containerd.AdjustOOMScore(shim.Pid); err != nil {
		_ = shim.Kill()
		return nil, fmt.Errorf("OOM score of the shim: %w", err)
	}
	return &bootstrap.BootstrapResult{Version: 3, Address: address, Protocol: "ttrpc"}, nil
}

// listen makes the socket on which containerd calls a shim. One that a killed shim has
// left is replaced.
func listen(address string) (*os.File, error) {
	listener, err := containerd.NewSocket(address)
	if containerd.SocketEaddrinuse(err) {
		if containerd.CanConnect(address) {
			return nil, errors.New("a shim of this sandbox is running already")
		}
		if err := containerd.RemoveSocket(address); err != nil {
			return nil, err
		}
		listener, err = containerd.NewSocket(address)
	}
	if err != nil {
		return nil, err
	}
	listener.SetUnlinkOnClose(false)
	defer listener.Close()
	return listener.File()
}

func (manager) spawn(ctx context.Context, id, containerdAddress string, debug bool, socket *os.File) (*os.Process, error) {
	namespace, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{"-namespace", namespace, "-id", id, "-address", containerdAddress}
	if debug {
		args = append(args, "-debug")
	}
	cmd := exec.Command(self, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.ExtraFiles = []*os.File{socket}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return cmd.Process, nil
}

// Stop cleans up after a shim that is dead: containerd calls it for the sandbox and for
// each of its containers, whose own bundles hold nothing of the shim's.
func (manager) Stop(ctx context.Context, id string) (containerd.StopStatus, error) {
	status := containerd.StopStatus{ExitStatus: int(killed), ExitedAt: time.Now()}
	bundle, err := os.Getwd()
	if err != nil {
		return status, err
	}
	left, err := loadState(bundle)
	if err != nil {
		return status, fmt.Errorf("what the sandbox left: %w", err)
	}
	status.Pid = left.QEMU
	// First what needs no time: containerd gives this process some seconds.
	if left.Socket != "" {
		if gone := os.Remove(left.Socket); !errors.Is(gone, fs.ErrNotExist) {
			err = gone
		}
	}
	err = errors.Join(err, left.cleanUp())
	if err != nil {
		// containerd would not call again, and would keep the bundle.
		log.G(ctx).WithError(err).WithField("id", id).Error("clean up after a dead shim")
	}
	return status, nil
}

// Info implements containerd's Shim.
func (m manager) Info(context.Context, io.Reader) (*types.RuntimeInfo, error) {
	return &types.RuntimeInfo{Name: m.name, Version: &types.RuntimeVersion{Version: "v1"}}, nil
}
