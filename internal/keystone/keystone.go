// Package keystone runs a real Keystone, OpenStack's identity service, from
// Debian's packages: with SQLite, Fernet tokens and one uWSGI process. It is for
// `h8s up --keystone` and for tests; a Keystone for production is run by those who
// run OpenStack.
package keystone

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/renameio/v2"
)

// Packages are the Debian packages that a Keystone needs, installed without what
// they recommend. None of them has a service that starts.
var Packages = []string{"python3-keystone", "uwsgi-core", "uwsgi-plugin-python3"}

// What is installed where. Debian's own Python runs it, whatever python3 is first
// in PATH.
const (
	python  = "/usr/bin/python3"
	manage  = "/usr/bin/keystone-manage"
	wsgi    = "/usr/bin/keystone-wsgi-public"
	uwsgi   = "/usr/bin/uwsgi-core"
	plugins = "/usr/lib/uwsgi/plugins"
)

const (
	// Region that the catalogue and every clouds.yaml name.
	Region = "RegionOne"
	// AdminUser has the role admin on the project of the same name and on the
	// system; both are in the domain Default.
	AdminUser = "admin"
	// DefaultTokenLifetime is how long a token is valid, as in Keystone itself.
	DefaultTokenLifetime = time.Hour

	defaultDomain = "Default"
	// Debian reserves the number and gives it to nobody, so no other process of the
	// machine can read Keystone's keys. It needs no name.
	unprivileged = 65533
	// How long Keystone may take: it imports half of OpenStack, on a busy machine too.
	manageTimeout = 5 * time.Minute
	startTimeout  = 2 * time.Minute
	stopTimeout   = 10 * time.Second
)

// Options say where a Keystone is and what it does. Dir and Address must be set.
type Options struct {
	// Dir holds all files of this Keystone, made if need be. They are the caller's, but
	// for the directory `data` with the database: if the caller is root, Keystone is an
	// unprivileged user that may write there and nowhere else, and must be able to get
	// there. What is in it from before goes on: the database, the keys, the
	// administrator's password.
	Dir string
	// Address to listen on.
	Address netip.AddrPort
	// TokenLifetime counts from a token's issue; 0 means DefaultTokenLifetime.
	TokenLifetime time.Duration
}

// Keystone is one installation: files, and an address.
type Keystone struct {
	opts     Options
	password string
	// uid and gid are those of Keystone's processes.
	uid, gid int
}

// Prepare makes what is missing of a Keystone's files: configuration, keys, and a
// database with an administrator. It is idempotent, and takes some seconds the first
// time. An error says what to install if it is that.
func Prepare(ctx context.Context, opts Options) (*Keystone, error) {
	if err := Installed(); err != nil {
		return nil, err
	}
	if opts.TokenLifetime == 0 {
		opts.TokenLifetime = DefaultTokenLifetime
	}
	k := &Keystone{opts: opts, uid: os.Geteuid(), gid: os.Getegid()}
	if k.uid == 0 {
		k.uid, k.gid = unprivileged, unprivileged
	}
	if err := k.prepareFiles(); err != nil {
		return nil, fmt.Errorf("prepare Keystone's files: %w", err)
	}
	if err := k.bootstrap(ctx); err != nil {
		return nil, fmt.Errorf("prepare Keystone's database: %w", err)
	}
	return k, nil
}

// Installed says which packages to install, if any are missing.
func Installed() error {
	for _, path := range []string{python, manage, wsgi, uwsgi} {
		if _, err := os.Stat(path); err != nil {
			return missing(path)
		}
	}
	_, err := pythonPlugin()
	return err
}

func missing(path string) error {
	return fmt.Errorf("Keystone is not installed, %s is missing: run `make keystone`, or `apt-get install --no-install-recommends %s`", path, strings.Join(Packages, " "))
}

// pythonPlugin is uWSGI's, which Debian names for its version of Python.
func pythonPlugin() (string, error) {
	pattern := filepath.Join(plugins, "python3*_plugin.so")
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) == 0 {
		return "", missing(pattern)
	}
	return found[0], nil
}

// URL is Keystone's endpoint, which clients call auth_url.
func (k *Keystone) URL() string { return "http://" + k.opts.Address.String() + "/v3" }

// AdminPassword is the password of AdminUser.
func (k *Keystone) AdminPassword() string { return k.password }

// AdminCloud is the administrator's clouds.yaml, with one cloud of the given name.
// See https://docs.openstack.org/openstacksdk/latest/user/config/configuration.html.
func (k *Keystone) AdminCloud(cloud string) []byte {
	return k.clouds(cloud, AdminUser, k.password, inProject(AdminUser))
}

