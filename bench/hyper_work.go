package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/internal/hyper/accel"
)

const (
	workRounds = 5
	// execs is how many commands a round's exec latency is the median of.
	execs     = 7
	workImage = "localhost/agnhost:latest"
	// workFile is the one large file of the image; nothing reads it before the measurement.
	workFile      = "/agnhost"
	workTimeout   = time.Minute
	transferTime  = time.Second
	transferBlock = 256 << 10

	cpuGroup   = "CPU-bound work"
	cpuInteger = "md5 of 128 MiB"
)

// workScript prints a line for each piece of work: its name, and the seconds when it
// began and ended. The size of the large file comes first.
const workScript = `set -e
stat -c 'size %s 0' ` + workFile + `
t() { name=$1; shift; begin=$EPOCHREALTIME; "$@" >/dev/null 2>&1; echo $name $begin $EPOCHREALTIME; }
t read dd if=` + workFile + ` of=/dev/null bs=1M
t again dd if=` + workFile + ` of=/dev/null bs=1M
t write dd if=/dev/zero of=/data bs=1M count=64 conv=fsync
t md5 md5sum /data /data
t float awk 'BEGIN { for (i = 0; i < 500000; i++) s += i * 1.5 }'
t calls dd if=/dev/zero of=/dev/null bs=1 count=100000
`

func measureWork(ctx context.Context, l *lab, _ options, p *progress) (_ []Row, err error) {
	p.say("work: exec, disk, network and CPU in %d fresh pods of each kind", workRounds)
	m, err := l.openMachines(ctx, p)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	choice, err := m.node.accelerator()
	if err != nil {
		return nil, err
	}
	var variants []variant
	for _, k := range runningKinds() {
		variants = append(variants, variant{k.name, m.work(k)})
	}
	// The first pods unpack the image.
	if _, err := interleave(ctx, 1, variants); err != nil {
		return nil, err
	}
	r, err := interleave(ctx, workRounds, variants)
	if err != nil {
		return nil, err
	}
	var rows []Row
	for _, g := range []struct {
		name, note string
		list       []wanted
	}{
		{"exec", "ExecSync of true by the CRI, as for an exec probe", []wanted{{"latency", "ms", "exec", nil}}},
		{"disk", "a clone's layers are disks that the node has in its page cache; its writes stay in its memory, and so does gVisor's page cache", []wanted{
			{"first read of an image's file", "MB/s", "read", nil},
			{"read again", "MB/s", "again", nil},
			{"write and fsync 64 MiB", "MB/s", "write", nil},
		}},
		{"network", "one TCP connection with the node, dd at the pod's end", []wanted{
			{"pod → node", "Gbit/s", "up", nil},
			{"node → pod", "Gbit/s", "down", nil},
		}},
		{cpuGroup, cpuReason(choice), []wanted{
			{cpuInteger, "s", "md5", nil},
			{"floating point, interpreted", "s", "float", nil},
			{"200000 system calls", "s", "calls", nil},
		}},
	} {
		more, err := r.cloneAgainst(g.name, []string{kindRunc, kindGVisor}, g.list...)
		if len(more) > 0 {
			more[len(more)-1].Note = g.note
		}
		rows = append(rows, more...)
		if err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// cpuReason says what a CPU-bound guest's slowness comes from.
func cpuReason(c accel.Choice) string {
	if c.Accelerator == accel.TCG {
		return "the guest is slower because QEMU translates each of its instructions (TCG), and computes floating point in software; " +
			"why it has no KVM is said above"
	}
	return "the processor executes the guest itself (KVM)"
}

// work starts a pod, measures everything in it, and deletes it.
func (m *machineLab) work(k kind) func(context.Context, int) (map[string]float64, error) {
	return func(ctx context.Context, round int) (_ map[string]float64, err error) {
		ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
		defer cancel()
		pod := newPod(defaultNamespace, k.objectName("work", round), m.node.name, k.runtimeClass)
		pod.Spec.Containers[0].Image = workImage
		defer func() { err = errors.Join(err, m.deletePods(ctx, pod)) }()
		if _, err := m.startPod(ctx, pod); err != nil {
			return nil, err
		}
		if err := m.waitPod(ctx, pod, "ready", isReady); err != nil {
			return nil, err
		}
		_, id, ok := strings.Cut(pod.Status.ContainerStatuses[0].ContainerID, "://")
		if !ok {
			return nil, fmt.Errorf("pod %s has no container", pod.Name)
		}
		c := worker{m, id}
		values := map[string]float64{}
		if values["exec"], err = c.latency(ctx); err != nil {
			return nil, err
		}
		out, err := c.exec(ctx, "/bin/sh", "-c", workScript)
		if err != nil {
			return nil, err
		}
		if err := parseWork(out, values); err != nil {
			return nil, err
		}
		for name, direction := range directions() {
			if values[name], err = c.transfer(ctx, direction); err != nil {
				return nil, err
			}
		}
		return values, nil
	}
}

// worker is a container in which something is measured.
type worker struct {
	*machineLab
	id string
}

// exec runs a command and returns what it prints; one that fails is an error.
func (c worker) exec(ctx context.Context, command ...string) (string, error) {
	r, err := c.cri.ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: c.id, Cmd: command, Timeout: int64(workTimeout.Seconds()),
	})
	if err != nil {
		return "", fmt.Errorf("exec %q: %w", command[0], err)
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("exec %q: exit code %d: %s%s", command[0], r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout), nil
}

func (c worker) latency(ctx context.Context) (float64, error) {
	var times []float64
	for range execs {
		begin := time.Now()
		if _, err := c.exec(ctx, "/bin/true"); err != nil {
			return 0, err
		}
		times = append(times, milliseconds(time.Since(begin)))
	}
	return median(times), nil
}

// parseWork reads what workScript prints: MB/s of reading and writing, seconds of all else.
func parseWork(out string, values map[string]float64) error {
	var size float64
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return fmt.Errorf("the work printed %q", line)
		}
		begin, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return fmt.Errorf("the work printed %q: %w", line, err)
		}
		end, err := strconv.ParseFloat(fields[2], 64)
		if err != nil {
			return fmt.Errorf("the work printed %q: %w", line, err)
		}
		took := end - begin
		if fields[0] == "size" {
			size = begin
			continue
		}
		if took <= 0 {
			return fmt.Errorf("the work %q took %v s", fields[0], took)
		}
		switch fields[0] {
		case "read", "again":
			values[fields[0]] = size / 1e6 / took
		case "write":
			values[fields[0]] = 64 << 20 / 1e6 / took
		default:
			values[fields[0]] = took
		}
	}
	for _, name := range []string{"read", "again", "write", "md5", "float", "calls"} {
		if values[name] == 0 {
			return fmt.Errorf("the work did not print %q", name)
		}
	}
	return nil
}

