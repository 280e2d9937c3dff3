package dns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/miekg/dns"
)

// ResolvConf names the resolvers that a resolv.conf(5) file lists, and follows it when it changes. It may be used concurrently.
type ResolvConf struct {
	path string

	mu      sync.Mutex
	content []byte // that servers were read from
	servers []string
}

// NewResolvConf follows the first of the files that lists a resolver; the error says why none does.
func NewResolvConf(paths ...string) (*ResolvConf, error) {
	var errs []error
	for _, path := range paths {
		r := &ResolvConf{path: path}
		err := r.read()
		if err == nil {
			return r, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("find the host's resolvers: %w", errors.Join(errs...))
}

// Resolvers are those that the file lists now, in its order, as host or host:port. A file that is gone or lists none,
// as while somebody writes it, changes nothing.
func (r *ResolvConf) Resolvers() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	// The file is small, and what its reader does next takes far longer; the time of its change is too coarse.
	_ = r.read()
	return r.servers
}

// read needs r.mu.
func (r *ResolvConf) read() error {
	content, err := os.ReadFile(r.path)
	if err != nil || r.servers != nil && bytes.Equal(content, r.content) {
		return err
	}
	conf, err := dns.ClientConfigFromReader(bytes.NewReader(content))
	if err == nil && len(conf.Servers) == 0 {
		err = errors.New("it lists no nameserver")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", r.path, err)
	}
	r.content, r.servers = content, conf.Servers
	return nil
}
