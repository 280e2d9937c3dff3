package tenancy

import (
	"errors"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestSelectsOnly(t *testing.T) {
	tenant := func(operator metav1.LabelSelectorOperator, values ...string) metav1.LabelSelectorRequirement {
		return metav1.LabelSelectorRequirement{Key: v1alpha1.LabelTenant, Operator: operator, Values: values}
	}
	const in, notIn = metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn
	other := metav1.LabelSelectorRequirement{Key: "app", Operator: in, Values: []string{"acme"}}
	for name, tt := range map[string]struct {
		requirements []metav1.LabelSelectorRequirement
		want         bool
	}{
		"nothing":                      {nil, false},
		"mine":                         {[]metav1.LabelSelectorRequirement{tenant(in, "acme")}, true},
		"both mine":                    {[]metav1.LabelSelectorRequirement{tenant(in, "acme", "initech")}, true},
		"mine and another's":           {[]metav1.LabelSelectorRequirement{tenant(in, "acme", "globex")}, false},
		"another's and mine":           {[]metav1.LabelSelectorRequirement{tenant(in, "globex", "acme")}, false},
		"another's":                    {[]metav1.LabelSelectorRequirement{tenant(in, "globex")}, false},
		"no tenant":                    {[]metav1.LabelSelectorRequirement{tenant(in, "")}, false},
		"of no value":                  {[]metav1.LabelSelectorRequirement{tenant(in)}, false},
		"not another's":                {[]metav1.LabelSelectorRequirement{tenant(notIn, "globex")}, false},
		"not mine":                     {[]metav1.LabelSelectorRequirement{tenant(notIn, "acme")}, false},
		"any":                          {[]metav1.LabelSelectorRequirement{tenant(metav1.LabelSelectorOpExists)}, false},
		"none":                         {[]metav1.LabelSelectorRequirement{tenant(metav1.LabelSelectorOpDoesNotExist)}, false},
		"an operator not known":        {[]metav1.LabelSelectorRequirement{tenant("Like", "acme")}, false},
		"another label":                {[]metav1.LabelSelectorRequirement{other}, false},
		"mine, narrowed":               {[]metav1.LabelSelectorRequirement{other, tenant(in, "acme")}, true},
		"mine and, as well, another's": {[]metav1.LabelSelectorRequirement{tenant(in, "globex"), tenant(in, "acme")}, true}, // selects nothing
	} {
		t.Run(name, func(t *testing.T) {
			got, err := SelectsOnly(tt.requirements, func(name string) (bool, error) { return name == "acme" || name == "initech", nil })
			if err != nil || got != tt.want {
				t.Errorf("%t, %v, want %t", got, err, tt.want)
			}
		})
	}
	failed := errors.New("no answer")
	if ok, err := SelectsOnly([]metav1.LabelSelectorRequirement{tenant(in, "acme")}, func(string) (bool, error) { return true, failed }); ok || !errors.Is(err, failed) {
		t.Errorf("%t, %v, want the error", ok, err)
	}
}
