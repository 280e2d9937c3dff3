package identity

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// oracle stands for Keystone where its number of answers or the moment of one is what
// matters: real ones cannot be stopped at a moment, nor be asked a million times.
type oracle struct {
	questions atomic.Int64
	answer    func(ctx context.Context, token string) (*token, error)
}

func (o *oracle) ask(ctx context.Context, token string) (*token, error) {
	o.questions.Add(1)
	return o.answer(ctx, token)
}

func tokenOf(name string) *token {
	domain := named{"default", "Default"}
	return &token{
		User: owned{named{name, name}, domain}, Project: &owned{named{"p", "p"}, domain},
		Roles: []named{{"r", "member"}}, ExpiresAt: time.Now().Add(time.Hour),
	}
}

// TestOneQuestion: reviews that come while Keystone is thinking about the same token
// wait for that answer, also without a memory; and one caller's end is not the others'.
func TestOneQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		source := &oracle{answer: func(ctx context.Context, token string) (*token, error) {
			select {
			case <-release:
				return tokenOf(token), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}}
		v := must[*Validator](t)(newValidator(source, Options{}))
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error)
		go func() {
			_, err := v.Validate(ctx, "token")
			first <- err
		}()
		synctest.Wait()
		errs := make([]error, 1000)
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { _, errs[i] = v.Validate(t.Context(), "token") })
		}
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, ErrUnavailable) {
			t.Errorf("the caller who went away: %v", err)
		}
		close(release)
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Error(err)
		}
		if n := source.questions.Load(); n != 1 {
			t.Errorf("%d questions, want one", n)
		}
	})
}

// TestHang: with a Keystone that never answers, every review ends by the deadline, few
// questions are put at once, and what is too much is turned away at once.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int64
		source := &oracle{answer: func(ctx context.Context, _ string) (*token, error) {
			for n := now.Add(1); ; {
				if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
					break
				}
			}
			defer now.Add(-1)
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		opts := Options{Questions: 4, Waiting: 16, Deadline: 2 * time.Second}
		v := must[*Validator](t)(newValidator(source, opts))
		began := time.Now()
		const callers = 100
		var atOnce atomic.Int64
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				_, err := v.Validate(t.Context(), fmt.Sprint("token-", i))
				if !errors.Is(err, ErrUnavailable) {
					t.Errorf("%v", err)
				}
				if time.Since(began) == 0 {
					atOnce.Add(1)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > opts.Deadline {
			t.Errorf("the last answer came after %s", took)
		}
		if n := most.Load(); n != int64(opts.Questions) {
			t.Errorf("%d questions at once, want %d", n, opts.Questions)
		}
		if n, want := atOnce.Load(), int64(callers-opts.Questions-opts.Waiting); n != want {
			t.Errorf("%d were turned away at once, want %d", n, want)
		}
		synctest.Wait()
		if lane := v.strangers; len(lane.queue) != 0 || len(lane.turns) != 0 {
			t.Errorf("%d in the queue and %d in turn when all is over", len(lane.queue), len(lane.turns))
		}
	})
}

// TestFloodOfStrangers: tokens that nobody knows, as many as anybody likes to send, do
// not keep those who are known out.
func TestFloodOfStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := &oracle{answer: func(ctx context.Context, token string) (*token, error) {
			if token == "known" {
				return tokenOf(token), nil
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		v := must[*Validator](t)(newValidator(source, Options{Questions: 4, Waiting: 16}))
		if _, err := v.Validate(t.Context(), "known"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(MaxCache) // the answer is too old to count without another
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() { _, _ = v.Validate(t.Context(), fmt.Sprint("stranger-", i)) })
		}
		synctest.Wait()
		if _, err := v.Validate(t.Context(), "one-more"); !errors.Is(err, errBusy) {
			t.Errorf("a stranger behind a full queue: %v", err)
		}
		if _, err := v.Validate(t.Context(), "known"); err != nil {
			t.Errorf("a known token behind a full queue of strangers: %v", err)
		}
		wg.Wait()
	})
}

