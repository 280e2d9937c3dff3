package main

import (
	"encoding/json"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"h8s.io/hypernetes/internal/cluster"
)

func newStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show a cluster and its nodes; exit status 1 if it is not ready",
		Args:  cobra.NoArgs,
	}
	name, format := nameFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		s, err := cluster.GetStatus(cmd.Context(), *name)
		if err != nil {
			return err
		}
		if format.json() {
			err = json.NewEncoder(os.Stdout).Encode(s)
		} else {
			err = printStatus(s)
		}
		if err == nil && !s.Ready {
			err = errReported
		}
		return err
	}
	return cmd
}

func printStatus(s *cluster.Status) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "cluster\t%s\n", s.Name)
	fmt.Fprintf(w, "ready\t%t\n", s.Ready)
	if s.Problem != "" {
		fmt.Fprintf(w, "problem\t%s\n", s.Problem)
	}
	fmt.Fprintf(w, "server\t%s\nkubeconfig\t%s\nstate\t%s\n", s.Server, s.Kubeconfig, s.StateDir)
	for _, n := range s.Nodes {
		fmt.Fprintf(w, "node %s\tready=%t address=%s pods=%s pid=%d\n", n.Name, n.Ready, n.Address, n.PodCIDR, n.PID)
	}
	return w.Flush()
}
