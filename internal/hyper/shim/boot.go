package shim

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"k8s.io/apimachinery/pkg/api/validate/content"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/tap"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// tenantAnnotation is v1alpha1.AnnotationTenant, whose package each pod's shim would
// pay for with memory.
const tenantAnnotation = "h8s.io/tenant"

// boot starts the machine, as a clone if that can be had, and makes its guest this
// pod's.
func (p *pod) boot(ctx context.Context, nic *tap.Tap) (*vm.VM, *guest, error) {
	mac, err := net.ParseMAC(nic.Link.HardwareAddr)
	if err != nil {
		return nil, nil, err
	}
	cpus, memory := size(p.config, memoryLimited(p.config.GetLinux().GetCgroupParent()))
	c := vm.Config{
		ID: p.id, Dir: p.left.RunDir, Kernel: p.settings.Kernel, Initrd: p.settings.Initrd,
		CPUs: cpus, Memory: memory, Accel: p.settings.Accel,
		NIC:     &vm.NIC{Tap: nic.File, HardwareAddr: mac},
		Users:   p.settings.users(),
		Cgroup:  p.confine,
		Console: &p.console,
	}
	machine, discard, err := p.machine(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	guest, err := p.welcome(ctx, machine, nic.Link)
	if err != nil {
		if suspect(ctx, err) {
			err = errors.Join(err, discard())
		}
		return nil, nil, err
	}
	return machine, guest, nil
}

// suspect reports whether other clones of a template may answer no more than the one whose
// welcome failed with err. One that was killed, whether by us because nobody waits for it any
// more or by the node because memory was wanting, says nothing about the others.
func suspect(ctx context.Context, err error) bool {
	return ctx.Err() == nil && !errors.Is(err, vm.ErrKilled)
}

// lastWords is why the machine ends by itself, or nil if it does not. Its channel ends before it is
// known to have ended.
func lastWords(machine *vm.VM) error {
	select {
	case <-machine.Done():
		return machine.Err()
	case <-time.After(lastWordsTimeout):
		return nil
	}
}

// machine starts the machine: it is a clone, or boots where none can be had. One that is
// only slow is waited for: on a node without a processor to spare, to boot instead would
// take twenty times as much of it. discard removes the template, if it is a clone.
func (p *pod) machine(ctx context.Context, c vm.Config) (machine *vm.VM, discard func() error, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if p.settings.clones() {
		templates := p.settings.templates()
		owner, err := p.settings.owner(p.config)
		if err == nil {
			if machine, err = templates.Clone(ctx, owner, c); err == nil {
				return machine, func() error { return templates.Discard(owner, c) }, nil
			}
		}
		if ctx.Err() != nil {
			return nil, nil, err
		}
		log.G(ctx).WithError(err).Warn("no clone of a template: boot the virtual machine")
	}
	machine, err = vm.Start(ctx, c)
	return machine, func() error { return nil }, err
}

// welcome waits for the machine's guest, and makes it this pod's. If that fails, nothing
// of the machine is left.
func (p *pod) welcome(ctx context.Context, machine *vm.VM, link guestapi.Link) (_ *guest, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	defer func() {
		if err != nil {
			if died := lastWords(machine); died != nil && !errors.Is(err, died) {
				err = errors.Join(err, died)
			}
			machine.Kill()
			<-machine.Done()
			_ = machine.Channel().Close()
			err = fmt.Errorf("%w (the guest's console ends with: %q)", err, p.console.String())
		}
	}()
	// A machine that ends ends the waiting for it.
	ctx, gone := context.WithCancelCause(ctx)
	defer gone(nil)
	go func() {
		select {
		case <-machine.Done():
			gone(machine.Err())
		case <-ctx.Done():
		}
	}()
	guest, err := connect(ctx, machine)
	if err != nil {
		return nil, errors.Join(err, context.Cause(ctx))
	}
	if err := p.setUp(ctx, guest, link); err != nil {
		guest.close()
		_ = guest.channel.Close()
		return nil, err
	}
	return guest, nil
}

func (p *pod) setUp(ctx context.Context, g *guest, link guestapi.Link) error {
	id := sha256.Sum256([]byte(p.id))
	hostname := p.config.GetHostname()
	if hostname == "" {
		hostname = p.config.GetMetadata().GetName()
	}
	return g.call(ctx, http.MethodPost, "/v1/setup", guestapi.Setup{
		Hostname:  hostname,
		MachineID: hex.EncodeToString(id[:16]),
		Time:      time.Now(),
		Entropy:   entropy(),
		Sysctls:   p.config.GetLinux().GetSysctls(),
		Links:     []guestapi.Link{link},
	})
}

// entropy is what a guest's random numbers begin with.
func entropy() []byte {
	fresh := make([]byte, 256)
	_, _ = rand.Read(fresh) // it does not fail
	return fresh
}

// clones says whether machines are clones.
func (c Config) clones() bool { return c.Templates == nil || *c.Templates }

func (c Config) templates() vm.Templates {
	return vm.Templates{
		Dir: filepath.Join(c.CacheDir, "templates"),
		// What is ready to be cloned is a guest that has once done what each clone does
		// first: its clones find the memory for that in the template. Its link is up, which
		// package guest sees to, but gets no address: it would speak on it in each clone
		// before that has an address of its own.
		Ready: func(ctx context.Context, rw io.ReadWriteCloser) error {
			host, err := channel.NewHost(rw)
			if err != nil {
				return err
			}
			defer host.Close()
			g, err := newGuest(ctx, host)
			if err != nil {
				return err
			}
			defer g.close()
			return g.call(ctx, http.MethodPost, "/v1/setup", guestapi.Setup{
				Hostname: "template", Time: time.Now(), Entropy: entropy(), Template: true,
			})
		},
		// It is in no pod's cgroup, and the first to go when the node has no memory left:
		// without it, a pod boots.
		Cgroup: func(pid int) error { return allowOOMKill(pid, besteffort) },
	}
}

// owner is whose templates a pod's machine is cloned of.
func (c Config) owner(pod *cri.PodSandboxConfig) (string, error) {
	tenant, ok := pod.GetAnnotations()[tenantAnnotation]
	switch {
	case c.ShareTemplates:
		return "everybody", nil
	case !ok:
		return "nobody", nil // pods of the cluster itself
	case len(content.IsDNS1123Subdomain(tenant)) > 0:
		return "", fmt.Errorf("the pod's annotation %s=%q is not the name of a tenant", tenantAnnotation, tenant)
	}
	return "tenant." + tenant, nil
}
