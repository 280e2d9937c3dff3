package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	events "github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/layers"
	"h8s.io/hypernetes/internal/hyper/seccomp"
)

const (
	// createTimeout bounds the making of a container, which includes the images of layers that
	// the node does not have yet.
	createTimeout = 4 * time.Minute
	// killTimeout is how long the guest may take until a process that was killed has
	// ended.
	killTimeout = 30 * time.Second
)

// process is a container's first process, or one that was executed in it.
type process struct {
	container *container
	execID    string // empty: the first
	stdio     stdio

	mu      sync.Mutex
	streams *streams
	pid     uint32 // in the guest
	status  tasktypes.Status
	exit    uint32
	at      time.Time
	done    chan struct{} // closed when it has ended
}

func newProcess(c *container, execID string, node stdio) *process {
	return &process{container: c, execID: execID, stdio: node, status: tasktypes.Status_CREATED, done: make(chan struct{})}
}

// end records the end, and reports whether it was not on record yet.
func (p *process) end(status uint32, at time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.status == tasktypes.Status_STOPPED {
		return false
	}
	p.status, p.exit, p.at = tasktypes.Status_STOPPED, status, at
	close(p.done)
	return true
}

func (p *process) set(status tasktypes.Status, pid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pid != 0 {
		p.pid = pid
	}
	if p.status != tasktypes.Status_STOPPED {
		p.status = status
	}
}

func (p *process) setStreams(s *streams) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.streams = s
}

func (p *process) getStreams() *streams {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.streams
}

func (p *process) closeStreams() {
	if s := p.getStreams(); s != nil {
		s.close()
	}
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) state() *task.StateResponse {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &task.StateResponse{
		ID: p.container.id, ExecID: p.execID, Bundle: p.container.bundle, Pid: p.pid, Status: p.status,
		Stdin: p.stdio.stdin, Stdout: p.stdio.stdout, Stderr: p.stdio.stderr, Terminal: p.stdio.terminal,
		ExitStatus: p.exit,
	}
	if !p.at.IsZero() {
		s.ExitedAt = timestamppb.New(p.at)
	}
	return s
}

// eventID is the process's ID in events, where a container's first process has the
// container's.
func (p *process) eventID() string {
	if p.execID == "" {
		return p.container.id
	}
	return p.execID
}

func (p *process) exitEvent() *events.TaskExit {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &events.TaskExit{
		ContainerID: p.container.id, ID: p.eventID(), Pid: p.pid, ExitStatus: p.exit, ExitedAt: timestamppb.New(p.at),
	}
}

// container is a container in the machine.
type container struct {
	id      string
	bundle  string // on the node
	pod     *pod
	init    *process
	reports []report
	oom     sync.Once // it is published that memory was wanting

	mu    sync.Mutex
	execs map[string]*process
}

// report is a file of the guest whose content a file of the node gets at the end.
type report struct{ guest, node string }

