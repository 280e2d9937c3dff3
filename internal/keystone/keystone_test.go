package keystone

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/config/clouds"
	"github.com/gophercloud/gophercloud/v2/openstack/identity/v3/domains"
)

// login asks for a token, and returns Keystone's status and the token.
func login(t *testing.T, s *Server, password string) (int, string) {
	t.Helper()
	body := fmt.Sprintf(`{"auth": {"identity": {"methods": ["password"], "password": {"user": {"name": %q, "domain": {"name": "Default"}, "password": %q}}},
		"scope": {"project": {"name": "admin", "domain": {"name": "Default"}}}}}`, AdminUser, password)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+"/auth/tokens", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode, resp.Header.Get("X-Subject-Token")
}

// processes are those whose user is this Keystone's and that run in its directory.
func processes(t *testing.T, s *Server) []string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(links, func(link string) bool {
		dir, err := os.Readlink(link)
		return err != nil || dir != s.data()
	})
}

func TestServer(t *testing.T) {
	s, err := StartServer(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	t.Cleanup(func() {
		if err := s.Close(); err != nil && !closed {
			t.Error(err)
		}
	})
	if status, _ := login(t, s, "wrong"); status != http.StatusUnauthorized {
		t.Errorf("a wrong password: status %d", status)
	}
	status, token := login(t, s, s.AdminPassword())
	if status != http.StatusCreated || token == "" {
		t.Fatalf("the administrator's login: status %d", status)
	}
	if cloud := s.AdminCloud("test"); !bytes.Contains(cloud, []byte(s.URL())) || !bytes.Contains(cloud, []byte(s.AdminPassword())) {
		t.Errorf("clouds.yaml is not of this Keystone:\n%s", cloud)
	}
	// Twice the same user; many writes.
	cloud, err := s.EnsureServiceUser(t.Context(), "h8s", "h8s")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.EnsureServiceUser(t.Context(), "h8s", "h8s"); err != nil || !bytes.Equal(again, cloud) {
		t.Errorf("the service user again: %v, clouds.yaml\n%s\nwas\n%s", err, again, cloud)
	}
	reader, err := s.EnsureReader(t.Context(), "reader", "reads")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.EnsureReader(t.Context(), "reader", "reads"); err != nil || !bytes.Equal(again, reader) {
		t.Errorf("the reader again: %v, clouds.yaml\n%s\nwas\n%s", err, again, reader)
	}
	for name, want := range map[string]gophercloud.AuthOptions{
		"h8s":   {Username: "h8s", Scope: &gophercloud.AuthScope{ProjectName: ServiceProject, DomainName: defaultDomain}},
		"reads": {Username: "reader", Scope: &gophercloud.AuthScope{System: true}},
	} {
		got, _, _, err := clouds.Parse(clouds.WithCloudsYAML(bytes.NewReader(Clouds(cloud, reader))), clouds.WithCloudName(name))
		if err != nil || got.Username != want.Username || got.Scope == nil || *got.Scope != *want.Scope {
			t.Errorf("the cloud %s of one clouds.yaml with both: %v, user %s, scope %+v", name, err, got.Username, got.Scope)
			continue
		}
		got.AllowReauth = false
		if _, err := openstack.AuthenticatedClient(t.Context(), got); err != nil {
			t.Errorf("log in to the cloud %s: %v", name, err)
		}
	}
	admin, err := s.Admin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if _, err := domains.Create(t.Context(), admin, domains.CreateOpts{Name: fmt.Sprint("domain-", i)}).Extract(); err != nil {
			t.Fatal(err)
		}
	}
	running := processes(t, s)
	if len(running) != 1 {
		t.Fatalf("processes %v, want one", running)
	}
	info, err := os.Stat(filepath.Dir(running[0]))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid == 0 {
		t.Error("Keystone runs as root")
	}
	keptFrom(t, s)

	s.Stop()
	s.Stop()
	if conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.opts.Address.String()); err == nil {
		_ = conn.Close()
		t.Error("a stopped Keystone accepts connections")
	}
	if left := processes(t, s); len(left) > 0 {
		t.Errorf("a stopped Keystone has processes %v", left)
	}

	// A Keystone that was taken over leaves links where we might write.
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"keystone.log", "keystone.conf", "admin-password", "bootstrapped", "fernet-keys", "elsewhere"} {
		if err := os.Symlink(victim, s.data(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(victim, s.data("hard")); err != nil {
		t.Fatal(err)
	}
	// The same directory again: what was is still there.
	again, err := Prepare(t.Context(), Options{Dir: s.opts.Dir, Address: s.opts.Address})
	if err != nil {
		t.Fatal(err)
	}
	if again.AdminPassword() != s.AdminPassword() {
		t.Error("the administrator has another password")
	}
	if info, err := os.Stat(victim); err != nil || info.Size() > 0 || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("a file elsewhere was changed: %+v, %v", info, err)
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL()+"/auth/tokens", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Auth-Token", token)
	req.Header.Set("X-Subject-Token", token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("a token from before the restart: %s", resp.Status)
	}

	// One whose port is taken says so.
	err = again.Run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a second Keystone at the same address: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	closed = true
	if _, err := os.Stat(s.opts.Dir); !os.IsNotExist(err) {
		t.Errorf("files are left: %v", err)
	}
}

// keptFrom finds what Keystone may write outside of its data, and what others may read.
func keptFrom(t *testing.T, s *Server) {
	t.Helper()
	err := filepath.WalkDir(s.opts.Dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if perm := info.Mode().Perm(); perm&0o007 != 0 {
			t.Errorf("others get at %s: %s", path, perm)
		}
		if path == s.data() {
			return filepath.SkipDir
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 || info.Mode().Perm()&0o020 != 0 {
			t.Errorf("Keystone may write %s, of user %d: %s", path, uid, info.Mode())
		}
		if strings.HasSuffix(path, "-password") && info.Mode().Perm() != 0o600 {
			t.Errorf("Keystone may read %s", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestDirectoryOfAnother: where somebody else may put links, root writes nothing.
func TestDirectoryOfAnother(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keystone")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, unprivileged, unprivileged); err != nil {
		t.Fatal(err)
	}
	_, err := Prepare(t.Context(), Options{Dir: dir})
	if err == nil || !strings.Contains(err.Error(), "not a directory that is the caller's") {
		t.Errorf("prepared: %v", err)
	}
	if made, err := os.ReadDir(dir); err != nil || len(made) > 0 {
		t.Errorf("%v, %v, want nothing", made, err)
	}
}

// TestPackages: what the Makefile installs is what an error tells to install.
func TestPackages(t *testing.T) {
	data, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(string(data))
	for _, p := range Packages {
		if !slices.Contains(words, p) {
			t.Errorf("the Makefile does not install %s", p)
		}
	}
}
