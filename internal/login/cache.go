package login

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// Cache is the directory of the sessions' files. It is the user's alone (0700), as
// are the files (0600).
type Cache string

// DefaultCache is in the user's cache directory (XDG Base Directory Specification).
func DefaultCache() (Cache, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return Cache(filepath.Join(dir, "h8s", "sessions")), nil
}

var errNoSession = errors.New("there is no such session")

// file is where a session is; its name may have any characters.
func (c Cache) file(name, suffix string) string {
	return filepath.Join(string(c), url.QueryEscape(name)+suffix)
}

// lock waits until no other process uses the session. The lock's file stays: to
// remove it would let two processes hold locks of two files of one name.
func (c Cache) lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := os.MkdirAll(string(c), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of sessions: %w", err)
	}
	// It may have been there before, open to others.
	if err := os.Chmod(string(c), 0o700); err != nil {
		return nil, fmt.Errorf("close the directory of sessions to others: %w", err)
	}
	f, err := os.OpenFile(c.file(name, ".lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the session %q: %w", name, err)
	}
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock the session %q: %w", name, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another process renews the session %q and does not end: %w", name, ctx.Err())
		case <-ticker.C:
		}
	}
}

func (c Cache) load(name string) (*Session, error) {
	data, err := os.ReadFile(c.file(name, ".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("you are not logged in (%w: %q): run `h8s login`", errNoSession, name)
	}
	if err != nil {
		return nil, fmt.Errorf("read the session: %w", err)
	}
	var s Session
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("the file of the session %q is damaged, run `h8s login` again: %w", name, err)
	}
	return &s, nil
}

// save replaces the file in one step.
func (c Cache) save(name string, s *Session) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(c.file(name, ".json"), data, 0o600, renameio.WithTempDir(string(c)), renameio.WithStaticPermissions(0o600)); err != nil {
		return fmt.Errorf("keep the session %q: %w", name, err)
	}
	return nil
}

func (c Cache) remove(name string) error {
	if err := os.Remove(c.file(name, ".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the session %q: %w", name, err)
	}
	return nil
}
