// Command bench measures the product side by side with what one would run
// instead, in one run on the same nodes:
//
//	go run ./bench                       its own cluster "bench", removed afterwards
//	go run ./bench -cluster dev          a cluster that is up
//	go run ./bench -only network,cni     some of the sections
//
// What counts are the ratios and their spread; the absolute values are those of
// this machine. All sides of a comparison take turns in every round.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// limit is for the whole run.
const limit = 15 * time.Minute

func main() {
	// Threads that change their namespace are thrown away, and the first one
	// cannot be: it stays here.
	runtime.LockOSThread()
	if len(os.Args) == 2 && os.Args[1] == driverCommand {
		if err := serveCNI(context.Background(), os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.cluster, "cluster", "", "use this running cluster instead of one made for the run")
	flag.StringVar(&o.bin, "bin", "bin", "directory of h8s and the upstream programs")
	flag.StringVar(&o.out, "out", "", "file for the results (default bench/results/<time>.json)")
	flag.IntVar(&o.rounds, "rounds", 15, "rounds of the network measurements")
	flag.IntVar(&o.adds, "adds", 80, "CNI calls of each plugin")
	flag.IntVar(&o.starts, "starts", 12, "pods of each kind to start")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster that was made up")
	only := flag.String("only", "", "sections to run, of "+strings.Join(sectionNames(), ",")+" (default all)")
	flag.Parse()
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	cluster, bin, out    string
	rounds, adds, starts int
	keep                 bool
	only                 []string
}

// section is a group of rows that are measured together. A section that fails
// costs its own rows only.
type section struct {
	name string
	run  func(ctx context.Context, l *lab, o options, p *progress) ([]Row, error)
}

// sections in the order in which they run: memory is last, because it begins by
// taking away what the others made.
func sections() []section {
	return []section{
		{"network", measureNetwork},
		{"cni", measureCNI},
		{"start", measureStart},
		{"memory", measureMemory},
	}
}

func sectionNames() []string {
	var names []string
	for _, s := range sections() {
		names = append(names, s.name)
	}
	return names
}

func run(o options) (err error) {
	for _, name := range o.only {
		if !slices.Contains(sectionNames(), name) {
			return fmt.Errorf("no section %q: -only takes %s", name, strings.Join(sectionNames(), ", "))
		}
	}
	if min(o.rounds, o.adds, o.starts) < 1 {
		return errors.New("-rounds, -adds and -starts must be 1 at least")
	}
	if os.Geteuid() != 0 {
		return errors.New("nodes and pods are network namespaces that only root can enter: run it as root")
	}
	p := newProgress(os.Stdout)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the run took longer than %s", limit))
	defer cancel()

	l, err := openLab(ctx, o, p)
	if err != nil {
		return err
	}
	defer func() {
		// Also after an interrupt.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		err = errors.Join(err, l.close(clean, p))
	}()

	report := newReport(l)
	var failed []error
	for _, s := range sections() {
		if len(o.only) > 0 && !slices.Contains(o.only, s.name) {
			continue
		}
		rows, err := s.run(ctx, l, o, p)
		report.Rows = append(report.Rows, rows...)
		if err != nil {
			err = fmt.Errorf("section %s: %w", s.name, err)
			p.say("%v", err)
			report.Errors = append(report.Errors, err.Error())
			failed = append(failed, err)
		}
		if ctx.Err() != nil {
			failed = append(failed, context.Cause(ctx))
			break
		}
	}
	report.Seconds = p.elapsed().Seconds()
	path := o.out
	if path == "" {
		path = filepath.Join("bench", "results", report.Started.Format("2006-01-02-150405")+".json")
	}
	if err := report.save(path); err != nil {
		failed = append(failed, err)
	}
	report.print(os.Stdout)
	fmt.Printf("\nwritten to %s\n", path)
	return errors.Join(failed...)
}

func (r *Report) save(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode results: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}
