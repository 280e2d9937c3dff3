package controller

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/projects"
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

// Where the API server has the admission plugin OwnerReferencesPermissionEnforcement,
// only who may update an owner's finalizers may make objects that it owns.
func TestChartOwners(t *testing.T) {
	for _, owner := range []string{"users", "tenants"} {
		t.Run(owner, func(t *testing.T) {
			review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User:               controllerUser,
				ResourceAttributes: &authorizationv1.ResourceAttributes{Group: v1alpha1.GroupVersion.Group, Resource: owner, Subresource: "finalizers", Verb: "update"},
			}}
			if err := cluster.admin.Create(t.Context(), review); err != nil {
				t.Fatal(err)
			}
			if !review.Status.Allowed {
				t.Error("the controller may not")
			}
		})
	}
}

func quotaWebhookOfChart(t *testing.T) admissionregistrationv1.ValidatingWebhook {
	t.Helper()
	var config admissionregistrationv1.ValidatingWebhookConfiguration
	if err := cluster.admin.Get(t.Context(), client.ObjectKey{Name: "h8s"}, &config); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(config.Webhooks, func(w admissionregistrationv1.ValidatingWebhook) bool { return w.Name == "quota.h8s.io" })
	if i < 0 {
		t.Fatal("there is no webhook of quotas")
	}
	return config.Webhooks[i]
}

// An operator who labels the namespaces that everything else depends on does not lock the cluster.
func TestChartQuotaOfSystem(t *testing.T) {
	selector, err := metav1.LabelSelectorAsSelector(quotaWebhookOfChart(t).NamespaceSelector)
	if err != nil {
		t.Fatal(err)
	}
	for namespace, asked := range map[string]bool{"shop": true, release: false, metav1.NamespaceSystem: false} {
		t.Run(namespace, func(t *testing.T) {
			if got := selector.Matches(labels.Set{corev1.LabelMetadataName: namespace, v1alpha1.LabelTenant: "acme"}); got != asked {
				t.Errorf("the webhook is asked: %v, want %v", got, asked)
			}
		})
	}
}

// A request that waits for its quota holds a seat of all tenants: not for long, and
// whoever waits in vain gets our answer, not that of a timeout.
func TestChartQuotaTimeout(t *testing.T) {
	timeout := time.Duration(*quotaWebhookOfChart(t).TimeoutSeconds) * time.Second
	if timeout > 5*time.Second || timeout <= commitTimeout {
		t.Errorf("the API server waits for %s, and a commit takes up to %s", timeout, commitTimeout)
	}
}

// The controller is told whom to answer: never everybody whom a CA has signed.
func TestChartClientNames(t *testing.T) {
	const flag, ca = `- "--webhook-client-name=`, "webhooks.clientCA=-----BEGIN CERTIFICATE-----"
	for name, test := range map[string]struct{ values, want string }{
		"the usual one": {ca, flag + `front-proxy-client"`},
		"another":       {ca + ",webhooks.clientNames={system:auth-proxy}", flag + `system:auth-proxy"`},
		"no name":       {ca + ",webhooks.clientNames={}", "/webhooks/clientNames"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "../../bin/helm", "template", "h8s", "../../deploy/h8s", "--namespace", release, "--kube-version", "1.36.3",
				"--show-only", "templates/controller.yaml", "--set", test.values)
			if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), test.want) { // an error says why
				t.Errorf("no %q in\n%s", test.want, out)
			}
		})
	}
}

// TestChartSync: what the chart tells the controller to synchronize is what it understands,
// and only with that it may make Tenants.
func TestChartSync(t *testing.T) {
	render := func(t *testing.T, values string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "../../bin/helm", "template", "h8s", "../../deploy/h8s", "--namespace", release, "--kube-version", "1.36.3",
			"--show-only", "templates/controller.yaml", "--set", values)
		out, _ := cmd.CombinedOutput() // an error says why
		return string(out)
	}
	const create = "resources: [tenants] # of Keystone's projects\n  verbs: [create]"
	for name, test := range map[string]struct {
		values, want string
		on           bool
	}{
		"off":              {"keystone.secretName=k", "--keystone-clouds", false},
		"on":               {"keystone.secretName=k,keystone.sync.enabled=true", `\"reader\":\"view\"`, true},
		"changed":          {"keystone.secretName=k,keystone.sync.enabled=true,keystone.sync.tag=x,keystone.sync.roles.reader=null", `\"tag\":\"x\"`, true},
		"without a Secret": {"keystone.sync.enabled=true", "keystone.sync.enabled needs keystone.secretName", false},
		"an unknown role":  {"keystone.secretName=k,keystone.sync.enabled=true,keystone.sync.roles.reader=root", "/keystone/sync/roles/reader", false},
	} {
		t.Run(name, func(t *testing.T) {
			out := render(t, test.values)
			if !strings.Contains(out, test.want) {
				t.Errorf("no %q in\n%s", test.want, out)
			}
			if got := strings.Contains(out, create); got != test.on {
				t.Errorf("the controller may make Tenants: %t", got)
			}
			_, flag, found := strings.Cut(out, `- "--keystone-sync=`)
			if found != test.on {
				t.Fatalf("--keystone-sync is set: %t", found)
			}
			if found {
				line, _, _ := strings.Cut(flag, "\n")
				value, err := strconv.Unquote(`"` + line)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := projects.ParseConfig([]byte(value)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
