package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// admin is the operator: the kubeconfig without --user.
const admin = ""

func kubeconfigPath(user string) string {
	if user == admin {
		user = "admin"
	}
	return filepath.Join(cluster.dir, user+".kubeconfig")
}

// writeKubeconfig gets credentials for a User, who is in the groups as well.
func writeKubeconfig(user string, groups ...string) error {
	args := []string{"kubeconfig", "--name", cluster.cluster}
	if user != admin {
		args = append(args, "--user", user)
	}
	for _, g := range groups {
		args = append(args, "--group", g)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(cluster.bin, "h8s"), args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return fmt.Errorf("h8s %s: %w", strings.Join(args, " "), err)
	}
	return os.WriteFile(kubeconfigPath(user), out, 0o600)
}

// try runs kubectl as user and gives back what it printed; err holds its standard error.
func try(user string, args ...string) (string, error) { return tryInput(user, "", args...) }

// tryInput is try with standard input.
func tryInput(user, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(cluster.bin, "kubectl"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfigPath(user), "HOME="+cluster.dir)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// kubectl is try that must succeed.
func kubectl(t testing.TB, user string, args ...string) string {
	t.Helper()
	out, err := try(user, args...)
	if err != nil {
		t.Fatalf("as %q: %v", user, err)
	}
	return out
}

// apply applies manifests, which must succeed.
func apply(t testing.TB, user, manifests string) {
	t.Helper()
	if _, err := tryInput(user, manifests, "apply", "-f", "-"); err != nil {
		t.Fatalf("as %q: %v", user, err)
	}
}

// refused asserts that kubectl fails and that its message contains want.
func refused(t testing.TB, user, stdin, want string, args ...string) {
	t.Helper()
	out, err := tryInput(user, stdin, args...)
	if err == nil {
		t.Errorf("as %q: kubectl %s was allowed: %s", user, strings.Join(args, " "), out)
		return
	}
	if !strings.Contains(err.Error(), want) {
		t.Errorf("as %q: refused, but the message does not say %q: %v", user, want, err)
	}
}

// patience is how long a test waits for what must come. It says nothing of how
// fast the product is: the machine that runs the tests may be busy, or slow.
const patience = 4 * time.Minute

// eventually polls until f returns nil; the last error fails the test.
func eventually(t testing.TB, f func() error) {
	t.Helper()
	within(t, patience, f)
}

// within is eventually for what the product promises a time for.
func within(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	if err := poll(limit, f); err != nil {
		t.Fatalf("still after %s: %v", limit, err)
	}
}

// poll asks often at first, and then seldom: what it waits for needs the processors, too.
// It asks for the last time when the time is over: on a busy machine a question takes long,
// and one that was put earlier does not say that it is too late.
func poll(within time.Duration, f func() error) error {
	deadline := time.Now().Add(within)
	for pause := 100 * time.Millisecond; ; pause = min(pause*3/2, 1500*time.Millisecond) {
		last := !time.Now().Before(deadline)
		err := f()
		if err == nil || last {
			return err
		}
		time.Sleep(min(pause, time.Until(deadline)))
	}
}
