package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
)

const (
	// ConflistName sorts before the default network's, so that the container
	// runtime picks it.
	ConflistName = "00-h8s.conflist"
	pluginType   = "h8s-cni"
	networkName  = "h8s"
)

// Conflist is the network configuration list that makes the container runtime
// call h8s-cni. confDir is where h8s-cni finds the default network's, as the
// runtime sees it.
func Conflist(socket, confDir string) ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		"cniVersion": "1.1.0",
		"name":       networkName,
		"plugins": []any{map[string]any{
			"type":    pluginType,
			"socket":  socket,
			"confDir": confDir,
			// The runtime passes only what is declared here, and h8s-cni hands it
			// on; which of it matters is for the default network's plugins to say.
			"capabilities": map[string]bool{
				"portMappings": true, "bandwidth": true, "dns": true, "ipRanges": true, "ips": true, "mac": true,
				"aliases": true, "cgroupPath": true, "deviceID": true, "infinibandGUID": true,
				"io.kubernetes.cri.pod-annotations": true,
			},
		}},
	}, "", "  ")
}

// InstallPlugin copies the program h8s-cni into dir, in one step: a container
// runtime that executes it meanwhile gets the old one or the new one.
func InstallPlugin(source, dir string) error {
	data, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("install %s: %w", pluginType, err)
	}
	if err := install(filepath.Join(dir, pluginType), 0o755, data); err != nil {
		return fmt.Errorf("install %s: %w", pluginType, err)
	}
	return nil
}

// InstallConflist writes the configuration list into dir, in one step. From then
// on the container runtime calls h8s-cni for every pod of the node.
func InstallConflist(dir, socket string) error {
	data, err := Conflist(socket, dir)
	if err != nil {
		return fmt.Errorf("install %s: %w", ConflistName, err)
	}
	if err := install(filepath.Join(dir, ConflistName), 0o644, data); err != nil {
		return fmt.Errorf("install %s: %w", ConflistName, err)
	}
	return nil
}

// Uninstall removes both, so that the container runtime goes back to the default
// network.
func Uninstall(binDir, confDir string) error {
	var errs []error
	for _, path := range []string{filepath.Join(confDir, ConflistName), filepath.Join(binDir, pluginType)} {
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// install does nothing if the file is right already: the runtime reloads its
// configuration on every change.
func install(path string, mode os.FileMode, content []byte) error {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return os.Chmod(path, mode)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A child started meanwhile would inherit the open file for a moment, and
	// nobody can execute a program that is open for writing.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	// The temporary name begins with a dot, which keeps it out of the runtime's sight.
	return renameio.WriteFile(path, content, mode, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode))
}
