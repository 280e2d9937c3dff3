package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"h8s.io/hypernetes/internal/keystone"
)

// tokensSection are reviews of Keystone's tokens.
const tokensSection = "tokens"

const (
	// coldTokens are reviewed one after the other, and as many others side by side;
	// cachedReviews are of the former.
	coldTokens, cachedReviews = 40, 1000
	tokenWorkers              = 8
)

// tokenIssuer is a real Keystone, and where to get tokens of it.
type tokenIssuer struct {
	server *keystone.Server
	http   *http.Client
}

// newTokenIssuer also returns the path of the clouds.yaml of the user who validates.
func newTokenIssuer(ctx context.Context, dir string) (*tokenIssuer, string, error) {
	server, err := keystone.StartServer(ctx, 0)
	if err != nil {
		return nil, "", err
	}
	path := filepath.Join(dir, "clouds.yaml")
	clouds, err := server.EnsureServiceUser(ctx, "h8s", "h8s")
	if err == nil {
		err = os.WriteFile(path, clouds, 0o600)
	}
	if err != nil {
		return nil, "", errors.Join(err, server.Close())
	}
	return &tokenIssuer{server, &http.Client{Timeout: readyLimit}}, path, nil
}

// issue makes a token of the administrator by password.
func (i *tokenIssuer) issue(ctx context.Context) (string, error) {
	type object = map[string]any
	domain := object{"name": "Default"}
	body, err := json.Marshal(object{"auth": object{
		"identity": object{"methods": []string{"password"}, "password": object{"user": object{"name": keystone.AdminUser, "domain": domain, "password": i.server.AdminPassword()}}},
		"scope":    object{"project": object{"name": keystone.AdminUser, "domain": domain}},
	}})
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, i.server.URL()+"/auth/tokens", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := i.http.Do(req)
	if err != nil {
		return "", fmt.Errorf("get a token of Keystone: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		return "", fmt.Errorf("get a token of Keystone: %s", resp.Status)
	}
	return resp.Header.Get("X-Subject-Token"), nil
}

// tokenMetrics are what measureTokens notes, with units.
func tokenMetrics() []struct{ name, unit string } {
	return []struct{ name, unit string }{
		{"token review cold, p50", "ms"},
		{"token review cold, p99", "ms"},
		{"cold reviews per second, one Keystone process", "1/s"},
		{"token review cached, p50", "ms"},
		{"token review cached, p99", "ms"},
		{"cached reviews per second and core of the controller", "1/s"},
	}
}

// tryTokens measures them. On a busy machine Keystone may be too slow to answer within
// the webhook's deadline: that costs these figures, and no others.
func (c *crowd) tryTokens(ctx context.Context) error {
	if err := c.measureTokens(ctx); err != nil {
		if ctx.Err() != nil {
			return err
		}
		c.tokensErr = fmt.Errorf("with %d tenants: %w", c.count, err)
		c.p.say("tokens, %v", c.tokensErr)
	}
	return nil
}

// measureTokens has the controller's webhook review tokens that it has never seen, and
// tokens that it knows.
func (c *crowd) measureTokens(ctx context.Context) error {
	if c.tokens == nil {
		return nil
	}
	tokens := make([]string, 2*coldTokens)
	for i := range tokens {
		var err error
		if tokens[i], err = c.tokens.issue(ctx); err != nil {
			return err
		}
	}
	httpClient, url := c.TokenReviews()
	defer httpClient.CloseIdleConnections()
	review := func(ctx context.Context, token string) (time.Duration, error) {
		return reviewToken(ctx, httpClient, url, token)
	}
	if _, err := review(ctx, "not one of Keystone's"); err == nil { // and it opens the connection
		return errors.New("the webhook believes a token that nobody has issued")
	}

	var cold, cached []float64
	for _, token := range tokens[:coldTokens] {
		took, err := review(ctx, token)
		if err != nil {
			return err
		}
		cold = append(cold, milliseconds(took))
	}
	// While the answers count: ten seconds.
	last := tokens[coldTokens-1]
	cpu, err := processTime(c.Controller.PID())
	if err != nil {
		return err
	}
	for range cachedReviews {
		took, err := review(ctx, last)
		if err != nil {
			return err
		}
		cached = append(cached, milliseconds(took))
	}
	cpuAfter, err := processTime(c.Controller.PID())
	if err != nil {
		return err
	}
	began := time.Now()
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(tokenWorkers)
	for _, token := range tokens[coldTokens:] {
		group.Go(func() error {
			_, err := review(groupCtx, token)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	rate := float64(coldTokens) / time.Since(began).Seconds()
	for i, value := range []float64{
		median(cold), quantile(cold, 0.99), rate,
		median(cached), quantile(cached, 0.99), cachedReviews / max(tick, cpuAfter-cpu).Seconds(),
	} {
		c.note(tokenMetrics()[i].name, value)
	}
	return nil
}

// measureTokensAlone is for a run without tenants: those with tenants review tokens at
// each checkpoint.
func measureTokensAlone(ctx context.Context, l *lab, _ options, _ *progress) ([]Row, error) {
	c := l.crowd
	if c.values[tokenMetrics()[0].name] == nil {
		if err := c.measureTokens(ctx); err != nil {
			return nil, err
		}
	}
	var rows []Row
	for _, metric := range tokenMetrics() {
		s := c.values[metric.name]
		rows = append(rows, absolute(lastPlace(s), metric.name, metric.unit, newSide("h8s-controller", []float64{s.Y[len(s.Y)-1]}), nil))
	}
	return rows, c.tokensErr
}

// reviewToken asks the webhook as the API server does. A token that is refused is an error.
func reviewToken(ctx context.Context, httpClient *http.Client, url, token string) (time.Duration, error) {
	question := authenticationv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: authenticationv1.SchemeGroupVersion.String(), Kind: "TokenReview"},
		Spec:     authenticationv1.TokenReviewSpec{Token: token},
	}
	body, err := json.Marshal(question)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	began := time.Now()
	resp, err := httpClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("ask the webhook about a token: %w", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	took := time.Since(began)
	if err != nil {
		return 0, err
	}
	var answer authenticationv1.TokenReview
	if err := json.Unmarshal(data, &answer); err != nil {
		return 0, fmt.Errorf("the webhook answers %s: %w", resp.Status, err)
	}
	if !answer.Status.Authenticated {
		return 0, fmt.Errorf("the webhook refuses a token: %s", answer.Status.Error)
	}
	return took, nil
}
