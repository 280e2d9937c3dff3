package identity

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"golang.org/x/sync/singleflight"
)

// Refusal is Keystone's verdict, or ours, that a token is not valid. Any other error of
// a Validator means that nobody could be asked.
type Refusal struct{ reason string }

// Error says why, without the token.
func (r *Refusal) Error() string { return r.reason }

// ErrUnavailable means that Keystone gave no answer about a token, be it valid or not.
var ErrUnavailable = errors.New("Keystone cannot be asked")

var (
	errUnknown  = &Refusal{"Keystone knows no such token: it has expired or been revoked, its user or project is disabled, or it never was one; log in again"}
	errForeign  = &Refusal{"this is not one of Keystone's tokens"}
	errTooLong  = &Refusal{"the token is longer than any of Keystone's"}
	errExpired  = &Refusal{"the token has expired; log in again"}
	errBusy     = fmt.Errorf("%w: too many tokens wait to be validated; try again", ErrUnavailable)
	errDeadline = fmt.Errorf("%w: no answer in time", ErrUnavailable)
)

const (
	// maxToken is what web servers in front of Keystone accept as a header. Fernet tokens
	// have about 200 bytes.
	maxToken = 8 << 10
	// MaxCache is the longest that any answer may be used again.
	MaxCache = 10 * time.Second
)

// Options are how a Validator remembers and waits. Zero means the default.
type Options struct {
	Prefix Prefix
	// Fresh is how long a valid token counts without asking Keystone again. The default is
	// none: the API server itself remembers a valid token for 10 seconds, whatever its
	// flags say, and reviews of one token at one time share one question.
	Fresh time.Duration
	// Grace is how long after Keystone's last good word a token counts while Keystone
	// cannot be asked: 10 seconds.
	Grace time.Duration
	// Refused is how long a refused token stays refused: 2 seconds.
	Refused time.Duration
	// Deadline is how long one validation may take: 2.5 seconds.
	Deadline time.Duration
	// Entries is how many valid tokens are remembered, and how many refused ones: 4096.
	Entries int
	// Questions is how many are put to Keystone at once about tokens that are remembered as
	// valid, and how many about others: 16 of each. Waiting is how many more of each may
	// wait for their turn, 1024.
	Questions, Waiting int
	// Now is the clock.
	Now func() time.Time
}

func (o *Options) complete() error {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	for _, d := range []struct {
		name      string
		value     *time.Duration
		otherwise time.Duration
	}{{"fresh", &o.Fresh, 0}, {"grace", &o.Grace, MaxCache}, {"refused", &o.Refused, 2 * time.Second}} {
		if *d.value == 0 {
			*d.value = d.otherwise
		}
		if *d.value < 0 || *d.value > MaxCache {
			return fmt.Errorf("%s %s: answers of Keystone are used again for %s at most, or a revoked token would live too long", d.name, *d.value, MaxCache)
		}
	}
	if o.Deadline <= 0 {
		o.Deadline = 2500 * time.Millisecond
	}
	if o.Entries <= 0 {
		o.Entries = 4096
	}
	if o.Questions <= 0 {
		o.Questions = 16
	}
	if o.Waiting <= 0 {
		o.Waiting = 1024
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return nil
}

// asker puts one question to Keystone: what it says about a token, a *Refusal, or
// another error.
type asker interface {
	ask(ctx context.Context, token string) (*token, error)
}

// digest stands for a token where it is remembered, so that memory holds no
// credentials.
type digest [sha256.Size]byte

// Validator says who a token is of. Its memory is bounded, and so is the time of every
// call. It is safe for concurrent use.
type Validator struct {
	opts    Options
	source  asker
	valid   *lru.Cache[digest, validEntry]
	refused *lru.Cache[digest, refusedEntry]
	flights singleflight.Group
	// Whoever likes asks about strangers; those who are known do not wait behind them.
	known, strangers lane
}

// lane is a way to Keystone: turns has a place for each question that is put, queue for
// those that wait too.
type lane struct{ turns, queue chan struct{} }

func newLane(opts Options) lane {
	return lane{make(chan struct{}, opts.Questions), make(chan struct{}, opts.Questions+opts.Waiting)}
}

type validEntry struct {
	identity *Identity
	asked    time.Time
}

type refusedEntry struct {
	reason *Refusal
	asked  time.Time
}

// New makes a Validator that asks as the service user does. Nothing is asked yet:
// Keystone need not be up.
func New(service *Service, opts Options) (*Validator, error) { return newValidator(service, opts) }

func newValidator(source asker, opts Options) (*Validator, error) {
	if err := opts.complete(); err != nil {
		return nil, err
	}
	valid, err := lru.New[digest, validEntry](opts.Entries)
	if err != nil {
		return nil, err
	}
	refused, err := lru.New[digest, refusedEntry](opts.Entries)
	if err != nil {
		return nil, err
	}
	return &Validator{
		opts: opts, source: source, valid: valid, refused: refused,
		known: newLane(opts), strangers: newLane(opts),
	}, nil
}

// Validate says who the token is of. The error is a *Refusal if the token is not
// valid, and wraps ErrUnavailable if Keystone did not say. It returns within the
// deadline of the Options.
//
// A token whose revocation Keystone knows is refused after Fresh at the latest. While
// Keystone cannot be asked, a token that was valid counts until Grace has passed, and
// never after it has expired; all others wait for Keystone, outside.
func (v *Validator) Validate(ctx context.Context, token string) (*Identity, error) {
	if err := plausible(token); err != nil {
		return nil, err
	}
	key := digest(sha256.Sum256([]byte(token)))
	now := v.opts.Now()
	known, ok := v.valid.Get(key)
	if ok && now.Sub(known.asked) < v.opts.Fresh {
		return known.at(now)
	}
	if r, ok := v.refused.Get(key); ok {
		if now.Sub(r.asked) < v.opts.Refused {
			return nil, r.reason
		}
		v.refused.Remove(key)
	}
	flight := v.flights.DoChan(string(key[:]), func() (any, error) { return v.question(context.WithoutCancel(ctx), key, token) })
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", errDeadline, ctx.Err())
	case result := <-flight:
		if result.Err == nil {
			return result.Val.(*Identity), nil
		}
		if errors.Is(result.Err, ErrUnavailable) {
			now := v.opts.Now()
			// What is known now: another answer may have come in the meantime.
			if known, ok := v.valid.Get(key); ok && now.Sub(known.asked) < v.opts.Grace {
				return known.at(now)
			}
		}
		return nil, result.Err
	}
}

