// Command dex is the OpenID Connect provider of the tests: Dex's own server package,
// with its storage in an etcd, one public client and the people that its configuration
// names. Dex's own command is not used because it also has Dex's gRPC API, whose module
// is not published at the same commit; its storage in memory is not, because a refresh
// of a token waits there for itself.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/dexidp/dex/server"
	"github.com/dexidp/dex/server/connectors"
	"github.com/dexidp/dex/server/signer"
	"github.com/dexidp/dex/server/tokens"
	"github.com/dexidp/dex/storage"
	"github.com/dexidp/dex/storage/etcd"
)

// config is the JSON file that --config names.
type config struct {
	Issuer string `json:"issuer"`
	// Listen is the address:port to serve on, by TLS.
	Listen  string `json:"listen"`
	TLSCert string `json:"tlsCert"`
	TLSKey  string `json:"tlsKey"`
	// ClientID is the one public client.
	ClientID string `json:"clientID"`
	// Etcd is the URL of the etcd, Namespace the prefix of the keys in it.
	Etcd      string `json:"etcd"`
	Namespace string `json:"namespace"`
	// IDTokens is how long an ID token is valid, such as "1h".
	IDTokens string `json:"idTokens"`
	// Passwords are the people, as in Dex's own configuration (hash is base64 of bcrypt's).
	Passwords []storage.Password `json:"passwords"`
}

func main() {
	path := flag.String("config", "", "configuration file, JSON")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *path)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "dex:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read --config: %w", err)
	}
	var c config
	if err := json.Unmarshal(data, &c); err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	lifetime, err := time.ParseDuration(c.IDTokens)
	if err != nil {
		return fmt.Errorf("idTokens: %w", err)
	}
	issuer, err := url.Parse(c.Issuer)
	if err != nil {
		return fmt.Errorf("issuer: %w", err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	store, err := (&etcd.Etcd{Endpoints: []string{c.Etcd}, Namespace: c.Namespace}).Open(log)
	if err != nil {
		return fmt.Errorf("open the storage: %w", err)
	}
	defer store.Close()
	store = storage.WithStaticClients(store, []storage.Client{{
		ID: c.ClientID, Name: c.ClientID, Public: true,
		RedirectURIs: []string{issuer.Path + "/device/callback"}, // the device flow's own (RFC 8628)
	}})
	store = storage.WithStaticPasswords(store, c.Passwords, log)
	store = storage.WithStaticConnectors(store, []storage.Connector{
		{ID: connectors.LocalConnector, Name: "Email", Type: connectors.LocalConnector},
	})
	local := signer.LocalConfig{KeysRotationPeriod: "6h"}
	signing, err := local.Open(ctx, store, lifetime, time.Now, log)
	if err != nil {
		return fmt.Errorf("make the signing key: %w", err)
	}
	refresh, err := tokens.NewRefreshTokenPolicy(log, false, "", "", "")
	if err != nil {
		return err
	}
	handler, err := server.NewServer(ctx, server.Config{
		Issuer: c.Issuer, Storage: store, Signer: signing, Logger: log,
		IDTokensValidFor: lifetime, RefreshTokenPolicy: refresh,
	})
	if err != nil {
		return err
	}
	web := &http.Server{Addr: c.Listen, Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		<-ctx.Done()
		_ = web.Close()
	}()
	if err := web.ListenAndServeTLS(c.TLSCert, c.TLSKey); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
