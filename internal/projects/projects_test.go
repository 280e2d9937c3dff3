package projects

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/api/v1alpha1"
	"h8s.io/hypernetes/internal/identity"
)

const good = `{"tag": "h8s", "cloud": "h8s-sync", "interval": "30s", "roles": {"admin": "admin", "boss": "owner", "member": "edit", "reader": "view"}, "tenant": {"network": {"cidrs": ["10.0.0.0/16"]}}}`

func config(t *testing.T) *Config {
	t.Helper()
	c, err := ParseConfig([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestParseConfig(t *testing.T) {
	config(t)
	for name, test := range map[string]struct{ old, new, want string }{
		"no tag":               {`"h8s"`, `""`, "1 to 255 characters"},
		"a list of tags":       {`"h8s"`, `"a,b"`, "neither ','"},
		"no cloud":             {`"h8s-sync"`, `""`, "cloud"},
		"too often":            {`"30s"`, `"1ms"`, "the least"},
		"no roles":             {`"roles": {"admin": "admin", "boss": "owner", "member": "edit", "reader": "view"}`, `"roles": {}`, "at least one"},
		"a role that is not":   {`"edit"`, `"root"`, "no role \"root\""},
		"no range":             {`"cidrs": ["10.0.0.0/16"]`, ``, "10.0.0.0/16"},
		"one Network for all":  {`"cidrs": ["10.0.0.0/16"]`, `"name": "shared"`, "a Network of its own"},
		"suspended from birth": {`"tenant": {`, `"tenant": {"suspended": true, `, "cannot be suspended"},
		"a misspelt field":     {`"tag"`, `"tags"`, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseConfig([]byte(strings.Replace(good, test.old, test.new, 1))); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want an error with %q", err, test.want)
			}
		})
	}
}

func TestNames(t *testing.T) {
	for name, test := range map[string]struct {
		project string
		want    []string // the second without its end
	}{
		"a label":             {"web-1", []string{"web-1", "web-1-"}},
		"upper case":          {"Web", []string{"web-"}},
		"odd characters":      {"../a b/ü", []string{"a-b-"}},
		"nothing to read":     {"—", []string{"project-"}},
		"the longest":         {strings.Repeat("a", 40), []string{strings.Repeat("a", 40), strings.Repeat("a", 29) + "-"}},
		"too long":            {strings.Repeat("a", 41), []string{strings.Repeat("a", 29) + "-"}},
		"cut where it breaks": {strings.Repeat("a", 28) + "-" + strings.Repeat("b", 20), []string{strings.Repeat("a", 28) + "-"}},
		"ends in a hyphen":    {"web-", []string{"web-"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := Names(&identity.Project{ID: "id", Name: test.project})
			if len(got) != len(test.want) {
				t.Fatalf("%q, want %q", got, test.want)
			}
			last := len(got) - 1
			if last == 1 && got[0] != test.want[0] {
				t.Errorf("%q, want %q", got[0], test.want[0])
			}
			if !regexp.MustCompile("^"+regexp.QuoteMeta(test.want[last])+"[0-9a-f]{10}$").MatchString(got[last]) || len(got[last]) > 40 {
				t.Errorf("%q, want %q and ten digits", got[last], test.want[last])
			}
			if other := Names(&identity.Project{ID: "another", Name: test.project}); other[last] == got[last] {
				t.Errorf("two projects have the name %q", got[last])
			}
		})
	}
}

func TestMembers(t *testing.T) {
	has := func(user, role string) identity.Assignment {
		return identity.Assignment{User: user, Group: "role-id:1/" + role, Role: role}
	}
	user := func(name string, role v1alpha1.Role) v1alpha1.Member {
		return v1alpha1.Member{Kind: "User", Name: name, Role: role}
	}
	group := func(name string, role v1alpha1.Role) v1alpha1.Member {
		return v1alpha1.Member{Kind: "Group", Name: name, Role: role}
	}
	many := func(n int) (all []identity.Assignment) {
		for i := range n {
			all = append(all, has(fmt.Sprintf("u%03d", i), "member"))
		}
		return append(all, has("u000", "boss"))
	}
	long := strings.Repeat("x", 254)
	for name, test := range map[string]struct {
		assignments []identity.Assignment
		want        []v1alpha1.Member
		unnamed     []string
	}{
		"nobody":                    {nil, nil, nil},
		"the most powerful role":    {[]identity.Assignment{has("b", "reader"), has("a", "member"), has("b", "admin"), has("b", "member")}, []v1alpha1.Member{user("a", "edit"), user("b", "admin")}, nil},
		"owner above admin":         {[]identity.Assignment{has("b", "boss"), has("b", "admin")}, []v1alpha1.Member{user("b", "owner")}, nil},
		"roles that mean nothing":   {[]identity.Assignment{has("b", "swiftoperator"), has("a", "reader")}, []v1alpha1.Member{user("a", "view")}, nil},
		"a name that is too long":   {[]identity.Assignment{has(long, "reader"), has(long, "member"), has(long[1:], "reader")}, []v1alpha1.Member{user(long[1:], "view")}, []string{long}},
		"too many users for a list": {many(401), []v1alpha1.Member{group("role-id:1/boss", "owner"), group("role-id:1/member", "edit")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, unnamed := config(t).Members(test.assignments)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(test.unnamed, unnamed); diff != "" {
				t.Error(diff)
			}
		})
	}
	if got, _ := config(t).Members(many(400)); len(got) != 400 || got[0] != user("u000", "owner") {
		t.Errorf("of 400 users: %d members, the first %v", len(got), got[0])
	}
}

func TestGone(t *testing.T) {
	for name, test := range map[string]struct {
		project identity.Project
		want    string
	}{
		"there":    {identity.Project{Enabled: true, Tags: []string{"other", "h8s"}}, ""},
		"disabled": {identity.Project{Tags: []string{"h8s"}}, Disabled},
		"untagged": {identity.Project{Enabled: true, Tags: []string{"h8s-not"}}, "its project has no tag h8s in Keystone any more"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := config(t).Gone(&test.project); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// TestSpec: who has set what decides who may take it away. TestProjects has the same
// with an API server.
func TestSpec(t *testing.T) {
	alice := v1alpha1.Member{Kind: "User", Name: "alice", Role: "edit"}
	// What somebody else has set, as an API server writes it down.
	const (
		itself    = `"f:members": {"k:{\"kind\":\"User\",\"name\":\"alice\"}": {".": {}, "f:role": {}}}`
		itsRole   = `"f:members": {"k:{\"kind\":\"User\",\"name\":\"alice\"}": {"f:role": {}}}`
		suspended = `"f:suspended": {}`
		because   = `"f:suspendedBecause": {}`
	)
	for name, test := range map[string]struct {
		live   v1alpha1.TenantSpec
		others []string
		gone   string
		unread bool
		want   Spec
	}{
		"new":                               {want: Spec{Members: []v1alpha1.Member{alice}}},
		"another role by an operator":       {live: v1alpha1.TenantSpec{Members: []v1alpha1.Member{{Kind: "Group", Name: "alice", Role: "view"}, {Kind: "User", Name: "alice", Role: "owner"}}}, others: []string{itsRole}, want: Spec{Members: []v1alpha1.Member{{Kind: "User", Name: "alice", Role: "owner"}}}},
		"another role by nobody":            {live: v1alpha1.TenantSpec{Members: []v1alpha1.Member{{Kind: "User", Name: "alice", Role: "owner"}}}, want: Spec{Members: []v1alpha1.Member{alice}}},
		"gone":                              {gone: "x", want: Spec{Suspended: true, SuspendedBecause: "x"}},
		"still gone":                        {live: v1alpha1.TenantSpec{Suspended: true, SuspendedBecause: "x"}, gone: "x", want: Spec{Suspended: true, SuspendedBecause: "x"}},
		"gone, members unread":              {live: v1alpha1.TenantSpec{Members: []v1alpha1.Member{alice, {Kind: "User", Name: "ops", Role: "admin"}}}, gone: "x", unread: true, want: Spec{Members: []v1alpha1.Member{alice}, Suspended: true, SuspendedBecause: "x"}},
		"and with a role of an operator's":  {live: v1alpha1.TenantSpec{Members: []v1alpha1.Member{{Kind: "User", Name: "alice", Role: "owner"}}}, others: []string{itsRole}, gone: "x", unread: true, want: Spec{Members: []v1alpha1.Member{{Kind: "User", Name: "alice", Role: "owner"}}, Suspended: true, SuspendedBecause: "x"}},
		"back":                              {live: v1alpha1.TenantSpec{Suspended: true, SuspendedBecause: "x"}, want: Spec{Members: []v1alpha1.Member{alice}}},
		"suspended by an operator":          {live: v1alpha1.TenantSpec{Suspended: true, SuspendedBecause: "unpaid"}, others: []string{suspended, because}, want: Spec{Members: []v1alpha1.Member{alice}}},
		"and gone as well":                  {live: v1alpha1.TenantSpec{Suspended: true, SuspendedBecause: "unpaid"}, others: []string{suspended, because}, gone: "x", want: Spec{Suspended: true}},
		"an operator's without a reason":    {live: v1alpha1.TenantSpec{Suspended: true}, others: []string{suspended}, gone: "x", want: Spec{Suspended: true, SuspendedBecause: "x"}},
		"an operator's reason for ours":     {live: v1alpha1.TenantSpec{Suspended: true, SuspendedBecause: "unpaid"}, others: []string{because}, want: Spec{Members: []v1alpha1.Member{alice}, Suspended: true}},
		"an operator wants it nevertheless": {live: v1alpha1.TenantSpec{}, others: []string{suspended}, gone: "x", want: Spec{Suspended: true, SuspendedBecause: "x"}},
		"a reason that was left over":       {live: v1alpha1.TenantSpec{SuspendedBecause: "unpaid"}, others: []string{because}, gone: "x", want: Spec{Suspended: true, SuspendedBecause: "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			fields := fmt.Sprintf(`{"f:spec": {%s}}`, strings.Join(test.others, ","))
			owners, err := OwnersOf([]metav1.ManagedFieldsEntry{
				{Manager: "operator", FieldsV1: metav1.NewFieldsV1(fields)},
				{Manager: "us", FieldsV1: metav1.NewFieldsV1(`{"f:spec": {` + itself + `,` + suspended + `,` + because + `}}`)},
				{Manager: "operator", Subresource: "status", FieldsV1: metav1.NewFieldsV1(`{"f:spec": {` + itsRole + `}}`)},
			}, "us")
			if err != nil {
				t.Fatal(err)
			}
			wish := Wish{Gone: test.gone, Unread: test.unread}
			if test.gone == "" {
				wish.Members = []v1alpha1.Member{alice}
			}
			if diff := cmp.Diff(test.want, wish.Spec(&v1alpha1.Tenant{Spec: test.live}, owners)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
