// h8s-controller runs the reconcilers and webhooks of Hypernetes.
package main

import (
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"h8s.io/hypernetes/internal/controller"
	"h8s.io/hypernetes/internal/identity"
	"h8s.io/hypernetes/internal/projects"
)

// version is set by the linker.
var version = "dev"

type flags struct {
	namespace     string
	certDir       string
	webhookHost   string
	clientCA      string
	clientNames   []string
	webhookPort   int
	healthAddress string
	// metricsAddress and pprofAddress are off if they are "0".
	metricsAddress, pprofAddress string
	logLevel                     string
	options                      controller.Options
	keystone                     keystoneFlags
}

// keystoneFlags are off without a path.
type keystoneFlags struct {
	path, cloud, prefix string
	fresh               time.Duration
	sync                string
}

func main() {
	var f flags
	cmd := &cobra.Command{
		Use:           "h8s-controller",
		Short:         "Reconcilers and admission webhooks of Hypernetes",
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(*cobra.Command, []string) error { return run(f) },
	}
	cmd.Flags().StringVar(&f.namespace, "namespace", "h8s-system", "namespace that the controller runs in")
	cmd.Flags().StringVar(&f.certDir, "webhook-cert-dir", "/tls", "directory with tls.crt and tls.key")
	cmd.Flags().StringVar(&f.webhookHost, "webhook-host", "", "address of the webhooks (default all)")
	cmd.Flags().StringVar(&f.clientCA, "webhook-client-ca", "", "file with the CA of the client certificates that the webhooks want (default: they want none)")
	cmd.Flags().StringArrayVar(&f.clientNames, "webhook-client-name", []string{"front-proxy-client"}, "common name that such a certificate must have; may be given several times")
	cmd.Flags().IntVar(&f.webhookPort, "webhook-port", 9443, "port of the webhooks")
	cmd.Flags().StringVar(&f.healthAddress, "health-address", ":8081", "address of /healthz and /readyz")
	cmd.Flags().StringVar(&f.metricsAddress, "metrics-address", "0", "address of /metrics, for Prometheus, without TLS; 0 for none")
	cmd.Flags().StringVar(&f.pprofAddress, "pprof-address", "0", "address of /debug/pprof, without TLS; 0 for none")
	cmd.Flags().StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	cmd.Flags().StringSliceVar(&f.options.ServiceCIDRs, "service-cidr", nil, "ranges of Services; those of ServiceCIDR objects are added")
	cmd.Flags().StringSliceVar(&f.options.PodCIDRs, "pod-cidr", nil, "ranges of the default network; those of Nodes are added")
	cmd.Flags().StringSliceVar(&f.options.InfrastructureCIDRs, "infrastructure-cidr", nil, "other ranges of the cluster's own, such as the nodes' network")
	cmd.Flags().StringVar(&f.keystone.path, "keystone-clouds", "", "clouds.yaml with the service user that validates Keystone's tokens (default: none are)")
	cmd.Flags().StringVar(&f.keystone.cloud, "keystone-cloud", "h8s", "cloud in that file")
	cmd.Flags().StringVar(&f.keystone.prefix, "keystone-prefix", identity.DefaultPrefix, "beginning of the names of Keystone's users and groups")
	cmd.Flags().DurationVar(&f.keystone.fresh, "keystone-fresh", 0, "how long Keystone's word about a token counts without asking again, 10s at most; the API server adds 10s of its own")
	cmd.Flags().StringVar(&f.keystone.sync, "keystone-sync", "", "which projects of Keystone become Tenants, and how, as JSON: the chart's value keystone.sync (default: none)")
	if err := cmd.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "h8s-controller:", err)
		os.Exit(1)
	}
}

func run(f flags) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	ctrl.SetLogger(logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	scheme, err := controller.NewScheme()
	if err != nil {
		return err
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the API server: %w", err)
	}
	if f.keystone.path != "" {
		if f.options.Tokens, err = f.keystone.validator(); err != nil {
			return err
		}
	}
	if f.keystone.sync != "" {
		if f.options.Projects, err = f.keystone.projects(); err != nil {
			return err
		}
	}
	shutdown := 5 * time.Second
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        scheme,
		Cache:                         controller.CacheOptions(),
		Metrics:                       metricsserver.Options{BindAddress: f.metricsAddress},
		PprofBindAddress:              f.pprofAddress,
		HealthProbeBindAddress:        f.healthAddress,
		WebhookServer:                 controller.NewWebhookServer(f.webhookHost, f.webhookPort, f.certDir, f.clientCA, f.clientNames),
		LeaderElection:                true,
		LeaderElectionID:              "h8s-controller",
		LeaderElectionNamespace:       f.namespace,
		LeaderElectionReleaseOnCancel: true,
		GracefulShutdownTimeout:       &shutdown,
	})
	if err != nil {
		return fmt.Errorf("connect to the API server: %w", err)
	}
	if err := controller.Setup(mgr, f.options); err != nil {
		return err
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("webhooks", mgr.GetWebhookServer().StartedChecker()); err != nil {
		return err
	}
	return mgr.Start(ctrl.SetupSignalHandler())
}

// validator does not ask Keystone yet: the controller starts without it.
func (f keystoneFlags) validator() (*identity.Validator, error) {
	prefix, err := identity.ParsePrefix(f.prefix)
	if err != nil {
		return nil, fmt.Errorf("--keystone-prefix: %w", err)
	}
	service, err := identity.NewService(f.path, f.cloud)
	if err != nil {
		return nil, fmt.Errorf("--keystone-clouds: %w", err)
	}
	return identity.New(service, identity.Options{Prefix: prefix, Fresh: f.fresh})
}

// projects does not ask Keystone yet.
func (f keystoneFlags) projects() (*controller.ProjectOptions, error) {
	config, err := projects.ParseConfig([]byte(f.sync))
	if err != nil {
		return nil, fmt.Errorf("--keystone-sync: %w", err)
	}
	prefix, err := identity.ParsePrefix(f.prefix)
	if err != nil {
		return nil, fmt.Errorf("--keystone-prefix: %w", err)
	}
	service, err := identity.NewService(f.path, config.Cloud)
	if err != nil {
		return nil, fmt.Errorf("--keystone-sync needs --keystone-clouds: %w", err)
	}
	return &controller.ProjectOptions{Config: *config, Directory: identity.NewDirectory(service, prefix)}, nil
}
