// h8s-node is the node agent: CNI server, portals, addresses and names of one node.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/clientcmd"

	"h8s.io/hypernetes/internal/agent"
	"h8s.io/hypernetes/internal/cni"
	"h8s.io/hypernetes/internal/dns"
	"h8s.io/hypernetes/internal/hyper/accel"
	"h8s.io/hypernetes/internal/hyper/install"
	"h8s.io/hypernetes/internal/portal"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "h8s-node:", err)
		os.Exit(1)
	}
}

// options are the flags that are not the agent's own.
type options struct {
	nodeIP, clusterDNS       string
	serviceCIDRs, podCIDRs   []string
	infrastructure, denied   []string
	resolvConf               []string
	hyperSource              string
	hyperInstallDir          string
	containerdConfDir        string
	kubeconfig, health, logs string
}

func command() *cobra.Command {
	var (
		cfg  agent.Config
		opts options
	)
	cmd := &cobra.Command{
		Use:           "h8s-node",
		Short:         "The node agent of Hypernetes: connects tenants' pods to their Networks",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.complete(&cfg); err != nil {
				return err
			}
			return run(cmd.Context(), cfg, opts)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.NodeName, "node-name", os.Getenv("NODE_NAME"), "name of the Node object (default $NODE_NAME)")
	f.StringVar(&opts.nodeIP, "node-ip", "", "address on the underlay (default: InternalIP of the Node object)")
	f.StringVar(&cfg.Underlay, "underlay", "", "link on the underlay (default: the one that has the node's address)")
	f.IntVar(&cfg.VXLANPort, "vxlan-port", 4789, "UDP port of the overlay, one for all nodes")
	f.StringVar(&opts.clusterDNS, "cluster-dns", "", "address of the name server in pods, as in kubelet's configuration")
	f.StringVar(&cfg.ClusterDomain, "cluster-domain", "cluster.local", "domain of the cluster, as in kubelet's configuration")
	f.StringSliceVar(&opts.serviceCIDRs, "service-cidr", nil, "ranges of Services, added to those of ServiceCIDR objects")
	f.StringSliceVar(&opts.podCIDRs, "pod-cidr", nil, "ranges of the default network, added to those of Node objects")
	f.StringSliceVar(&opts.infrastructure, "infrastructure-cidr", nil, "other ranges of the cluster's own, such as the nodes' network: no tenant reaches them, no Network may overlap with them")
	f.StringSliceVar(&opts.denied, "denied-cidr", nil, "ranges outside of the cluster that no tenant reaches; Networks may have the same addresses")
	f.StringSliceVar(&opts.resolvConf, "resolv-conf", []string{"/etc/resolv.conf"}, "files that name the host's resolvers: the first that does counts, and is followed when it changes")
	f.StringVar(&cfg.CNIPlugin, "cni-plugin", "/usr/local/bin/h8s-cni", "program to copy to --cni-bin-dir; empty: it is there")
	f.StringVar(&cfg.CNIBinDir, "cni-bin-dir", "/opt/cni/bin", "where the container runtime finds CNI plugins")
	f.StringVar(&cfg.CNIConfDir, "cni-conf-dir", "/etc/cni/net.d", "where the container runtime finds CNI configuration")
	f.StringVar(&cfg.Socket, "socket", "/run/h8s/cni.sock", "where h8s-cni asks this agent")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/h8s", "where attachments are recorded")
	f.StringVar(&cfg.NetnsDir, "netns-dir", "/run/netns", "where portals are bound")
	f.StringVar(&cfg.HyperDir, "hyper-dir", accel.DefaultDir, "where containerd-shim-hyper-v1 records what executes virtual machines (its runDir)")
	f.StringVar(&opts.hyperInstallDir, "hyper-install-dir", "", "where to install the runtime of virtual machines; empty: nowhere")
	f.StringVar(&opts.hyperSource, "hyper-source", "/usr/local/lib/h8s", "where it is copied from")
	f.StringVar(&opts.containerdConfDir, "containerd-conf-dir", "/etc/containerd/conf.d", "where containerd's configuration for it is written")
	f.StringVar(&opts.health, "health-address", "127.0.0.1:9476", "where /healthz and /readyz are answered; empty: nowhere")
	f.DurationVar(&cfg.BlockGrace, "block-grace", 2*time.Minute, "how long a Block without pods is kept")
	f.StringVar(&opts.logs, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&opts.kubeconfig, "kubeconfig", "", "how to reach the API server (default: as a pod does)")
	cmd.AddCommand(uninstall(&cfg, &opts))
	for _, name := range []string{"cni-bin-dir", "cni-conf-dir", "hyper-install-dir", "containerd-conf-dir"} {
		cmd.PersistentFlags().AddFlag(f.Lookup(name))
	}
	return cmd
}

