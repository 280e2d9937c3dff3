package login

import (
	"errors"
	"fmt"
	"os"
	"slices"

	clientauthenticationv1 "k8s.io/client-go/pkg/apis/clientauthentication/v1"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Entry is what a login adds to a kubeconfig: a user and a context of one name,
// and a cluster if the kubeconfig has none.
type Entry struct {
	// Name of the user and the context; also of the session.
	Name string
	// Cluster is the name of the cluster. The next four are what a kubeconfig says of
	// it; CA is PEM. They describe it if this one does not, and must agree if it does.
	Cluster       string
	Server        string
	CA            []byte
	TLSServerName string
	ProxyURL      string
	// Command is the absolute path of h8s.
	Command string
}

// Check says what keeps Add from writing the entry: a name that stands for something
// else already, or a cluster that nothing describes, or that has another server or CA.
// It returns the cluster that the entry leads to.
func (e Entry) Check(files clientcmd.ConfigAccess) (Cluster, error) {
	config, err := files.GetStartingConfig()
	if err != nil {
		return Cluster{}, fmt.Errorf("read the kubeconfig: %w", err)
	}
	return e.check(config)
}

// authority is the cluster's CA, PEM. Data counts more than a file, as in kubectl.
func authority(c *clientcmdapi.Cluster) (string, error) {
	if len(c.CertificateAuthorityData) > 0 || c.CertificateAuthority == "" {
		return string(c.CertificateAuthorityData), nil
	}
	ca, err := os.ReadFile(c.CertificateAuthority)
	if err != nil {
		return "", fmt.Errorf("read the CA that the kubeconfig names: %w", err)
	}
	return string(ca), nil
}

func (e Entry) check(config *clientcmdapi.Config) (Cluster, error) {
	if have := config.AuthInfos[e.Name]; have != nil && sessionOf(have) == "" {
		return Cluster{}, fmt.Errorf("the kubeconfig has a user %q that `h8s login` did not make: choose another name with --session", e.Name)
	}
	if have := config.Contexts[e.Name]; have != nil && have.AuthInfo != e.Name {
		return Cluster{}, fmt.Errorf("the kubeconfig has a context %q of another user: choose another name with --session", e.Name)
	}
	said := Cluster{Server: e.Server, CA: string(e.CA)}
	described := config.Clusters[e.Cluster]
	if described == nil {
		if e.Server == "" {
			return Cluster{}, fmt.Errorf("the kubeconfig has no cluster %q: say --server, and --certificate-authority", e.Cluster)
		}
		return said, nil
	}
	ca, err := authority(described)
	if err != nil {
		return Cluster{}, err
	}
	have := Cluster{Server: described.Server, CA: ca}
	switch {
	case said.Server != "" && !have.sameServer(said):
		return Cluster{}, fmt.Errorf("the kubeconfig has a cluster %q at %s, not %s: choose another name with --cluster", e.Cluster, have.Server, said.Server)
	case said.CA != "" && !have.same(said):
		// Whom to trust is not ours to change: others use the cluster's entry, too.
		return Cluster{}, fmt.Errorf("the kubeconfig has the cluster %q with another CA: if the cluster was made anew, `kubectl config delete-cluster %s` and log in again; if not, choose another name with --cluster", e.Cluster, e.Cluster)
	}
	return have, nil
}

// Add writes the entry and makes it the current context. Nothing that is there is
// lost: it refuses what Check does.
func (e Entry) Add(files clientcmd.ConfigAccess) error {
	config, err := files.GetStartingConfig()
	if err != nil {
		return fmt.Errorf("read the kubeconfig: %w", err)
	}
	if _, err := e.check(config); err != nil {
		return err
	}
	if config.Clusters[e.Cluster] == nil {
		config.Clusters[e.Cluster] = &clientcmdapi.Cluster{Server: e.Server, CertificateAuthorityData: e.CA, TLSServerName: e.TLSServerName, ProxyURL: e.ProxyURL}
	}
	user := clientcmdapi.NewAuthInfo()
	user.Exec = &clientcmdapi.ExecConfig{
		APIVersion:      clientauthenticationv1.SchemeGroupVersion.String(),
		Command:         e.Command,
		Args:            []string{"credential", "--session", e.Name},
		InteractiveMode: clientcmdapi.IfAvailableExecInteractiveMode,
		// The session is found by its name alone: the plugin must see who gets its credential.
		ProvideClusterInfo: true,
		InstallHint:        "h8s is needed to log in to this cluster: install it, or run `h8s login` where it is.",
	}
	if have := config.AuthInfos[e.Name]; have != nil {
		user.LocationOfOrigin = have.LocationOfOrigin
	}
	config.AuthInfos[e.Name] = user
	context := config.Contexts[e.Name]
	if context == nil {
		context = clientcmdapi.NewContext()
		config.Contexts[e.Name] = context
	}
	context.Cluster, context.AuthInfo = e.Cluster, e.Name
	config.CurrentContext = e.Name
	return modify(files, config)
}

// Remove takes the session's user and its contexts out of the kubeconfig. The
// cluster stays: others may use it.
func Remove(files clientcmd.ConfigAccess, session string) error {
	config, err := files.GetStartingConfig()
	if err != nil {
		return fmt.Errorf("read the kubeconfig: %w", err)
	}
	var users []string
	for name, user := range config.AuthInfos {
		if sessionOf(user) == session {
			users = append(users, name)
			delete(config.AuthInfos, name)
		}
	}
	for name, context := range config.Contexts {
		if slices.Contains(users, context.AuthInfo) {
			delete(config.Contexts, name)
			if config.CurrentContext == name {
				config.CurrentContext = ""
			}
		}
	}
	return modify(files, config)
}

// CurrentSession is the session of a context of the kubeconfig, the current one if
// context is empty.
func CurrentSession(config *clientcmdapi.Config, context string) (string, error) {
	if context == "" {
		context = config.CurrentContext
	}
	c := config.Contexts[context]
	if c == nil {
		return "", errors.New("the kubeconfig has no such context: say which session with --session")
	}
	if user := config.AuthInfos[c.AuthInfo]; user != nil {
		if session := sessionOf(user); session != "" {
			return session, nil
		}
	}
	return "", fmt.Errorf("the context %q was not made by `h8s login`: say which session with --session", context)
}

// sessionOf is the session that a user of the kubeconfig asks our plugin for, empty if
// the user is no session's.
func sessionOf(user *clientcmdapi.AuthInfo) string {
	if user.Exec == nil {
		return ""
	}
	if args := user.Exec.Args; len(args) == 3 && args[0] == "credential" && args[1] == "--session" {
		return args[2]
	}
	return ""
}

func modify(files clientcmd.ConfigAccess, config *clientcmdapi.Config) error {
	if err := clientcmd.ModifyConfig(files, *config, true); err != nil {
		return fmt.Errorf("write the kubeconfig: %w", err)
	}
	return nil
}
