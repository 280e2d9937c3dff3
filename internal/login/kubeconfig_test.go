package login

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

func filesAt(path string) *clientcmd.PathOptions {
	options := clientcmd.NewDefaultPathOptions()
	options.LoadingRules.ExplicitPath = path
	return options
}

func TestEntry(t *testing.T) {
	old := clientcmdapi.NewConfig()
	old.Clusters["prod"] = &clientcmdapi.Cluster{Server: "https://prod:6443", CertificateAuthorityData: []byte("CA")}
	authority := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(authority, []byte("FILE"), 0o600); err != nil {
		t.Fatal(err)
	}
	old.Clusters["filed"] = &clientcmdapi.Cluster{Server: "https://filed:6443", CertificateAuthority: authority}
	old.AuthInfos["me"] = &clientcmdapi.AuthInfo{Token: "secret"}
	old.AuthInfos["tool"] = &clientcmdapi.AuthInfo{Exec: &clientcmdapi.ExecConfig{APIVersion: "client.authentication.k8s.io/v1", Command: "tool", InteractiveMode: "Never"}}
	old.Contexts["prod"] = &clientcmdapi.Context{Cluster: "prod", AuthInfo: "me", Namespace: "mine"}
	old.CurrentContext = "prod"

	for name, test := range map[string]struct {
		entry Entry
		want  string // part of the refusal; empty if it is written
	}{
		"a cluster that is there":        {entry: Entry{Name: "h8s-prod", Cluster: "prod"}},
		"a new cluster":                  {entry: Entry{Name: "h8s-dev", Cluster: "dev", Server: "https://dev:6443", CA: []byte("DEV")}},
		"through a proxy":                {entry: Entry{Name: "h8s-far", Cluster: "far", Server: "https://10.0.0.1:6443", TLSServerName: "far", ProxyURL: "http://proxy:3128"}},
		"the same again":                 {entry: Entry{Name: "h8s-prod", Cluster: "prod", Server: "https://prod:6443", CA: []byte("CA\n")}},
		"the same, in a file":            {entry: Entry{Name: "h8s-filed", Cluster: "filed", Server: "https://filed:6443", CA: []byte("FILE")}},
		"a cluster that was made anew":   {Entry{Name: "x", Cluster: "prod", Server: "https://prod:6443", CA: []byte("NEW")}, "kubectl config delete-cluster prod"},
		"made anew, a file":              {Entry{Name: "x", Cluster: "filed", Server: "https://filed:6443", CA: []byte("NEW")}, "kubectl config delete-cluster filed"},
		"a cluster that nobody knows":    {Entry{Name: "x", Cluster: "dev"}, "say --server"},
		"a cluster of the same name":     {Entry{Name: "x", Cluster: "prod", Server: "https://evil:6443"}, "choose another name with --cluster"},
		"somebody's user":                {Entry{Name: "me", Cluster: "prod"}, "choose another name with --session"},
		"another plugin's user":          {Entry{Name: "tool", Cluster: "prod"}, "choose another name with --session"},
		"a context that leads elsewhere": {Entry{Name: "prod", Cluster: "prod"}, "choose another name with --session"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config")
			if err := clientcmd.WriteToFile(*old, path); err != nil {
				t.Fatal(err)
			}
			files := filesAt(path)
			test.entry.Command = "/usr/bin/h8s"
			for range 2 { // to log in again is fine
				err := test.entry.Add(files)
				if test.want != "" {
					if err == nil || !strings.Contains(err.Error(), test.want) {
						t.Errorf("Add: %v, want a refusal with %q", err, test.want)
					}
				} else if err != nil {
					t.Fatal(err)
				}
			}
			got, err := clientcmd.LoadFromFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got.AuthInfos["me"].Token != "secret" || got.AuthInfos["tool"].Exec.Command != "tool" ||
				got.Clusters["prod"].Server != "https://prod:6443" || got.Contexts["prod"].AuthInfo != "me" || got.Contexts["prod"].Namespace != "mine" {
				t.Errorf("what was there has changed: %+v", got)
			}
			if test.want != "" {
				if got.CurrentContext != "prod" || len(got.AuthInfos) != 2 {
					t.Errorf("a refused entry was written: %+v", got)
				}
				return
			}
			session, err := CurrentSession(got, "")
			if err != nil || session != test.entry.Name {
				t.Errorf("the current session is %q (%v)", session, err)
			}
			if c := got.Contexts[got.CurrentContext]; c.Cluster != test.entry.Cluster {
				t.Errorf("the context leads to %q", c.Cluster)
			}
			if c := got.Clusters[test.entry.Cluster]; c.TLSServerName != test.entry.TLSServerName || c.ProxyURL != test.entry.ProxyURL {
				t.Errorf("the cluster is %+v", c)
			}

			if err := Remove(files, session); err != nil {
				t.Fatal(err)
			}
			if got, err = clientcmd.LoadFromFile(path); err != nil {
				t.Fatal(err)
			}
			if len(got.AuthInfos) != 2 || len(got.Contexts) != 1 || got.CurrentContext != "" || got.AuthInfos["me"].Token != "secret" {
				t.Errorf("after the logout: %+v", got)
			}
			if _, err := CurrentSession(got, "prod"); err == nil {
				t.Error("a context of somebody else's counts as a session")
			}
		})
	}
}

func TestParseExecInfo(t *testing.T) {
	const right = `{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","spec":{"interactive":%s,"cluster":{"server":"https://prod:6443","certificate-authority-data":"Q0E="}}}`
	for name, test := range map[string]struct {
		info string
		want bool
		err  string
	}{
		"a terminal":      {strings.Replace(right, "%s", "true", 1), true, ""},
		"a script":        {strings.Replace(right, "%s", "false", 1), false, ""},
		"called by hand":  {"", false, "h8s login"},
		"an old protocol": {`{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential"}`, false, "v1beta1"},
		"an old entry":    {`{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","spec":{"interactive":true}}`, false, "which cluster"},
		"no JSON":         {"{", false, "parse"},
	} {
		t.Run(name, func(t *testing.T) {
			cluster, got, err := ParseExecInfo(test.info)
			if got != test.want || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("%t, %v", got, err)
			}
			if want := (Cluster{Server: "https://prod:6443", CA: "CA"}); err == nil && cluster != want {
				t.Errorf("for %v, want %v", cluster, want)
			}
		})
	}
}
