package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"h8s.io/hypernetes/internal/controller"
	"h8s.io/hypernetes/internal/login"
)

// kubeconfigFlags adds --kubeconfig and --context, with kubectl's meaning.
func kubeconfigFlags(cmd *cobra.Command) *kubeconfigFiles {
	var k kubeconfigFiles
	cmd.Flags().StringVar(&k.path, "kubeconfig", "", "kubeconfig file (default: $KUBECONFIG, then ~/.kube/config)")
	cmd.Flags().StringVar(&k.context, "context", "", "context of the kubeconfig (default: the current one)")
	return &k
}

type kubeconfigFiles struct{ path, context string }

func (k *kubeconfigFiles) access() *clientcmd.PathOptions {
	options := clientcmd.NewDefaultPathOptions()
	options.LoadingRules.ExplicitPath = k.path
	return options
}

func (k *kubeconfigFiles) client() clientcmd.ClientConfig {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = k.path
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: k.context})
}

// session is the one named, or that of the context.
func (k *kubeconfigFiles) session(named string) (string, error) {
	if named != "" {
		return named, nil
	}
	config, err := k.client().RawConfig()
	if err != nil {
		return "", fmt.Errorf("read the kubeconfig: %w", err)
	}
	return login.CurrentSession(&config, k.context)
}

type loginFlags struct {
	files *kubeconfigFiles

	session, cluster, server, authority string

	cloud string
	totp  bool

	oidc   login.OIDC
	oidcCA string

	certificate bool
	from        string
}

func newLogin() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Log in to a cluster: by Keystone, OpenID Connect, or a User's certificate",
		Long: `Log in to a cluster and write a kubeconfig entry whose credentials renew themselves.

With a Keystone: --os-cloud NAME of clouds.yaml, or the variables OS_CLOUD or OS_AUTH_URL, OS_USERNAME, ….
With OpenID Connect: --oidc-issuer and --oidc-client-id; it prints an address to open in a browser.
With a certificate: --certificate, and in --from the kubeconfig that an operator gave (h8s kubeconfig --user).

The cluster is that of the kubeconfig's context, or --server with --certificate-authority.`,
		Args: cobra.NoArgs,
	}
	f := loginFlags{files: kubeconfigFlags(cmd)}
	flags := cmd.Flags()
	flags.StringVar(&f.session, "session", "", "name of the session, and of the user and context in the kubeconfig (default: h8s-CLUSTER)")
	flags.StringVar(&f.cluster, "cluster", "", "name of the cluster in the kubeconfig (default: that of the context, or of --from)")
	flags.StringVar(&f.server, "server", "", "URL of the API server, if the kubeconfig does not have the cluster")
	flags.StringVar(&f.authority, "certificate-authority", "", "file with the CA of --server")
	flags.StringVar(&f.cloud, "os-cloud", "", "Keystone: name of the cloud in clouds.yaml (default: $OS_CLOUD)")
	flags.BoolVar(&f.totp, "totp", false, "Keystone: ask for a one-time code")
	flags.StringVar(&f.oidc.Issuer, "oidc-issuer", "", "OpenID Connect: URL of the issuer")
	flags.StringVar(&f.oidc.ClientID, "oidc-client-id", "", "OpenID Connect: ID of the public client")
	flags.StringSliceVar(&f.oidc.Scopes, "oidc-scope", []string{"email", "groups", "profile"}, "OpenID Connect: scopes to ask for")
	flags.StringVar(&f.oidcCA, "oidc-ca-file", "", "OpenID Connect: file with the CA of the issuer (default: the machine's)")
	flags.BoolVar(&f.certificate, "certificate", false, "keep renewing the client certificate in the kubeconfig")
	flags.StringVar(&f.from, "from", "", "with --certificate: the kubeconfig file that has it (default: the kubeconfig)")
	cmd.MarkFlagsMutuallyExclusive("os-cloud", "oidc-issuer", "certificate")
	cmd.MarkFlagsMutuallyExclusive("totp", "oidc-issuer", "certificate")
	cmd.MarkFlagsRequiredTogether("oidc-issuer", "oidc-client-id")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context()) }
	return cmd
}

