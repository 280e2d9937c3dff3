// Command hostile is PID 1 of a virtual machine that means its host harm. The file
// /behaviour names how.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
)

func main() {
	err := run()
	fmt.Println("hostile guest:", err)
	time.Sleep(time.Second)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	for target, kind := range map[string]string{"/dev": "devtmpfs", "/sys": "sysfs", "/proc": "proc"} {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(kind, target, kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	text, err := os.ReadFile("/behaviour")
	if err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	return behave(string(text), port)
}

func behave(behaviour string, port *os.File) error {
	g := &guest{behaviour: behaviour}
	switch behaviour {
	case "garbage":
		_, err := io.Copy(port, rand.Reader)
		return err
	case "silence":
		_, err := io.Copy(io.Discard, port)
		return err
	case "pings": // which are never read
		return repeat(port, []byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7})
	case "streams":
		return repeat(port, []byte{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0})
	case "console":
		go func() { _ = repeat(os.Stdout, []byte(strings.Repeat("noise ", 20)+"\n")) }()
	}
	return channel.Serve(context.Background(), port, map[channel.Kind]channel.Handler{
		channel.Control: func(string) (func(net.Conn), error) { return g.control, nil },
		channel.Task:    func(string) (func(net.Conn), error) { return g.tasks, nil },
		channel.Pipe:    func(string) (func(net.Conn), error) { return g.pipe, nil },
	})
}

// repeat writes the same for ever, many at once.
func repeat(w io.Writer, b []byte) error {
	b = bytes.Repeat(b, 4096/len(b))
	for {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
}

// guest seems a good one to who does not ask for its behaviour.
type guest struct {
	task.TTRPCTaskService
	behaviour string
}

func (g *guest) control(c net.Conn) {
	if g.behaviour == "headers" {
		_, _ = c.Read(make([]byte, 64<<10)) // an answer to no question is another fault
		_, _ = io.WriteString(c, "HTTP/1.1 204 No Content\r\n")
		_ = repeat(c, []byte("X-Header: "+strings.Repeat("x", 500)+"\r\n"))
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("/v1/setup", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNoContent)
		if g.behaviour == "frames" {
			go forge()
		}
	})
	mux.HandleFunc("/v1/files", func(w http.ResponseWriter, _ *http.Request) { _ = repeat(w, []byte("file")) })
	mux.HandleFunc("/v1/events", func(w http.ResponseWriter, r *http.Request) {
		if g.behaviour == "events" {
			_ = repeat(w, []byte(`{"oom": "`+strings.Repeat("x", 100)+`"}`+"\n"))
		}
		if r.URL.Query().Get("follow") != "false" {
			<-r.Context().Done()
		}
	})
	mux.HandleFunc("/v1/shutdown", func(http.ResponseWriter, *http.Request) { select {} })
	_ = (&http.Server{Handler: mux}).Serve(&listener{conns: []net.Conn{c}})
}

func (g *guest) tasks(c net.Conn) {
	switch g.behaviour {
	case "large":
		header := binary.BigEndian.AppendUint32(nil, 4<<20)
		header = append(binary.BigEndian.AppendUint32(header, 1), 2, 0)
		message := append(header, make([]byte, 4<<20)...)
		_, _ = c.Read(make([]byte, 1))
		for {
			if _, err := c.Write(message); err != nil {
				return
			}
		}
	case "deaf":
		select {}
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return
	}
	task.RegisterTTRPCTaskService(server, g)
	_ = server.Serve(context.Background(), &listener{conns: []net.Conn{c}})
}

// pipe is the output of a container.
func (g *guest) pipe(c net.Conn) {
	if g.behaviour == "output" {
		_ = repeat(c, []byte("output without end\n"))
	}
}

func (g *guest) Create(context.Context, *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	return &task.CreateTaskResponse{Pid: 1}, nil
}

func (g *guest) Start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return &task.StartResponse{Pid: 1}, nil
}

// Wait never tells that anything has ended.
func (g *guest) Wait(ctx context.Context, _ *task.WaitRequest) (*task.WaitResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// Kill claims to have done it.
func (g *guest) Kill(context.Context, *task.KillRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Exec claims to have begun.
func (g *guest) Exec(context.Context, *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (g *guest) Delete(context.Context, *task.DeleteRequest) (*task.DeleteResponse, error) {
	return nil, errors.New(strings.Repeat("no, ", 1<<18))
}

func (g *guest) CloseIO(context.Context, *task.CloseIORequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (g *guest) Stats(context.Context, *task.StatsRequest) (*task.StatsResponse, error) {
	return &task.StatsResponse{Stats: &anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: []byte{0xff, 0xff}}}, nil
}

// forge sends frames of many senders to many receivers.
func forge() {
	links, err := netlink.LinkList()
	if err != nil {
		fmt.Println("hostile guest:", err)
	}
	for _, l := range links {
		if l.Type() != "device" || l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		_ = netlink.LinkSetUp(l)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			fmt.Println("hostile guest:", err)
			return
		}
		to := &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index, Protocol: 0x0008}
		for i := 0; ; i++ {
			// An IPv4 packet to everybody, said to be from 169.254.x.y.
			frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, byte(i >> 8), byte(i), 8, 0},
				0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 169, 254, byte(i>>8), byte(i), 255, 255, 255, 255,
				0, 1, 0, 1, 0, 8, 0, 0)
			_ = unix.Sendto(fd, frame, 0, to)
		}
	}
}

type listener struct{ conns []net.Conn }

func (l *listener) Accept() (net.Conn, error) {
	if len(l.conns) == 0 {
		select {}
	}
	c := l.conns[0]
	l.conns = nil
	return c, nil
}
func (*listener) Close() error   { return nil }
func (*listener) Addr() net.Addr { return &net.UnixAddr{} }

func loadModules() error {
	files, err := filepath.Glob("/modules/boot/*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("module %s: %w", path, err)
		}
		f.Close()
	}
	return nil
}

func openPort() (*os.File, error) {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		ports, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, p := range ports {
			if name, _ := os.ReadFile(p); strings.TrimSpace(string(name)) == guestapi.Port {
				port, err := os.OpenFile("/dev/"+filepath.Base(filepath.Dir(p)), os.O_RDWR|unix.O_NONBLOCK, 0)
				if err != nil {
					return nil, err
				}
				return port, awaitHost(port)
			}
		}
	}
	return nil, fmt.Errorf("no port %s", guestapi.Port)
}

// awaitHost waits until the host's side of the port is open: reads are at their end until
// then.
func awaitHost(port *os.File) error {
	raw, err := port.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents&unix.POLLHUP == 0
	})
}
