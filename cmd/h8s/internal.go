package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"h8s.io/hypernetes/internal/cluster"
)

// newSupervise and newNodeInit are what `up` starts; nobody calls them by hand.

func newSupervise() *cobra.Command {
	cmd := &cobra.Command{Use: "supervise", Hidden: true, Args: cobra.NoArgs}
	name := nameFlag(cmd)
	standby := cmd.Flags().Bool("standby", false, "wait until the cluster's supervisor is gone, then take its place")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return cluster.Supervise(cmd.Context(), *name, *standby, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	}
	return cmd
}

func newNodeInit() *cobra.Command {
	return &cobra.Command{
		Use: "node-init", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cluster.RunNodeInit(cmd.Context(), os.Stdin, slog.New(slog.NewTextHandler(os.Stderr, nil)))
		},
	}
}