// uninstall hands the node's pods back to the default network; for the time when
// the product has left the cluster.
func uninstall(cfg *agent.Config, opts *options) *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the CNI plugin, its configuration and the guard rules from this node, on which no agent runs any more",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := errors.Join(cni.Uninstall(cfg.CNIBinDir, cfg.CNIConfDir), portal.RemoveGuard(cmd.Context()))
			if opts.hyperInstallDir != "" {
				err = errors.Join(err, install.Remove(opts.hyperInstallDir, opts.containerdConfDir))
			}
			return err
		},
	}
}

func (o options) complete(cfg *agent.Config) error {
	if cfg.NodeName == "" {
		return errors.New("--node-name (or $NODE_NAME) is needed")
	}
	var err error
	if o.nodeIP != "" {
		if cfg.NodeIP, err = netip.ParseAddr(o.nodeIP); err != nil {
			return fmt.Errorf("--node-ip: %w", err)
		}
	}
	if cfg.ClusterDNS, err = netip.ParseAddr(o.clusterDNS); err != nil {
		return fmt.Errorf("--cluster-dns is needed, the address that kubelet writes into pods: %w", err)
	}
	for _, list := range []struct {
		flag string
		in   []string
		out  *[]netip.Prefix
	}{
		{"service-cidr", o.serviceCIDRs, &cfg.ServiceCIDRs},
		{"pod-cidr", o.podCIDRs, &cfg.PodCIDRs},
		{"infrastructure-cidr", o.infrastructure, &cfg.InfrastructureCIDRs},
		{"denied-cidr", o.denied, &cfg.DeniedCIDRs},
	} {
		if *list.out, err = ipv4Prefixes(list.in); err != nil {
			return fmt.Errorf("--%s: %w", list.flag, err)
		}
	}
	resolv, err := dns.NewResolvConf(o.resolvConf...)
	if err != nil {
		return fmt.Errorf("--resolv-conf: %w", err)
	}
	cfg.Resolvers = resolv.Resolvers
	return nil
}

// ipv4Prefixes leaves the other family's out: Networks have none of it.
func ipv4Prefixes(in []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range in {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, err
		}
		if p.Addr().Is4() {
			out = append(out, p.Masked())
		}
	}
	return out, nil
}

func run(ctx context.Context, cfg agent.Config, opts options) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(opts.logs)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	if opts.hyperInstallDir != "" {
		restart, err := install.Ensure(opts.hyperSource, opts.hyperInstallDir, opts.containerdConfDir)
		if err != nil {
			return err
		}
		if restart {
			log.Warn("restart containerd on this node: it does not know the runtime hyper yet", "configuration", opts.containerdConfDir)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", opts.kubeconfig)
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	a, err := agent.New(ctx, cfg, config, log)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.Run(ctx) })
	if opts.health != "" {
		group.Go(func() error { return serveHealth(ctx, opts.health, a.Ready) })
	}
	return group.Wait()
}

func serveHealth(ctx context.Context, address string, ready func() error) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("serve health: %w", err)
	}
	server := &http.Server{Handler: mux, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health: %w", err)
	}
	return nil
}
