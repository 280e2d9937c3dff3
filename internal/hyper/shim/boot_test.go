package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/hyper/vm"
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

// TestSuspect: a template is made anew when its clones may be of no use, and is kept when a
// pod's own machine was killed, or its start given up.
func TestSuspect(t *testing.T) {
	of := func(why error) error { return fmt.Errorf("virtual machine web: %w", why) }
	for name, test := range map[string]struct {
		err     error
		givenUp bool
		want    bool
	}{
		"no answer in time":                     {err: context.DeadlineExceeded, want: true},
		"a guest that cannot be set up":         {err: errors.New("the guest answers POST /v1/setup with 500"), want: true},
		"a panic":                               {err: of(vm.ErrPanicked), want: true},
		"a reset":                               {err: of(vm.ErrReset), want: true},
		"a guest that powers off":               {err: of(vm.ErrPoweredOff), want: true},
		"a crash of QEMU":                       {err: of(vm.ErrDied), want: true},
		"QEMU was killed":                       {err: of(fmt.Errorf("%w (%w)", vm.ErrDied, vm.ErrKilled))},
		"QEMU was killed while the guest spoke": {err: errors.Join(io.EOF, of(fmt.Errorf("%w (%w)", vm.ErrDied, vm.ErrKilled)))},
		"the machine was ended":                 {err: of(vm.ErrKilled)},
		"containerd waits no more":              {err: context.Canceled, givenUp: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			if test.givenUp {
				cancel()
			}
			defer cancel()
			if got := suspect(ctx, test.err); got != test.want {
				t.Errorf("suspect: %v", got)
			}
		})
	}
}
