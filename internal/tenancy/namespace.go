package tenancy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
)

// LabelPodSecurity is the label by which Pod Security admission knows a
// namespace's level.
const (
	LabelPodSecurity = "pod-security.kubernetes.io/enforce"
	levelBaseline    = "baseline"
	levelRestricted  = "restricted"
)

// DefaultNetwork is the name of the tenant's default Network.
func DefaultNetwork(t *v1alpha1.Tenant) string {
	if t.Spec.Network.Name != "" {
		return t.Spec.Network.Name
	}
	return t.Name
}

// Complete sets what a namespace of the tenant must carry and says whether
// anything changed. The Network stays if one is named: pods may live on it. The
// Pod Security level stays if it is baseline or stricter.
func Complete(meta *metav1.ObjectMeta, t *v1alpha1.Tenant) bool {
	changed := false
	set := func(m *map[string]string, key, value string) {
		if have, ok := (*m)[key]; ok && have == value {
			return
		}
		if *m == nil {
			*m = map[string]string{}
		}
		(*m)[key] = value
		changed = true
	}
	set(&meta.Labels, v1alpha1.LabelTenant, t.Name)
	if meta.Labels[v1alpha1.LabelNetwork] == "" {
		set(&meta.Labels, v1alpha1.LabelNetwork, DefaultNetwork(t))
	}
	set(&meta.Labels, v1alpha1.LabelSandbox, t.Spec.Sandbox.Default)
	if level := meta.Labels[LabelPodSecurity]; level != levelBaseline && level != levelRestricted {
		set(&meta.Labels, LabelPodSecurity, levelBaseline)
	}
	set(&meta.Annotations, v1alpha1.AnnotationSandboxes, strings.Join(t.Spec.Sandbox.Allowed, ","))
	return changed
}

// Strip removes what Complete has set from a namespace that no longer belongs to
// a tenant, and says whether anything changed. The Pod Security level stays: no
// longer needed, but never loosened by accident.
func Strip(meta *metav1.ObjectMeta) bool {
	changed := false
	for _, key := range []string{v1alpha1.LabelNetwork, v1alpha1.LabelSandbox} {
		if _, ok := meta.Labels[key]; ok {
			delete(meta.Labels, key)
			changed = true
		}
	}
	if _, ok := meta.Annotations[v1alpha1.AnnotationSandboxes]; ok {
		delete(meta.Annotations, v1alpha1.AnnotationSandboxes)
		changed = true
	}
	return changed
}

// Kubernetes' own keys are reserved as well as ours: resource.kubernetes.io/admin-access,
// for one, opens other people's devices. The policy h8s-namespace has the same two patterns.
var (
	reservedKey = regexp.MustCompile(`^([^/]+[.])?(h8s|kubernetes|k8s)[.]io/`)
	harmlessKey = regexp.MustCompile(`^(app|kubectl)[.]kubernetes[.]io/|^kubernetes[.]io/metadata[.]name$`)
)

// CheckRequested refuses labels and annotations that a tenant's people may not
// give a namespace of theirs. They may name its tenant, its Network, and a Pod
// Security level that is not lower than baseline.
func CheckRequested(meta *metav1.ObjectMeta) error {
	var refused []string
	for key, value := range meta.Labels {
		if key == v1alpha1.LabelTenant || key == v1alpha1.LabelNetwork {
			continue
		}
		if key == LabelPodSecurity && (value == levelBaseline || value == levelRestricted) {
			continue
		}
		if reservedKey.MatchString(key) && !harmlessKey.MatchString(key) {
			refused = append(refused, key)
		}
	}
	for key := range meta.Annotations {
		if reservedKey.MatchString(key) && !harmlessKey.MatchString(key) {
			refused = append(refused, key)
		}
	}
	if len(refused) == 0 {
		return nil
	}
	slices.Sort(refused)
	return fmt.Errorf("the labels or annotations %s are set by operators and by the cluster only: leave them out (the level of %s may be %s or %s)",
		strings.Join(refused, ", "), LabelPodSecurity, levelBaseline, levelRestricted)
}

// CheckNetwork refuses a Network that is not the tenant's own. Network is nil if
// there is none of that name; both cases read the same, so that the name of another
// tenant's Network cannot be probed.
func CheckNetwork(t *v1alpha1.Tenant, name string, network *v1alpha1.Network) error {
	if network == nil || network.Spec.Tenant != t.Name {
		return fmt.Errorf("the Tenant %q has no Network %q: correct the label %s, or leave it out for the tenant's default Network", t.Name, name, v1alpha1.LabelNetwork)
	}
	if network.DeletionTimestamp != nil {
		return fmt.Errorf("the Network %q is being deleted: name another one in the label %s", name, v1alpha1.LabelNetwork)
	}
	return nil
}

// CheckQuota refuses one more of what the tenant has as many of as it may.
func CheckQuota(tenant, what string, have int, limit *int32) error {
	if limit == nil || have < int(*limit) {
		return nil
	}
	return fmt.Errorf("the Tenant %q has %d of %d %s: delete one, or ask an operator to raise spec.quota.%s", tenant, have, *limit, what, what)
}
