package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

const (
	// requestTimeout is well below what kubelet gives a sandbox to start.
	requestTimeout = 60 * time.Second
	// statusTimeout is short, because the container runtime answers nothing
	// else about the node's network meanwhile.
	statusTimeout = 5 * time.Second
	dialTimeout   = 5 * time.Second
)

// errUnreachable says that no agent answered; nothing is known of the request.
//
// Its text avoids the words of the operating system: containerd takes a DEL that
// fails with "no such file or directory" or "not found" for success, and that
// would leak the pod's address.
var errUnreachable = errors.New("the node agent h8s-node does not answer: see to its pod on this node; this is tried again")

// call asks the node agent behind socket.
func call(ctx context.Context, socket string, request Request) (Answer, error) {
	timeout := requestTimeout
	if request.Verb == Status {
		timeout = statusTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := json.Marshal(request)
	if err != nil {
		return Answer{}, fmt.Errorf("encode request: %w", err)
	}
	httpRequest, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://h8s-node/cni", bytes.NewReader(body))
	if err != nil {
		return Answer{}, fmt.Errorf("encode request: %w", err)
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", socket)
		},
	}
	response, err := (&http.Client{Transport: transport}).Do(httpRequest)
	if err != nil {
		return Answer{}, errUnreachable
	}
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	if err != nil {
		return Answer{}, errUnreachable
	}
	if response.StatusCode != http.StatusOK {
		e := new(types.Error)
		if err := json.Unmarshal(data, e); err != nil || e.Msg == "" {
			return Answer{}, fmt.Errorf("the node agent refused the request: %s: are h8s-cni and h8s-node of one version?", bytes.TrimSpace(data))
		}
		return Answer{}, e
	}
	var answer Answer
	if err := json.Unmarshal(data, &answer); err != nil {
		return Answer{}, fmt.Errorf("decode the node agent's answer: %w", err)
	}
	return answer, nil
}
