package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of /proc/stat, the same on every Linux (USER_HZ).
const tick = 10 * time.Millisecond

func loadAverage() string {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// cpuTime is the machine's since it booted.
type cpuTime struct{ busy, all time.Duration }

// parseStat reads the first line of /proc/stat.
func parseStat(data string) (cpuTime, error) {
	line, _, _ := strings.Cut(data, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return cpuTime{}, fmt.Errorf("/proc/stat begins with %q", line)
	}
	var t cpuTime
	// user nice system idle iowait irq softirq steal; what follows is part of user.
	for i, f := range fields[1:9] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return cpuTime{}, fmt.Errorf("/proc/stat: %w", err)
		}
		t.all += time.Duration(n) * tick
		if i != 3 && i != 4 {
			t.busy += time.Duration(n) * tick
		}
	}
	return t, nil
}

func machineTime() (cpuTime, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return cpuTime{}, err
	}
	return parseStat(string(data))
}

// cpuTime is the CPU time of the cluster, of this process and of its children that ended.
func (l *lab) cpuTime() (time.Duration, error) {
	var sum time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, err
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	if l.crowd != nil {
		of, err := descendantsTime(os.Getpid())
		return sum + of, err
	}
	of, err := cgroupTime("/h8s-" + l.name)
	return sum + of, err
}

// descendantsTime is the CPU time of those who run, and of their children that ended.
func descendantsTime(pid int) (time.Duration, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	type process struct {
		parent int
		time   time.Duration
	}
	all := map[int]process{}
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if parent, own, ended, err := processStat(id); err == nil { // it may have ended meanwhile
			all[id] = process{parent, own + ended}
		}
	}
	var sum time.Duration
	for id, p := range all {
		for at := id; at > 1; at = all[at].parent {
			if at != id && at == pid {
				sum += p.time
				break
			}
		}
	}
	return sum, nil
}

// processTime is the CPU time of a process without its children.
func processTime(pid int) (time.Duration, error) {
	_, own, _, err := processStat(pid)
	return own, err
}

// processStat reads /proc/PID/stat (proc(5)).
func processStat(pid int) (parent int, own, ended time.Duration, err error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, 0, err
	}
	// The second field is the name, in parentheses and with whatever in it.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 15 {
		return 0, 0, 0, fmt.Errorf("/proc/%d/stat has %q", pid, data)
	}
	n := make([]int, 5)
	for i, at := range []int{1, 11, 12, 13, 14} { // ppid, utime, stime, cutime, cstime
		if n[i], err = strconv.Atoi(fields[at]); err != nil {
			return 0, 0, 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
	}
	return n[0], time.Duration(n[1]+n[2]) * tick, time.Duration(n[3]+n[4]) * tick, nil
}

// cgroupTime is the CPU time of a cgroup with all below it, of version 1 or 2.
func cgroupTime(path string) (time.Duration, error) {
	for _, controller := range []string{"cpuacct", "cpu,cpuacct"} {
		data, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, path, "cpuacct.usage"))
		if err == nil {
			n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
			return time.Duration(n), err
		}
	}
	data, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", path, "cpu.stat"))
	if err != nil {
		return 0, fmt.Errorf("CPU time of the cluster: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if usec, ok := strings.CutPrefix(strings.TrimSpace(line), "usage_usec "); ok {
			n, err := strconv.ParseInt(usec, 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, errors.New("cpu.stat has no usage_usec")
}

// watchOthers returns what says which share of the CPU time others have had since.
func watchOthers(ownTime func() (time.Duration, error)) func() float64 {
	read := func() (busy, all time.Duration, err error) {
		machine, err := machineTime()
		own, ownErr := ownTime()
		return machine.busy - own, machine.all, errors.Join(err, ownErr)
	}
	busy, all, err := read()
	return func() float64 {
		busyNow, allNow, errNow := read()
		if err != nil || errNow != nil || allNow <= all {
			return -1
		}
		// The clocks differ by a tick or so.
		return max(0, float64(busyNow-busy)/float64(allNow-all))
	}
}

// others says what the rest of the machine did during the run.
func (m Machine) others() string {
	switch {
	case m.Others < 0:
		return "how much of the CPU time others took is not known"
	case m.Others >= loaded:
		return fmt.Sprintf("THE MACHINE WAS LOADED: others took %.0f%% of its CPU time, times are too long and targets missed for it", 100*m.Others)
	default:
		return fmt.Sprintf("others took %.0f%% of its CPU time", 100*m.Others)
	}
}
