// Package terminal is a person at a terminal, for tests of programs that ask one.
package terminal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// Answer runs the program on a pseudo-terminal of its own. When the terminal shows the
// question and no longer what is typed (ECHO, termios(3)), the secret is typed, once. It
// returns all that the terminal has shown, and how the program ended: an error also if it was never
// asked, or if the secret is among what was shown. The context ends a program that goes on and on.
func Answer(ctx context.Context, cmd *exec.Cmd, question, secret string) (shown string, err error) {
	tty, err := pty.Start(cmd)
	if err != nil {
		return "", fmt.Errorf("start %s on a terminal: %w", cmd.Path, err)
	}
	defer tty.Close()
	fd := int(tty.Fd())
	var screen screen
	var exit error
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(&screen, tty) // until nobody has the other end any more, which is an error here (EIO)
		exit = cmd.Wait()
		close(ended)
	}()
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for typed := false; ; {
		select {
		case <-ended:
			shown := screen.String()
			switch {
			case exit != nil:
				return shown, exit
			case !typed:
				return shown, fmt.Errorf("it has ended and never asked %q out of sight", question)
			case strings.Contains(shown, secret):
				return shown, errors.New("the terminal has shown the secret")
			}
			return shown, nil
		case <-ctx.Done():
			_ = cmd.Process.Kill()
			<-ended
			return screen.String(), fmt.Errorf("it goes on and on: %w", ctx.Err())
		case <-ticker.C:
			state, err := unix.IoctlGetTermios(fd, unix.TCGETS)
			if typed || err != nil || state.Lflag&unix.ECHO != 0 || !strings.Contains(screen.String(), question) {
				continue
			}
			typed = true
			if _, err := io.WriteString(tty, secret+"\n"); err != nil {
				_ = cmd.Process.Kill()
				<-ended
				return screen.String(), fmt.Errorf("type: %w", err)
			}
		}
	}
}

// screen is what has been shown.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}
