// Package e2e plays an operator, tenants and attackers on a throwaway two-node
// cluster, with the tools and credentials that they would have: kubectl and
// kubeconfigs that `h8s kubeconfig` printed.
//
//	go test ./test/e2e                      its own cluster, removed afterwards
//	go test ./test/e2e -cluster dev         a cluster that is up (h8s up --name dev --resolver …), TestLogin excepted
//	go test ./test/e2e -keep                leaves its cluster up, to look at
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/dex"
)

var (
	clusterFlag = flag.String("cluster", "", "use this running cluster instead of a throwaway one")
	keepFlag    = flag.Bool("keep", false, "leave the throwaway cluster up")
)

// outsideName is a name that only the host's resolvers know, and outsideAddress is its address.
const (
	outsideName    = "outside.example.com"
	outsideAddress = "198.51.100.7"
	// outsideDNS is where the test's own "resolver of the host" listens.
	outsideDNS = "127.0.0.1:15353"
)

// env is the cluster under test.
type env struct {
	root    string // of the repository
	bin     string
	cluster string
	dir     string // kubeconfigs
	// provider is whose ID tokens the cluster believes; nil for a cluster that was up.
	provider *dex.Provider
}

var cluster env //nolint:gochecknoglobals // set once by TestMain, which cannot pass values to tests

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	root, err := filepath.Abs("../..")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "h8s-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	cluster = env{root: root, bin: filepath.Join(root, "bin"), cluster: *clusterFlag, dir: dir}

	stop, err := serveOutsideDNS()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer stop()

	if cluster.cluster != "" {
		return runTests(m)
	}
	cluster.cluster = "e2e"
	unlock, err := lockCluster(cluster.cluster)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer unlock()
	// Programs that leave scratch files behind leave them here.
	scratchDir := filepath.Join(dir, "tmp")
	if err := errors.Join(os.Mkdir(scratchDir, 0o700), os.Setenv("TMPDIR", scratchDir)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// What an earlier run left when it was killed is not this run's business.
	_ = h8s("down", "--name", cluster.cluster)
	before, err := newHostState(cluster.cluster)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if !*keepFlag {
		defer func() { // test/runner looks for "after the tests: "
			if err := h8s("down", "--name", cluster.cluster); err != nil {
				fmt.Fprintln(os.Stderr, "after the tests: h8s down:", err)
				code = 1
			}
			if err := awaitRestored(before, cluster.cluster); err != nil {
				fmt.Fprintln(os.Stderr, "after the tests:", err)
				code = 1
			}
			if left, err := os.ReadDir(scratchDir); err != nil || len(left) > 0 {
				fmt.Fprintln(os.Stderr, "after the tests: scratch files are left:", left, err)
				code = 1
			}
		}()
	}
	if cluster.provider, err = newProvider(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if err := h8s(append([]string{"up", "--name", cluster.cluster, "--nodes", "2", "--resolver", outsideDNS}, upFlags(cluster.provider)...)...); err != nil {
		fmt.Fprintln(os.Stderr, "h8s up:", err)
		return 1
	}
	return runTests(m)
}

func runTests(m *testing.M) int {
	if err := writeKubeconfig(admin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// What runs in parallel here mostly waits for answers that must not come.
	if err := flag.Set("test.parallel", "8"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// lockCluster keeps another run of these tests from taking this run's cluster
// away. The lock ends with the process, however it ends.
func lockCluster(name string) (unlock func(), err error) {
	path := filepath.Join(os.TempDir(), "h8s-test-"+name+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock cluster %q: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another run of these tests uses cluster %q (%s: %w): wait for it, or use -cluster", name, path, err)
	}
	return func() { f.Close() }, nil
}

// h8s runs our CLI with its output on this process's.
func h8s(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "h8s"), args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// serveOutsideDNS plays the host's resolver, over UDP and TCP. Another run of
// these tests, on another cluster, may do so at the same time.
func serveOutsideDNS() (stop func(), err error) {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		if len(q.Question) == 1 && strings.EqualFold(q.Question[0].Name, outsideName+".") {
			if q.Question[0].Qtype == dns.TypeA {
				rr, err := dns.NewRR(outsideName + ". 30 IN A " + outsideAddress)
				if err == nil {
					r.Answer = append(r.Answer, rr)
				}
			}
		} else {
			r.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(r)
	})
	var servers []*dns.Server
	stop = func() {
		for _, srv := range servers {
			_ = srv.Shutdown()
		}
	}
	for _, network := range []string{"udp", "tcp"} {
		started := make(chan error, 1)
		srv := &dns.Server{Addr: outsideDNS, Net: network, ReusePort: true, Handler: handler, NotifyStartedFunc: func() { started <- nil }}
		go func() {
			if err := srv.ListenAndServe(); err != nil {
				select {
				case started <- err:
				default: // it had started
				}
			}
		}()
		if err := <-started; err != nil {
			stop()
			return nil, fmt.Errorf("the test's resolver: %w", err)
		}
		servers = append(servers, srv)
	}
	return stop, nil
}
