package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"
)

// The driver calls CNI plugins as a container runtime does, with upstream's library
// and a fresh network namespace for each ADD. It runs inside a node, as a second
// process of this program, and obeys requests on its standard input.

const (
	// driverCommand is the argument that makes this program the driver.
	driverCommand = "cni-driver"
	// callTimeout bounds one call of a plugin.
	callTimeout = 90 * time.Second
)

// call is one request to the driver.
type call struct {
	// Verb is ADD or DEL.
	Verb        string      `json:"verb"`
	ContainerID string      `json:"containerID"`
	Args        [][2]string `json:"args,omitempty"`
	// Conflist is a network configuration list or, if it is a string, the path of
	// one on the node.
	Conflist json.RawMessage `json:"conflist"`
}

// reply is the driver's answer.
type reply struct {
	Milliseconds float64 `json:"milliseconds"`
	Address      string  `json:"address,omitempty"`
	Error        string  `json:"error,omitempty"`
}

// attached is an ADD without its DEL.
type attached struct {
	list *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
}

type driver struct {
	cni      *libcni.CNIConfig
	attached map[string]attached
}

// serveCNI obeys requests until in ends, then deletes what is still attached.
func serveCNI(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	cache, err := os.MkdirTemp("", "h8s-bench-cni-")
	if err != nil {
		return fmt.Errorf("make cache directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(cache)) }()
	d := &driver{
		cni:      libcni.NewCNIConfigWithCacheDir([]string{"/opt/cni/bin"}, cache, nil),
		attached: map[string]attached{},
	}
	defer func() {
		for id := range d.attached {
			_, delErr := d.del(ctx, id)
			err = errors.Join(err, delErr)
		}
	}()
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var c call
		if err := decoder.Decode(&c); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		r, err := d.do(ctx, c)
		if err != nil {
			r.Error = err.Error()
		}
		if err := encoder.Encode(r); err != nil {
			return fmt.Errorf("write reply: %w", err)
		}
	}
}

func (d *driver) do(ctx context.Context, c call) (reply, error) {
	if c.Verb == "DEL" {
		return d.del(ctx, c.ContainerID)
	}
	conflist := []byte(c.Conflist)
	var path string
	if json.Unmarshal(c.Conflist, &path) == nil {
		var err error
		if conflist, err = os.ReadFile(path); err != nil {
			return reply{}, fmt.Errorf("read network configuration: %w", err)
		}
	}
	list, err := libcni.NetworkConfFromBytes(conflist)
	if err != nil {
		return reply{}, fmt.Errorf("read network configuration: %w", err)
	}
	netns, err := bindNetns(c.ContainerID)
	if err != nil {
		return reply{}, err
	}
	a := attached{list, &libcni.RuntimeConf{ContainerID: c.ContainerID, NetNS: netns, IfName: "eth0", Args: c.Args}}
	d.attached[c.ContainerID] = a // also what fails halfway is deleted
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	start := time.Now()
	result, err := d.cni.AddNetworkList(ctx, list, a.rt)
	took := time.Since(start)
	if err != nil {
		return reply{}, fmt.Errorf("ADD: %w", err)
	}
	made, err := types100.NewResultFromResult(result)
	if err != nil || len(made.IPs) == 0 {
		return reply{}, errors.Join(err, errors.New("ADD gave no address"))
	}
	return reply{Milliseconds: milliseconds(took), Address: made.IPs[0].Address.String()}, nil
}

func (d *driver) del(ctx context.Context, id string) (reply, error) {
	a, ok := d.attached[id]
	if !ok {
		return reply{}, fmt.Errorf("container %s is not attached", id)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	start := time.Now()
	err := d.cni.DelNetworkList(ctx, a.list, a.rt)
	took := time.Since(start)
	if err != nil {
		return reply{}, fmt.Errorf("DEL: %w", err)
	}
	delete(d.attached, id)
	return reply{Milliseconds: milliseconds(took)}, errors.Join(unix.Unmount(a.rt.NetNS, unix.MNT_DETACH), os.Remove(a.rt.NetNS))
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }

// bindNetns makes a network namespace and gives it a name where the container
// runtime has its own.
func bindNetns(name string) (string, error) {
	path := filepath.Join("/run/netns", name)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return "", fmt.Errorf("name network namespace: %w", err)
	}
	file.Close()
	ns, err := newNetns()
	if err != nil {
		return "", err
	}
	defer ns.Close()
	if err := unix.Mount(netnsPath(ns), path, "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("name network namespace %s: %w", path, err)
	}
	return path, nil
}

// cniClient is a driver that runs in a node.
type cniClient struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	encoder *json.Encoder
	decoder *json.Decoder
	program string
}

// startCNI starts a driver in a node.
func startCNI(ctx context.Context, n node) (*cniClient, error) {
	// The node has a root of its own, and /tmp of it is in the node's directory.
	name := "h8s-bench-" + strconv.Itoa(os.Getpid())
	program := filepath.Join(n.dir, "tmp", name)
	if err := copyFile("/proc/self/exe", program); err != nil {
		return nil, fmt.Errorf("copy the driver into node %s: %w", n.name, err)
	}
	// It ends with its standard input, not with the context: there is something to
	// clean up.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "nsenter", "--target", strconv.Itoa(n.pid),
		"--mount", "--net", "--pid", "--ipc", "--uts", "--", "/tmp/"+name, driverCommand)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=/tmp"}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		os.Remove(program)
		return nil, fmt.Errorf("start the driver in node %s: %w", n.name, err)
	}
	return &cniClient{cmd, in, json.NewEncoder(in), json.NewDecoder(out), program}, nil
}

// do has one call made and returns how long it took.
func (c *cniClient) do(request call) (reply, error) {
	if err := c.encoder.Encode(request); err != nil {
		return reply{}, fmt.Errorf("ask the driver: %w", err)
	}
	var r reply
	if err := c.decoder.Decode(&r); err != nil {
		return reply{}, fmt.Errorf("the driver's answer: %w", err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("container %s: %s", request.ContainerID, r.Error)
	}
	return r, nil
}

// stop ends the driver, which deletes what it left attached.
func (c *cniClient) stop() error {
	return errors.Join(c.in.Close(), c.cmd.Wait(), os.Remove(c.program))
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	target, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}
