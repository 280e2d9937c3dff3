package main

import (
	"github.com/spf13/cobra"

	"h8s.io/hypernetes/internal/cluster"
)

func newImage() *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Container images of a cluster's nodes"}
	load := &cobra.Command{
		Use:   "load FILE.tar",
		Short: "Load a docker or OCI archive into every node",
		Args:  cobra.ExactArgs(1),
	}
	name := nameFlag(load)
	load.RunE = func(cmd *cobra.Command, args []string) error {
		return cluster.LoadImage(cmd.Context(), *name, args[0])
	}
	cmd.AddCommand(load)
	return cmd
}
