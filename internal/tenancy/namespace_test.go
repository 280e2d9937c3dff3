package tenancy

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"h8s.io/hypernetes/api/v1alpha1"
)

func acmeTenant() *v1alpha1.Tenant {
	t := tenant("acme")
	t.Spec.Sandbox = v1alpha1.TenantSandbox{Default: "gvisor", Allowed: []string{"gvisor", "hyper"}}
	return &t
}

func TestComplete(t *testing.T) {
	full := map[string]string{
		v1alpha1.LabelTenant: "acme", v1alpha1.LabelNetwork: "acme", v1alpha1.LabelSandbox: "gvisor", LabelPodSecurity: "baseline",
	}
	with := func(kv ...string) map[string]string {
		labels := map[string]string{}
		for k, v := range full {
			labels[k] = v
		}
		for i := 0; i < len(kv); i += 2 {
			labels[kv[i]] = kv[i+1]
		}
		return labels
	}
	for name, tt := range map[string]struct {
		labels, want map[string]string
	}{
		"nothing yet":               {nil, full},
		"only the tenant":           {map[string]string{v1alpha1.LabelTenant: "acme"}, full},
		"its own labels stay":       {map[string]string{"team": "a"}, with("team", "a")},
		"a Network stays":           {map[string]string{v1alpha1.LabelNetwork: "second"}, with(v1alpha1.LabelNetwork, "second")},
		"a stricter level stays":    {map[string]string{LabelPodSecurity: "restricted"}, with(LabelPodSecurity, "restricted")},
		"a looser level does not":   {map[string]string{LabelPodSecurity: "privileged"}, full},
		"an old sandbox is changed": {map[string]string{v1alpha1.LabelSandbox: "runc"}, full},
	} {
		t.Run(name, func(t *testing.T) {
			meta := metav1.ObjectMeta{Labels: tt.labels}
			if !Complete(&meta, acmeTenant()) {
				t.Error("says that nothing changed")
			}
			if diff := cmp.Diff(tt.want, meta.Labels); diff != "" {
				t.Error(diff)
			}
			if got := meta.Annotations[v1alpha1.AnnotationSandboxes]; got != "gvisor,hyper" {
				t.Errorf("sandboxes %q", got)
			}
			if Complete(&meta, acmeTenant()) {
				t.Error("changes again what it has completed")
			}
			if !Strip(&meta) || meta.Labels[v1alpha1.LabelNetwork]+meta.Labels[v1alpha1.LabelSandbox]+meta.Annotations[v1alpha1.AnnotationSandboxes] != "" || Strip(&meta) {
				t.Errorf("after Strip: %v", meta)
			}
		})
	}
}

func TestCheckRequested(t *testing.T) {
	for name, tt := range map[string]struct {
		labels, annotations map[string]string
		want                string
	}{
		"nothing":              {nil, nil, ""},
		"own":                  {map[string]string{"team": "a", "example.com/x": "y", "nok8s.io/x": "y"}, map[string]string{"note": "z"}, ""},
		"tenant and network":   {map[string]string{v1alpha1.LabelTenant: "a", v1alpha1.LabelNetwork: "b"}, nil, ""},
		"what kubectl writes":  {map[string]string{"kubernetes.io/metadata.name": "x", "app.kubernetes.io/name": "x"}, map[string]string{"kubectl.kubernetes.io/last-applied-configuration": "{}"}, ""},
		"restricted":           {map[string]string{LabelPodSecurity: "restricted"}, nil, ""},
		"privileged":           {map[string]string{LabelPodSecurity: "privileged"}, nil, LabelPodSecurity},
		"level version":        {map[string]string{LabelPodSecurity + "-version": "v1.0"}, nil, "enforce-version"},
		"sandbox":              {map[string]string{v1alpha1.LabelSandbox: "runc"}, nil, v1alpha1.LabelSandbox},
		"sandboxes":            {nil, map[string]string{v1alpha1.AnnotationSandboxes: "runc"}, v1alpha1.AnnotationSandboxes},
		"tenant as annotation": {nil, map[string]string{v1alpha1.LabelTenant: "x"}, v1alpha1.LabelTenant},
		"admin access":         {map[string]string{"resource.kubernetes.io/admin-access": "true"}, nil, "admin-access"},
		"node selector":        {nil, map[string]string{"scheduler.alpha.kubernetes.io/node-selector": "a=b"}, "node-selector"},
		"two, sorted":          {map[string]string{"b.k8s.io/x": "", "a.h8s.io/x": ""}, nil, "a.h8s.io/x, b.k8s.io/x"},
	} {
		t.Run(name, func(t *testing.T) {
			err := CheckRequested(&metav1.ObjectMeta{Labels: tt.labels, Annotations: tt.annotations})
			if (err != nil) != (tt.want != "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("CheckRequested = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestCheckNetwork(t *testing.T) {
	of := func(owner string) *v1alpha1.Network {
		return &v1alpha1.Network{Spec: v1alpha1.NetworkSpec{Tenant: owner}}
	}
	going := of("acme")
	going.DeletionTimestamp = &metav1.Time{}
	missing := CheckNetwork(acmeTenant(), "x", nil)
	foreign := CheckNetwork(acmeTenant(), "x", of("globex"))
	if missing == nil || foreign == nil || missing.Error() != foreign.Error() {
		t.Errorf("missing %v and foreign %v differ", missing, foreign)
	}
	if err := CheckNetwork(acmeTenant(), "x", of("acme")); err != nil {
		t.Error(err)
	}
	if err := CheckNetwork(acmeTenant(), "x", going); err == nil || !strings.Contains(err.Error(), "being deleted") {
		t.Error(err)
	}
}

func TestCheckQuota(t *testing.T) {
	for name, tt := range map[string]struct {
		have  int
		limit *int32
		ok    bool
	}{
		"unbounded": {1000, nil, true},
		"last":      {2, ptr.To(int32(3)), true},
		"full":      {3, ptr.To(int32(3)), false},
		"lowered":   {5, ptr.To(int32(3)), false},
		"none":      {0, ptr.To(int32(0)), false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := CheckQuota("acme", "namespaces", tt.have, tt.limit); (err == nil) != tt.ok {
				t.Errorf("CheckQuota = %v", err)
			}
		})
	}
}

func TestDefaultNetwork(t *testing.T) {
	named := tenant("acme")
	named.Spec.Network.Name = "shared"
	made := tenant("acme")
	if DefaultNetwork(&named) != "shared" || DefaultNetwork(&made) != "acme" {
		t.Error(DefaultNetwork(&named), DefaultNetwork(&made))
	}
}
