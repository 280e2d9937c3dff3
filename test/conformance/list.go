// Package conformance runs Kubernetes' own end-to-end tests of pods with a RuntimeClass
// forced on every pod that they make. Which specs must pass, and why others are not
// run, is in hyper.yaml.
//
//	make e2e-hyper                                      all of it, on a throwaway cluster
//	go test -tags hyper ./test/conformance -group 'configmap|secrets'
//	go test -tags hyper ./test/conformance -class ''    without a RuntimeClass: what this machine allows
//	go test -tags hyper ./test/conformance -cluster dev a cluster that is up; -keep leaves the throwaway one up
package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// List is what is expected of the specs in focus.
type List struct {
	Groups []Group `json:"groups"`
}

// Group is a part of the list that is run at once.
type Group struct {
	Name string `json:"name"`
	// Containers are Ginkgo's: the group's specs are those whose names begin with one of
	// them. Without any, all specs are the group's.
	Containers []string `json:"containers,omitempty"`
	// Passes are the names of the specs that must pass.
	Passes []string `json:"passes"`
	// Excluded are those that are not run.
	Excluded []Exclusion `json:"excluded,omitempty"`
}

// Exclusion is why some specs are not run.
type Exclusion struct {
	Reason string   `json:"reason"`
	Specs  []string `json:"specs"`
}

// ParseList reads a List, in which every name stands once and every exclusion has a reason.
func ParseList(text []byte) (List, error) {
	var l List
	if err := yaml.UnmarshalStrict(text, &l); err != nil {
		return List{}, err
	}
	var wrong []error
	seen := map[string]string{}
	note := func(name, group string) {
		if before, twice := seen[name]; twice {
			wrong = append(wrong, fmt.Errorf("group %s: %q is listed already, in group %s", group, name, before))
		}
		seen[name] = group
	}
	for _, g := range l.Groups {
		if g.Name == "" {
			wrong = append(wrong, errors.New("a group needs a name"))
		}
		for _, name := range g.Passes {
			note(name, g.Name)
		}
		for _, e := range g.Excluded {
			if e.Reason == "" {
				wrong = append(wrong, fmt.Errorf("group %s: a reason is needed for the exclusion of %q", g.Name, e.Specs))
			}
			for _, name := range e.Specs {
				note(name, g.Name)
			}
		}
	}
	return l, errors.Join(wrong...)
}

// Plan is what to run of a group: what must pass, and what is in the group's containers
// but not listed. stale are names that the group lists and that there are not in all.
func (g Group) Plan(all []string) (passes, unlisted, stale []string) {
	listed := map[string]bool{}
	for _, e := range g.Excluded {
		for _, name := range e.Specs {
			listed[name] = true
		}
	}
	for _, name := range g.Passes {
		listed[name] = true
	}
	for _, name := range all {
		if !g.holds(name) {
			continue
		}
		switch {
		case !listed[name]:
			unlisted = append(unlisted, name)
		case slices.Contains(g.Passes, name):
			passes = append(passes, name)
		}
		delete(listed, name)
	}
	for name := range listed {
		stale = append(stale, name)
	}
	slices.Sort(stale)
	return passes, unlisted, stale
}

func (g Group) holds(name string) bool {
	return len(g.Containers) == 0 || slices.ContainsFunc(g.Containers, func(c string) bool { return strings.HasPrefix(name, c+" ") })
}

// Result is how a spec ended.
type Result struct {
	// State is Ginkgo's: passed, failed, skipped, timedout, …
	State string
	// Message says why it did not pass.
	Message string
}

// ParseReport reads Ginkgo's JSON report.
func ParseReport(r io.Reader) (map[string]Result, error) {
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   string
			Failure                 struct {
				Message  string
				Location struct {
					FileName   string
					LineNumber int
				}
			}
		}
	}
	if err := json.NewDecoder(r).Decode(&suites); err != nil {
		return nil, fmt.Errorf("Ginkgo's report: %w", err)
	}
	results := map[string]Result{}
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			if s.LeafNodeType != "It" {
				continue
			}
			result := Result{State: s.State, Message: s.Failure.Message}
			if s.Failure.Location.FileName != "" {
				result.Message = fmt.Sprintf("%s:%d: %s", s.Failure.Location.FileName, s.Failure.Location.LineNumber, s.Failure.Message)
			}
			results[strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")] = result
		}
	}
	return results, nil
}
