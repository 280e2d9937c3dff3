package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"h8s.io/hypernetes/internal/cluster"
	"h8s.io/hypernetes/internal/identity"
)

func newUp() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Start a cluster on this machine and install Hypernetes",
		Args:  cobra.NoArgs,
	}
	name := nameFlag(cmd)
	nodes := cmd.Flags().Int("nodes", cluster.DefaultNodes, "number of nodes of a new cluster")
	resolvers := cmd.Flags().StringSlice("resolver", nil, "DNS resolver (address:port) for the nodes; may be given again (default: the machine's)")
	noProduct := cmd.Flags().Bool("no-product", false, "plain Kubernetes, without Hypernetes")
	keystone := cmd.Flags().Bool("keystone", false, "with an OpenStack Keystone, from Debian's packages, whose users may log in (a new cluster only)")
	keystonePrefix := cmd.Flags().String("keystone-prefix", "", fmt.Sprintf("beginning of the names of Keystone's users and groups (default %q)", identity.DefaultPrefix))
	demo := cmd.Flags().Bool("demo", false, "make two tenants, acme and globex, with a web Service each")
	oidc := oidcFlags(cmd)
	bin := binDirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		dir, err := bin()
		if err != nil {
			return err
		}
		provider, err := oidc()
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("nodes") {
			*nodes = 0 // as many as there are
		}
		return cluster.Up(cmd.Context(), cluster.UpOptions{
			Name:           *name,
			Nodes:          *nodes,
			BinDir:         dir,
			Resolvers:      *resolvers,
			OIDC:           provider,
			Product:        !*noProduct,
			Keystone:       *keystone,
			KeystonePrefix: *keystonePrefix,
			Demo:           *demo,
			Out:            os.Stdout,
			Terminal:       term.IsTerminal(int(os.Stdout.Fd())),
		})
	}
	return cmd
}

// oidcFlags adds the flags of the identity provider; the function returned gives it,
// nil if none is named.
func oidcFlags(cmd *cobra.Command) func() (*cluster.OIDC, error) {
	var o cluster.OIDC
	flags := cmd.Flags()
	flags.StringVar(&o.IssuerURL, "oidc-issuer-url", "", "OpenID Connect: issuer whose ID tokens a new cluster believes; its nodes must reach it")
	flags.StringVar(&o.ClientID, "oidc-client-id", "", "OpenID Connect: client that the tokens must be for")
	caFile := flags.String("oidc-ca-file", "", "OpenID Connect: file with the CA of the issuer (default: the machine's)")
	flags.StringVar(&o.UsernameClaim, "oidc-username-claim", "email", "OpenID Connect: claim with the user's name")
	flags.StringVar(&o.GroupsClaim, "oidc-groups-claim", "groups", "OpenID Connect: claim with the names of groups")
	flags.StringVar(&o.Prefix, "oidc-username-prefix", "", "OpenID Connect: prefix of all its users and groups, such as oidc: (needed)")
	cmd.MarkFlagsRequiredTogether("oidc-issuer-url", "oidc-client-id", "oidc-username-prefix")
	return func() (*cluster.OIDC, error) { // cluster.Up validates it
		if o.IssuerURL == "" {
			return nil, nil
		}
		if *caFile != "" {
			data, err := os.ReadFile(*caFile)
			if err != nil {
				return nil, fmt.Errorf("--oidc-ca-file: %w", err)
			}
			o.CA = string(data)
		}
		return &o, nil
	}
}

func newDown() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Remove a cluster and everything it made",
		Args:  cobra.NoArgs,
	}
	name := nameFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := cluster.Down(cmd.Context(), *name); err != nil {
			return err
		}
		fmt.Printf("cluster %q is down\n", *name)
		return nil
	}
	return cmd
}
