package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/tap"
	"h8s.io/hypernetes/internal/hyper/vm"
)

const (
	// resumeTarget and kvmTarget are in ms.
	resumeTarget = 70
	kvmTarget    = 130

	resumeGroup   = "clone alone"
	resumeAnswers = "resume: start → guest answers"
	resumeRunning = "of that, until QEMU runs the guest"
	resumeSetUp   = "set-up of the guest, after that"

	// machineMemory is what a pod without limits has.
	machineMemory = 512 << 20
)

func measureResume(ctx context.Context, l *lab, o options, p *progress) (_ []Row, err error) {
	count := 2 * o.starts
	p.say("resume: %d clones of a template, one after the other, without containerd", count)
	choice, err := l.nodes[1].accelerator()
	if err != nil {
		return nil, err
	}
	r, err := newResumer(l.bin, choice.Accelerator)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	clones := []variant{{kindClone, r.measure}}
	// The first one makes the template.
	if _, err := interleave(ctx, 1, clones); err != nil {
		return nil, err
	}
	found, err := interleave(ctx, count, clones)
	if err != nil {
		return nil, err
	}
	return []Row{
		absolute(resumeGroup, resumeAnswers, "ms", found.side(kindClone, "answers"), &Target{Value: resumeTarget}),
		absolute(resumeGroup, resumeRunning, "ms", found.side(kindClone, "running"), nil),
		absolute(resumeGroup, resumeSetUp, "ms", found.side(kindClone, "setup"), nil),
	}, nil
}

// resumer starts clones as a shim does, but without containerd and a pod.
type resumer struct {
	dir       string
	ns        *os.File
	tap       *tap.Tap
	templates vm.Templates
	config    vm.Config
}

func newResumer(bin, accelerator string) (_ *resumer, err error) {
	if bin, err = filepath.Abs(bin); err != nil {
		return nil, err
	}
	r := &resumer{}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.dir, err = os.MkdirTemp("", "h8s-bench-resume-"); err != nil {
		return nil, err
	}
	if r.ns, err = newNetns(); err != nil {
		return nil, err
	}
	if err = inNetns(netnsPath(r.ns), makePodInterface); err != nil {
		return nil, err
	}
	if r.tap, err = tap.Open(netnsPath(r.ns)); err != nil {
		return nil, err
	}
	mac, err := net.ParseMAC(r.tap.Link.HardwareAddr)
	if err != nil {
		return nil, err
	}
	r.templates = vm.Templates{Dir: filepath.Join(r.dir, "templates"), Ready: awaitAnswer, Cgroup: anyCgroup}
	r.config = vm.Config{
		ID: "bench-resume", Dir: r.dir, CPUs: 1, Memory: machineMemory, Accel: accelerator,
		Kernel: filepath.Join(bin, "hyper", "vmlinuz"), Initrd: filepath.Join(bin, "hyper", "initrd.img"),
		Users: vm.Users{File: filepath.Join(r.dir, "users")}, Cgroup: anyCgroup,
		NIC:     &vm.NIC{Tap: r.tap.File, HardwareAddr: mac},
		Console: io.Discard,
	}
	return r, nil
}

// anyCgroup leaves QEMU where this program is.
func anyCgroup(int) error { return nil }

