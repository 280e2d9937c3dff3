package controller

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/api/v1alpha1"
)

// What the CustomResourceDefinitions refuse by themselves, and with which words.
func TestValidation(t *testing.T) {
	longest := strings.Repeat("a", 40)
	tenant := func(change func(*v1alpha1.Tenant)) *v1alpha1.Tenant {
		t := tenantOf("valid", "10.0.0.0/16")
		change(t)
		return t
	}
	block := func(cidr string) *v1alpha1.Block {
		return &v1alpha1.Block{ObjectMeta: metav1.ObjectMeta{Name: "valid-block"}, Spec: v1alpha1.BlockSpec{Network: "n", CIDR: cidr, Node: "n"}}
	}
	many := tenant(func(t *v1alpha1.Tenant) {
		for i := range 500 {
			t.Spec.Members = append(t.Spec.Members, member("User", "u"+strings.Repeat("x", 200)+string(rune('a'+i%26))+strings.Repeat("y", i/26), v1alpha1.RoleView))
		}
	})
	for name, tt := range map[string]struct {
		obj  client.Object
		want string
	}{
		"tenant":         {tenantOf("valid", "10.0.0.0/16"), ""},
		"longest name":   {tenantOf(longest, "10.0.0.0/16"), ""},
		"500 members":    {many, ""},
		"name too long":  {tenantOf(longest+"a", "10.0.0.0/16"), "40 characters at most"},
		"name with dots": {tenantOf("a.b", "10.0.0.0/16"), "must be a DNS label"},
		"member twice": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("User", "a", "owner"), member("User", "a", "view")}
		}), "Duplicate value"},
		"user and group of one name": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("User", "a", "owner"), member("Group", "a", "view")}
		}), ""},
		"system member": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("Group", "system:masters", "owner")}
		}), "cannot be members of a Tenant"},
		"member of everybody's name": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("User", "*", "view")}
		}), "'*' stands for everybody"},
		"group of everybody's name": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("Group", "*", "view")}
		}), "'*' stands for everybody"},
		"unknown role": {tenant(func(t *v1alpha1.Tenant) { t.Spec.Members = []v1alpha1.Member{member("User", "a", "root")} }), "Unsupported value"},
		"unknown kind": {tenant(func(t *v1alpha1.Tenant) { t.Spec.Members = []v1alpha1.Member{member("Robot", "a", "view")} }), "Unsupported value"},
		"ServiceAccount": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Members = []v1alpha1.Member{member("ServiceAccount", "ci:bot.v1", "view")}
		}), ""},
		"ServiceAccount, no namespace": {tenant(func(t *v1alpha1.Tenant) { t.Spec.Members = []v1alpha1.Member{member("ServiceAccount", "bot", "view")} }), "must be written namespace:name"},
		"no network":                   {tenant(func(t *v1alpha1.Tenant) { t.Spec.Network = v1alpha1.TenantNetwork{} }), "set either network.cidrs"},
		"two networks":                 {tenant(func(t *v1alpha1.Tenant) { t.Spec.Network.Name = "x" }), "set either network.cidrs"},
		"default sandbox not allowed": {tenant(func(t *v1alpha1.Tenant) {
			t.Spec.Sandbox = v1alpha1.TenantSandbox{Default: "hyper", Allowed: []string{"gvisor"}}
		}), "sandbox.default must be one of sandbox.allowed"},
		"block":                         {block("10.0.0.16/28"), ""},
		"block that is not canonical":   {block("10.0.0.17/28"), "not a canonical CIDR"},
		"user":                          {&v1alpha1.User{ObjectMeta: metav1.ObjectMeta{Name: "valid@example.com"}}, "a lowercase RFC 1123 subdomain"},
		"network with the longest name": {networkOf(longest+"a", "valid", "10.0.0.0/16"), "40 characters at most"},
	} {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, cluster.admin.Create(t.Context(), tt.obj, client.DryRunAll), tt.want)
		})
	}
}
