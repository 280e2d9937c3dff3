package cluster

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"h8s.io/hypernetes/internal/identity"
)

func TestOIDCValidate(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*OIDC)
		want   string // part of the error; empty for none
	}{
		"as it should be":        {func(*OIDC) {}, ""},
		"no groups":              {func(o *OIDC) { o.GroupsClaim = "" }, ""},
		"issuer without TLS":     {func(o *OIDC) { o.IssuerURL = "http://issuer.example.com" }, "https://"},
		"issuer with a query":    {func(o *OIDC) { o.IssuerURL += "?a=b" }, "no query"},
		"no client":              {func(o *OIDC) { o.ClientID = "" }, "--oidc-client-id"},
		"no claim":               {func(o *OIDC) { o.UsernameClaim = "" }, "--oidc-username-claim"},
		"no prefix":              {func(o *OIDC) { o.Prefix = "" }, "':' at the end"},
		"prefix without colon":   {func(o *OIDC) { o.Prefix = "oidc" }, "':' at the end"},
		"Kubernetes' prefix":     {func(o *OIDC) { o.Prefix = "system:" }, "are Kubernetes' or ours"},
		"within Kubernetes' own": {func(o *OIDC) { o.Prefix = "system:serviceaccount:" }, "':' at the end"},
		"Keystone's usual":       {func(o *OIDC) { o.Prefix = "keystone:" }, "are Keystone's"},
		"Keystone's here":        {func(o *OIDC) { o.Prefix = "os-east:" }, "are Keystone's"},
		"within Keystone's here": {func(o *OIDC) { o.Prefix = "os-east:project:" }, "':' at the end"},
		"around Keystone's here": {func(o *OIDC) { o.Prefix = "o" }, "':' at the end"},
		"one that looks like it": {func(o *OIDC) { o.Prefix = "os:" }, ""},
		"a CA that is none":      {func(o *OIDC) { o.CA = "nothing" }, "no PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			o := OIDC{IssuerURL: "https://issuer.example.com", ClientID: "h8s", UsernameClaim: "email", GroupsClaim: "groups", Prefix: "oidc:"}
			test.change(&o)
			switch err := o.Validate("os-east:"); {
			case test.want == "" && err != nil, test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// `h8s up` refuses names that could be of two authenticators before it makes anything.
func TestNames(t *testing.T) {
	oidc := func(prefix string) *OIDC {
		return &OIDC{IssuerURL: "https://issuer.example.com", ClientID: "h8s", UsernameClaim: "email", GroupsClaim: "groups", Prefix: prefix}
	}
	for name, test := range map[string]struct {
		options UpOptions
		want    string // part of the error; empty for none
	}{
		"neither":                        {UpOptions{}, ""},
		"both":                           {UpOptions{Keystone: true, OIDC: oidc("oidc:")}, ""},
		"both, Keystone's is named":      {UpOptions{Keystone: true, KeystonePrefix: "os-east:", OIDC: oidc("os:")}, ""},
		"the same":                       {UpOptions{Keystone: true, KeystonePrefix: "os-east:", OIDC: oidc("os-east:")}, `--oidc-username-prefix "os-east:": names that begin so are Keystone's`},
		"Keystone's usual":               {UpOptions{Keystone: true, OIDC: oidc("keystone:")}, "are Keystone's"},
		"Keystone's usual, without it":   {UpOptions{OIDC: oidc("keystone:")}, "are Keystone's"},
		"Keystone's is Kubernetes'":      {UpOptions{Keystone: true, KeystonePrefix: "system:"}, "--keystone-prefix: "},
		"Keystone's is no prefix":        {UpOptions{Keystone: true, KeystonePrefix: "os"}, "--keystone-prefix: "},
		"a prefix, and there is no such": {UpOptions{KeystonePrefix: "os:"}, "say --keystone, too"},
	} {
		t.Run(name, func(t *testing.T) {
			switch err := test.options.validateNames(); {
			case test.want == "" && err != nil, test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// The chart's schema keeps the same prefixes from Keystone as this program.
func TestReservedPrefixes(t *testing.T) {
	data, err := os.ReadFile("../../deploy/h8s/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema struct {
		Properties struct {
			Keystone struct {
				Properties struct {
					Prefix struct {
						Not struct{ Enum []identity.Prefix }
					}
				}
			}
		}
	}
	if err := json.Unmarshal(data, &schema); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(identity.Reserved(), schema.Properties.Keystone.Properties.Prefix.Not.Enum); diff != "" {
		t.Errorf("identity.Reserved and the schema (- +):\n%s", diff)
	}
}

// Nobody gets a certificate with a name that somebody else gives.
func TestCheckSubject(t *testing.T) {
	plain, both := testConfig(t, 1), testConfig(t, 1)
	both.Keystone, both.KeystonePrefix, both.OIDC = true, "os-east:", &OIDC{Prefix: "oidc:"}
	for name, test := range map[string]struct {
		config *Config
		want   string // part of the refusal; empty for none
	}{
		"alice":                      {both, ""},
		"team-a":                     {both, ""},
		"keystone":                   {both, ""},
		"":                           {plain, "must have a name"},
		"system:masters":             {plain, "names that start with system: are not"},
		"h8s:x":                      {plain, "names that start with h8s: are not"},
		"keystone:Default/admin":     {plain, "names that start with keystone: are not"},
		"os-east:Default/admin":      {both, "names that start with os-east: are not"},
		"os-east:project:Default/p":  {both, "names that start with os-east: are not"},
		"oidc:ann@example.com":       {both, "names that start with oidc: are not"},
		"keystone:Default/of-others": {both, "names that start with keystone: are not"},
	} {
		t.Run(name, func(t *testing.T) {
			switch err := test.config.checkSubject(name); {
			case test.want == "" && err != nil, test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

// The file is on the node of the API server, whose flags name it; only if there is a provider.
func TestOIDCRendered(t *testing.T) {
	const flag = "--authentication-config=/etc/kubernetes/authentication.yaml"
	for name, oidc := range map[string]*OIDC{
		"no provider": nil,
		"a provider":  {IssuerURL: "https://issuer.example.com", ClientID: "h8s", UsernameClaim: "email", GroupsClaim: "groups", Prefix: "oidc:"},
	} {
		t.Run(name, func(t *testing.T) {
			c := testConfig(t, 2)
			c.OIDC = oidc
			for i, n := range c.Nodes {
				want := oidc != nil && i == 0
				f, ok := renderFiles(t, c, n)["kubernetes/authentication.yaml"]
				if ok != want || ok && !strings.Contains(string(f.data), "prefix: 'oidc:'") {
					t.Errorf("%s: the file is there: %t\n%s", n.Name, ok, f.data)
				}
				flagged := false
				for _, p := range nodePrograms(c, n) {
					for _, a := range p.args {
						flagged = flagged || p.name == "kube-apiserver" && a == flag
					}
				}
				if flagged != want {
					t.Errorf("%s: kube-apiserver has the flag: %t", n.Name, flagged)
				}
			}
		})
	}
}
