package shim

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// Only the process on record is killed, not another one that has its ID.
func TestCleanUpKillsOneProcess(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*state)
		killed bool
	}{
		"on record":                   {change: func(*state) {}, killed: true},
		"the ID has another process":  {change: func(s *state) { s.Started++ }},
		"nothing is on record":        {change: func(s *state) { *s = state{} }},
		"the record is not a process": {change: func(s *state) { s.QEMU = -1 }},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("sleep", "1000")
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			must(t, cmd.Start())
			ended := make(chan struct{})
			go func() {
				_ = cmd.Wait()
				close(ended)
			}()
			defer func() {
				_ = cmd.Process.Kill()
				<-ended
			}()
			started, err := startTime(cmd.Process.Pid)
			must(t, err)
			s := state{QEMU: cmd.Process.Pid, Started: started}
			test.change(&s)
			must(t, s.cleanUp())
			if test.killed {
				select {
				case <-ended:
				case <-time.After(testTimeout):
					t.Error("it still runs")
				}
				return
			}
			if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
				t.Errorf("another process was killed: %v", err)
			}
		})
	}
}

func TestStateIsKept(t *testing.T) {
	bundle := t.TempDir()
	if s, err := loadState(bundle); err != nil || s != (state{}) {
		t.Errorf("of nothing: %+v, %v", s, err)
	}
	run := filepath.Join(t.TempDir(), "run")
	must(t, os.Mkdir(run, 0o700))
	s := state{NetNS: filepath.Join(run, "none"), RunDir: run}
	must(t, s.save(bundle))
	got, err := loadState(bundle)
	if err != nil || got != s {
		t.Errorf("%+v, %v, want %+v", got, err, s)
	}
	must(t, got.cleanUp())
	must(t, got.cleanUp())
	if _, err := os.Stat(run); !os.IsNotExist(err) {
		t.Errorf("the directory is still there: %v", err)
	}
}
