package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/tap"
)

// Files of the shim in a sandbox's bundle, which containerd makes and removes.
const (
	configFile = "hyper-config.json" // Config, written when the shim is started
	stateFile  = "hyper-state.json"  // state
)

// state is what has to be cleaned up after a shim that was killed.
type state struct {
	NetNS  string `json:"netns,omitempty"`
	Cgroup string `json:"cgroup,omitempty"`
	RunDir string `json:"runDir,omitempty"`
	// Socket is the shim's, which stays as long as the shim.
	Socket string `json:"socket,omitempty"`
	// QEMU is the process ID of QEMU, which dies with the shim, and Started when it
	// was started, in clock ticks since boot: process IDs are used again.
	QEMU    int    `json:"qemu,omitempty"`
	Started uint64 `json:"started,omitempty"`
}

func (s state) save(bundle string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return renameio.WriteFile(filepath.Join(bundle, stateFile), text, 0o600)
}

func loadState(bundle string) (state, error) {
	var s state
	text, err := os.ReadFile(filepath.Join(bundle, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	return s, err
}

// cleanUp removes everything that a virtual machine leaves on its node. It is
// idempotent. QEMU is dead, or dying of its parent's death.
func (s state) cleanUp() error {
	var errs []error
	if s.QEMU != 0 {
		errs = append(errs, s.endQEMU())
	}
	if s.NetNS != "" {
		errs = append(errs, restoreLoopback(s.NetNS), tap.Remove(s.NetNS))
	}
	if s.Cgroup != "" {
		errs = append(errs, removeCgroup(s.Cgroup))
	}
	if s.RunDir != "" {
		errs = append(errs, os.RemoveAll(s.RunDir))
	}
	return errors.Join(errs...)
}

// endTimeout is how long a killed process may take to be gone.
const endTimeout = 5 * time.Second

func (s state) endQEMU() error {
	fd, err := unix.PidfdOpen(s.QEMU, 0)
	if err != nil {
		return nil // it is gone
	}
	defer unix.Close(fd)
	// The descriptor is of one process for good; this is the one that was started.
	if started, err := startTime(s.QEMU); err != nil || started != s.Started {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill QEMU, process %d: %w", s.QEMU, err)
	}
	deadline := time.Now().Add(endTimeout)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for the end of QEMU, process %d: %w", s.QEMU, err)
		case !time.Now().Before(deadline):
			return fmt.Errorf("QEMU, process %d, was killed and is still there after %s", s.QEMU, endTimeout)
		}
	}
}