// TestMemory: floods of tokens, good or bad, take a bounded memory, and the bad ones
// do not push out the good ones.
func TestMemory(t *testing.T) {
	source := &oracle{answer: func(_ context.Context, token string) (*token, error) {
		if token[0] == 'b' {
			return nil, errUnknown
		}
		return tokenOf(token), nil
	}}
	const entries = 1000
	began := time.Now() // the clock stands: memory is bounded by number, not by age
	v := must[*Validator](t)(newValidator(source, Options{
		Entries: entries, Fresh: MaxCache, Refused: MaxCache, Now: func() time.Time { return began },
	}))
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	flood := func(kind string, from, to int) {
		for i := from; i < to; i++ {
			_, _ = v.Validate(t.Context(), fmt.Sprintf("%s-%d", kind, i))
		}
	}
	flood("good", 0, entries)
	flood("bad", 0, entries)
	before := heap()
	asked := source.questions.Load()
	flood("bad", entries, 20*entries)
	flood("good", 0, entries)
	if n := source.questions.Load() - asked; n != 19*entries {
		t.Errorf("%d questions, want %d: bad tokens have pushed out good ones", n, 19*entries)
	}
	flood("good", entries, 20*entries)
	if after := heap(); after > before+1<<20 {
		t.Errorf("memory grew from %d to %d bytes", before, after)
	}
	if v.valid.Len() != entries || v.refused.Len() != entries {
		t.Errorf("%d valid and %d refused tokens are remembered, want %d of each", v.valid.Len(), v.refused.Len(), entries)
	}
	runtime.KeepAlive(v)
}

// TestTimes walks through the life of an answer.
func TestTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := errors.New("down")
		var verdict error
		expires := time.Now().Add(time.Hour)
		source := &oracle{answer: func(_ context.Context, token string) (*token, error) {
			if verdict != nil {
				return nil, verdict
			}
			answer := tokenOf(token)
			answer.ExpiresAt = expires
			return answer, nil
		}}
		v := must[*Validator](t)(newValidator(source, Options{Fresh: 3 * time.Second}))
		step := func(what string, after time.Duration, keystone error, asked int64, want error) {
			t.Helper()
			time.Sleep(after)
			verdict = keystone
			before := source.questions.Load()
			_, err := v.Validate(t.Context(), "token")
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", what, err, want)
			}
			if n := source.questions.Load() - before; n != asked {
				t.Errorf("%s: %d questions, want %d", what, n, asked)
			}
		}
		step("the first time", 0, nil, 1, nil)
		step("fresh", 3*time.Second-1, errUnknown, 0, nil)
		step("no longer fresh, Keystone is down", 1, down, 1, nil)
		step("at the end of the grace", 7*time.Second-1, down, 1, nil)
		step("past the grace", 1, down, 1, ErrUnavailable)
		step("Keystone is up", 0, nil, 1, nil)
		step("revoked", 3*time.Second, errUnknown, 1, errUnknown)
		step("revoked, and Keystone is down: no way back", 2*time.Second, down, 1, ErrUnavailable)
		step("refused", 0, errUnknown, 1, errUnknown)
		step("still refused", 2*time.Second-1, nil, 0, errUnknown)
		step("asked again", 1, nil, 1, nil)
		expires = time.Now().Add(4 * time.Second)
		step("known with another end", 3*time.Second, nil, 1, nil)
		step("past its end, while fresh", time.Second, down, 0, errExpired)
		step("past its end, by Keystone's clock not", 3*time.Second, nil, 1, errExpired)
	})
}

func TestOptions(t *testing.T) {
	for name, opts := range map[string]Options{
		"fresh": {Fresh: MaxCache + 1}, "grace": {Grace: time.Minute}, "refused": {Refused: time.Hour}, "negative": {Fresh: -1},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := newValidator(&oracle{}, opts); err == nil {
				t.Error("accepted")
			}
		})
	}
}
