package conformance

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestHyperList holds without a cluster: the list that is committed can be read.
func TestHyperList(t *testing.T) {
	text, err := os.ReadFile("hyper.yaml")
	if err != nil {
		t.Fatal(err)
	}
	list, err := ParseList(text)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range list.Groups {
		if len(g.Passes) == 0 {
			t.Errorf("group %s: nothing of it passes", g.Name)
		}
		_, unlisted, stale := g.Plan(append(g.Passes, excluded(g)...))
		if len(unlisted) > 0 || len(stale) > 0 {
			t.Errorf("group %s: these are not of its containers: %q %q", g.Name, unlisted, stale)
		}
	}
}

func excluded(g Group) []string {
	var names []string
	for _, e := range g.Excluded {
		names = append(names, e.Specs...)
	}
	return names
}

func TestParseListRefuses(t *testing.T) {
	for name, test := range map[string]struct{ list, want string }{
		"a name twice":              {`groups: [{name: a, containers: [c], passes: [c x]}, {name: b, containers: [c], excluded: [{reason: r, specs: [c x]}]}]`, "listed already, in group a"},
		"an exclusion of no reason": {`groups: [{name: a, containers: [c], excluded: [{specs: [c x]}]}]`, "a reason is needed"},
		"a group without a name":    {`groups: [{containers: [c]}]`, "needs a name"},
		"an unknown field":          {`groups: [{name: a, containers: [c], fails: [c x]}]`, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseList([]byte(test.list)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

func TestPlan(t *testing.T) {
	group := Group{
		Containers: []string{"[node] Pods", "[node] Secrets"},
		Passes:     []string{"[node] Pods run", "[node] Pods that were renamed"},
		Excluded:   []Exclusion{{Reason: "r", Specs: []string{"[node] Secrets on Windows"}}},
	}
	passes, unlisted, stale := group.Plan([]string{
		"[node] Pods run", "[node] Pods are new", "[node] Secrets on Windows", "[node] PodsToo run", "[storage] [node] Pods run",
	})
	got := [][]string{passes, unlisted, stale}
	want := [][]string{{"[node] Pods run"}, {"[node] Pods are new"}, {"[node] Pods that were renamed"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("passes, unlisted, stale (- want, + got):\n%s", diff)
	}
}

func TestParseReport(t *testing.T) {
	got, err := ParseReport(strings.NewReader(`[{"SpecReports": [
		{"LeafNodeType": "BeforeSuite", "State": "passed"},
		{"LeafNodeType": "It", "ContainerHierarchyTexts": ["[node] Pods", "when new"], "LeafNodeText": "run", "State": "passed"},
		{"LeafNodeType": "It", "ContainerHierarchyTexts": ["[node] Pods"], "LeafNodeText": "end", "State": "failed",
		 "Failure": {"Message": "it runs", "Location": {"FileName": "pods.go", "LineNumber": 7}}}]}]`))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Result{
		"[node] Pods when new run": {State: "passed"},
		"[node] Pods end":          {State: "failed", Message: "pods.go:7: it runs"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(- want, + got):\n%s", diff)
	}
}
