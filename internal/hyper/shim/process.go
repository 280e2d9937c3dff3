package shim

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// startTime is when a process started, in clock ticks since boot.
func startTime(pid int) (uint64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the name, in parentheses, and may hold anything.
	_, rest, ok := bytes.Cut(text[bytes.LastIndexByte(text, ')')+1:], []byte(" "))
	fields := bytes.Fields(rest)
	const start = 22 - 3 // of proc_pid_stat(5), counted from the third
	if !ok || len(fields) <= start {
		return 0, fmt.Errorf("/proc/%d/stat is not as proc_pid_stat(5) says", pid)
	}
	return strconv.ParseUint(string(fields[start]), 10, 64)
}
