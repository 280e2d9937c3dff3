package shim

import (
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

func TestOwner(t *testing.T) {
	if tenantAnnotation != v1alpha1.AnnotationTenant {
		t.Errorf("the annotation %s, want %s", tenantAnnotation, v1alpha1.AnnotationTenant)
	}
	of := func(tenant string) map[string]string { return map[string]string{tenantAnnotation: tenant} }
	for name, test := range map[string]struct {
		config      Config
		annotations map[string]string
		want        string
		fails       bool
	}{
		"tenant":                      {annotations: of("red"), want: "tenant.red"},
		"a name with a dot":           {annotations: of("red.example"), want: "tenant.red.example"},
		"no tenant":                   {want: "nobody"},
		"a tenant called nobody":      {annotations: of("nobody"), want: "tenant.nobody"},
		"shared":                      {config: Config{ShareTemplates: true}, annotations: of("red"), want: "everybody"},
		"empty":                       {annotations: of(""), fails: true},
		"a way out":                   {annotations: of("../tenant.blue"), fails: true},
		"a name that is no directory": {annotations: of("red/blue"), fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := test.config.owner(&cri.PodSandboxConfig{Annotations: test.annotations})
			if got != test.want || (err != nil) != test.fails {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
