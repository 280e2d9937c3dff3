package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"

	"h8s.io/hypernetes/internal/hyper/channel"
	"h8s.io/hypernetes/internal/hyper/guestapi"
	"h8s.io/hypernetes/internal/hyper/vm"
)

const (
	// callTimeout bounds what a guest does at once unless it hangs.
	callTimeout = 10 * time.Second
	// startTimeout bounds the start of a process, which is much work where the processor is
	// emulated and many want it.
	startTimeout = time.Minute
	// maxMessage is how much of a refusal is read.
	maxMessage = 4 << 10
)

// guest is the inside of a virtual machine. What it says is not trusted: answers are
// bounded in size, and in time.
type guest struct {
	channel *channel.Host
	http    *http.Client
	ttrpc   *ttrpc.Client
	tasks   task.TTRPCTaskService
}

// connect returns when the machine's guest serves the channel.
func connect(ctx context.Context, machine *vm.VM) (*guest, error) {
	// The channel's own deadlines are not for a guest that boots.
	if err := machine.AwaitGuest(ctx); err != nil {
		return nil, err
	}
	ch, err := channel.NewHost(machine.Channel())
	if err != nil {
		return nil, err
	}
	g, err := newGuest(ctx, ch)
	if err != nil {
		_ = ch.Close()
	}
	return g, err
}

// newGuest returns when the guest serves the channel.
func newGuest(ctx context.Context, ch *channel.Host) (*guest, error) {
	conn, err := ch.Open(ctx, channel.Task, "")
	if err != nil {
		return nil, err
	}
	client := newTaskClient(conn)
	return &guest{
		channel: ch,
		http: &http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return ch.Open(ctx, channel.Control, "")
			},
			MaxIdleConnsPerHost:    2,
			MaxResponseHeaderBytes: 16 << 10,
			DisableCompression:     true,
		}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		ttrpc: client,
		tasks: task.NewTTRPCTaskClient(client),
	}, nil
}

func (g *guest) close() {
	_ = g.ttrpc.Close()
	g.http.CloseIdleConnections()
}

// call makes a request with a JSON body.
func (g *guest) call(ctx context.Context, method, path string, in any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	return g.send(ctx, method, path, bytes.NewReader(body))
}

func (g *guest) send(ctx context.Context, method, path string, body io.Reader) error {
	response, err := g.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	return response.Body.Close()
}

// do returns an answer that is not a refusal. The caller closes its body.
func (g *guest) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://guest"+path, body)
	if err != nil {
		return nil, err
	}
	response, err := g.http.Do(request)
	if err != nil {
		if text := err.Error(); len(text) > maxMessage {
			err = errors.New(bounded(text)) // it quotes the guest
		}
		return nil, fmt.Errorf("ask the guest: %w", err)
	}
	if response.StatusCode >= http.StatusMultipleChoices {
		defer response.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(response.Body, maxMessage))
		return nil, fmt.Errorf("the guest answers %s %s with %d: %s", method, path, response.StatusCode, strings.TrimSpace(bounded(string(text))))
	}
	return response, nil
}

// readFile reads a file of the guest.
func (g *guest) readFile(ctx context.Context, path string) ([]byte, error) {
	response, err := g.do(ctx, http.MethodGet, "/v1/files?path="+url.QueryEscape(path), nil)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(io.LimitReader(response.Body, guestapi.MaxFile))
}

// events calls f for each event, past and to come, until the guest ends the stream or
// ctx is done. Without follow, the stream has the past ones only.
func (g *guest) events(ctx context.Context, follow bool, f func(guestapi.Event)) error {
	path := "/v1/events"
	if !follow {
		path += "?follow=false"
	}
	response, err := g.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	return readEvents(response.Body, f)
}

// readEvents calls f for each event. Its error is io.EOF when they end in order.
func readEvents(r io.Reader, f func(guestapi.Event)) error {
	// A decoder would keep a line of any length.
	lines := newLineReader(r, maxMessage)
	for {
		line, err := lines.next()
		if err != nil {
			return err
		}
		var event guestapi.Event
		if err := json.Unmarshal(line, &event); err != nil {
			return fmt.Errorf("an event of the guest: %w", err)
		}
		f(event)
	}
}
