package login

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"h8s.io/hypernetes/internal/cluster"
	"h8s.io/hypernetes/internal/dex"
	"h8s.io/hypernetes/internal/identity"
)

// patience with a busy machine, where a deadline is not what is tested.
const patience = 2 * time.Minute

func binDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("KUBEBUILDER_ASSETS"); dir != "" {
		return dir
	}
	dir, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func eventually(t *testing.T, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("gave up after %s: %v", patience, err)
		case <-ticker.C:
		}
	}
}

func newDex(t *testing.T) *dex.Provider {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddrPort(listener.Addr().String())
	listener.Close()
	p, err := dex.New(filepath.Join(binDir(t), "dex"), t.TempDir(), address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// browser is a person who opens what `h8s login` says and fills in the forms.
type browser struct {
	provider *dex.Provider
	told     string
	// failed ends the login, which would wait for an approval that does not come.
	failed context.CancelCauseFunc
}

// browse is a browser, and a context for what waits for it.
func browse(ctx context.Context, provider *dex.Provider) (context.Context, *browser) {
	ctx, cancel := context.WithCancelCause(ctx)
	return ctx, &browser{provider: provider, failed: cancel}
}

func (b *browser) Ask(context.Context, string, bool) (string, error) {
	return "", errors.New("nothing is asked on the terminal in the device flow")
}

func (b *browser) Tell(message string) {
	b.told = message
	go func() {
		if err := b.provider.Approve(context.Background(), regexp.MustCompile(`https://\S+`).FindString(message)); err != nil {
			b.failed(err)
		}
	}()
}

// TestOIDC logs in with the device flow of a real provider, to a real API server with
// the configuration that `h8s up --oidc-…` renders.
func TestOIDC(t *testing.T) {
	ctx := t.Context()
	provider := newDex(t)
	trust := cluster.OIDC{IssuerURL: provider.Issuer, ClientID: dex.ClientID, CA: provider.CA, UsernameClaim: "email", GroupsClaim: "groups", Prefix: "oidc:"}
	if err := trust.Validate(identity.DefaultPrefix); err != nil {
		t.Fatal(err)
	}
	rendered, err := trust.AuthenticationConfiguration()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "authentication.yaml")
	if err := os.WriteFile(path, rendered, 0o600); err != nil {
		t.Fatal(err)
	}
	env := &envtest.Environment{BinaryAssetsDirectory: binDir(t), ControlPlaneStartTimeout: 3 * time.Minute, ControlPlaneStopTimeout: time.Minute}
	env.ControlPlane.GetAPIServer().Configure().Set("authentication-config", path)
	config, err := env.Start()
	if err != nil {
		t.Fatalf("start etcd and kube-apiserver: %v", err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	etcd := env.ControlPlane.Etcd.URL.String()
	start := func(namespace string) {
		t.Helper()
		if err := provider.Start(ctx, etcd, namespace); err != nil {
			t.Fatal(err)
		}
	}
	start("first/")

	home := t.TempDir()
	cache := Cache(filepath.Join(home, "h8s", "sessions"))
	session := Session{
		Cluster: Cluster{Server: config.Host, CA: string(config.CAData)},
		OIDC:    &OIDC{Issuer: provider.Issuer, ClientID: dex.ClientID, CA: provider.CA, Scopes: []string{"email", "groups"}},
	}
	waits, person := browse(ctx, provider)
	if err := cache.Login(waits, "ann/dex", &session, person); err != nil {
		t.Fatalf("%v (%v); told: %q", err, context.Cause(waits), person.told)
	}
	checkModes(t, string(cache))

	token := func() string {
		t.Helper()
		got, err := cache.Credential(ctx, "ann/dex", session.Cluster, nil)
		if err != nil {
			t.Fatal(err)
		}
		return got.Token
	}
	first := token()
	checkWhoAmI(t, config, first)
	checkKubectl(t, config, home, "ann/dex")
	if token() != first {
		t.Error("a token that is good for minutes was replaced")
	}

	// At its end: several kubectls at once renew it once; each refresh token is taken
	// once only.
	age(t, cache, "ann/dex", 24*time.Hour)
	renewed := make([]string, 8)
	var wg sync.WaitGroup
	for i := range renewed {
		wg.Go(func() { renewed[i] = token() })
	}
	wg.Wait()
	if got := slices.Compact(slices.Clone(renewed)); len(got) != 1 || got[0] == first {
		t.Errorf("renewed to %d tokens", len(got))
	}
	checkWhoAmI(t, config, renewed[0])

	// The provider is gone: what is left of the token is used.
	provider.Stop()
	age(t, cache, "ann/dex", time.Hour)
	if token() != renewed[0] {
		t.Error("another token, and the provider is down")
	}
	// It is back and knows nothing of the refresh token; the token's end has come.
	start("second/")
	age(t, cache, "ann/dex", 24*time.Hour)
	if got, err := cache.Credential(ctx, "ann/dex", session.Cluster, nil); err == nil || !errors.Is(err, ErrPersonNeeded) || !strings.Contains(err.Error(), "run `h8s login`") {
		t.Errorf("credential %v, error %v; want one sentence about `h8s login`", got, err)
	}
	// With a terminal, kubectl's plugin asks.
	waits, person = browse(ctx, provider)
	if got, err := cache.Credential(waits, "ann/dex", session.Cluster, person); err != nil || got.Token == "" {
		t.Errorf("with somebody to ask: %v (%v)", err, context.Cause(waits))
	}

	if err := cache.Logout(ctx, "ann/dex"); err != nil {
		t.Errorf("logout: %v", err)
	}
	if _, err := cache.Credential(ctx, "ann/dex", session.Cluster, nil); err == nil || !strings.Contains(err.Error(), "run `h8s login`") {
		t.Errorf("after the logout: %v", err)
	}
	if err := cache.Logout(ctx, "ann/dex"); err != nil {
		t.Errorf("a second logout: %v", err)
	}
}

// checkWhoAmI wants the provider's claims, with the prefix: a group called
// system:masters there is nothing here.
func checkWhoAmI(t *testing.T, admin *rest.Config, token string) {
	t.Helper()
	config := rest.AnonymousClientConfig(admin)
	config.BearerToken = token
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the API server fetches the issuer's keys in the background
		review, err := kube.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		user := review.Status.UserInfo
		slices.Sort(user.Groups)
		if want := []string{"oidc:system:masters", "oidc:team-a", "system:authenticated"}; user.Username != "oidc:"+dex.Email || !slices.Equal(user.Groups, want) {
			t.Errorf("the cluster takes the holder for %q in %q, want %q in %q", user.Username, user.Groups, "oidc:"+dex.Email, want)
		}
		return nil
	})
}

// checkKubectl has kubectl ask the credential plugin, which is h8s itself, as the
// kubeconfig entry says.
func checkKubectl(t *testing.T, admin *rest.Config, home, session string) {
	t.Helper()
	kubeconfig := filepath.Join(home, "config")
	entry := Entry{Name: session, Cluster: "test", Server: admin.Host, CA: admin.CAData, Command: filepath.Join(binDir(t), "h8s")}
	if err := entry.Add(filesAt(kubeconfig)); err != nil {
		t.Fatal(err)
	}
	for _, argv := range [][]string{{"kubectl", "auth", "whoami"}, {"h8s", "whoami"}} {
		cmd := exec.Command(filepath.Join(binDir(t), argv[0]), append(argv[1:], "--kubeconfig="+kubeconfig)...)
		cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+home, "HOME="+home)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "oidc:"+dex.Email) {
			t.Errorf("%v: %v\n%s", argv, err, out)
		}
	}
}

// age makes the session's credential as old as if it had been got that much earlier.
func age(t *testing.T, cache Cache, name string, by time.Duration) {
	t.Helper()
	s, err := cache.load(name)
	if err != nil {
		t.Fatal(err)
	}
	if by >= 24*time.Hour {
		s.Credential.Expires = time.Now().Add(-time.Minute)
	}
	s.Credential.Renew = time.Now().Add(-by)
	if err := cache.save(name, s); err != nil {
		t.Fatal(err)
	}
}
