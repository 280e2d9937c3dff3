// Package accel says what executes the guests of a node: the processor (KVM), or QEMU's
// translator (TCG). The shim chooses, and records it for those who only want to know.
package accel

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// The accelerators, as QEMU calls them.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// DefaultDir is the shim's RunDir, where it records the choice unless it is configured
// otherwise.
const DefaultDir = "/run/h8s/hyper"

// Choice is what executes the guests of a node.
type Choice struct {
	// Accelerator is KVM or TCG.
	Accelerator string `json:"accelerator"`
	// Reason says why, for a person.
	Reason string `json:"reason"`
}

const forcedReason = "forced by the configuration"

// Forced says whether the configuration has chosen, and no probe.
func (c Choice) Forced() bool { return c.Reason == forcedReason }

// Prober says whether a guest really boots with KVM here, and if not, why.
type Prober func(ctx context.Context) (ok bool, why string, err error)

// Choose returns the accelerator that the configuration forces, or else KVM where the
// probe finds that it works.
func Choose(ctx context.Context, forced string, kvm Prober) (Choice, error) {
	switch forced {
	case KVM, TCG:
		return Choice{forced, forcedReason}, nil
	case "":
	default:
		return Choice{}, fmt.Errorf("accel %q: say kvm or tcg, or leave it out for kvm where it boots a guest", forced)
	}
	ok, why, err := kvm(ctx)
	switch {
	case err != nil:
		return Choice{}, err
	case ok:
		return Choice{KVM, "a guest boots with it"}, nil
	}
	return Choice{TCG, "KVM does not boot a guest: " + why}, nil
}

func file(dir string) string { return filepath.Join(dir, "accelerator.json") }

// Record makes the choice known in dir. It is idempotent, and writes only what is new.
func Record(dir string, c Choice) error {
	if known, found, err := Recorded(dir); err == nil && found && known == c {
		return nil
	}
	text, err := json.Marshal(c)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = renameio.WriteFile(file(dir), append(text, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("record the accelerator: %w", err)
	}
	return nil
}

// Recorded returns the choice that was recorded in dir, and whether one was.
func Recorded(dir string) (c Choice, found bool, err error) {
	text, err := os.ReadFile(file(dir))
	if errors.Is(err, os.ErrNotExist) {
		return c, false, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err == nil && c.Accelerator != KVM && c.Accelerator != TCG {
		err = fmt.Errorf("accelerator %q", c.Accelerator)
	}
	if err != nil {
		return Choice{}, false, fmt.Errorf("the recorded accelerator (remove %s, and the next pod records it anew): %w", file(dir), err)
	}
	return c, true, nil
}