// The first line of a clouds.yaml, and what the users of one log in to.
const (
	cloudsHeader = "clouds:\n"
	onSystem     = "system_scope: all"
)

func inProject(name string) string {
	return "project_name: " + name + "\n      project_domain_name: " + defaultDomain
}

// clouds is the clouds.yaml of a user of the domain Default.
func (k *Keystone) clouds(cloud, user, password, scope string) []byte {
	return fmt.Appendf([]byte(cloudsHeader), `  %s:
    auth:
      auth_url: %s
      username: %s
      password: %s
      user_domain_name: %s
      %s
    region_name: %s
    identity_api_version: 3
`, cloud, k.URL(), user, password, defaultDomain, scope, Region)
}

func (k *Keystone) path(elem ...string) string {
	return filepath.Join(append([]string{k.opts.Dir}, elem...)...)
}

// data is where Keystone writes. Whoever has taken Keystone over can put links to
// anything there: we make the directory, and touch nothing in it.
func (k *Keystone) data(elem ...string) string {
	return k.path(append([]string{"data"}, elem...)...)
}

// Log is the file that all of Keystone's programs write to. It is opened for them.
func (k *Keystone) Log() string { return k.path("keystone.log") }

func (k *Keystone) prepareFiles() error {
	if err := os.MkdirAll(k.opts.Dir, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(k.opts.Dir)
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); !ok || !info.IsDir() || int(stat.Uid) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not a directory that is the caller's to write alone, so others may have put links there; remove it (`h8s down` does, if it is an embedded cluster's)", k.opts.Dir)
	}
	for _, dir := range []struct {
		path string
		uid  int
		perm os.FileMode
	}{
		{k.opts.Dir, os.Geteuid(), 0o710},
		{k.path("fernet-keys"), os.Geteuid(), 0o750},
		{k.path("credential-keys"), os.Geteuid(), 0o750},
		{k.data(), k.uid, 0o700},
	} {
		if err := k.ensureDir(dir.path, dir.uid, dir.perm); err != nil {
			return err
		}
	}
	// sqlite_synchronous: nobody's data depends on a crash of the machine. bcrypt's usual
	// twelve rounds cost a quarter of a second of CPU at each login; four is the least.
	config := fmt.Sprintf(`[DEFAULT]
use_stderr = true
[database]
connection = sqlite:///%s?timeout=60
sqlite_synchronous = false
[identity]
password_hash_rounds = 4
[auth]
methods = external,password,token,oauth1,mapped,application_credential,totp
[token]
provider = fernet
expiration = %d
[fernet_tokens]
key_repository = %s
[fernet_receipts]
key_repository = %s
[credential]
key_repository = %s
`, k.data("keystone.db"), int(k.opts.TokenLifetime.Seconds()), k.path("fernet-keys"), k.path("fernet-keys"), k.path("credential-keys"))
	if err := k.publish(k.path("keystone.conf"), config); err != nil {
		return err
	}
	for _, repository := range []string{"fernet-keys", "credential-keys"} {
		// 0 is the key that will be the primary one after a rotation; the highest number is
		// the primary one now.
		for _, number := range []string{"0", "1"} {
			key := make([]byte, 32)
			_, _ = rand.Read(key)
			if _, err := ensureFile(k.path(repository, number), base64.URLEncoding.EncodeToString(key), k.publish); err != nil {
				return err
			}
		}
	}
	if k.password, err = k.ensurePassword(AdminUser); err != nil {
		return err
	}
	log, err := os.OpenFile(k.Log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return log.Close()
}

// ensureDir makes a directory in one that is the caller's.
func (k *Keystone) ensureDir(path string, uid int, perm os.FileMode) error {
	if err := os.Mkdir(path, perm); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.Lchown(path, uid, k.gid); err != nil {
		return err
	}
	return os.Chmod(path, perm)
}

// publish writes a file of the caller's that Keystone may read, and others may not.
func (k *Keystone) publish(path, content string) error {
	file, err := renameio.NewPendingFile(path, renameio.WithStaticPermissions(0o640))
	if err != nil {
		return err
	}
	defer func() { _ = file.Cleanup() }()
	if err := file.Chown(-1, k.gid); err != nil {
		return err
	}
	if _, err := file.WriteString(content); err != nil {
		return err
	}
	return file.CloseAtomicallyReplace()
}

// ensurePassword is a random one, made when it is first asked for.
func (k *Keystone) ensurePassword(user string) (string, error) {
	secret := make([]byte, 16)
	_, _ = rand.Read(secret)
	return ensureFile(k.path(user+"-password"), hex.EncodeToString(secret), func(path, content string) error {
		return renameio.WriteFile(path, []byte(content), 0o600)
	})
}