func (r *resumer) close() error {
	var errs []error
	if r.tap != nil {
		errs = append(errs, r.tap.Close())
	}
	if r.ns != nil {
		errs = append(errs, r.ns.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// makePodInterface makes what CNI would have made in a pod's network namespace.
func makePodInterface() error {
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "node"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make eth0: %w", err)
	}
	for _, name := range []string{"eth0", "node"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
		if name == "eth0" {
			addr, err := netlink.ParseAddr("10.250.0.2/24")
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("add an address to eth0: %w", err)
			}
		}
	}
	return nil
}

// measure starts a clone, waits until its guest answers, makes it a pod's, and ends it.
func (r *resumer) measure(ctx context.Context, _ int) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	begin := time.Now()
	machine, err := r.templates.Clone(ctx, "bench", r.config)
	if err != nil {
		return nil, err
	}
	running := time.Since(begin)
	defer func() {
		machine.Kill()
		<-machine.Done()
		_ = machine.Channel().Close() // by now the host's end may be closed already
	}()
	if err := machine.AwaitGuest(ctx); err != nil {
		return nil, err
	}
	host, err := channel.NewHost(machine.Channel())
	if err != nil {
		return nil, err
	}
	defer host.Close()
	task, err := host.Open(ctx, channel.Task, "")
	if err != nil {
		return nil, err
	}
	answers := time.Since(begin)
	if err := errors.Join(task.Close(), setUp(ctx, host, r.tap.Link)); err != nil {
		return nil, err
	}
	return map[string]float64{
		"running": milliseconds(running),
		"answers": milliseconds(answers),
		"setup":   milliseconds(time.Since(begin) - answers),
	}, nil
}

// awaitAnswer returns when a guest answers.
func awaitAnswer(ctx context.Context, rw io.ReadWriteCloser) error {
	host, err := channel.NewHost(rw)
	if err != nil {
		return err
	}
	defer host.Close()
	stream, err := host.Open(ctx, channel.Task, "")
	if err != nil {
		return err
	}
	return stream.Close()
}

// setUp makes a guest a pod's: clock, entropy, name, network.
func setUp(ctx context.Context, host *channel.Host, link guestapi.Link) error {
	entropy := make([]byte, 256)
	_, _ = rand.Read(entropy) // it does not fail
	body, err := json.Marshal(guestapi.Setup{Hostname: "bench", Time: time.Now(), Entropy: entropy, Links: []guestapi.Link{link}})
	if err != nil {
		return err
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return host.Open(ctx, channel.Control, "")
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://guest/v1/setup", bytes.NewReader(body))
	if err != nil {
		return err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return fmt.Errorf("set the guest up: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode >= http.StatusMultipleChoices {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return fmt.Errorf("set the guest up: %s: %s", response.Status, text)
	}
	return nil
}

// estimateKVM is what RunPodSandbox would take if the processor executed the guest: what
// the guest does itself, from its first instruction after the resume until it is set up,
// is divided by how many times slower than native the CPU-bound work was that was measured
// in the same run; the rest is native already, and stays.
func estimateKVM(rows []Row) (Row, bool) {
	find := func(group, metric, peer string) *Row {
		for i, r := range rows {
			if r.Group == group && r.Metric == metric && (r.Peer == nil && peer == "" || r.Peer != nil && r.Peer.Name == peer) {
				return &rows[i]
			}
		}
		return nil
	}
	sandbox := find(sandboxGroup, sandboxReady, "")
	answers, running := find(resumeGroup, resumeAnswers, ""), find(resumeGroup, resumeRunning, "")
	setup := find(resumeGroup, resumeSetUp, "")
	cpu := find(cpuGroup, cpuInteger, kindRunc)
	for _, r := range []*Row{sandbox, answers, running, setup, cpu} {
		if r == nil {
			return Row{}, false
		}
	}
	translated := answers.Ours.Median - running.Ours.Median + setup.Ours.Median
	native := sandbox.Ours.Median - translated
	slower := max(1, cpu.Ratio.Median)
	row := absolute("with KVM, an estimate", sandboxReady, "ms",
		newSide(kindClone, []float64{native + translated/slower}), &Target{Value: kvmTarget})
	row.Verdict += " on paper"
	row.Note = fmt.Sprintf("nothing was measured with KVM. Of the %s ms under TCG, the guest's own part is %s ms (it answers %s ms after QEMU runs it, "+
		"and is set up in %s ms); that part divided by %s, the slowdown of integer work in this run, and the other %s ms as they are "+
		"(containerd, CNI, shim, start of QEMU, loading of the template). It does not know what KVM itself costs: making the "+
		"machine, and page faults in two stages", number(sandbox.Ours.Median), number(translated),
		number(answers.Ours.Median-running.Ours.Median), number(setup.Ours.Median), number(slower), number(native))
	return row, true
}
