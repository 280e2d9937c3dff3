package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"h8s.io/hypernetes/internal/cluster"
)

func newDoctor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine this machine and its clusters; exit status 1 if something is wrong",
		Args:  cobra.NoArgs,
	}
	format := outputFlag(cmd)
	bin := binDirFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		dir, err := bin()
		if err != nil {
			return err
		}
		checks := cluster.Diagnose(cmd.Context(), dir)
		if format.json() {
			err = json.NewEncoder(os.Stdout).Encode(checks)
		} else {
			printChecks(checks)
		}
		for _, c := range checks {
			if err == nil && c.Status == cluster.CheckFail {
				err = errReported
			}
		}
		return err
	}
	return cmd
}

func printChecks(checks []cluster.Check) {
	for _, c := range checks {
		line := fmt.Sprintf("%-5s %s", c.Status, c.Name)
		if c.Detail != "" {
			line += ": " + c.Detail
		}
		if c.Status != cluster.CheckOK && c.Fix != "" {
			line += " → " + c.Fix
		}
		fmt.Println(line)
	}
}
