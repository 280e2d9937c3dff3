package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Versions of the specification that h8s-cni speaks.
var Versions = version.PluginSupports("0.4.0", "1.0.0", "1.1.0")

// Plugin executes the verbs in h8s-cni. It writes results to Stdout.
type Plugin struct{ Stdout io.Writer }

// Funcs returns the verbs.
func (p Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.add, Del: p.del, Check: p.check, GC: p.gc, Status: p.status}
}

// config is the plugin's entry in the network configuration list; see Conflist.
type config struct {
	types.PluginConf
	Socket        string         `json:"socket"`
	ConfDir       string         `json:"confDir"`
	CacheDir      string         `json:"cacheDir,omitempty"`
	RuntimeConfig map[string]any `json:"runtimeConfig,omitempty"`
	// Attachments is raw to tell "there are none" from "the runtime did not say".
	Attachments json.RawMessage `json:"cni.dev/valid-attachments,omitempty"`
}

func parseConfig(data []byte) (config, error) {
	var c config
	if err := json.Unmarshal(data, &c); err != nil {
		return config{}, NewError(types.ErrDecodingFailure, "decode network configuration: %v", err)
	}
	if c.Socket == "" || c.ConfDir == "" {
		return config{}, NewError(types.ErrInvalidNetworkConfig, "the network configuration of %s lacks socket or confDir: restart h8s-node, which writes it", pluginType)
	}
	return c, nil
}

// invocation is a verb together with all that it was called with.
type invocation struct {
	config  config
	request Request
	args    *skel.CmdArgs
}

func parse(verb Verb, args *skel.CmdArgs) (invocation, error) {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return invocation{}, err
	}
	pairs, err := parseArgs(args.Args)
	if err != nil {
		return invocation{}, err
	}
	r := Request{Verb: verb, ContainerID: args.ContainerID, Netns: args.Netns, IfName: args.IfName}
	for _, pair := range pairs {
		switch pair[0] {
		case "K8S_POD_NAMESPACE":
			r.Pod.Namespace = pair[1]
		case "K8S_POD_NAME":
			r.Pod.Name = pair[1]
		case "K8S_POD_UID":
			r.Pod.UID = pair[1]
		}
	}
	return invocation{config: c, request: r, args: args}, nil
}

// parseArgs splits CNI_ARGS, "K=V;K=V".
func parseArgs(s string) ([][2]string, error) {
	var out [][2]string
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, NewError(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %q is not key=value", pair)
		}
		out = append(out, [2]string{key, value})
	}
	return out, nil
}

func (i invocation) ask(ctx context.Context) (Answer, error) {
	answer, err := call(ctx, i.config.Socket, i.request)
	if errors.Is(err, errUnreachable) {
		return Answer{}, types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	return answer, err
}

func (p Plugin) add(args *skel.CmdArgs) error {
	ctx := context.Background()
	i, err := parse(Add, args)
	if err != nil {
		return err
	}
	answer, err := i.ask(ctx)
	if err != nil {
		return err
	}
	var result types.Result
	switch {
	case answer.Delegate:
		d, err := i.defaultNetwork()
		if err != nil {
			return err
		}
		if result, err = d.add(ctx); err != nil {
			return err
		}
	case answer.Interface != nil:
		result = i.result(*answer.Interface)
	default:
		return NewError(types.ErrInternal, "the node agent's answer to ADD is empty: are h8s-cni and h8s-node of one version?")
	}
	result, err = result.GetAsVersion(i.config.CNIVersion)
	if err != nil {
		return NewError(types.ErrIncompatibleCNIVersion, "convert result: %v", err)
	}
	return result.PrintTo(p.Stdout)
}

// result is what the runtime is told of a tenant's interface.
func (i invocation) result(made Interface) types.Result {
	host := net.IPNet{IP: net.IP(made.Address.AsSlice()), Mask: net.CIDRMask(made.Address.BitLen(), made.Address.BitLen())}
	everywhere := net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
	gateway := net.IP(made.Gateway.AsSlice())
	return &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: i.args.IfName, Mac: made.MAC, Mtu: made.MTU, Sandbox: i.args.Netns}},
		IPs:        []*types100.IPConfig{{Interface: types100.Int(0), Address: host, Gateway: gateway}},
		Routes:     []*types.Route{{Dst: everywhere, GW: gateway}},
	}
}

func (p Plugin) del(args *skel.CmdArgs) error {
	ctx := context.Background()
	i, err := parse(Del, args)
	if err != nil {
		return err
	}
	answer, err := call(ctx, i.config.Socket, i.request)
	unreachable := errors.Is(err, errUnreachable)
	if err != nil && !unreachable {
		return err
	}
	if !unreachable && !answer.Delegate {
		return nil
	}
	d, err := i.defaultNetwork()
	switch {
	case unreachable && err == nil && d.attached():
		// The default network has a record of this container: no tenant's, and
		// no need to wait for the agent.
	case unreachable:
		return types.NewError(types.ErrTryAgainLater, errUnreachable.Error(), "")
	case errors.Is(err, errNoDefaultNetwork):
		return nil // what was never delegated needs no deletion
	case err != nil:
		return err
	}
	return d.del(ctx)
}

func (p Plugin) check(args *skel.CmdArgs) error {
	ctx := context.Background()
	i, err := parse(Check, args)
	if err != nil {
		return err
	}
	answer, err := i.ask(ctx)
	if err != nil || !answer.Delegate {
		return err
	}
	d, err := i.defaultNetwork()
	if err != nil {
		return err
	}
	return d.check(ctx)
}

func (p Plugin) status(args *skel.CmdArgs) error {
	ctx := context.Background()
	i, err := parse(Status, args)
	if err != nil {
		return err
	}
	if _, err := i.ask(ctx); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	d, err := i.defaultNetwork()
	if err != nil {
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	}
	return d.status(ctx)
}

func (p Plugin) gc(args *skel.CmdArgs) error {
	ctx := context.Background()
	i, err := parse(GC, args)
	if err != nil {
		return err
	}
	if len(i.config.Attachments) == 0 {
		return NewError(types.ErrInvalidNetworkConfig, "GC without cni.dev/valid-attachments: refused, since it would remove every attachment")
	}
	if err := json.Unmarshal(i.config.Attachments, &i.request.ValidAttachments); err != nil {
		return NewError(types.ErrDecodingFailure, "decode cni.dev/valid-attachments: %v", err)
	}
	if _, err := i.ask(ctx); err != nil {
		return err
	}
	d, err := i.defaultNetwork()
	if errors.Is(err, errNoDefaultNetwork) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.gc(ctx, i.request.ValidAttachments)
}

// errNoDefaultNetwork says that nobody serves the pods of no tenant.
var errNoDefaultNetwork = errors.New("no default network is configured")

func noDefaultNetwork(dir string) error {
	return fmt.Errorf("%w in %s: install the cluster's own network plugin, which serves pods of no tenant", errNoDefaultNetwork, dir)
}
