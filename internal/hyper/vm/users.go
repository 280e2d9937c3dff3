package vm

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Users are the user and group IDs that QEMU runs as: a machine has one of its own for as
// long as it lives. No other process of the node may have one of them.
type Users struct {
	// First is the lowest (default: 1900000000), Count how many there are (default: 65536).
	First, Count uint32
	// File is where locks say which are taken (default: /run/h8s/hyper/users). Those who
	// share it share the range. Its directory is made if need be.
	File string
}

func (u Users) withDefaults() Users {
	if u.First == 0 {
		u.First = 1_900_000_000
	}
	if u.Count == 0 {
		u.Count = 1 << 16
	}
	if u.File == "" {
		u.File = filepath.Join(probeCache, "users")
	}
	return u
}

// take returns an ID that nobody has, and what gives it back: closing, or the end of
// this process. It is a lock of one byte of the file, which has none.
func (u Users) take() (id uint32, giveBack io.Closer, err error) {
	u = u.withDefaults()
	if last := uint64(u.First) + uint64(u.Count) - 1; last >= 1<<32-1 {
		return 0, nil, fmt.Errorf("users from %d to %d for QEMU: IDs are less than %d", u.First, last, uint32(1<<32-1))
	}
	if err := os.MkdirAll(filepath.Dir(u.File), 0o700); err != nil {
		return 0, nil, err
	}
	file, err := os.OpenFile(u.File, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return 0, nil, err
	}
	// From anywhere: where nodes share a kernel, but no file, they rarely meet.
	begin := rand.Uint32N(u.Count)
	for i := range u.Count {
		n := (begin + i) % u.Count
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: int64(n), Len: 1}
		switch err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock); {
		case err == nil:
			return u.First + n, file, nil
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES):
			file.Close()
			return 0, nil, fmt.Errorf("lock %s: %w", u.File, err)
		}
	}
	file.Close()
	return 0, nil, fmt.Errorf("all %d users for QEMU are taken: give the node a larger range", u.Count)
}