func (p *pod) container(id string) (*container, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.containers[id]
	if c == nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("process %s in container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*process, 0, len(c.execs)+1)
	for _, p := range c.execs {
		all = append(all, p)
	}
	return append(all, c.init)
}

// end records that the machine has taken all of the container's processes with it.
func (c *container) end(at time.Time) {
	for _, p := range c.processes() {
		if p.end(killed, at) {
			c.pod.publish("/tasks/exit", p.exitEvent())
		}
		p.closeStreams()
	}
}

// create makes a container of a bundle: its disks, its volumes, its streams, and its first
// process, which waits to be started.
func (p *pod) create(ctx context.Context, r *task.CreateTaskRequest) (_ *container, err error) {
	ctx, cancel := context.WithTimeout(ctx, createTimeout)
	defer cancel()
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("restore a container from a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	c := &container{id: r.ID, bundle: r.Bundle, pod: p, execs: map[string]*process{}}
	c.init = newProcess(c, "", stdio{r.Stdin, r.Stdout, r.Stderr, r.Terminal})
	p.mu.Lock()
	switch {
	case p.phase != ready:
		err = fmt.Errorf("the pod's virtual machine does not run: %w", errdefs.ErrFailedPrecondition)
	case p.containers[c.id] != nil:
		err = fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
	default:
		p.containers[c.id] = c
	}
	p.mu.Unlock()
	if err != nil {
		return nil, err
	}
	defer func() { //nolint:contextcheck // also when the caller has given up
		if err != nil {
			p.forget(c)
		}
	}()

	spec, err := readSpec(c.bundle)
	if err != nil {
		return nil, err
	}
	asked := takeDevices(spec)
	if err := inGuest(spec, p.sharesPID()); err != nil {
		return nil, err
	}
	if err := seccomp.Compile(ctx, p.settings.SeccompFilter, spec); err != nil {
		log.L.WithError(err).WithField("id", c.id).Warn("the guest compiles the seccomp profile itself, which takes longer")
	}
	if err := p.mount(ctx, c, spec); err != nil {
		return nil, err
	}
	devices, err := p.attachDevices(ctx, c, asked)
	if err != nil {
		return nil, err
	}
	dirs, err := layers.Directories(r.Rootfs)
	if err != nil {
		return nil, err
	}
	serials, err := p.attachLayers(ctx, c, dirs)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	if err := p.guest.call(ctx, http.MethodPut, "/v1/containers/"+c.id, guestapi.Container{Spec: text, Layers: serials, Devices: devices}); err != nil {
		return nil, err
	}
	streams, inside, err := openStreams(ctx, p.guest.channel, c.init.stdio, c.id)
	if err != nil {
		return nil, err
	}
	c.init.setStreams(streams)
	created, err := p.guest.tasks.Create(ctx, &task.CreateTaskRequest{
		ID: c.id, Bundle: filepath.Join(guestapi.BundleDir, c.id),
		Terminal: inside.terminal, Stdin: inside.stdin, Stdout: inside.stdout, Stderr: inside.stderr,
	})
	if err != nil {
		return nil, err
	}
	c.init.set(tasktypes.Status_CREATED, created.Pid)
	go c.await(c.init) //nolint:contextcheck // for as long as the pod lives
	return c, nil
}

// forget undoes what create has done so far.
func (p *pod) forget(c *container) {
	p.mu.Lock()
	delete(p.containers, c.id)
	p.mu.Unlock()
	c.init.closeStreams()
	ctx, cancel := context.WithTimeout(p.ctx, callTimeout)
	defer cancel()
	if err := p.guest.send(ctx, http.MethodDelete, "/v1/containers/"+c.id, nil); err != nil && p.ctx.Err() == nil {
		log.L.WithError(err).WithField("id", c.id).Warn("remove a container's bundle from the guest")
	}
	go p.detach(c)
}

func readSpec(bundle string) (*specs.Spec, error) {
	text, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("the container's specification: %w", err)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(text, spec); err != nil {
		return nil, fmt.Errorf("the container's specification: %w", err)
	}
	return spec, nil
}

func (p *pod) sharesPID() bool {
	return p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == cri.NamespaceMode_POD
}

// kubeletDir is the pod's directory of the kubelet.
func (p *pod) kubeletDir() string {
	return filepath.Join(p.settings.KubeletDir, "pods", p.config.GetMetadata().GetUid())
}

// mount gives the guest a container's volumes, and lets the specification's mounts name
// them.
func (p *pod) mount(ctx context.Context, c *container, spec *specs.Spec) error {
	classify := classifier{
		podDir:    p.kubeletDir(),
		container: c.id,
		mounts:    ownMounts,
	}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		if !isBind(*m) {
			continue
		}
		v, err := classify.classify(m.Source)
		if err != nil {
			return err
		}
		if v.kind == disked {
			err = p.attachVolume(ctx, v, m.Source)
		} else {
			err = p.volumes.ensure(ctx, v, m.Source)
		}
		if err != nil {
			return err
		}
		if v.kind == reported {
			c.reports = append(c.reports, report{guest: v.path(), node: m.Source})
		}
		m.Source, m.Options, m.UIDMappings, m.GIDMappings = v.path(), bindOptions(m.Options), nil, nil
	}
	return p.mountOwn(ctx, spec)
}

// mountOwn adds what the pod has that no volume brings: its names and its shared memory.
// For a pod without a virtual machine, containerd does this.
func (p *pod) mountOwn(ctx context.Context, spec *specs.Spec) error {
	own, err := p.ownFiles()
	if err != nil {
		return err
	}
	access := "rw"
	if spec.Root.Readonly {
		access = "ro"
	}
	for destination, v := range own {
		mounted := slices.IndexFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean(m.Destination) == destination })
		if mounted >= 0 && isBind(spec.Mounts[mounted]) {
			continue
		}
		if err := p.volumes.ensure(ctx, v, ""); err != nil {
			return err
		}
		m := specs.Mount{Destination: destination, Type: "bind", Source: v.path(), Options: bindOptions([]string{access})}
		if v.kind == scratch {
			m.Options = bindOptions([]string{"rw", "nosuid", "noexec", "nodev"})
		}
		if mounted >= 0 {
			spec.Mounts[mounted] = m
		} else {
			spec.Mounts = append(spec.Mounts, m)
		}
	}
	return nil
}

