package controller

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	schedulingv1 "k8s.io/api/scheduling/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// TestDefaultPriorityAboveTenants: the chart is not installed where tenants' pods that
// name no PriorityClass would all be refused.
func TestDefaultPriorityAboveTenants(t *testing.T) {
	operator, err := cluster.env.AddUser(envtest.User{Name: "chart-operator", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := operator.KubeConfig()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		t.Fatal(err)
	}
	render := func(maxPodPriority, want string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "../../bin/helm", "template", "h8s", "../../deploy/h8s", "--namespace", release,
			"--kubeconfig", path, "--dry-run=server", "--kube-version", "1.36.3", "--set", "maxPodPriority="+maxPodPriority)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		wantRefusal(t, err, want)
	}
	// 0 is what pods have without a default class, too: other tests notice nothing.
	class := &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: "chart-default"}, GlobalDefault: true}
	render("-1", "")
	if err := cluster.admin.Create(t.Context(), class); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := cluster.admin.Delete(t.Context(), class); err != nil {
			t.Error(err)
		}
	}()
	render("-1", "maxPodPriority is -1, but pods that name no PriorityClass have the cluster's default, chart-default, with 0: set maxPodPriority to 0 or more")
	render("0", "")
}