// direction is a way of data over a connection between pod and node.
type direction struct {
	// dd is what the pod does with its end.
	dd string
	// step moves some bytes at the node's end.
	step func(fd int, buf []byte) (int, error)
}

func directions() map[string]direction {
	return map[string]direction{
		"up":   {"if=/dev/zero bs=64k", read},
		"down": {"of=/dev/null bs=64k", func(fd int, buf []byte) (int, error) { return len(buf), write(fd, buf) }},
	}
}

// move moves data for warmUp and then transferTime, and returns the bytes of the latter and
// how long they took.
func move(conn int, step func(fd int, buf []byte) (int, error)) (int, time.Duration, error) {
	buf := make([]byte, transferBlock)
	var start time.Time
	sum := 0
	for opened := time.Now(); ; {
		n, err := step(conn, buf)
		if err == nil && n == 0 {
			err = errors.New("the pod ended the connection")
		}
		if err != nil {
			return 0, 0, fmt.Errorf("transfer: %w", err)
		}
		switch {
		case !start.IsZero():
			sum += n
			if took := time.Since(start); took >= transferTime {
				return sum, took, nil
			}
		case time.Since(opened) >= warmUp:
			start = time.Now()
		}
	}
}

// transfer has the pod connect to the node, and returns Gbit/s as the node sees it.
func (c worker) transfer(ctx context.Context, d direction) (float64, error) {
	at := netip.AddrPortFrom(c.node.address, benchPort)
	// One side of dd is the socket. It is cut off when the node has seen enough.
	command := fmt.Sprintf("nc %s %d -e dd %s; true", at.Addr(), at.Port(), d.dd)
	var gbits float64
	listening := make(chan error, 1)
	served := onThread(func() error {
		listener, err := func() (int, error) {
			if err := enterNetns(c.node.netns); err != nil {
				return -1, err
			}
			return listen(at)
		}()
		listening <- err
		if err != nil {
			return err
		}
		defer unix.Close(listener)
		conn, err := accept(listener)
		if err != nil {
			return err
		}
		defer unix.Close(conn)
		n, took, err := move(conn, d.step)
		gbits = float64(n) * 8 / 1e9 / took.Seconds()
		return err
	})
	if err := <-listening; err != nil {
		return 0, err
	}
	_, err := c.exec(ctx, "/bin/sh", "-c", command)
	return gbits, errors.Join(err, <-served)
}
