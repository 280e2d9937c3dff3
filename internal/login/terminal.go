package login

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/term"
)

// Terminal asks whoever sits at the process's controlling terminal. Standard output
// and input are not touched: they may be a pipe of kubectl's.
type Terminal struct{}

var errNoTerminal = errors.New("there is no terminal to ask on: run `h8s login` in one")

// Ask implements Person.
func (Terminal) Ask(ctx context.Context, question string, secret bool) (string, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return "", errors.Join(errNoTerminal, err)
	}
	defer tty.Close()
	fd := int(tty.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("examine the terminal: %w", err)
	}
	fmt.Fprint(tty, question, ": ")
	type answer struct {
		line string
		err  error
	}
	answers := make(chan answer, 1)
	go func() {
		if secret {
			line, err := term.ReadPassword(fd)
			fmt.Fprintln(tty)
			answers <- answer{string(line), err}
			return
		}
		line, err := bufio.NewReader(tty).ReadString('\n')
		answers <- answer{strings.TrimRight(line, "\r\n"), err}
	}()
	select {
	case a := <-answers:
		return a.line, a.err
	case <-ctx.Done(): // the terminal must not stay without echo
		_ = term.Restore(fd, state)
		return "", ctx.Err()
	}
}

// Tell implements Person.
func (Terminal) Tell(message string) { fmt.Fprintln(os.Stderr, message) }
