//go:build hyper

package conformance

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	classFlag   = flag.String("class", "hyper", "RuntimeClass that is forced on the tests' pods; empty: none")
	groupFlag   = flag.String("group", "", "run only the groups whose name matches this regular expression")
	specFlag    = flag.String("spec", "", "run only the specs whose name matches this regular expression")
	clusterFlag = flag.String("cluster", "", "use this running cluster instead of a throwaway one")
	keepFlag    = flag.Bool("keep", false, "leave the throwaway cluster up")
	procsFlag   = flag.Int("procs", 3, "how many specs run at once")
	logsFlag    = flag.String("logs", "../../bin/log", "directory for the tests' own output")
)

// cleanUpTime is what of the test's own deadline is left to those who clean up.
const cleanUpTime = 2 * time.Minute

// suite is Kubernetes' tests and the cluster that they run on.
type suite struct {
	bin, dir, cluster string
	specs             []string // all that there are
}

// TestPods runs the specs of hyper.yaml and holds them to it.
func TestPods(t *testing.T) {
	text, err := os.ReadFile("hyper.yaml")
	must(t, err)
	list, err := ParseList(text)
	must(t, err)
	groups, specs := regexp.MustCompile(*groupFlag), regexp.MustCompile(*specFlag)
	s := newSuite(t)
	for _, g := range list.Groups {
		if !groups.MatchString(g.Name) {
			continue
		}
		t.Run(g.Name, func(t *testing.T) {
			passes, unlisted, stale := g.Plan(s.specs)
			for _, name := range stale {
				t.Errorf("%s: there is no such spec in these containers any more: remove it from the list", name)
			}
			run := slices.DeleteFunc(slices.Concat(passes, unlisted), func(name string) bool { return !specs.MatchString(name) })
			if len(run) == 0 {
				t.Fatalf("no spec matches")
			}
			results := s.run(t, g.Name, run)
			for _, name := range run {
				t.Run(name, func(t *testing.T) {
					got := results[name]
					switch {
					case slices.Contains(unlisted, name):
						t.Errorf("state %q: it is not in the list: say that it passes, or why it is excluded: %s", got.State, got.Message)
					case got.State != "passed":
						t.Errorf("state %q: %s", got.State, got.Message)
					}
				})
			}
		})
	}
}

// newSuite brings up a cluster, with the images that the tests' pods run.
func newSuite(t *testing.T) *suite {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	must(t, err)
	s := &suite{bin: bin, dir: t.TempDir(), cluster: *clusterFlag}
	must(t, os.WriteFile(s.path("repos.yaml"), []byte(repoList), 0o600))
	s.specs = s.readSpecs(t)

	if s.cluster == "" {
		s.cluster = "conformance"
		_, _ = s.command(t, "", "h8s", "down", "--name", s.cluster) // what a killed run left
		if !*keepFlag {
			t.Cleanup(func() { s.must(t, "h8s", "down", "--name", s.cluster) })
		}
		s.must(t, "h8s", "up", "--name", s.cluster, "--nodes", "1")
	}
	must(t, os.WriteFile(s.path("kubeconfig"), []byte(s.must(t, "h8s", "kubeconfig", "--name", s.cluster)), 0o600))
	must(t, WriteImages(s.bin, s.path("images.tar"), strings.Fields(s.must(t, "e2e.test", "--list-images"))))
	s.must(t, "h8s", "image", "load", "--name", s.cluster, s.path("images.tar"))
	if *classFlag != "" {
		s.forceClass(t, *classFlag)
	}
	return s
}

func (s *suite) path(name string) string { return filepath.Join(s.dir, name) }

// command runs a program of bin/ with the cluster's credentials.
func (s *suite) command(t *testing.T, stdin, program string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // also while the test is cleaned up
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, program), args...)
	cmd.Env = s.environment()
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

