package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	events "github.com/containerd/containerd/api/events"
	"github.com/containerd/log"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/layers"
	"h8s.io/hypernetes/internal/hyper/tap"
	"h8s.io/hypernetes/internal/hyper/vm"
)

const (
	// bootTimeout bounds the start of a machine, which may include the making of its
	// template, and then the wait until its guest answers. Many may start at once; the
	// kubelet waits for four minutes.
	bootTimeout = 100 * time.Second
	// lastWordsTimeout is how long a machine with which nobody can speak may take to end by itself.
	lastWordsTimeout = time.Second
	// collectTimeout bounds the waiting for a moment in which nobody starts a machine.
	collectTimeout = 30 * time.Second
	// shutdownTimeout is how long a guest may take to end itself in order.
	shutdownTimeout = 5 * time.Second
	// settleTimeout is how long it may take if it has disks to write to.
	settleTimeout = time.Minute
)

// phase is how far a pod's life is.
type phase int

const (
	made phase = iota
	starting
	ready
	ended
)

// pod is a sandbox: one virtual machine, and the containers in it.
type pod struct {
	id        string
	config    *cri.PodSandboxConfig
	settings  Config
	bundle    string
	publish   func(topic string, event any)
	left      state
	created   time.Time
	cache     *layers.Cache
	volumes   *volumes
	disks     disks
	console   tail
	ctx       context.Context // ends when the machine has ended
	cancel    context.CancelCauseFunc
	finished  chan struct{} // closed when all is cleaned up
	vm        *vm.VM
	guest     *guest
	forwarder *forwarder

	mu         sync.Mutex
	phase      phase
	stopping   bool
	exitStatus uint32
	exited     time.Time
	containers map[string]*container
}

func newPod(id string, config *cri.PodSandboxConfig, netns string, settings Config, bundle string, publish func(string, any)) (*pod, error) {
	shares := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	switch {
	case netns == "":
		return nil, refusal("hostNetwork is not for this runtime: the pod is a virtual machine, which is not in the node's network")
	case shares.GetPid() == cri.NamespaceMode_NODE:
		return nil, refusal("hostPID is not for this runtime: the pod is a virtual machine, which has no process of the node")
	case shares.GetIpc() == cri.NamespaceMode_NODE:
		return nil, refusal("hostIPC is not for this runtime: the pod is a virtual machine, which shares no memory with the node")
	}
	cache, err := layers.NewCache(filepath.Join(settings.CacheDir, "layers"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	p := &pod{
		id: id, config: config, settings: settings, bundle: bundle, publish: publish, cache: cache,
		ctx: ctx, cancel: cancel, finished: make(chan struct{}), containers: map[string]*container{},
	}
	p.left.NetNS = netns
	// Sandboxes' IDs are random: a part is enough, and keeps the paths of sockets short.
	p.left.RunDir = filepath.Join(settings.RunDir, id[:min(len(id), 20)])
	if parent := config.GetLinux().GetCgroupParent(); parent != "" {
		p.left.Cgroup = filepath.Join("/", parent, "h8s-"+id[:min(len(id), 20)])
	}
	return p, nil
}

// errStopped is why a pod's start fails that is stopped before it is ready.
var errStopped = errors.New("the pod was stopped while it started")

// start starts the machine and makes its guest this pod's. If it fails, it leaves
// nothing.
func (p *pod) start(ctx context.Context) (err error) {
	p.mu.Lock()
	if p.phase != made {
		p.mu.Unlock()
		return errors.New("the pod was started or stopped before")
	}
	p.phase = starting
	p.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(context.Cause(p.ctx)) })() //nolint:contextcheck // stop ends it
	defer func() {
		if err != nil {
			err = errors.Join(err, p.left.cleanUp())
			p.notStarted()
		}
	}()
	if err := os.MkdirAll(p.left.RunDir, 0o700); err != nil {
		return err
	}
	if err := p.left.save(p.bundle); err != nil {
		return err
	}
	nic, err := tap.Open(p.left.NetNS)
	if err != nil {
		return err
	}
	defer nic.Close()
	machine, guest, err := p.boot(ctx, nic)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			machine.Kill()
			<-machine.Done()
			_ = guest.channel.Close()
		}
	}()
	forwarder, err := newForwarder(p.left.NetNS, dialFunc(func(port uint16) (io.ReadWriteCloser, error) { //nolint:contextcheck // for as long as the pod lives
		ctx, cancel := context.WithTimeout(p.ctx, callTimeout)
		defer cancel()
		return guest.channel.Open(ctx, channel.Dial, strconv.Itoa(int(port)))
	}))
	if err != nil {
		return fmt.Errorf("ports of the pod: %w", err)
	}
	p.vm, p.guest, p.forwarder = machine, guest, forwarder
	p.volumes = newVolumes(guest)
	p.mu.Lock()
	if p.stopping {
		p.mu.Unlock()
		forwarder.close()
		return errStopped
	}
	p.phase, p.created = ready, time.Now()
	p.mu.Unlock()
	go forwarder.serve()
	go p.volumes.follow(p.ctx) //nolint:contextcheck // for as long as the pod lives
	go p.listen()
	go p.watch()
	go p.collect() //nolint:contextcheck // for as long as the pod lives
	return nil
}

