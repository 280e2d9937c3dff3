// Command probe is package probe as a program, static, to be copied into a pod.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"h8s.io/hypernetes/test/e2e/probe"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	return probe.Run(ctx, os.Args[1:], os.Stdin, os.Stdout)
}
