//go:build linux

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"h8s.io/hypernetes/internal/hyper/guestapi"
)

// maxRequest bounds a request's JSON.
const maxRequest = 4 << 20

// badRequestError is the host's fault.
type badRequestError struct{ error }

func badRequest(format string, args ...any) error {
	return badRequestError{fmt.Errorf(format, args...)}
}

// guest is what the control service works on.
type guest struct {
	events     *eventLog
	links      *links
	disks      *disks
	containers *containers
	volumes    *volumes
	powerOff   func() error
}

// serveControl serves HTTP to all streams that its handle is given.
func serveControl(h http.Handler) *streams {
	listener := newStreams()
	server := &http.Server{Handler: h, ReadHeaderTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	go func() {
		// It ends with the listener, which nobody closes.
		if err := server.Serve(listener); err != nil {
			fmt.Fprintln(os.Stderr, "hyperinit: control service:", err)
		}
	}()
	return listener
}

// handler is the service that package guestapi describes.
func (g *guest) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, serve func(*http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := serve(r); err != nil {
				fail(w, err)
				return
			}
			w.WriteHeader(http.StatusNoContent)
		})
	}
	handle("POST /v1/setup", func(r *http.Request) error {
		setup, err := decode[guestapi.Setup](r)
		if err != nil {
			return err
		}
		return g.setUp(r.Context(), setup)
	})
	handle("PUT /v1/disks/{serial}", func(r *http.Request) error {
		disk, err := decode[guestapi.Disk](r)
		if err != nil {
			return err
		}
		return g.disks.mount(r.Context(), r.PathValue("serial"), disk)
	})
	handle("PATCH /v1/disks/{serial}", func(r *http.Request) error {
		return g.disks.directories(r.PathValue("serial"), r.Body)
	})
	handle("DELETE /v1/disks/{serial}", func(r *http.Request) error {
		return g.disks.unmount(r.PathValue("serial"))
	})
	handle("PUT /v1/containers/{id}", func(r *http.Request) error {
		container, err := decode[guestapi.Container](r)
		if err != nil {
			return err
		}
		return g.containers.make(r.PathValue("id"), container)
	})
	handle("DELETE /v1/containers/{id}", func(r *http.Request) error {
		return g.containers.remove(r.PathValue("id"))
	})
	handle("PUT /v1/volumes/{name}", func(r *http.Request) error {
		name, q := r.PathValue("name"), r.URL.Query()
		if !q.Has("scratch") {
			return g.volumes.apply(name, r.Body)
		}
		var size int64
		if s := q.Get("scratch"); s != "" {
			var err error
			if size, err = strconv.ParseInt(s, 10, 64); err != nil || size <= 0 {
				return badRequest("a scratch volume of %q bytes", s)
			}
		}
		return g.volumes.scratch(name, size, r.Body)
	})
	handle("PATCH /v1/volumes/{name}", func(r *http.Request) error {
		return g.volumes.directories(r.PathValue("name"), r.Body)
	})
	handle("DELETE /v1/volumes/{name}", func(r *http.Request) error {
		return g.volumes.remove(r.PathValue("name"))
	})
	mux.HandleFunc("GET /v1/files", func(w http.ResponseWriter, r *http.Request) {
		if err := sendFile(w, r.URL.Query().Get("path")); err != nil {
			fail(w, err)
		}
	})
	mux.HandleFunc("GET /v1/events", g.sendEvents)
	mux.HandleFunc("POST /v1/shutdown", func(w http.ResponseWriter, r *http.Request) {
		if err := g.disks.settle(r.Context()); err != nil {
			fmt.Fprintln(os.Stderr, "hyperinit: shutdown:", err)
		}
		w.Header().Set("Content-Length", "0")
		w.WriteHeader(http.StatusAccepted)
		// The answer comes before the end, if it can.
		_ = http.NewResponseController(w).Flush()
		if err := g.powerOff(); err != nil {
			fmt.Fprintln(os.Stderr, "hyperinit: power off:", err)
		}
	})
	return mux
}

// fail answers with an error as text.
func fail(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.As(err, new(badRequestError)):
		status = http.StatusBadRequest
	case errors.Is(err, fs.ErrNotExist):
		status = http.StatusNotFound
	case errors.Is(err, unix.EBUSY):
		status = http.StatusConflict
	}
	http.Error(w, err.Error(), status)
}

func decode[T any](r *http.Request) (T, error) {
	var v T
	body := http.MaxBytesReader(nil, r.Body, maxRequest)
	if err := json.NewDecoder(body).Decode(&v); err != nil {
		return v, badRequest("%s %s: %w", r.Method, r.URL.Path, err)
	}
	return v, nil
}

// sendEvents answers a line for each event: the past ones, and, unless follow=false
// was asked for, those to come.
func (g *guest) sendEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/jsonl")
	line := json.NewEncoder(w)
	if r.URL.Query().Get("follow") == "false" {
		past, _, _ := g.events.from(0)
		for _, e := range past {
			if line.Encode(e) != nil {
				return
			}
		}
		return
	}
	flush := http.NewResponseController(w).Flush
	if flush() != nil {
		return
	}
	// It ends with the stream.
	_ = g.events.listen(r.Context(), func(e guestapi.Event) error {
		if err := line.Encode(e); err != nil {
			return err
		}
		return flush()
	})
}

// sendFile answers the last MaxFile bytes of a regular file.
func sendFile(w http.ResponseWriter, name string) error {
	// A FIFO must not keep us.
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return badRequest("%s is no regular file", name)
	}
	if over := info.Size() - guestapi.MaxFile; over > 0 {
		if _, err := f.Seek(over, io.SeekStart); err != nil {
			return err
		}
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	// It may grow, and the stream may end: the host sees a short body either way.
	_, _ = io.Copy(w, io.LimitReader(f, guestapi.MaxFile))
	return nil
}

// maxName leaves a file's name room for a prefix.
const maxName = 200

var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]*$`)

// checkName admits what names a file in one directory and cannot lead out of it.
func checkName(kind, name string) error {
	if len(name) > maxName || !validName.MatchString(name) {
		return badRequest("%s %q: a name has at most %d letters, digits and _.- and begins with one of the former", kind, name, maxName)
	}
	return nil
}
