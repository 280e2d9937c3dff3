package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func newVersion() *cobra.Command {
	cmd := &cobra.Command{Use: "version", Short: "Print the version of Hypernetes", Args: cobra.NoArgs}
	format := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		if format.json() {
			return json.NewEncoder(os.Stdout).Encode(map[string]string{"version": version})
		}
		fmt.Println("h8s", version)
		return nil
	}
	return cmd
}
