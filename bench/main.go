// Command bench measures the product side by side with what one would run
// instead, in one run on the same nodes:
//
//	go run ./bench                       its own cluster "bench", removed afterwards
//	go run ./bench -cluster dev          a cluster that is up
//	go run ./bench -only network,cni     some of the sections
//	go run ./bench -suite hyper          pods that are virtual machines, beside runc and gVisor
//	go run ./bench -suite neighbours     a tenant's requests beside another's flood of them
//	go run ./bench -suite tenancy        1,000 tenants on a control plane without nodes
//	go run ./bench -from F -plots DIR    the plots of results that are there, once more
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
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A whole run takes no longer; tenants are made one after the other.
const (
	runLimit     = 15 * time.Minute
	tenancyLimit = 90 * time.Minute
)

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
	if len(os.Args) == 3 && os.Args[1] == floodCommand {
		if err := flood(context.Background(), os.Args[2], os.Stdin, os.Stdout); err != nil {
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
	flag.IntVar(&o.starts, "starts", 0, "pods of each kind to start, one after the other (default 12, in suite hyper 8)")
	flag.IntVar(&o.bursts, "bursts", 2, "rounds of ten pods at once (suite hyper)")
	flag.IntVar(&o.pods, "pods", 30, "idle pods of each kind whose memory is measured (suite hyper)")
	flag.IntVar(&o.tenants, "tenants", 1000, "tenants to make (suite tenancy)")
	flag.StringVar(&o.root, "root", ".", "directory of the project, for the chart (suite tenancy)")
	flag.StringVar(&o.plots, "plots", "", "directory for a plot (SVG) of each curve (default none)")
	flag.StringVar(&o.profiles, "profiles", "", "directory for profiles of the controller with all tenants (suite tenancy; default none)")
	flag.StringVar(&o.from, "from", "", "measure nothing: plot and print the results of this file")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster that was made up")
	flag.StringVar(&o.suite, "suite", productSuite, "what to measure: "+strings.Join(slices.Sorted(maps.Keys(suites())), " or "))
	flag.StringVar(&o.output, "output", "table", "what to print at the end: table or json")
	only := flag.String("only", "", "sections of the suite to run, separated by commas (default all)")
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
	suite, output        string
	root, plots, from    string
	profiles             string
	rounds, adds, starts int
	bursts, pods         int
	tenants              int
	keep                 bool
	only                 []string
}

// section is a group of rows that are measured together. A section that fails
// costs its own rows only.
type section struct {
	name string
	run  func(ctx context.Context, l *lab, o options, p *progress) ([]Row, error)
}

// productSuite measures networks, CNI, start of pods and the node agent.
const productSuite = "product"

// suites are the sections of each suite, in the order in which they run.
func suites() map[string][]section {
	return map[string][]section{
		productSuite: {
			{"network", measureNetwork},
			{"cni", measureCNI},
			{"start", measureStart},
			// Last, because it begins by taking away what the others made.
			{"memory", measureMemory},
		},
		neighboursSuite: {
			{"flood", measureFlood},
		},
		tenancySuite: {
			{"tenants", measureTenants},
			{tokensSection, measureTokensAlone},
			{"without", measureWithout},
			{"deletion", measureDeletion},
		},
		hyperSuite: {
			{"resume", measureResume},
			{"sandbox", measureSandbox},
			{"start", measureMachineStart},
			{"burst", measureBurst},
			{"work", measureWork},
			{"memory", measureMachineMemory},
		},
	}
}

// sections are those of the suite that were asked for.
func (o options) sections() ([]section, error) {
	suite, ok := suites()[o.suite]
	if !ok {
		return nil, fmt.Errorf("no suite %q: -suite takes %s", o.suite, strings.Join(slices.Sorted(maps.Keys(suites())), " or "))
	}
	var names []string
	for _, s := range suite {
		names = append(names, s.name)
	}
	for _, name := range o.only {
		if !slices.Contains(names, name) {
			return nil, fmt.Errorf("no section %q in suite %s: -only takes %s", name, o.suite, strings.Join(names, ", "))
		}
	}
	return slices.DeleteFunc(suite, func(s section) bool {
		return len(o.only) > 0 && !slices.Contains(o.only, s.name)
	}), nil
}

func run(o options) (err error) {
	if o.from != "" {
		return replay(o)
	}
	sections, err := o.sections()
	if err != nil {
		return err
	}
	if o.starts == 0 {
		o.starts = 12
		if o.suite == hyperSuite {
			o.starts = 8
		}
	}
	switch {
	case min(o.rounds, o.adds, o.starts, o.bursts, o.pods, o.tenants-2) < 1:
		return errors.New("-rounds, -adds, -starts, -bursts and -pods must be 1 at least, -tenants 3")
	case o.output != "table" && o.output != "json":
		return fmt.Errorf("-output %q: there are table and json", o.output)
	case os.Geteuid() != 0:
		return errors.New("nodes and pods are network namespaces that only root can enter: run it as root")
	}
	p := newProgress(os.Stderr)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	limit, open := runLimit, openLab
	if o.suite == tenancySuite {
		limit, open = tenancyLimit, openCrowd
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the run took longer than %s", limit))
	defer cancel()

	report := newReport()
	l, err := open(ctx, o, p)
	if err != nil {
		return err
	}
	defer func() {
		// Also after an interrupt.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		err = errors.Join(err, l.close(clean, p))
	}()
	report.Suite, report.Cluster, report.Version = o.suite, l.name, l.version
	others := watchOthers(l.cpuTime)

	var failed []error
	for _, s := range sections {
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
	if o.suite == hyperSuite {
		failed = append(failed, report.addMachines(l))
	}
	report.Curves = l.curves
	report.Seconds = p.elapsed().Seconds()
	report.Machine.LoadAfter = loadAverage()
	report.Machine.Others = others()
	path := o.out
	if path == "" {
		path = filepath.Join("bench", "results", report.fileName())
	}
	data, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return errors.Join(append(failed, fmt.Errorf("encode results: %w", err))...)
	}
	data = append(data, '\n')
	failed = append(failed, save(path, data))
	if o.plots != "" {
		failed = append(failed, savePlots(o.plots, report.Curves))
	}
	if o.output == "json" {
		_, err := os.Stdout.Write(data)
		return errors.Join(append(failed, err)...)
	}
	report.print(os.Stdout)
	fmt.Printf("\nwritten to %s\n", path)
	return errors.Join(failed...)
}

// replay prints and plots results that were saved.
func replay(o options) error {
	data, err := os.ReadFile(o.from)
	if err != nil {
		return err
	}
	var report Report
	if err := json.Unmarshal(data, &report); err != nil {
		return fmt.Errorf("read the results %s: %w", o.from, err)
	}
	report.print(os.Stdout)
	if o.plots == "" {
		return nil
	}
	return savePlots(o.plots, report.Curves)
}

// fileName is the time of the run, after the suite if that is not the product's.
func (r *Report) fileName() string {
	name := r.Started.Format("2006-01-02-150405") + ".json"
	if r.Suite == productSuite {
		return name
	}
	return r.Suite + "-" + name
}

func save(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("save results: %w", err)
	}
	return os.WriteFile(path, data, 0o644)
}
