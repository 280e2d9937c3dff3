package cni

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

// delegate runs a verb with the default network's plugins, as the container
// runtime would have done if this product were not there: with the runtime's own
// arguments, capabilities and cache directory.
type delegate struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
}

func (i invocation) defaultNetwork() (delegate, error) {
	list, err := loadDefaultNetwork(i.config.ConfDir)
	if err != nil {
		return delegate{}, err
	}
	pairs, err := parseArgs(i.args.Args)
	if err != nil {
		return delegate{}, err
	}
	return delegate{
		cni:  libcni.NewCNIConfigWithCacheDir(filepath.SplitList(i.args.Path), i.config.CacheDir, nil),
		list: list,
		rt: &libcni.RuntimeConf{
			ContainerID:    i.args.ContainerID,
			NetNS:          i.args.Netns,
			IfName:         i.args.IfName,
			Args:           pairs,
			CapabilityArgs: i.config.RuntimeConfig,
		},
	}, nil
}

// loadDefaultNetwork returns the first configuration in dir, in the order of
// names, that is not this product's: the one that the runtime would use.
func loadDefaultNetwork(dir string) (*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return nil, fmt.Errorf("look for the default network: %w", err)
	}
	slices.Sort(files)
	for _, file := range files {
		if filepath.Base(file) == ConflistName {
			continue
		}
		list, err := loadConfig(file)
		if err != nil {
			return nil, fmt.Errorf("the default network's configuration %s is not valid: correct or remove it: %w", file, err)
		}
		if !slices.ContainsFunc(list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Type == pluginType }) {
			return list, nil
		}
	}
	return nil, noDefaultNetwork(dir)
}

func loadConfig(file string) (*libcni.NetworkConfigList, error) {
	if filepath.Ext(file) == ".conflist" {
		return libcni.NetworkConfFromFile(file)
	}
	conf, err := libcni.ConfFromFile(file) //nolint:staticcheck // container runtimes still read the single-plugin format, and so must we
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromConf(conf) //nolint:staticcheck // as above
}

func (d delegate) add(ctx context.Context) (types.Result, error) {
	return d.cni.AddNetworkList(ctx, d.list, d.rt)
}

func (d delegate) del(ctx context.Context) error { return d.cni.DelNetworkList(ctx, d.list, d.rt) }

func (d delegate) check(ctx context.Context) error { return d.cni.CheckNetworkList(ctx, d.list, d.rt) }

func (d delegate) status(ctx context.Context) error { return d.cni.GetStatusNetworkList(ctx, d.list) }

func (d delegate) gc(ctx context.Context, valid []types.GCAttachment) error {
	if valid == nil {
		valid = []types.GCAttachment{} // "none is valid", which null is not
	}
	return d.cni.GCNetworkList(ctx, d.list, &libcni.GCArgs{ValidAttachments: valid})
}

// attached reports whether the default network has a record of the container's
// interface, which its ADD left in the cache.
func (d delegate) attached() bool {
	found, err := d.cni.GetCachedAttachments(d.rt.ContainerID)
	return err == nil && slices.ContainsFunc(found, func(a *libcni.NetworkAttachment) bool {
		return a.Network == d.list.Name && a.IfName == d.rt.IfName
	})
}