// at is the entry's identity as long as the token lives.
func (e validEntry) at(now time.Time) (*Identity, error) {
	if !now.Before(e.identity.Expires) {
		return nil, errExpired
	}
	return e.identity, nil
}

// question asks Keystone, when it is its turn, and remembers the answer. It does not
// end with the caller who came first: others wait for the same answer.
func (v *Validator) question(ctx context.Context, key digest, token string) (*Identity, error) {
	lane := v.strangers
	if v.valid.Contains(key) {
		lane = v.known
	}
	select {
	case lane.queue <- struct{}{}:
		defer func() { <-lane.queue }()
	default:
		return nil, errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, v.opts.Deadline)
	defer cancel()
	select {
	case lane.turns <- struct{}{}:
		defer func() { <-lane.turns }()
	case <-ctx.Done():
		return nil, errBusy
	}
	// The answer is as old as the question.
	asked := v.opts.Now()
	id, err := v.answer(ctx, token)
	if refusal := new(Refusal); errors.As(err, &refusal) {
		v.valid.Remove(key)
		v.refused.Add(key, refusedEntry{refusal, asked})
		return nil, refusal
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, errDeadline
		}
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	v.valid.Add(key, validEntry{id, asked})
	return id, nil
}

func (v *Validator) answer(ctx context.Context, token string) (*Identity, error) {
	t, err := v.source.ask(ctx, token)
	if err != nil {
		return nil, err
	}
	id, err := v.opts.Prefix.identify(t)
	if err != nil {
		return nil, &Refusal{err.Error()}
	}
	if !v.opts.Now().Before(id.Expires) {
		return nil, errExpired
	}
	return id, nil
}

// plausible refuses what cannot be a token of Keystone's, and never needs to leave
// this process: others' tokens are not for Keystone to see.
func plausible(token string) error {
	switch {
	case len(token) > maxToken:
		return errTooLong
	case token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
		return errForeign
	case issued(token):
		return errForeign
	}
	return nil
}

// issued says whether the token is a JSON Web Token (RFC 7519) that names its issuer,
// as those of ServiceAccounts and of OpenID providers do, and Keystone's do not.
func issued(token string) bool {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var claims struct {
		Issuer *string `json:"iss"`
	}
	return json.Unmarshal(payload, &claims) == nil && claims.Issuer != nil
}

// verdict reads the status of Keystone's answer about a token. Bodies are not quoted:
// some contain the token.
func verdict(status int) error {
	switch status {
	case http.StatusNotFound:
		return errUnknown
	case http.StatusForbidden:
		return errors.New("the service user may not validate tokens: give it the role `service` in its project")
	case http.StatusUnauthorized:
		return errors.New("Keystone refuses the service user's token")
	}
	return fmt.Errorf("Keystone answers with status %d", status)
}
