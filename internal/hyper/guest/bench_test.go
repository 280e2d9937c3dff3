//go:build hyper

package guest_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// BenchmarkContainer measures what a container costs in a clone: the first one, for which
// nothing has been translated or cached yet, and the second.
// Of all runs it reports the least: what others do on the machine only adds to that.
func BenchmarkContainer(b *testing.B) {
	c := config(b, 512<<20)
	c.Template = saveTemplate(b, c)
	layer := busyboxLayer(b)
	took := map[string]duration{}
	for b.Loop() {
		m := start(b, c)
		m.must("POST", "/v1/setup", guestapi.Setup{Hostname: "clone", Time: time.Now(), Entropy: bytes.Repeat([]byte{1}, 32)})
		if err := m.vm.AddDisk(b.Context(), vm.Disk{
			Serial: "busybox", ReadOnly: true, Backend: map[string]any{"driver": "file", "filename": layer},
		}); err != nil {
			b.Fatal(err)
		}
		m.must("PUT", "/v1/disks/busybox", guestapi.Disk{FileSystem: "erofs", ReadOnly: true})
		for i := range 2 {
			m.life(fmt.Sprint(i), func(step string, d duration) {
				step = fmt.Sprintf("%s%d", step, i+1)
				if least, ok := took[step]; ok {
					d = duration{min(d.wall, least.wall), min(d.cpu, least.cpu)}
				}
				took[step] = d
			})
		}
		m.vm.Kill()
		<-m.vm.Done()
	}
	for step, d := range took {
		b.ReportMetric(float64(d.wall.Microseconds())/1000, "ms-"+step)
		b.ReportMetric(float64(d.cpu.Microseconds())/1000, "cpu-ms-"+step)
	}
}

// BenchmarkSetUp measures what makes a clone a pod's: without a link, and with one. Of all runs
// it reports the least, as BenchmarkContainer does.
func BenchmarkSetUp(b *testing.B) {
	c := config(b, 512<<20)
	c.Template = saveWithCard(b, c)
	pod := newPodNetwork(b)
	c.NIC = &vm.NIC{Tap: pod.tap.File, HardwareAddr: []byte{2, 0, 0, 0, 0, 2}}
	for name, links := range map[string][]guestapi.Link{"alone": nil, "link": {pod.tap.Link}} {
		b.Run(name, func(b *testing.B) {
			var least duration
			for b.Loop() {
				m := start(b, c)
				begin, cpu := time.Now(), m.cpu()
				m.must("POST", "/v1/setup", guestapi.Setup{
					Hostname: "clone", Time: time.Now(), Entropy: bytes.Repeat([]byte{1}, 32), Links: links,
				})
				took := duration{time.Since(begin), m.cpu() - cpu}
				if least.wall == 0 {
					least = took
				}
				least = duration{min(took.wall, least.wall), min(took.cpu, least.cpu)}
				m.vm.Kill()
				<-m.vm.Done()
			}
			b.ReportMetric(float64(least.wall.Microseconds())/1000, "ms-setup")
			b.ReportMetric(float64(least.cpu.Microseconds())/1000, "cpu-ms-setup")
		})
	}
}

// duration is how long something took, and of that, what QEMU had the processor for: the latter
// can be compared when others use the machine, too.
type duration struct{ wall, cpu time.Duration }

// cpu is how long QEMU has had a processor.
func (m *machine) cpu() time.Duration {
	m.t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", m.vm.Pid()))
	if err != nil {
		m.t.Fatal(err)
	}
	var sum time.Duration
	for _, t := range threads {
		text, err := os.ReadFile(t)
		if err != nil {
			continue // a thread that has ended
		}
		var on time.Duration
		if _, err := fmt.Sscan(string(text), &on); err != nil {
			m.t.Fatal(err)
		}
		sum += on
	}
	return sum
}

// life lets a container live, and tells how long each of its steps takes.
func (m *machine) life(id string, took func(step string, d duration)) {
	timed := func(step string, do func() error) {
		m.t.Helper()
		begin, cpu := time.Now(), m.cpu()
		if err := do(); err != nil {
			m.t.Fatalf("%s: %v", step, err)
		}
		took(step, duration{time.Since(begin), m.cpu() - cpu})
	}
	ctx := m.t.Context()
	s := spec("sleep", "1000")
	compile(m.t, s)
	raw, err := json.Marshal(s)
	if err != nil {
		m.t.Fatal(err)
	}
	process, err := json.Marshal(specs.Process{Args: []string{"cat", "/dev/null"}, Cwd: "/", Env: []string{"PATH=/bin"}})
	if err != nil {
		m.t.Fatal(err)
	}
	timed("bundle", func() error {
		_, err := m.call("PUT", "/v1/containers/"+id, guestapi.Container{Spec: raw, Layers: []string{"busybox"}})
		return err
	})
	for _, name := range []string{"out", "err", "exec", "exec-err"} {
		m.pipe(id, name+":r")
	}
	at := filepath.Join(guestapi.PipeDir, id)
	timed("create", func() error {
		_, err := m.tasks.Create(ctx, &taskapi.CreateTaskRequest{ID: id, Stdout: at + "/out", Stderr: at + "/err"})
		return err
	})
	timed("start", func() error {
		_, err := m.tasks.Start(ctx, &taskapi.StartRequest{ID: id})
		return err
	})
	timed("exec", func() error {
		_, err := m.tasks.Exec(ctx, &taskapi.ExecProcessRequest{
			ID: id, ExecID: "e", Stdout: at + "/exec", Stderr: at + "/exec-err",
			Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: process},
		})
		if err == nil {
			_, err = m.tasks.Start(ctx, &taskapi.StartRequest{ID: id, ExecID: "e"})
		}
		if err == nil {
			_, err = m.tasks.Wait(ctx, &taskapi.WaitRequest{ID: id, ExecID: "e"})
		}
		return err
	})
	timed("kill", func() error {
		_, err := m.tasks.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: 9})
		if err == nil {
			_, err = m.tasks.Wait(ctx, &taskapi.WaitRequest{ID: id})
		}
		return err
	})
	timed("delete", func() error {
		_, err := m.tasks.Delete(ctx, &taskapi.DeleteRequest{ID: id})
		return err
	})
}
