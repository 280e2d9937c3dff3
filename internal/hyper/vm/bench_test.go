//go:build hyper

package vm

import (
	"bufio"
	"fmt"
	"testing"
	"time"
)

// BenchmarkStart measures the time until QEMU runs the guest (ms-running) and until the
// guest has answered over the channel (ms-channel).
func BenchmarkStart(b *testing.B) {
	for name, clone := range map[string]bool{"cold": false, "clone": true} {
		b.Run(name, func(b *testing.B) {
			c := config(b)
			c.NIC = &NIC{}
			if clone {
				c.Template = save(b, c, "template")
			}
			c.NIC = testNIC(b)
			var running, channel time.Duration
			for b.Loop() {
				begin := time.Now()
				v, err := Start(deadline(b), c)
				if err != nil {
					b.Fatal(err)
				}
				running += time.Since(begin)
				if _, err := ask(v.Channel(), bufio.NewReader(v.Channel()), "echo hello"); err != nil {
					b.Fatal(err)
				}
				channel += time.Since(begin)
				v.Kill()
				<-v.Done()
				v.Channel().Close()
			}
			b.ReportMetric(float64(running.Milliseconds())/float64(b.N), "ms-running")
			b.ReportMetric(float64(channel.Milliseconds())/float64(b.N), "ms-channel")
		})
	}
}

// BenchmarkIdle measures the memory of each of some idle clones (MB-PSS).
func BenchmarkIdle(b *testing.B) {
	for _, clones := range []int{1, 10, 30} {
		b.Run(fmt.Sprint(clones), func(b *testing.B) {
			c := config(b)
			c.Template = save(b, c, "template")
			for b.Loop() {
				var all []*VM
				for range clones {
					v, err := Start(deadline(b), c)
					if err != nil {
						b.Fatal(err)
					}
					defer v.Channel().Close()
					all = append(all, v)
					if _, err := ask(v.Channel(), bufio.NewReader(v.Channel()), "echo hello"); err != nil {
						b.Fatal(err)
					}
				}
				time.Sleep(10 * time.Second) // so that they idle
				sum := 0
				for _, v := range all {
					sum += memoryOf(b, v.Pid(), "Pss")
				}
				b.ReportMetric(float64(sum)/float64(clones)/1e6, "MB-PSS")
				for _, v := range all {
					v.Kill()
					<-v.Done()
				}
			}
		})
	}
}
