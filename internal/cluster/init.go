package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/install"
)

// initRequest is what the supervisor tells a node init once its network card and
// cgroup are there.
type initRequest struct {
	Config *Config `json:"config"`
	Node   string  `json:"node"`
}

// RunNodeInit is PID 1 of a node. It reads its request from the lifeline, a pipe
// whose other end the supervisor holds as long as it lives, and returns when that
// end closes or the node cannot be made.
func RunNodeInit(ctx context.Context, lifeline io.Reader, log *slog.Logger) error {
	if os.Getpid() != 1 {
		return errors.New("node-init is started by the supervisor, as PID 1 of a node: use `h8s up`")
	}
	var req initRequest
	decoder := json.NewDecoder(lifeline)
	if err := decoder.Decode(&req); err != nil {
		return fmt.Errorf("read request from the supervisor: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		_, err := io.Copy(io.Discard, lifeline)
		cancel(fmt.Errorf("the supervisor has gone: %w", errors.Join(err, io.EOF)))
	}()
	n, err := req.Config.node(req.Node)
	if err != nil {
		return err
	}
	if err := bootNode(req.Config, n); err != nil {
		return fmt.Errorf("boot node %s: %w", n.Name, err)
	}
	log.Info("node booted", "node", n.Name)
	// Only now: until here the package waited for its own children.
	reaper := newReaper()
	go reaper.run(ctx)
	r := &runner{
		reaper: reaper,
		binDir: nodeBinDir,
		logDir: "/var/log/h8s",
		env: []string{
			"PATH=" + nodeBinDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
			"HOME=/root",
		},
		log: log,
	}
	go func() {
		// It is not needed to start: whoever needs it first finds it out.
		if err := r.once(ctx, program{name: install.Shim, args: []string{"probe"}}); err != nil {
			log.Warn("what executes guests is not known before the first pod that is one", "error", err)
		}
	}()
	r.run(ctx, nodePrograms(req.Config, n))
	return context.Cause(ctx)
}

// bootNode makes what a machine has when its init starts services.
func bootNode(c *Config, n Node) error {
	if err := unix.Sethostname([]byte(n.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	state := c.state()
	if err := prepareNodeFiles(c, n); err != nil {
		return err
	}
	if err := enterRoot(state, n.Name, c.BinDir); err != nil {
		return err
	}
	return setupNodeNetwork(c, n)
}

// prepareNodeFiles writes what is in a node's private directories when it boots.
func prepareNodeFiles(c *Config, n Node) error {
	state := c.state()
	// What is in /run and /tmp is of the life before: sockets, PID files, names of
	// network namespaces.
	for _, dir := range []string{"run", "tmp"} {
		if err := os.RemoveAll(state.node(n.Name, dir)); err != nil {
			return fmt.Errorf("clear /%s: %w", dir, err)
		}
	}
	for dir, mode := range map[string]os.FileMode{
		"run": 0o755, "run/lock": 0o1777 | os.ModeSticky, "run/netns": 0o755, "tmp": 0o1777 | os.ModeSticky,
		"etc": 0o755, "opt": 0o755, "opt/cni/bin": 0o755, "log/runsc": 0o755,
		"var/lib/kubelet": 0o700, "var/lib/containerd": 0o711, "var/log/pods": 0o755, "var/tmp": 0o1777 | os.ModeSticky,
	} {
		path := state.node(n.Name, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"var/run": "/run", "var/lock": "/run/lock"} {
		if err := os.Symlink(target, state.node(n.Name, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	etc := state.node(n.Name, "etc")
	if err := copyEtc(etc); err != nil {
		return err
	}
	machineID := filepath.Join(etc, "machine-id")
	if _, err := os.Stat(machineID); errors.Is(err, os.ErrNotExist) {
		id := strings.ReplaceAll(uuid.NewString(), "-", "") + "\n"
		if err := writeFile(machineID, []byte(id), 0o444); err != nil {
			return err
		}
	}
	p, err := ensurePKI(state.pki(), c, time.Now())
	if err != nil {
		return err
	}
	snapshotter := "overlayfs"
	if !supportsOverlay(state.node(n.Name, "var", "lib", "containerd")) {
		snapshotter = "native"
	}
	files, err := nodeFiles(c, n, p, snapshotter)
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := writeFile(filepath.Join(etc, f.path), f.data, f.mode); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
	}
	return copyPlugins(filepath.Join(c.BinDir, "cni"), state.node(n.Name, "opt", "cni", "bin"))
}

// copyPlugins copies upstream's CNI plugins into the node's plugin directory,
// which stays writable: add-ons install theirs beside them.
func copyPlugins(from, to string) error {
	entries, err := os.ReadDir(from)
	if err != nil {
		return fmt.Errorf("find CNI plugins: %w", err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(to, e.Name()), data, 0o755); err != nil {
			return fmt.Errorf("install CNI plugin: %w", err)
		}
	}
	return nil
}