func (f *loginFlags) run(ctx context.Context) error {
	if f.from != "" && !f.certificate {
		return errors.New("--from is the kubeconfig of --certificate: say that, too, or leave it out")
	}
	entry, config, err := f.target()
	if err != nil {
		return err
	}
	session, err := f.provider(config)
	if err != nil {
		return err
	}
	cache, err := login.DefaultCache()
	if err != nil {
		return err
	}
	if session.Cluster, err = entry.Check(f.files.access()); err != nil {
		return err
	}
	if err := cache.Login(ctx, entry.Name, &session, login.Terminal{}); err != nil {
		return err
	}
	if err := entry.Add(f.files.access()); err != nil {
		return err
	}
	fmt.Printf("logged in; context %q is the current one (h8s whoami, h8s logout)\n", entry.Name)
	return nil
}

// source is the kubeconfig that names the cluster. Where that is the one to write to, it
// need not exist yet; it is made with mode 0600.
func (f *loginFlags) source() (*kubeconfigFiles, *clientcmdapi.Config, error) {
	if f.from == "" {
		raw, err := f.files.access().GetStartingConfig()
		return f.files, raw, err
	}
	source := &kubeconfigFiles{path: f.from}
	raw, err := source.client().RawConfig()
	return source, &raw, err
}

// target is the cluster to log in to, and how the kubeconfig that names it gets in.
func (f *loginFlags) target() (login.Entry, *rest.Config, error) {
	source, raw, err := f.source()
	if err != nil {
		return login.Entry{}, nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	context := source.context
	if context == "" {
		context = raw.CurrentContext
	}
	e := login.Entry{Name: f.session, Cluster: f.cluster, Server: f.server}
	if e.Command, err = os.Executable(); err != nil {
		return e, nil, fmt.Errorf("find this program: %w", err)
	}
	if f.authority != "" {
		if e.CA, err = os.ReadFile(f.authority); err != nil {
			return e, nil, fmt.Errorf("--certificate-authority: %w", err)
		}
	}
	var config *rest.Config
	switch c := raw.Contexts[context]; {
	case f.server != "":
		if e.Cluster == "" {
			e.Cluster = strings.TrimPrefix(f.server, "https://")
		}
	case c != nil:
		if e.Cluster == "" {
			e.Cluster = c.Cluster
		}
		if f.from != "" || f.certificate {
			if config, err = source.client().ClientConfig(); err != nil {
				return e, nil, fmt.Errorf("read the kubeconfig: %w", err)
			}
			if err := rest.LoadTLSFiles(config); err != nil {
				return e, nil, fmt.Errorf("read the kubeconfig's certificates: %w", err)
			}
			e.Server, e.CA = config.Host, config.CAData
			if described := raw.Clusters[c.Cluster]; described != nil {
				e.TLSServerName, e.ProxyURL = described.TLSServerName, described.ProxyURL
			}
		}
	case e.Cluster == "":
		return e, nil, errors.New("it is not said which cluster: name its address with --server (and --certificate-authority), or use a kubeconfig that has it")
	}
	if e.Name == "" {
		e.Name = "h8s-" + e.Cluster
	}
	return e, config, nil
}

func (f *loginFlags) provider(config *rest.Config) (login.Session, error) {
	switch {
	case f.certificate:
		if config == nil {
			return login.Session{}, errors.New("--certificate needs a kubeconfig with a client certificate: name it with --from")
		}
		certificate, err := login.NewCertificate(config)
		return login.Session{Certificate: certificate}, err
	case f.oidc.Issuer != "":
		if f.oidcCA != "" {
			ca, err := os.ReadFile(f.oidcCA)
			if err != nil {
				return login.Session{}, fmt.Errorf("--oidc-ca-file: %w", err)
			}
			f.oidc.CA = string(ca)
		}
		return login.Session{OIDC: &f.oidc}, nil
	default:
		keystone, err := login.NewKeystone(f.cloud, f.totp, os.Getenv)
		return login.Session{Keystone: keystone}, err
	}
}

func newLogout() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "logout",
		Short: "End a session of `h8s login`: revoke its token, forget it and its kubeconfig entry",
		Args:  cobra.NoArgs,
	}
	files := kubeconfigFlags(cmd)
	named := cmd.Flags().String("session", "", "name of the session (default: that of the kubeconfig's context)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		session, err := files.session(*named)
		if err != nil {
			return err
		}
		cache, err := login.DefaultCache()
		if err != nil {
			return err
		}
		if err := errors.Join(cache.Logout(cmd.Context(), session), login.Remove(files.access(), session)); err != nil {
			return err
		}
		fmt.Printf("session %q is over\n", session)
		return nil
	}
	return cmd
}

