package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// onThread runs f on a thread of its own, which ends with f: whatever f changes of
// it (namespaces, affinity) touches nobody else.
func onThread(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		done <- f()
	}()
	return done
}

// inNetns runs f in the network namespace at path.
func inNetns(path string, f func() error) error {
	return <-onThread(func() error {
		if err := enterNetns(path); err != nil {
			return err
		}
		return f()
	})
}

// enterNetns moves the calling thread into the network namespace at path.
func enterNetns(path string) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}

// newNetns makes a network namespace that lives as long as the file is open, with
// lo up. It is reached by the path netnsPath returns.
func newNetns() (*os.File, error) {
	var ns *os.File
	err := <-onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("set lo up: %w", err)
		}
		ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}

func netnsPath(ns *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }
