package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/accel"
)

// Report is one run.
type Report struct {
	Started time.Time `json:"started"`
	Seconds float64   `json:"seconds"`
	Suite   string    `json:"suite"`
	Machine Machine   `json:"machine"`
	Cluster string    `json:"cluster"`
	Version string    `json:"version"`
	// Accelerator is what executed the guests, in the suite that has some.
	Accelerator *accel.Choice `json:"accelerator,omitempty"`
	Rows        []Row         `json:"rows"`
	// Curves are what is plotted.
	Curves []Curve `json:"curves,omitempty"`
	// Errors are sections that could not be measured.
	Errors []string `json:"errors,omitempty"`
}

// Machine is what the absolute values belong to.
type Machine struct {
	Kernel string `json:"kernel"`
	CPUs   int    `json:"cpus"`
	CPU    string `json:"cpu"`
	// LoadBefore is /proc/loadavg when the run began, LoadAfter when it had measured
	// everything: the latter is its own for the most part.
	LoadBefore string `json:"loadBefore"`
	LoadAfter  string `json:"loadAfter"`
	// Others is the share of the machine's CPU time that was neither the run's nor idle,
	// from 0 to 1; negative if it is not known.
	Others float64 `json:"others"`
}

// loaded is the share from which on what others do is in the results.
const loaded = 0.2

// Row is one comparison.
type Row struct {
	// Group is where or on what it was measured, Metric what.
	Group  string `json:"group"`
	Metric string `json:"metric"`
	Unit   string `json:"unit"`
	Ours   Side   `json:"ours"`
	// Peer is nil where an absolute value is the result.
	Peer  *Side  `json:"peer,omitempty"`
	Ratio *Ratio `json:"ratio,omitempty"`
	// Target is nil where none was set; the row is there to be known.
	Target  *Target `json:"target,omitempty"`
	Verdict string  `json:"verdict,omitempty"`
	Note    string  `json:"note,omitempty"`
}

// Side is one of the things compared, with one sample for each round.
type Side struct {
	Name    string    `json:"name"`
	Median  float64   `json:"median"`
	P10     float64   `json:"p10"`
	P90     float64   `json:"p90"`
	Samples []float64 `json:"samples"`
}

func newSide(name string, samples []float64) Side {
	return Side{Name: name, Median: median(samples), P10: quantile(samples, 0.1), P90: quantile(samples, 0.9), Samples: samples}
}

// row compares two sides that were measured in the same rounds.
func row(group, metric, unit string, ours, peer Side, target *Target) (Row, error) {
	ratio, err := compare(ours.Samples, peer.Samples)
	if err != nil {
		return Row{}, fmt.Errorf("%s of %s against %s, %s: %w", metric, ours.Name, peer.Name, group, err)
	}
	r := Row{Group: group, Metric: metric, Unit: unit, Ours: ours, Peer: &peer, Ratio: &ratio, Target: target}
	if target != nil {
		r.Verdict = target.verdict(ratio)
	}
	return r, nil
}

// absolute is a result without a peer.
func absolute(group, metric, unit string, ours Side, target *Target) Row {
	r := Row{Group: group, Metric: metric, Unit: unit, Ours: ours, Target: target}
	if target != nil {
		r.Verdict = target.verdict(Ratio{Median: ours.Median, P10: ours.P10, P90: ours.P90, Single: len(ours.Samples) == 1})
	}
	return r
}

func newReport() *Report {
	return &Report{Started: time.Now().UTC().Truncate(time.Second), Machine: thisMachine()}
}

func thisMachine() Machine {
	m := Machine{CPUs: runtime.NumCPU(), LoadBefore: loadAverage()}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	return m
}

// print writes the table.
func (r *Report) print(out io.Writer) {
	fmt.Fprintf(out, "\n%s, kernel %s, %d × %s\n", r.Version, r.Machine.Kernel, r.Machine.CPUs, r.Machine.CPU)
	fmt.Fprintf(out, "load average %s before, %s after; %s\n", r.Machine.LoadBefore, r.Machine.LoadAfter, r.Machine.others())
	if r.Accelerator != nil {
		fmt.Fprintf(out, "guests are executed by %s: %s\n", r.Accelerator.Accelerator, r.Accelerator.Reason)
	}
	fmt.Fprintf(out, "ratio: ours/peer, median of the rounds (p10–p90)\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "WHERE\tWHAT\tOURS\tPEER\tRATIO\tTARGET\tVERDICT")
	for _, row := range r.Rows {
		ours, peer, ratio := number(row.Ours.Median)+" "+row.Unit, "", ""
		if row.Peer == nil && len(row.Ours.Samples) > 1 {
			ours += fmt.Sprintf(" (%s–%s)", number(row.Ours.P10), number(row.Ours.P90))
		}
		if row.Peer != nil {
			peer = fmt.Sprintf("%s %s", number(row.Peer.Median), row.Peer.Name)
		}
		if row.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", row.Ratio.Median)
			if !row.Ratio.Single {
				ratio += fmt.Sprintf(" (%.2f–%.2f)", row.Ratio.P10, row.Ratio.P90)
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", row.Group, row.Metric, ours, peer, ratio, row.target(), row.Verdict)
	}
	w.Flush()
	for _, row := range r.Rows {
		if row.Note != "" {
			fmt.Fprintf(out, "\n%s, %s: %s\n", row.Group, row.Metric, row.Note)
		}
	}
	for _, e := range r.Errors {
		fmt.Fprintf(out, "\nnot measured: %s\n", e)
	}
}

func (r Row) target() string {
	if r.Target == nil {
		return "–"
	}
	sign, unit := "≤ ", "×"
	if r.Target.AtLeast {
		sign = "≥ "
	}
	if r.Ratio == nil {
		unit = " " + r.Unit
	}
	return sign + number(r.Target.Value) + unit
}

// number has three significant digits, and as many more as there are before the point.
func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	default:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
}