// newCredential is the exec credential plugin; kubectl calls it.
func newCredential() *cobra.Command {
	cmd := &cobra.Command{Use: "credential", Short: "Credential plugin that kubectl calls", Hidden: true, Args: cobra.NoArgs}
	session := cmd.Flags().String("session", "", "name of the session")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cluster, interactive, err := login.ParseExecInfo(os.Getenv(login.ExecInfoVariable))
		if err != nil {
			return err
		}
		cache, err := login.DefaultCache()
		if err != nil {
			return err
		}
		var person login.Person
		if interactive {
			person = login.Terminal{}
		}
		credential, err := cache.Credential(cmd.Context(), *session, cluster, person)
		if err != nil {
			return err
		}
		return login.WriteExecCredential(os.Stdout, credential)
	}
	return cmd
}

func newWhoAmI() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show who the cluster takes you for, your tenants and roles, and what you may do",
		Args:  cobra.NoArgs,
	}
	files, format := kubeconfigFlags(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := files.client().ClientConfig()
		if err != nil {
			return fmt.Errorf("read the kubeconfig: %w", err)
		}
		scheme, err := controller.NewScheme()
		if err != nil {
			return err
		}
		c, err := client.New(config, client.Options{Scheme: scheme})
		if err != nil {
			return fmt.Errorf("connect to the cluster: %w", err)
		}
		id, err := login.WhoAmI(cmd.Context(), c)
		if err != nil {
			return err
		}
		if format.json() {
			return json.NewEncoder(os.Stdout).Encode(id)
		}
		return printIdentity(os.Stdout, id)
	}
	return cmd
}

func printIdentity(out io.Writer, id *login.Identity) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "user\t%s\n", id.User)
	if len(id.Groups) > 0 {
		fmt.Fprintf(w, "groups\t%s\n", strings.Join(id.Groups, ", "))
	}
	if len(id.Tenants) == 0 {
		fmt.Fprintln(w, "tenants\tnone")
	}
	if id.Note != "" {
		fmt.Fprintf(w, "note\t%s\n", id.Note)
	}
	for _, t := range id.Tenants {
		roles := make([]string, len(t.Roles))
		for i, r := range t.Roles {
			roles[i] = string(r)
		}
		fmt.Fprintf(w, "tenant %s\t%s\n", t.Tenant, strings.Join(roles, ", "))
		for _, n := range t.Namespaces {
			fmt.Fprintf(w, "  namespace %s\twrites %d kinds, reads %d more%s\n", n.Namespace, len(n.Write), len(n.Read), important(n.Write))
		}
	}
	return w.Flush()
}

// important names what most people want to know.
func important(write []string) string {
	var names []string
	for _, name := range []string{"pods", "pods/exec", "deployments.apps", "services", "secrets", "rolebindings.rbac.authorization.k8s.io"} {
		if slices.Contains(write, name) {
			short, _, _ := strings.Cut(name, ".")
			names = append(names, short)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return ": writes " + strings.Join(names, ", ")
}
