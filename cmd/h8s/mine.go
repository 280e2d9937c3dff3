package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"h8s.io/hypernetes/api/v1alpha1"
)

// pluginPrefix begins the names of programs that kubectl takes for plugins: h8s
// that is called kubectl-h8s is `kubectl h8s`.
const pluginPrefix = "kubectl-"

// displayName is what help and usage call this program.
func displayName(argv0 string) string {
	if plugin, ok := strings.CutPrefix(filepath.Base(argv0), pluginPrefix); ok {
		return "kubectl " + plugin
	}
	return "h8s"
}

// newMine are the commands that list what is of one's own tenants: `kubectl get`
// with the selector that members may list by.
func newMine() []*cobra.Command {
	var commands []*cobra.Command
	for _, of := range []struct{ use, resource, what string }{
		{"ns", "namespaces", "namespaces"},
		{"networks", "networks.h8s.io", "Networks"},
		{"tenants", "tenants.h8s.io", "Tenants"},
	} {
		cmd := &cobra.Command{
			Use:   of.use + " [flags of kubectl get]",
			Short: "List the " + of.what + " of the tenants that you are a member of, as kubectl get does",
			// The flags are kubectl's.
			DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, args []string) error {
				if slices.Contains(args, "-h") || slices.Contains(args, "--help") {
					return cmd.Help()
				}
				return getMine(cmd.Context(), of.resource, args)
			},
		}
		commands = append(commands, cmd)
	}
	commands[0].Aliases = []string{"namespaces", "namespace"}
	return commands
}

// getMine hands over to kubectl, with all of its flags and a selector.
func getMine(ctx context.Context, resource string, args []string) error {
	flags, err := parseKubectl(args)
	if err != nil {
		return err
	}
	tenants, all, err := flags.tenants(ctx)
	if err != nil {
		return err
	}
	selector, err := mineSelector(tenants, all, flags.selector)
	if err != nil {
		return err
	}
	kubectl, err := findKubectl()
	if err != nil {
		return err
	}
	// Of several selectors kubectl takes the last.
	cmd := exec.CommandContext(ctx, kubectl, append(append([]string{"get", resource}, args...), "--selector="+selector)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	var exit *exec.ExitError
	if err := cmd.Run(); errors.As(err, &exit) {
		return errReported
	} else if err != nil {
		return fmt.Errorf("run kubectl: %w", err)
	}
	return nil
}

// mineSelector selects what is of the tenants, or of any for who may read all,
// and meets what the user asked for besides.
func mineSelector(tenants []string, all bool, also string) (string, error) {
	var selector string
	switch {
	case all:
		selector = v1alpha1.LabelTenant
	case len(tenants) > 0:
		selector = fmt.Sprintf("%s in (%s)", v1alpha1.LabelTenant, strings.Join(tenants, ","))
	default:
		return "", errors.New("you are a member of no tenant, or of suspended ones only (`h8s whoami` tells): ask an operator to be listed in a Tenant's spec.members")
	}
	if also != "" {
		selector += "," + also
	}
	return selector, nil
}

// kubectlFlags are those of kubectl's flags that matter here too.
type kubectlFlags struct {
	loading   *clientcmd.ClientConfigLoadingRules
	overrides *clientcmd.ConfigOverrides
	selector  string
}

func parseKubectl(args []string) (*kubectlFlags, error) {
	f := &kubectlFlags{loading: clientcmd.NewDefaultClientConfigLoadingRules(), overrides: &clientcmd.ConfigOverrides{}}
	set := pflag.NewFlagSet("kubectl", pflag.ContinueOnError)
	set.ParseErrorsAllowlist.UnknownFlags = true
	set.StringVar(&f.loading.ExplicitPath, "kubeconfig", "", "")
	set.StringVarP(&f.selector, "selector", "l", "", "")
	clientcmd.BindOverrideFlags(f.overrides, set, clientcmd.RecommendedConfigOverrideFlags(""))
	if err := set.Parse(args); err != nil {
		return nil, fmt.Errorf("read kubectl's flags: %w", err)
	}
	return f, nil
}

// tenants are those whose Tenant the user may read by name, which members and
// nobody else may; all is true for who may read every one.
func (f *kubectlFlags) tenants(ctx context.Context) (tenants []string, all bool, err error) {
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(f.loading, f.overrides).ClientConfig()
	if err != nil {
		return nil, false, fmt.Errorf("read the kubeconfig: %w", err)
	}
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, false, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	// Rules that are not of a namespace are in the review of any.
	review, err := api.AuthorizationV1().SelfSubjectRulesReviews().Create(ctx, &authorizationv1.SelfSubjectRulesReview{
		Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: metav1.NamespaceDefault},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, false, fmt.Errorf("ask the cluster which tenants are yours: %w", err)
	}
	tenants, all = readable(review.Status.ResourceRules)
	return tenants, all, nil
}

// readable are the Tenants that the rules allow to get, sorted.
func readable(rules []authorizationv1.ResourceRule) (tenants []string, all bool) {
	covers := func(list []string, value string) bool {
		return slices.Contains(list, value) || slices.Contains(list, "*")
	}
	for _, r := range rules {
		if !covers(r.APIGroups, v1alpha1.GroupVersion.Group) || !covers(r.Resources, "tenants") || !covers(r.Verbs, "get") {
			continue
		}
		all = all || len(r.ResourceNames) == 0
		tenants = append(tenants, r.ResourceNames...)
	}
	slices.Sort(tenants)
	return slices.Compact(tenants), all
}

// findKubectl looks where the shell does, then beside this program.
func findKubectl() (string, error) {
	if path, err := exec.LookPath("kubectl"); err == nil {
		return path, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	path := filepath.Join(filepath.Dir(self), "kubectl")
	if _, err := os.Stat(path); err != nil {
		return "", errors.New("there is no kubectl on the PATH nor beside h8s: install it")
	}
	return path, nil
}