// ensureFile returns what is in the file, which is written if there is none.
func ensureFile(path, content string, write func(path, content string) error) (string, error) {
	data, err := os.ReadFile(path)
	if !errors.Is(err, os.ErrNotExist) {
		return string(data), err
	}
	return content, write(path, content)
}

// bootstrap makes the database: once, or again if it was not finished.
func (k *Keystone) bootstrap(ctx context.Context) error {
	done := k.path("bootstrapped")
	if url, err := os.ReadFile(done); err == nil && string(url) == k.URL() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, manageTimeout)
	defer cancel()
	// One request of Keystone's may read and write on two connections, and waits for
	// itself unless SQLite lets readers and a writer be (https://www.sqlite.org/wal.html).
	const wal = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('pragma journal_mode=wal')"
	conf := k.path("keystone.conf")
	for _, args := range [][]string{
		{"-c", wal, k.data("keystone.db")},
		{manage, "--config-file", conf, "db_sync"},
		{
			manage, "--config-file", conf, "bootstrap", "--bootstrap-region-id", Region,
			"--bootstrap-public-url", k.URL(), "--bootstrap-internal-url", k.URL(), "--bootstrap-admin-url", k.URL(),
		},
	} {
		cmd := k.command(ctx, python, args...)
		cmd.Env = append(cmd.Env, "OS_BOOTSTRAP_PASSWORD="+k.password) // not to be seen in a list of processes
		if err := k.run(cmd, func() error { return cmd.Wait() }); err != nil {
			return fmt.Errorf("%s: %w; %s", strings.Join(args, " "), errors.Join(ctx.Err(), err), k.explain())
		}
	}
	return renameio.WriteFile(done, []byte(k.URL()), 0o600)
}

// command runs a program as the unprivileged user. It ends with the thread that
// starts it, which run takes care of.
func (k *Keystone) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = k.data()
	cmd.Env = []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + k.data(), "LANG=C.UTF-8",
		"OS_KEYSTONE_CONFIG_FILES=" + k.path("keystone.conf"),
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if k.uid != os.Geteuid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(k.uid), Gid: uint32(k.gid), Groups: []uint32{}}
	}
	return cmd
}

// run starts a command, which writes to the log, and stays on its thread until wait
// returns: the kernel ends the command with the thread that started it.
func (k *Keystone) run(cmd *exec.Cmd, wait func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	log, err := os.OpenFile(k.Log(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	return wait()
}

// Run serves until the context ends, and then returns the reason why it ended; any
// other error is of Keystone, which has ended by itself. Nothing runs any more when
// it returns.
func (k *Keystone) Run(ctx context.Context) error {
	// The socket is made here, so that a port in use is an error that says so.
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", k.opts.Address.String())
	if err != nil {
		return fmt.Errorf("listen for Keystone: %w", err)
	}
	socket, err := listener.(*net.TCPListener).File()
	_ = listener.Close()
	if err != nil {
		return fmt.Errorf("listen for Keystone: %w", err)
	}
	defer socket.Close()
	plugin, err := pythonPlugin()
	if err != nil {
		return err
	}
	// One process of one thread: with SQLite, several wait for each other's locks.
	// Without "Connection: close" uWSGI closes a connection that the client keeps for its
	// next request, and that request fails.
	cmd := k.command(context.WithoutCancel(ctx), uwsgi,
		"--plugin", plugin, "--http-socket", "fd://3", "--processes", "1", "--need-app", "--die-on-term",
		"--buffer-size", "65535", "--add-header", "Connection: close", "--disable-logging", "--wsgi-file", wsgi)
	cmd.ExtraFiles = []*os.File{socket}
	return k.run(cmd, func() error {
		// From here on only Keystone has the socket: when it ends, clients are refused.
		_ = socket.Close()
		var exit error
		ended := make(chan struct{})
		go func() {
			exit = cmd.Wait()
			close(ended)
		}()
		select {
		case <-ended:
			return fmt.Errorf("Keystone has ended (%w); %s", exit, k.explain())
		case <-ctx.Done():
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(stopTimeout):
			_ = cmd.Process.Kill()
			<-ended
		}
		return context.Cause(ctx)
	})
}

// explain ends an error with the last line of the log.
func (k *Keystone) explain() string {
	data, err := os.ReadFile(k.Log())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return fmt.Sprintf("%s ends with %s", k.Log(), strconv.Quote(lines[len(lines)-1]))
}

// Await waits until Keystone answers, as long as the context and the patience for a
// busy machine last.
func (k *Keystone) Await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := k.answers(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("Keystone does not get ready: %w; %s", err, k.explain())
		case <-ticker.C:
		}
	}
}

func (k *Keystone) answers(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.URL(), nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", k.URL(), resp.Status)
	}
	return nil
}
