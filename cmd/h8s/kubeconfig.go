package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"h8s.io/hypernetes/internal/cluster"
)

func newKubeconfig() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print a kubeconfig: the administrator's, or a User's, valid for one hour",
		Args:  cobra.NoArgs,
	}
	name := nameFlag(cmd)
	user := cmd.Flags().String("user", "", "the User to print it for (default: the administrator)")
	groups := cmd.Flags().StringArray("group", nil, "group that the user is in; may be given again")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var data []byte
		var err error
		switch {
		case *user != "":
			data, err = cluster.UserKubeconfig(cmd.Context(), *name, *user, *groups)
		case len(*groups) > 0:
			err = errors.New("--group needs --user: the administrator's groups are fixed")
		default:
			data, err = cluster.AdminKubeconfig(*name)
		}
		if err != nil {
			return err
		}
		_, err = os.Stdout.Write(data)
		return err
	}
	return cmd
}
