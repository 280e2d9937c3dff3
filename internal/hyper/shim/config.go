package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"

	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/directvolume"
	"h8s.io/hypernetes/internal/hyper/vm"
)

// Config is what a node's operator can set, in the YAML file that the option ConfigPath
// of containerd's runtime names (default: DefaultConfigPath, which need not exist).
type Config struct {
	// Kernel and Initrd are the guest's (default: hyper/vmlinuz and hyper/initrd.img
	// beside the shim).
	Kernel string `json:"kernel,omitempty"`
	Initrd string `json:"initrd,omitempty"`
	// SeccompFilter compiles seccomp profiles, see package seccomp (default:
	// hyper/seccomp-filter beside the shim).
	SeccompFilter string `json:"seccompFilter,omitempty"`
	// Accel is kvm or tcg (default: kvm where it really boots a guest).
	Accel string `json:"accel,omitempty"`
	// CacheDir holds the images of container layers, and templates of virtual machines
	// (default: /var/lib/h8s/hyper).
	CacheDir string `json:"cacheDir,omitempty"`
	// RunDir holds a directory for each running machine. Its path is short, for the
	// sockets in it (default: /run/h8s/hyper).
	RunDir string `json:"runDir,omitempty"`
	// FirstUser is the lowest of the user and group IDs that QEMU runs as, Users how many there
	// are, one for each machine at a time. They are nobody else's on this node (default: 65536
	// from 1900000000).
	FirstUser uint32 `json:"firstUser,omitempty"`
	Users     uint32 `json:"users,omitempty"`
	// KubeletDir is the kubelet's root directory (default: /var/lib/kubelet). A bind mount
	// from elsewhere is somebody's hostPath, and refused.
	KubeletDir string `json:"kubeletDir,omitempty"`
	// Templates lets virtual machines be clones of a template, of which each tenant has its
	// own (default: true). Without, each boots.
	Templates *bool `json:"templates,omitempty"`
	// ShareTemplates gives all tenants the same templates (default: false). Tenants then
	// share memory, of which each can tell what another has used lately.
	ShareTemplates bool `json:"shareTemplates,omitempty"`
	// DirectVolumeDir is where CSI drivers write down which disks are a pod's volumes, see
	// package directvolume (default: /run/h8s/direct-volumes).
	DirectVolumeDir string `json:"directVolumeDir,omitempty"`
}

// DefaultConfigPath is where the configuration is looked for when containerd's
// configuration does not name a file.
const DefaultConfigPath = "/etc/h8s/hyper.yaml"

// LoadConfig reads the configuration and fills in the defaults. Without a path it
// reads DefaultConfigPath, if that is there.
func LoadConfig(path string) (Config, error) {
	var c Config
	text, err := os.ReadFile(orDefault(path, DefaultConfigPath))
	switch {
	case path == "" && errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return c, fmt.Errorf("configuration of the hyper runtime: %w", err)
	default:
		if err := yaml.UnmarshalStrict(text, &c); err != nil {
			return c, fmt.Errorf("configuration of the hyper runtime: %s: %w", orDefault(path, DefaultConfigPath), err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return c, err
	}
	images := filepath.Join(filepath.Dir(self), "hyper")
	c.Kernel = orDefault(c.Kernel, filepath.Join(images, "vmlinuz"))
	c.Initrd = orDefault(c.Initrd, filepath.Join(images, "initrd.img"))
	c.SeccompFilter = orDefault(c.SeccompFilter, filepath.Join(images, "seccomp-filter"))
	c.CacheDir = orDefault(c.CacheDir, "/var/lib/h8s/hyper")
	c.RunDir = orDefault(c.RunDir, accel.DefaultDir)
	c.KubeletDir = orDefault(c.KubeletDir, "/var/lib/kubelet")
	c.DirectVolumeDir = orDefault(c.DirectVolumeDir, directvolume.DefaultDir)
	// containerd resolves the symbolic links of what it mounts.
	if resolved, err := filepath.EvalSymlinks(c.KubeletDir); err == nil {
		c.KubeletDir = resolved
	}
	return c, nil
}

// Accelerator finds out what executes the guests of this node, and records it in
// RunDir. The first call after the node has started may boot a guest for it, which can
// take some seconds.
func Accelerator(ctx context.Context, c Config) (accel.Choice, error) {
	choice, err := accel.Choose(ctx, c.Accel, func(ctx context.Context) (bool, string, error) {
		return vm.ProbeKVM(ctx, c.Kernel, c.Initrd, c.RunDir, c.users())
	})
	if err == nil {
		err = accel.Record(c.RunDir, choice)
	}
	return choice, err
}

// users are those that QEMU runs as.
func (c Config) users() vm.Users {
	return vm.Users{First: c.FirstUser, Count: c.Users, File: filepath.Join(c.RunDir, "users")}
}

func orDefault(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}
