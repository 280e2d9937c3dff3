package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"h8s.io/hypernetes/internal/cluster"
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
	demo := cmd.Flags().Bool("demo", false, "make two tenants, acme and globex, with a web Service each")
	bin := binDirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		dir, err := bin()
		if err != nil {
			return err
		}
		if !cmd.Flags().Changed("nodes") {
			*nodes = 0 // as many as there are
		}
		return cluster.Up(cmd.Context(), cluster.UpOptions{
			Name:      *name,
			Nodes:     *nodes,
			BinDir:    dir,
			Resolvers: *resolvers,
			Product:   !*noProduct,
			Demo:      *demo,
			Out:       os.Stdout,
			Terminal:  term.IsTerminal(int(os.Stdout.Fd())),
		})
	}
	return cmd
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
