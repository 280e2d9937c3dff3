// Package vm runs virtual machines: each is one QEMU process, a child of the caller,
// that boots a kernel or continues a saved template, and that is reached through a
// byte stream into the guest.
//
// QEMU runs as a user of its own that may read system files and nothing else; it is given
// the rest as open files. It has seccomp filters and no capabilities, and dies with its
// parent. It is commanded over a socket that only the two have.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"h8s.io/hypernetes/internal/hyper/qmp"
)

// Config describes a virtual machine.
type Config struct {
	// ID appears in messages and in the name of the process.
	ID string
	// Dir is QEMU's working directory, which it cannot open. It exists. Nothing is left there.
	Dir string
	// Users are those that QEMU runs as.
	Users Users
	// Kernel and Initrd are files that everybody may read.
	Kernel, Initrd string
	// CPUs is the number of virtual processors, Memory the guest's memory in bytes, a
	// multiple of 2 MiB.
	CPUs   int
	Memory int64
	// Accel is "kvm" or "tcg". When empty, it is what ProbeKVM says.
	Accel string
	// NIC is the guest's network card, or nil for none.
	NIC *NIC
	// Cgroup, if not nil, is called with QEMU's process ID before the guest executes
	// its first instruction. When it fails, Start fails.
	Cgroup func(pid int) error
	// Template is a directory that SaveTemplate made, to be cloned; empty: cold boot.
	Template string
	// Console receives what the guest writes to its serial console, unless it is nil.
	// A guest waits for a slow one: nobody else does.
	Console io.Writer
}

// NIC is a network card.
type NIC struct {
	// Tap is a tap device with one queue, made with IFF_NO_PI and IFF_VNET_HDR. The
	// caller keeps it, and may close it after Start. SaveTemplate makes an
	// unconnected one when it is nil.
	Tap *os.File
	// HardwareAddr is the card's address after a cold boot. A clone has the
	// template's until the guest sets another one.
	HardwareAddr net.HardwareAddr
}

// Why a virtual machine ended.
var (
	// ErrPoweredOff: the guest switched itself off.
	ErrPoweredOff = errors.New("the guest powered off")
	// ErrPanicked: the guest's kernel panicked.
	ErrPanicked = errors.New("the guest's kernel panicked")
	// ErrReset: the guest restarted itself. A kernel that panics before it has its
	// driver for saying so does this as well.
	ErrReset = errors.New("the guest reset itself")
	// ErrDied: QEMU ended without a reason of the guest's, such as by a signal.
	ErrDied = errors.New("QEMU died")
	// ErrKilled: Kill was called. An error that is ErrDied as well: somebody else did it, such as
	// the kernel when memory is wanting.
	ErrKilled = errors.New("the virtual machine was killed")
)

// VM is a virtual machine that was started.
type VM struct {
	id      string
	cmd     *exec.Cmd
	stderr  tail
	channel net.Conn
	monitor *qmp.Client

	done chan struct{}

	mu          sync.Mutex
	killed      bool
	slots       map[string]*slot         // of disks, by serial number
	ended       error                    // why QEMU says that it ends
	deleted     map[string]chan struct{} // closed when the device of this ID is gone
	opened      int                      // how often the guest has opened the channel's port
	portChanged chan struct{}            // closed, and replaced, when it does
	migrated    chan struct{}            // closed when a migration has come to its end
	err         error                    // what Err returns once done is closed
}

// startTimeout bounds what QEMU itself needs until the guest runs, which does not
// include the guest's own boot.
const startTimeout = 30 * time.Second

// Start starts a virtual machine. It returns when the guest runs; a guest that boots
// may not serve the channel yet. ctx bounds the start alone.
func Start(ctx context.Context, c Config) (*VM, error) {
	v, err := start(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("start virtual machine %s: %w", c.ID, err)
	}
	return v, nil
}

func start(ctx context.Context, c Config) (*VM, error) {
	if err := c.chooseAccel(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	m, err := newMachine(c)
	if err != nil {
		return nil, err
	}
	defer m.close()
	var state *os.File
	if c.Template == "" {
		m.ownMemory()
	} else {
		var memory *os.File
		if memory, state, err = openTemplate(c.Template, m.manifest, c.Memory); err != nil {
			return nil, err
		}
		defer state.Close()
		m.fileMemory(memory, false)
		m.arg("-incoming", "defer")
	}
	v, err := m.launch(ctx, c)
	if err != nil {
		return nil, err
	}
	if state != nil {
		if err = v.load(ctx, state); err != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: %s: %w", ErrTemplate, c.Template, err)
		}
	}
	if err == nil {
		err = v.monitor.Execute(ctx, "cont", nil, nil)
	}
	if err != nil {
		return nil, v.abandon(err)
	}
	return v, nil
}

// abandon ends a virtual machine whose start failed with err.
func (v *VM) abandon(err error) error {
	v.Kill()
	<-v.done
	v.channel.Close()
	return v.failure(err) // all that QEMU has said is there when it has ended
}

// failure adds to err what QEMU has said.
func (v *VM) failure(err error) error {
	if said := v.stderr.String(); said != "" {
		return fmt.Errorf("%w (QEMU says: %s)", err, said)
	}
	return err
}

