package main

import (
	"slices"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
)

func TestDisplayName(t *testing.T) {
	for argv0, want := range map[string]string{"h8s": "h8s", "/usr/bin/h8s": "h8s", "kubectl-h8s": "kubectl h8s", "/root/.krew/bin/kubectl-h8s": "kubectl h8s"} {
		if got := displayName(argv0); got != want {
			t.Errorf("%s: %q, want %q", argv0, got, want)
		}
	}
}

func TestMineSelector(t *testing.T) {
	for name, tt := range map[string]struct {
		tenants []string
		all     bool
		also    string
		want    string // empty: an error
	}{
		"one":             {tenants: []string{"acme"}, want: "h8s.io/tenant in (acme)"},
		"two, and a team": {tenants: []string{"acme", "globex"}, also: "team=b", want: "h8s.io/tenant in (acme,globex),team=b"},
		"an operator":     {all: true, want: "h8s.io/tenant"},
		"a stranger":      {},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := mineSelector(tt.tenants, tt.all, tt.also)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("%q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestReadable(t *testing.T) {
	rule := func(group, resource, verb string, names ...string) authorizationv1.ResourceRule {
		return authorizationv1.ResourceRule{APIGroups: []string{group}, Resources: []string{resource}, Verbs: []string{verb}, ResourceNames: names}
	}
	for name, tt := range map[string]struct {
		rules []authorizationv1.ResourceRule
		want  []string
		all   bool
	}{
		"a member":           {rules: []authorizationv1.ResourceRule{rule("h8s.io", "tenants", "get", "b"), rule("h8s.io", "tenants", "get", "a", "b")}, want: []string{"a", "b"}},
		"an operator":        {rules: []authorizationv1.ResourceRule{rule("*", "*", "*")}, all: true},
		"of something else":  {rules: []authorizationv1.ResourceRule{rule("", "tenants", "get", "a"), rule("h8s.io", "networks", "get", "a"), rule("h8s.io", "tenants", "update", "a")}},
		"nothing is allowed": {},
	} {
		t.Run(name, func(t *testing.T) {
			if got, all := readable(tt.rules); !slices.Equal(got, tt.want) || all != tt.all {
				t.Errorf("%v %t, want %v %t", got, all, tt.want, tt.all)
			}
		})
	}
}

// kubectl's flags stand among others that are not known here.
func TestParseKubectl(t *testing.T) {
	f, err := parseKubectl([]string{"-o", "wide", "--context", "prod", "-w", "-l", "team=b", "--kubeconfig=/x", "--as=bob", "--sort-by=.metadata.name"})
	if err != nil {
		t.Fatal(err)
	}
	if f.overrides.CurrentContext != "prod" || f.overrides.AuthInfo.Impersonate != "bob" || f.loading.ExplicitPath != "/x" || f.selector != "team=b" {
		t.Errorf("context %q, as %q, kubeconfig %q, selector %q", f.overrides.CurrentContext, f.overrides.AuthInfo.Impersonate, f.loading.ExplicitPath, f.selector)
	}
}
