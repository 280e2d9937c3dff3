package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

// Attachment is the record of one interface of one pod. It is written before
// the kernel is touched and removed after: whatever exists in the kernel has a record.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	Netns       string `json:"netns"`
	Network     string `json:"network"`
	NetworkID   int32  `json:"networkID"`
	// CIDR of the Network: it is needed also when the Network object is gone.
	CIDR    netip.Prefix `json:"cidr"`
	Address netip.Addr   `json:"address"`
	// Namespace, Pod and PodUID say whose it is.
	Namespace string    `json:"namespace"`
	Pod       string    `json:"pod"`
	PodUID    string    `json:"podUID"`
	Created   time.Time `json:"created"`
}

// Key identifies an Attachment.
func (a Attachment) Key() string { return AttachmentKey(a.ContainerID, a.IfName) }

// AttachmentKey returns the key of the Attachment of a container's interface.
func AttachmentKey(containerID, ifName string) string { return containerID + "-" + ifName }

// The Container Network Interface specification's rule for container IDs, and
// the kernel's for interface names: neither can leave the store's directory.
var (
	containerIDPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,199}$`)
	ifNamePattern      = regexp.MustCompile(`^[^/:\s]{1,15}$`)
)

const (
	recordSuffix = ".json"
	tempPrefix   = "." // of renameio; no container ID begins with it
)

// Store keeps Attachments in a directory, one file each. A record is either
// whole or absent, also after a crash or a loss of power.
type Store struct{ dir string }

// OpenStore makes the directory if need be and removes what a crash left half-written.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open attachment store: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("open attachment store: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, fmt.Errorf("open attachment store: %w", err)
			}
		}
	}
	return &Store{dir: dir}, nil
}

// Load returns every record. A damaged file is an error: an address that cannot
// be read could be given out twice.
func (s *Store) Load() ([]Attachment, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("load attachments: %w", err)
	}
	var out []Attachment
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), recordSuffix) {
			continue
		}
		path := filepath.Join(s.dir, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("load attachments: %w", err)
		}
		var a Attachment
		if err := json.Unmarshal(data, &a); err != nil || a.Key()+recordSuffix != e.Name() || !a.Address.IsValid() || !a.CIDR.Contains(a.Address) {
			return nil, fmt.Errorf("attachment record %s is damaged: stop the pod's sandbox with that container ID and remove the file", path)
		}
		out = append(out, a)
	}
	return out, nil
}

// Put writes a record, which survives a crash from the moment Put returns.
func (s *Store) Put(a Attachment) error {
	path, err := s.path(a.ContainerID, a.IfName)
	if err != nil {
		return err
	}
	data, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("write attachment %s: %w", a.Key(), err)
	}
	if err := writeFile(path, data); err != nil {
		return fmt.Errorf("write attachment %s: %w", a.Key(), err)
	}
	return nil
}

// Delete removes a record; one that does not exist is no error.
//
// The directory is not synced: should a loss of power bring the record back, it
// belongs to a pod that the same loss ended, and it is reaped as such. A later
// Put of the same address syncs the removal with itself.
func (s *Store) Delete(containerID, ifName string) error {
	path, err := s.path(containerID, ifName)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete attachment: %w", err)
	}
	return nil
}

func (s *Store) path(containerID, ifName string) (string, error) {
	if !containerIDPattern.MatchString(containerID) {
		return "", fmt.Errorf("invalid container ID %q", containerID)
	}
	if !ifNamePattern.MatchString(ifName) || ifName == "." || ifName == ".." {
		return "", fmt.Errorf("invalid interface name %q", ifName)
	}
	return filepath.Join(s.dir, AttachmentKey(containerID, ifName)+recordSuffix), nil
}

// writeFile is durable when it returns, of which the library leaves the directory out.
func writeFile(path string, data []byte) error {
	if err := renameio.WriteFile(path, data, 0o600, renameio.WithTempDir(filepath.Dir(path))); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
