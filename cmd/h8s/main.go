// Command h8s does what kubectl cannot: it makes and removes embedded clusters,
// makes kubeconfigs for Users, logs people in, lists what is one's own and examines
// the machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"h8s.io/hypernetes/internal/cluster"
)

// version is set by the linker.
var version = "dev"

// errReported ends the program with exit status 1 when the output says why already.
var errReported = errors.New("reported")

func main() {
	// What goes wrong is in the errors that come back; the client's own log is not for this terminal.
	ctrllog.SetLogger(logr.Discard())
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	if !errors.Is(err, errReported) {
		fmt.Fprintln(os.Stderr, "h8s:", err)
	}
	os.Exit(1)
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "h8s",
		Short:         "Hypernetes: one Kubernetes for tenants who do not trust each other",
		SilenceUsage:  true,
		SilenceErrors: true,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: displayName(os.Args[0])},
	}
	root.AddCommand(
		newUp(), newDown(), newStatus(), newKubeconfig(), newImage(), newDoctor(), newVersion(),
		newLogin(), newLogout(), newWhoAmI(), newCredential(),
		newSupervise(), newNodeInit(),
	)
	root.AddCommand(newMine()...)
	return root
}

// nameFlag adds --name, which nearly every command has.
func nameFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("name", cluster.DefaultName, "name of the cluster")
}

// outputFlag adds --output.
func outputFlag(cmd *cobra.Command) *output {
	o := output("text")
	cmd.Flags().VarP(&o, "output", "o", "output format: text or json")
	return &o
}

// output is the value of --output.
type output string

// String implements pflag.Value.
func (o *output) String() string { return string(*o) }

// Type implements pflag.Value.
func (o *output) Type() string { return "format" }

// Set implements pflag.Value.
func (o *output) Set(s string) error {
	if s != "text" && s != "json" {
		return errors.New("choose text or json")
	}
	*o = output(s)
	return nil
}

func (o *output) json() bool { return *o == "json" }

// binDirFlag adds --bin-dir; the function returned gives its value, or the
// directory of this program: the others are beside it.
func binDirFlag(cmd *cobra.Command) func() (string, error) {
	dir := cmd.Flags().String("bin-dir", "", "directory of the upstream programs (default: that of h8s)")
	return func() (string, error) {
		if *dir != "" {
			return filepath.Abs(*dir)
		}
		exe, err := os.Executable()
		if err != nil {
			return "", fmt.Errorf("find this program: %w", err)
		}
		return filepath.Dir(exe), nil
	}
}