func (s *suite) must(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := s.command(t, "", program, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *suite) environment() []string {
	return append(os.Environ(), "KUBECONFIG="+s.path("kubeconfig"), "HOME="+s.dir, "KUBE_TEST_REPO_LIST="+s.path("repos.yaml"))
}

// readSpecs asks the tests for the names of all specs.
func (s *suite) readSpecs(t *testing.T) []string {
	t.Helper()
	s.must(t, "e2e.test", "--ginkgo.dry-run", "--ginkgo.json-report="+s.path("specs.json"))
	return slices.Sorted(maps.Keys(readReport(t, s.path("specs.json"))))
}

func readReport(t *testing.T, path string) map[string]Result {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	results, err := ParseReport(f)
	must(t, err)
	return results
}

// run runs specs and returns how each of them ended.
func (s *suite) run(t *testing.T, group string, specs []string) map[string]Result {
	t.Helper()
	focus := make([]string, len(specs))
	for i, name := range specs {
		focus[i] = regexp.QuoteMeta(name)
	}
	logs, err := filepath.Abs(*logsFlag)
	must(t, err)
	must(t, os.MkdirAll(logs, 0o755))
	log, err := os.Create(filepath.Join(logs, "conformance-"+group+".log"))
	must(t, err)
	defer log.Close()
	timeout := 2 * time.Hour
	if deadline, ok := t.Deadline(); ok {
		timeout = time.Until(deadline) - cleanUpTime
	}
	if timeout < time.Minute {
		t.Fatal("no time is left: raise -timeout, or choose with -group")
	}
	report := "conformance-" + group + ".json"
	cmd := exec.Command(filepath.Join(s.bin, "ginkgo"), "--procs="+strconv.Itoa(*procsFlag), "--no-color", "--silence-skips",
		"--timeout="+timeout.String(), "--poll-progress-after=5m", "--output-dir="+logs, "--json-report="+report,
		"--focus=("+strings.Join(focus, "|")+")$", filepath.Join(s.bin, "e2e.test"), "--",
		"--kubeconfig="+s.path("kubeconfig"), "--kubectl-path="+filepath.Join(s.bin, "kubectl"), "--provider=skeleton",
		"--e2e-output-dir="+s.dir, "--disable-log-dump")
	cmd.Env, cmd.Stdout, cmd.Stderr = s.environment(), log, log
	cmd.Dir = s.dir
	// Its processes get the signal as well: they remove what they made.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Run(); err != nil {
		t.Logf("ginkgo: %v: see %s", err, log.Name())
	}
	return readReport(t, filepath.Join(logs, report))
}

// forceClass makes every pod of the tests' namespaces have the RuntimeClass, and returns when it does.
func (s *suite) forceClass(t *testing.T, class string) {
	t.Helper()
	policy := fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: conformance}
spec:
  failurePolicy: Fail
  reinvocationPolicy: IfNeeded
  matchConstraints:
    namespaceSelector: {matchExpressions: [{key: e2e-framework, operator: Exists}]}
    resourceRules:
    - {apiGroups: [""], apiVersions: [v1], resources: [pods], operations: [CREATE]}
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: "Object{spec: Object.spec{runtimeClassName: '%s'}}"}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: conformance}
spec: {policyName: conformance}
---
apiVersion: v1
kind: Namespace
metadata: {name: conformance, labels: {e2e-framework: conformance}}
`, class)
	_, err := s.command(t, policy, "kubectl", "apply", "-f", "-")
	must(t, err)
	deadline := time.Now().Add(2 * time.Minute)
	for {
		out, err := s.command(t, "", "kubectl", "run", "probe", "-n", "conformance", "--image=none", "--dry-run=server", "-o", "json")
		var pod struct {
			Spec struct{ RuntimeClassName string }
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &pod)
		}
		if err == nil && pod.Spec.RuntimeClassName == class {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the tests' pods have RuntimeClass %q, want %q: %v", pod.Spec.RuntimeClassName, class, err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
