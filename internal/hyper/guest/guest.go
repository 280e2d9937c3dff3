//go:build linux

// Package guest is PID 1 of a pod's virtual machine: it makes the initramfs a
// system, serves the host over the channel, runs containers by containerd's own Task
// service and crun, and reaps. The host rules the guest; the containers, which run as
// root of this very system, must not end it by accident, and gain nothing by ending
// it on purpose.
package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// Run is the life of PID 1. It returns only when it cannot go on: then the machine has
// to end.
func Run() error {
	if os.Getpid() != 1 {
		return errors.New("this is PID 1 of a virtual machine, and nothing to run elsewhere")
	}
	// What is free is better with the containers, and with the host.
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(48 << 20)
	if err := boot(); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	reap()

	ctx := context.Background()
	events := newEvents()
	pipes := newPipes(guestapi.PipeDir)
	tasks, err := newTasks(ctx, events, pipes)
	if err != nil {
		return err
	}
	// What is written must not be all that the containers have: the end would be an
	// out-of-memory kill, and not ENOSPC.
	memory, err := readNumber(filepath.Join(cgroupRoot, podCgroup, "memory.max"))
	if err != nil {
		return err
	}
	devices, err := watchBlockDevices()
	if err != nil {
		return err
	}
	links, err := raiseLinks()
	if err != nil {
		return fmt.Errorf("network cards: %w", err)
	}
	g := &guest{
		events:     events,
		links:      links,
		disks:      newDisks(guestapi.DiskDir, devices),
		containers: newContainers(guestapi.BundleDir, guestapi.DiskDir, memory/2),
		volumes:    newVolumes(guestapi.VolumeDir, memory/2),
		powerOff:   powerOff,
	}
	control := serveControl(g.handler())
	handlers := map[channel.Kind]channel.Handler{
		channel.Task:    tasks.handle,
		channel.Control: control.handle,
		channel.Pipe:    pipes.handle,
		channel.Dial:    dialLoopback,
	}
	for {
		port, err := openPort(ctx, guestapi.Port)
		if err != nil {
			return err
		}
		// The session ends when the host closes its end, as when a template was saved. Then
		// another may come: it finds the port opened again, and nothing of the one before.
		err = channel.Serve(ctx, port, handlers)
		port.Close()
		if err != nil {
			fmt.Fprintln(os.Stderr, "hyperinit:", err)
		}
	}
}

// readNumber reads a file of the kernel's that holds a number.
func readNumber(name string) (int64, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// poll calls done until it reports true or fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// powerOff ends the machine in order.
func powerOff() error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
