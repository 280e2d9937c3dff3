package cluster

import (
	"strings"
	"testing"
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
		"no prefix":              {func(o *OIDC) { o.Prefix = "" }, "must end in ':'"},
		"prefix without colon":   {func(o *OIDC) { o.Prefix = "oidc" }, "must end in ':'"},
		"Kubernetes' prefix":     {func(o *OIDC) { o.Prefix = "system:" }, "too much like"},
		"within Kubernetes' own": {func(o *OIDC) { o.Prefix = "system:serviceaccount:" }, "too much like"},
		"Keystone's prefix":      {func(o *OIDC) { o.Prefix = "keystone:" }, "too much like"},
		"a CA that is none":      {func(o *OIDC) { o.CA = "nothing" }, "no PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			o := OIDC{IssuerURL: "https://issuer.example.com", ClientID: "h8s", UsernameClaim: "email", GroupsClaim: "groups", Prefix: "oidc:"}
			test.change(&o)
			switch err := o.Validate(); {
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
