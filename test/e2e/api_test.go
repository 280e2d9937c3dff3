package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// apiClient speaks plain HTTP to the API server with a user's credentials: for
// tests that make thousands of requests, or requests that kubectl would not make.
type apiClient struct {
	host string
	http *http.Client
}

func newAPIClient(t testing.TB, user string) apiClient {
	t.Helper()
	config := restConfig(t, user)
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	client.Timeout = 30 * time.Second
	return apiClient{host: config.Host, http: client}
}

func restConfig(t testing.TB, user string) *rest.Config {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfigPath(user))
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// send makes a request, and again as long as nobody has judged it: the API server did not
// answer, or had too much to do (429).
func (c apiClient) send(method, path string, body any) (*http.Response, error) {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	contentType := "application/json"
	if method == http.MethodPatch {
		contentType = "application/merge-patch+json"
	}
	var resp *http.Response
	err := poll(patience, func() error {
		req, err := http.NewRequestWithContext(context.Background(), method, c.host+path, bytes.NewReader(data))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", contentType)
		if resp, err = c.http.Do(req); err != nil { //nolint:bodyclose // whose answer it is closes it
			return err
		}
		if resp.StatusCode == http.StatusTooManyRequests {
			resp.Body.Close()
			return errors.New(resp.Status)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	return resp, nil
}

// do makes one request. The body of an accepted request is not read: a watch has
// none that ends.
func (c apiClient) do(method, path string, body any) (code int, answer string, err error) {
	resp, err := c.send(method, path, body)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode < http.StatusBadRequest {
		return resp.StatusCode, "", nil
	}
	out, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.StatusCode, string(out), err
}

// post sends an object and decodes the answer into the same type.
func post[T any](c apiClient, path string, obj T) (T, error) {
	var answer T
	resp, err := c.send(http.MethodPost, path, obj)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= http.StatusBadRequest {
		out, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		return answer, fmt.Errorf("POST %s: %s: %s", path, resp.Status, out)
	}
	return answer, json.NewDecoder(resp.Body).Decode(&answer)
}
