package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

const (
	// probeCache is where ProbeKVM keeps its answer for an empty Config.Accel.
	probeCache = "/run/h8s/hyper"
	// probeTimeout is how long a guest may take to open its port. With KVM it takes a
	// second.
	probeTimeout = 15 * time.Second
)

// chooseAccel sets an empty Accel.
func (c *Config) chooseAccel(ctx context.Context) error {
	if c.Accel != "" {
		return nil
	}
	found, err := probe(ctx, c.Kernel, c.Initrd, probeCache, c.Users)
	if err != nil {
		return fmt.Errorf("probe KVM: %w", err)
	}
	if c.Accel = "tcg"; found.OK {
		c.Accel = "kvm"
	}
	return nil
}

// probed is the cached answer of ProbeKVM.
type probed struct {
	OK  bool   `json:"ok"`
	Why string `json:"why,omitempty"`
}

// ProbeKVM says whether a guest really boots with KVM here, and if not, why. That a
// device /dev/kvm opens says little: it may be an emulation on which no ordinary
// kernel runs, and QEMU is one of users. The answer is kept in cacheDir until the host restarts, or until QEMU,
// kernel or initrd change; processes that ask the same at the same time wait for one answer.
func ProbeKVM(ctx context.Context, kernel, initrd, cacheDir string, users Users) (ok bool, why string, err error) {
	found, err := probe(ctx, kernel, initrd, cacheDir, users)
	if err != nil {
		return false, "", fmt.Errorf("probe KVM: %w", err)
	}
	return found.OK, found.Why, nil
}

func probe(ctx context.Context, kernel, initrd, cacheDir string, users Users) (probed, error) {
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return probed{}, err
	}
	c := Config{
		ID: "probe", Dir: cacheDir, Kernel: kernel, Initrd: initrd, CPUs: 1, Memory: 256 << 20, Accel: "kvm", Users: users,
	}
	m, err := newMachine(c)
	if err != nil {
		return probed{}, err
	}
	answer := filepath.Join(cacheDir, "kvm-"+m.manifest.question())
	unlock, err := lock(ctx, answer+".lock", unix.LOCK_EX)
	if err != nil {
		return probed{}, err
	}
	defer unlock()
	var found probed
	if text, err := os.ReadFile(answer + ".json"); err == nil && json.Unmarshal(text, &found) == nil {
		return found, nil
	}
	if err := bootOnce(ctx, c); ctx.Err() != nil {
		return probed{}, context.Cause(ctx)
	} else if found = (probed{OK: err == nil}); err != nil {
		found.Why = err.Error()
	}
	text, err := json.Marshal(found)
	if err != nil {
		return probed{}, err
	}
	return found, renameio.WriteFile(answer+".json", text, 0o644)
}

// question names what an answer of ProbeKVM holds for. Where the pods of a node boot several guests in
// turn, none makes the answer for another forgotten: to ask again takes up to probeTimeout.
func (m manifest) question() string {
	all := sha256.Sum256([]byte(strings.Join(append([]string{m.Boot}, m.Files...), "\n")))
	return hex.EncodeToString(all[:8])
}

// bootOnce boots a guest until it opens its port.
func bootOnce(ctx context.Context, c Config) error {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return err
	} else if err := f.Close(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	v, err := Start(ctx, c)
	if err != nil {
		return err
	}
	defer func() {
		v.Kill()
		<-v.Done()
		v.channel.Close()
	}()
	return v.awaitPort(ctx, 1)
}

// lock takes a lock between processes, LOCK_EX or LOCK_SH of flock(2).
func lock(ctx context.Context, path string, how int) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}