// sharedMemory is the size of a pod's /dev/shm, as containerd has it.
const sharedMemory = 64 << 20

func (p *pod) ownFiles() (map[string]volume, error) {
	hostname := p.config.GetHostname()
	if hostname == "" {
		hostname = p.config.GetMetadata().GetName()
	}
	dns := p.config.GetDnsConfig()
	resolv := resolvConf(dns.GetServers(), dns.GetSearches(), dns.GetOptions())
	if dns == nil {
		var err error
		if resolv, err = os.ReadFile("/etc/resolv.conf"); err != nil {
			return nil, fmt.Errorf("the node's resolver configuration, which the pod has: %w", err)
		}
	}
	return map[string]volume{
		"/etc/hostname":    {name: "own.hostname", kind: copied, content: []byte(hostname + "\n")},
		"/etc/resolv.conf": {name: "own.resolv.conf", kind: copied, content: resolv},
		"/etc/hosts":       {name: "own.hosts", kind: copied, content: []byte("127.0.0.1\tlocalhost\n::1\tlocalhost\n")},
		"/dev/shm":         {name: "own.shm", kind: scratch, size: sharedMemory},
	}, nil
}

// await waits for the end of a process that the guest has.
func (c *container) await(p *process) {
	answer, err := c.pod.guest.tasks.Wait(c.pod.ctx, &task.WaitRequest{ID: c.id, ExecID: p.execID})
	switch {
	case p.ended():
		return
	case err != nil && c.pod.ctx.Err() != nil:
		return // the end of the machine is told by others
	case err != nil:
		c.pod.distrust("the guest does not say how process "+p.eventID()+" ends", err)
		return
	}
	if p.execID == "" {
		c.explain()
		c.report()
	}
	// By the node's clock: the guest's is its own affair.
	if p.end(answer.ExitStatus, time.Now()) {
		c.pod.publish("/tasks/exit", p.exitEvent())
	}
	if streams := p.getStreams(); streams != nil {
		streams.dropInput()
	}
}

// explain publishes why the container has ended before it is published that it has: the
// kubelet looks for the one when it learns of the other.
func (c *container) explain() {
	ctx, cancel := context.WithTimeout(c.pod.ctx, callTimeout)
	defer cancel()
	if err := c.pod.guest.events(ctx, false, c.pod.handle); !errors.Is(err, io.EOF) && c.pod.ctx.Err() == nil {
		log.L.WithError(err).WithField("id", c.id).Warn("ask the guest why a container has ended")
	}
}

// report copies the container's termination message to the node.
func (c *container) report() {
	for _, r := range c.reports {
		err := func() error {
			ctx, cancel := context.WithTimeout(c.pod.ctx, callTimeout)
			defer cancel()
			text, err := c.pod.guest.readFile(ctx, r.guest)
			if err != nil {
				return err
			}
			// The kubelet has made the file. What is there now is not followed elsewhere.
			f, err := os.OpenFile(r.node, os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0)
			if err != nil {
				return err
			}
			_, err = f.Write(text)
			return errors.Join(err, f.Close())
		}()
		if err != nil {
			log.L.WithError(err).WithField("id", c.id).Warn("copy a termination message out of the guest")
		}
	}
}