// notStarted notes that a start has failed, of which nothing is left.
func (p *pod) notStarted() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.phase = made
	if p.stopping {
		p.end()
	}
}

// end ends a pod that has no machine. The caller holds the lock.
func (p *pod) end() {
	p.phase, p.exited = ended, time.Now()
	close(p.finished)
}

// collect removes what no pod of the node uses any more.
func (p *pod) collect() {
	if err := p.cache.Collect(); err != nil {
		log.L.WithError(err).Warn("remove images of container layers that are gone")
	}
	ctx, cancel := context.WithTimeout(p.ctx, collectTimeout)
	defer cancel()
	if err := p.settings.templates().Collect(ctx); err != nil && ctx.Err() == nil {
		log.L.WithError(err).Warn("remove templates that are not used")
	}
}

// confine puts QEMU where it belongs, and on record.
func (p *pod) confine(pid int) error {
	started, err := startTime(pid)
	if err != nil {
		return err
	}
	p.left.QEMU, p.left.Started = pid, started
	if err := p.left.save(p.bundle); err != nil {
		return err
	}
	if err := allowOOMKill(pid, p.config.GetLinux().GetCgroupParent()); err != nil {
		return fmt.Errorf("OOM score of QEMU: %w", err)
	}
	if p.left.Cgroup == "" {
		return nil
	}
	return joinCgroup(p.left.Cgroup, pid)
}

// listen passes on what happens in the guest without being asked for.
func (p *pod) listen() {
	err := p.guest.events(p.ctx, true, p.handle)
	if p.ctx.Err() == nil {
		log.L.WithError(err).Warn("the guest's events have ended")
	}
}

// handle passes on an event of the guest, once, however often the guest tells it.
func (p *pod) handle(e guestapi.Event) {
	if c, err := p.container(e.OOM); err == nil {
		c.oom.Do(func() { p.publish("/tasks/oom", &events.TaskOOM{ContainerID: c.id}) })
	}
}

// watch waits for the end of the machine, or of its guest's answers, and then makes it
// true for everybody.
func (p *pod) watch() {
	select {
	case <-p.vm.Done():
	case <-p.guest.channel.Done():
		p.distrust("the guest does not answer any more", nil)
	}
	<-p.vm.Done()
	why := p.vm.Err()
	p.cancel(why)

	p.mu.Lock()
	p.phase, p.exited = ended, time.Now()
	stopping := p.stopping
	if !stopping {
		p.exitStatus = killed
	}
	containers := make([]*container, 0, len(p.containers))
	for _, c := range p.containers {
		containers = append(containers, c)
	}
	p.mu.Unlock()
	if !stopping {
		log.L.WithError(why).WithField("console", p.console.String()).Error("the virtual machine has ended")
	}
	// The containers have died of it, whoever in the pod took the memory.
	outOfMemory := errors.Is(why, vm.ErrDied) && p.left.Cgroup != "" && oomKilled(p.left.Cgroup)
	for _, c := range containers {
		if outOfMemory && !c.init.ended() {
			p.publish("/tasks/oom", &events.TaskOOM{ContainerID: c.id})
		}
		c.end(p.exited)
	}
	p.guest.close()
	_ = p.guest.channel.Close()
	p.forwarder.close()
	if err := p.left.cleanUp(); err != nil {
		log.L.WithError(err).Error("clean up after the virtual machine")
	}
	close(p.finished)
}

// stop ends the machine, or its start, and returns when nothing is left of it.
func (p *pod) stop(ctx context.Context) error {
	p.mu.Lock()
	before := p.phase
	p.stopping = true
	switch before {
	case made:
		p.cancel(errStopped)
		p.end()
	case starting:
		p.cancel(errStopped)
	}
	p.mu.Unlock()
	if before == ready {
		writes := p.disks.writable()
		patience := shutdownTimeout
		if writes {
			patience = settleTimeout
		}
		polite, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_ = p.guest.send(polite, http.MethodPost, "/v1/shutdown", nil)
		select {
		case <-p.vm.Done():
		case <-polite.Done():
			if writes {
				log.L.Errorf("the guest has not unmounted its disks in %s, and is killed: what it wrote last may not be on them", patience)
			}
			p.vm.Kill()
		}
	}
	select {
	case <-p.finished:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of the virtual machine: %w", context.Cause(ctx))
	}
}

// distrust ends the machine of a guest that does not do what it is told. A machine that
// ends by itself, whose guest cannot answer either, has a reason of its own.
func (p *pod) distrust(why string, err error) {
	select {
	case <-p.vm.Done():
	case <-time.After(2 * time.Second):
		log.L.WithError(err).Warn(why + ": end the virtual machine")
		p.vm.Kill()
	}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	kept []byte
}

const maxTail = 4 << 10

// Write implements io.Writer.
func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.kept = append(t.kept, b[max(0, len(b)-maxTail):]...)
	t.kept = t.kept[max(0, len(t.kept)-maxTail):]
	return len(b), nil
}

// String is what was kept.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.kept)
}