// launch starts QEMU, which then waits for the command to run the guest.
func (m *machine) launch(ctx context.Context, c Config) (*VM, error) {
	if err := m.openFiles(c); err != nil {
		return nil, err
	}
	channel, err := m.socket("channel")
	if err != nil {
		return nil, err
	}
	monitor, err := m.socket("monitor")
	if err != nil {
		channel.Close()
		return nil, err
	}
	m.arg("-mon", "chardev=monitor,mode=control")
	if err := m.console(c.Console); err != nil {
		channel.Close()
		monitor.Close()
		return nil, err
	}
	v := &VM{
		id:          c.ID,
		channel:     channel,
		done:        make(chan struct{}),
		slots:       map[string]*slot{},
		deleted:     map[string]chan struct{}{},
		portChanged: make(chan struct{}),
		migrated:    make(chan struct{}),
	}
	v.cmd = exec.Command(m.binary, m.args...)
	v.cmd.Env = []string{"LC_ALL=C", "MALLOC_ARENA_MAX=1"}
	v.cmd.ExtraFiles = m.files
	v.cmd.Stderr = &v.stderr
	v.cmd.WaitDelay = time.Second // for standard error, when QEMU has ended

	exited, err := m.startConfined(v.cmd, c)
	if err != nil {
		channel.Close()
		monitor.Close()
		return nil, err
	}
	m.close() // QEMU's ends: without it, they are at their end
	if c.Cgroup != nil {
		err = c.Cgroup(v.cmd.Process.Pid)
	}
	if err == nil {
		v.monitor, err = qmp.New(ctx, monitor, v.handle)
	} else {
		monitor.Close()
	}
	go v.wait(exited)
	if err != nil {
		return nil, v.abandon(err)
	}
	return v, nil
}

// startConfined starts cmd with nothing of the node but what its machine needs.
func (m *machine) startConfined(cmd *exec.Cmd, c Config) (exited <-chan struct{}, err error) {
	user, giveBack, err := c.Users.take()
	if err != nil {
		return nil, fmt.Errorf("a user of its own for QEMU: %w", err)
	}
	exited, err = startConfined(cmd, confinement{
		user: user, dir: c.Dir, readable: m.readable, writable: m.writable, template: m.template,
	})
	if err != nil {
		giveBack.Close()
		return nil, err
	}
	m.writable = nil // they are its supervisor's
	go func() {
		<-exited
		giveBack.Close()
	}()
	return exited, nil
}

// startConfined starts cmd from a thread that lives as long as it: the kernel sends
// the parent-death signal when the thread that forked ends, not when the process
// does. When it has started cmd, it closes the writable files after cmd's end.
func startConfined(cmd *exec.Cmd, c confinement) (exited <-chan struct{}, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL, Setpgid: true,
		Credential: &syscall.Credential{Uid: c.user, Gid: c.user}, // no groups
	}
	started, done := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		s, err := c.apply()
		if err != nil {
			started <- err
			return
		}
		defer s.close()
		go s.serve()
		err = cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // cmd.ProcessState says it all
			close(done)
		}
	}()
	return done, <-started
}

func (v *VM) wait(exited <-chan struct{}) {
	<-exited
	if v.monitor != nil {
		<-v.monitor.Done() // it has read QEMU's last words
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch said := v.stderr.String(); {
	case v.killed:
		v.err = ErrKilled
	case v.ended != nil:
		v.err = v.ended
	default:
		v.err = fmt.Errorf("%w: %s: %s", ErrDied, v.cmd.ProcessState, said)
		if end, ok := v.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && end.Signal() == syscall.SIGKILL {
			v.err = fmt.Errorf("%w (%w)", v.err, ErrKilled)
		}
	}
	v.err = fmt.Errorf("virtual machine %s: %w", v.id, v.err)
	close(v.done)
}

// handle handles an event of QEMU.
func (v *VM) handle(e qmp.Event) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch e.Name {
	case "SHUTDOWN":
		var data struct{ Reason string }
		e.Decode(&data)
		if v.ended == nil {
			v.ended = shutdownReason(data.Reason)
		}
	case "DEVICE_DELETED":
		var data struct{ Device string }
		e.Decode(&data)
		if gone := v.deleted[data.Device]; gone != nil {
			close(gone)
			delete(v.deleted, data.Device)
		}
	case "VSERPORT_CHANGE":
		var data struct{ Open bool }
		e.Decode(&data)
		if data.Open {
			v.opened++
			close(v.portChanged)
			v.portChanged = make(chan struct{})
		}
	case "MIGRATION":
		var data struct{ Status string }
		e.Decode(&data)
		switch data.Status {
		case "completed", "failed", "cancelled":
			select {
			case <-v.migrated: // more events than migrations
			default:
				close(v.migrated)
			}
		}
	}
}

func shutdownReason(reason string) error {
	switch reason {
	case "guest-shutdown":
		return ErrPoweredOff
	case "guest-panic":
		return ErrPanicked
	case "guest-reset":
		return ErrReset
	}
	return fmt.Errorf("%w: it shut down: %q", ErrDied, reason)
}

// Pid is QEMU's process ID.
func (v *VM) Pid() int { return v.cmd.Process.Pid }

// Channel is the stream that the guest serves. The caller closes it.
func (v *VM) Channel() io.ReadWriteCloser { return v.channel }

// Done is closed when QEMU has ended.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err is why QEMU ended, or nil while it runs: see ErrPoweredOff and its like.
func (v *VM) Err() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.err
}

// Kill ends QEMU at once; Done follows. It is idempotent.
func (v *VM) Kill() {
	v.mu.Lock()
	if v.ended == nil && v.err == nil {
		v.killed = true
	}
	v.mu.Unlock()
	_ = v.cmd.Process.Kill()
}

// tail keeps the end of what is written to it, which is QEMU's standard error.
type tail struct {
	mu   sync.Mutex
	kept []byte
}

const maxTail = 2 << 10

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kept = append(t.kept, p[max(0, len(p)-maxTail):]...); len(t.kept) > maxTail {
		t.kept = append(t.kept[:0], t.kept[len(t.kept)-maxTail:]...)
	}
	return len(p), nil
}

// String is what was kept, on one line.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	printable := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, string(t.kept))
	return strings.Join(strings.Fields(printable), " ")
}
