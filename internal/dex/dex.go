// Package dex runs a real OpenID Connect provider for tests: Dex, as upstream/dex builds
// it, with one public client and one person in it, and that person's browser.
package dex

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/net/html"
	"k8s.io/client-go/util/cert"
)

// What is in the provider: the public client, and the person with her groups.
const (
	ClientID = "h8s"
	Email    = "ann@example.com"

	password = "password"
	// bcrypt of it.
	passwordHash = "$2a$10$2b2cU8CPhOTaGrs1HRQuAueS7JTT5ZHsHSzYiFPm1leZck7Mc8T4W"
	startTimeout = 30 * time.Second
)

// Groups of the person: one of them is only called like one of Kubernetes'.
func Groups() []string { return []string{"team-a", "system:masters"} }

// Provider is one Dex, which may be started several times.
type Provider struct {
	// Issuer is its URL, CA the PEM of its certificate, CAFile where that is.
	Issuer, CA, CAFile string
	// Enter begins the command line of the program, such as nsenter's; Dial reaches the provider
	// from this process. Both may be nil.
	Enter []string
	Dial  func(ctx context.Context, network, address string) (net.Conn, error)

	program, dir string
	address      netip.AddrPort
	cmd          *exec.Cmd
}

// New prepares a provider that will listen on an address of loopback. Its files are in
// dir, which is the caller's to remove; program is the path of Dex.
func New(program, dir string, address netip.AddrPort) (*Provider, error) {
	ip := address.Addr()
	ca, key, err := cert.GenerateSelfSignedCertKey(ip.String(), []net.IP{ip.AsSlice()}, nil)
	if err != nil {
		return nil, fmt.Errorf("make Dex's certificate: %w", err)
	}
	p := &Provider{Issuer: "https://" + address.String() + "/dex", CA: string(ca), program: program, dir: dir, address: address}
	p.CAFile = p.path("tls.crt")
	if err := errors.Join(os.WriteFile(p.CAFile, ca, 0o600), os.WriteFile(p.path("tls.key"), key, 0o600)); err != nil {
		return nil, fmt.Errorf("write Dex's files: %w", err)
	}
	return p, nil
}

func (p *Provider) path(name string) string { return filepath.Join(p.dir, name) }

// Start starts it, with its memory in a part of the etcd, and waits until it answers.
func (p *Provider) Start(ctx context.Context, etcd, namespace string) error {
	config, err := json.Marshal(map[string]any{
		"issuer": p.Issuer, "listen": p.address.String(), "tlsCert": p.CAFile, "tlsKey": p.path("tls.key"),
		"clientID": ClientID, "idTokens": "10m", "etcd": etcd, "namespace": namespace,
		"passwords": []map[string]any{{
			"email": Email, "hash": []byte(passwordHash), "username": "ann", "userID": "08a8684b", "groups": Groups(),
		}},
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.path("config.json"), config, 0o600); err != nil {
		return fmt.Errorf("write Dex's files: %w", err)
	}
	log, err := os.Create(p.path("dex.log"))
	if err != nil {
		return fmt.Errorf("write Dex's files: %w", err)
	}
	defer log.Close()
	argv := append(slices.Clone(p.Enter), p.program, "--config", p.path("config.json"))
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start Dex (`make upstream` builds it): %w", err)
	}
	if err := p.await(ctx); err != nil {
		p.Stop()
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("Dex does not get ready: %w\n%s", err, text)
	}
	return nil
}

func (p *Provider) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	browser, err := p.browser()
	if err != nil {
		return err
	}
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		_, _, err := load(ctx, browser, http.MethodGet, p.Issuer+"/.well-known/openid-configuration", nil)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-ticker.C:
		}
	}
}

// Stop ends it. Connections are refused when it returns. To stop it twice is no error.
func (p *Provider) Stop() {
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	p.cmd = nil
}

func (p *Provider) browser() (*http.Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(p.CA)) {
		return nil, errors.New("the provider's CA is no certificate")
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, err
	}
	return &http.Client{
		Jar: jar, Timeout: startTimeout,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, DialContext: p.Dial, DisableKeepAlives: true},
	}, nil
}

// Approve is the person who opens the address of a device flow (RFC 8628, section 3.3) in
// a browser, and fills in each form until there is none.
func (p *Provider) Approve(ctx context.Context, address string) error {
	browser, err := p.browser()
	if err != nil {
		return err
	}
	at, page, err := load(ctx, browser, http.MethodGet, address, nil)
	for range 8 {
		if err != nil {
			return err
		}
		action, fields, err2 := form(page)
		if err2 != nil {
			return err2
		}
		if fields == nil {
			return nil // the last page says that it is done
		}
		if _, ok := fields["login"]; ok {
			fields.Set("login", Email)
			fields.Set("password", password)
		}
		target, err2 := at.Parse(action)
		if err2 != nil {
			return err2
		}
		at, page, err = load(ctx, browser, http.MethodPost, target.String(), fields)
	}
	return errors.New("the provider asks on and on")
}

// load returns a page and where it is in the end.
func load(ctx context.Context, browser *http.Client, method, address string, fields url.Values) (at *url.URL, page []byte, err error) {
	request, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader([]byte(fields.Encode())))
	if err != nil {
		return nil, nil, err
	}
	if method == http.MethodPost {
		request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	response, err := browser.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	page, err = io.ReadAll(response.Body)
	if err != nil {
		return nil, nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s says %s: %s", response.Request.URL, response.Status, page)
	}
	return response.Request.URL, page, nil
}

// form is the first form of an HTML page, as it would be sent; no fields if there is none.
func form(page []byte) (action string, fields url.Values, err error) {
	root, err := html.Parse(bytes.NewReader(page))
	if err != nil {
		return "", nil, err
	}
	attribute := func(n *html.Node, key string) string {
		for _, a := range n.Attr {
			if a.Key == key {
				return a.Val
			}
		}
		return ""
	}
	var found *html.Node
	for n := range root.Descendants() {
		switch {
		case n.Type != html.ElementNode:
		case n.Data == "form" && found == nil:
			found, action, fields = n, attribute(n, "action"), url.Values{}
		case n.Data == "input" && found != nil && isIn(n, found) && attribute(n, "type") != "checkbox":
			fields.Set(attribute(n, "name"), attribute(n, "value"))
		}
	}
	return action, fields, nil
}

func isIn(n, ancestor *html.Node) bool {
	return slices.Contains(slices.Collect(n.Ancestors()), ancestor)
}
