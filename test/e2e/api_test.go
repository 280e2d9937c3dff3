package e2e

import (
	"bytes"
	"context"
	"encoding/json"
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

// do makes one request. The body of an accepted request is not read: a watch has
// none that ends.
func (c apiClient) do(method, path string, body any) (code int, answer string, err error) {
	var data []byte
	if body != nil {
		if data, err = json.Marshal(body); err != nil {
			return 0, "", err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.host+path, bytes.NewReader(data))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, "", fmt.Errorf("%s %s: %w", method, path, err)
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
	data, err := json.Marshal(obj)
	if err != nil {
		return answer, err
	}
	resp, err := c.http.Post(c.host+path, "application/json", bytes.NewReader(data))
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
