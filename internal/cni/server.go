package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// requestLimit is ample: a GC request names some hundred attachments.
const requestLimit = 1 << 20

// Handler executes a verb in the node agent.
type Handler func(context.Context, Request) (Answer, error)

// Listen opens the socket on which h8s-cni asks, for root alone. A socket that an
// earlier agent left is replaced in one step, so that there is always one to connect to.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	temp := path + ".new"
	if err := os.RemoveAll(temp); err != nil {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	// By the time this listener is closed, the path may be a successor's.
	l.SetUnlinkOnClose(false)
	err = os.Chmod(temp, 0o600)
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	return l, nil
}

// Serve answers requests on l until ctx is done, and lets those under way finish.
func Serve(ctx context.Context, l net.Listener, handle Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler:           serverHandler(handle, log),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       time.Minute,
	}
	finished := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(finished)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if server.Shutdown(grace) != nil {
			server.Close()
		}
	})
	err := server.Serve(l)
	if stop() {
		return fmt.Errorf("serve CNI requests: %w", err) // not because ctx is done
	}
	<-finished
	return nil
}

func serverHandler(handle Handler, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var request Request
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, requestLimit)).Decode(&request); err != nil {
			http.Error(w, "malformed request: "+err.Error(), http.StatusBadRequest)
			return
		}
		log := log.With("verb", request.Verb, "container", request.ContainerID, "pod", request.Pod.Namespace+"/"+request.Pod.Name)
		start := time.Now()
		// The container runtime may give up, yet what was begun is finished: DEL
		// comes next in any case, and waits for it. The reason of a timeout should
		// still reach the caller.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), requestTimeout-5*time.Second)
		defer cancel()
		answer, err := handle(ctx, request)
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			log.Warn("CNI request failed", "err", err, "took", time.Since(start))
			w.WriteHeader(http.StatusInternalServerError)
			_ = json.NewEncoder(w).Encode(asError(err))
			return
		}
		log.Debug("CNI request", "delegate", answer.Delegate, "took", time.Since(start))
		_ = json.NewEncoder(w).Encode(answer)
	})
}
