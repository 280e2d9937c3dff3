package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"h8s.io/hypernetes/internal/terminal"
)

// TestMain is h8s itself when a kubeconfig of a test calls its plugin, or a test a
// process of its own.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"credential", "login"}, os.Args[1]) {
		main()
		return
	}
	os.Exit(m.Run())
}

// apiServer is a cluster as far as a thief needs one: it remembers what it is sent.
type apiServer struct {
	*httptest.Server
	ca     string // its file
	tokens []string
}

func newAPIServer(t *testing.T) *apiServer {
	t.Helper()
	s := &apiServer{ca: filepath.Join(t.TempDir(), "ca.crt")}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.tokens = append(s.tokens, strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		w.WriteHeader(http.StatusForbidden)
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(s.ca, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// ask sends a request with the kubeconfig, as kubectl does.
func ask(t *testing.T, kubeconfig string) error {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	_, err = kube.AuthenticationV1().SelfSubjectReviews().Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	return err
}

// TestFromKeepsTheWay reads a kubeconfig whose cluster is not reached straight.
func TestFromKeepsTheWay(t *testing.T) {
	far := clientcmdapi.NewConfig()
	far.Clusters["far"] = &clientcmdapi.Cluster{Server: "https://10.0.0.1:6443", CertificateAuthorityData: []byte("CA"), TLSServerName: "far", ProxyURL: "http://proxy:3128"}
	far.Contexts["far"] = &clientcmdapi.Context{Cluster: "far"}
	far.CurrentContext = "far"
	f := loginFlags{files: &kubeconfigFiles{}, certificate: true, from: filepath.Join(t.TempDir(), "far")}
	if err := clientcmd.WriteToFile(*far, f.from); err != nil {
		t.Fatal(err)
	}
	e, _, err := f.target()
	if err != nil {
		t.Fatal(err)
	}
	if e.Server != "https://10.0.0.1:6443" || string(e.CA) != "CA" || e.TLSServerName != "far" || e.ProxyURL != "http://proxy:3128" {
		t.Errorf("the entry is %+v", e)
	}
}

// testKeystone issues a token to everybody, and counts them. The environment of the
// test names it, with everything that a login needs.
type testKeystone struct {
	issued    int
	passwords []string
}

func newTestKeystone(t *testing.T, dir string) *testKeystone {
	t.Helper()
	k := &testKeystone{}
	identity := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var asked struct {
			Auth struct {
				Identity struct {
					Password struct{ User struct{ Password string } }
				}
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			t.Errorf("%s %s: %v", r.Method, r.URL, err)
		}
		k.passwords = append(k.passwords, asked.Auth.Identity.Password.User.Password)
		k.issued++
		w.Header().Set("X-Subject-Token", fmt.Sprintf("token-%d", k.issued))
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"token":{"expires_at":%q}}`, time.Now().Add(time.Hour).UTC().Format("2006-01-02T15:04:05.000000Z"))
	}))
	t.Cleanup(identity.Close)
	for name, value := range map[string]string{
		"XDG_CACHE_HOME": dir, "HOME": dir, "OS_CLOUD": "",
		"OS_AUTH_URL": identity.URL + "/v3", "OS_USERNAME": "ann", "OS_USER_DOMAIN_NAME": "Default", "OS_PASSWORD": "secret",
	} {
		t.Setenv(name, value)
	}
	return k
}

func runH8s(t *testing.T, args ...string) error {
	t.Helper()
	root := newRoot()
	root.SetArgs(args)
	return root.ExecuteContext(t.Context())
}

// TestLoginMakesTheKubeconfig that --kubeconfig names. What is only read must exist.
func TestLoginMakesTheKubeconfig(t *testing.T) {
	dir := t.TempDir()
	newTestKeystone(t, dir)
	s := newAPIServer(t)
	missing := filepath.Join(dir, "missing")
	for name, test := range map[string]struct {
		args []string
		want string // part of the error; empty if it is made
	}{
		"a new cluster":           {[]string{"--server", s.URL, "--certificate-authority", s.ca}, ""},
		"nothing says which":      {nil, "--server"},
		"a context that is not":   {[]string{"--context", "prod"}, "--server"},
		"a certificate from it":   {[]string{"--certificate"}, "--server"},
		"the source is missing":   {[]string{"--certificate", "--from", missing}, missing + ": no such file"},
		"--from is not made here": {[]string{"--certificate", "--from", missing, "--server", s.URL}, missing + ": no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "of", "mine", "config")
			err := runH8s(t, append([]string{"login", "--kubeconfig", file}, test.args...)...)
			info, statErr := os.Stat(file)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) || statErr == nil {
					t.Errorf("%v, want %q; the file: %v", err, test.want, statErr)
				}
				return
			}
			if err != nil || statErr != nil || info.Mode() != 0o600 {
				t.Fatalf("%v; the file: %v, %v", err, info, statErr)
			}
			s.tokens = nil
			_ = ask(t, file)
			if len(s.tokens) != 1 || s.tokens[0] == "" {
				t.Errorf("the cluster got %q, want a token", s.tokens)
			}
		})
	}
}

// TestPasswordOnTerminal: it is asked there and nowhere else, out of sight, and the
// terminal is afterwards as it was.
func TestPasswordOnTerminal(t *testing.T) {
	dir := t.TempDir()
	k := newTestKeystone(t, dir)
	t.Setenv("OS_PASSWORD", "")
	s := newAPIServer(t)
	const secret = "p\"4$s: word"
	login := func() *exec.Cmd {
		return exec.CommandContext(t.Context(), os.Args[0], "login", "--kubeconfig", filepath.Join(dir, "config"), "--server", s.URL, "--certificate-authority", s.ca)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	shown, err := terminal.Answer(ctx, login(), "Password of ann at http://", secret)
	if err != nil || !strings.Contains(shown, "logged in") {
		t.Errorf("%v; the terminal shows:\n%s", err, shown)
	}
	if want := []string{secret}; !slices.Equal(k.passwords, want) {
		t.Errorf("Keystone was given the passwords %q, want %q", k.passwords, want)
	}
	data, err := os.ReadFile(filepath.Join(dir, "config"))
	if err != nil || strings.Contains(string(data), "word") {
		t.Errorf("the kubeconfig: %v\n%s", err, data)
	}

	// Without a terminal nobody is asked: what comes by a pipe is not a person.
	cmd := login()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdin = strings.NewReader(secret + "\n")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "there is no terminal to ask on") || len(k.passwords) != 1 {
		t.Errorf("without a terminal: %v, %d passwords: %s", err, len(k.passwords), out)
	}
}

// TestTokensStayWithTheirCluster logs in to two clusters that are both called
// "kubernetes", each in a kubeconfig of its own.
func TestTokensStayWithTheirCluster(t *testing.T) {
	dir := t.TempDir()
	keystone := newTestKeystone(t, dir)
	a, b := newAPIServer(t), newAPIServer(t)
	login := func(s *apiServer, kubeconfig string, more ...string) error {
		t.Setenv("KUBECONFIG", kubeconfig)
		return runH8s(t, append([]string{"login", "--cluster", "kubernetes", "--server", s.URL, "--certificate-authority", s.ca}, more...)...)
	}
	fileA, fileB := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := login(a, fileA); err != nil {
		t.Fatal(err)
	}
	_ = ask(t, fileA)
	if len(a.tokens) != 1 || a.tokens[0] != "token-1" {
		t.Fatalf("A got %q, want its token", a.tokens)
	}

	// The second login would take the first one's name.
	if err := login(b, fileB); err == nil || !strings.Contains(err.Error(), "--session") || keystone.issued != 1 {
		t.Errorf("login to B in A's session: %v (%d tokens), want a refusal that names --session", err, keystone.issued)
	}
	if err := login(b, fileB, "--session", "b"); err != nil {
		t.Fatal(err)
	}
	_ = ask(t, fileB)
	if len(b.tokens) != 1 || b.tokens[0] != "token-2" {
		t.Errorf("B got %q, want its token", b.tokens)
	}

	// However it came about that A's kubeconfig asks for B's session.
	config, err := clientcmd.LoadFromFile(fileA)
	if err != nil {
		t.Fatal(err)
	}
	config.AuthInfos["h8s-kubernetes"].Exec.Args[2] = "b"
	if err := clientcmd.WriteToFile(*config, fileA); err != nil {
		t.Fatal(err)
	}
	a.tokens = nil
	if err := ask(t, fileA); err == nil || len(a.tokens) != 0 {
		t.Errorf("A got %q (%v), want nothing", a.tokens, err)
	}
}
