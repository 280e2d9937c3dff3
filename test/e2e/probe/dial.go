package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Target is what is dialled.
type Target struct {
	// Proto is http, tcp, udp or icmp; or api: https with the pod's ServiceAccount,
	// whose answer begins with the status code.
	Proto string `json:"proto"`
	// Address is host:port; for icmp an address.
	Address string `json:"address"`
	// Path is asked for with http; "/hostname" if empty.
	Path string `json:"path,omitempty"`
	// Size is how many bytes a udp or icmp payload has.
	Size int `json:"size,omitempty"`
}

// Outcome is what happened: an Answer, or one of refused, timeout, unreachable
// and error in Failure.
type Outcome struct {
	Answer  string `json:"answer,omitempty"`
	Failure string `json:"failure,omitempty"`
	Detail  string `json:"detail,omitempty"`
}

const (
	dialTimeout = 2 * time.Second
	// Whoever may be reached may be slow: many virtual machines share a processor.
	answerTimeout = 20 * time.Second
	// A datagram may be lost for good reasons; three in a row are not.
	datagrams = 3
)

func (t Target) dial(ctx context.Context) Outcome {
	var answer string
	var err error
	switch t.Proto {
	case "http":
		answer, err = t.http(ctx)
	case "api":
		answer, err = t.api(ctx)
	case "tcp":
		answer, err = t.tcp(ctx)
	case "udp":
		answer, err = t.udp(ctx)
	case "icmp":
		answer, err = t.icmp()
	default:
		err = fmt.Errorf("unknown protocol %q", t.Proto)
	}
	if err != nil {
		return Outcome{Failure: kind(err), Detail: err.Error()}
	}
	return Outcome{Answer: answer}
}

func kind(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "unreachable"
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, syscall.EAGAIN):
		return "timeout"
	}
	return "error"
}

func (t Target) tcp(ctx context.Context) (string, error) {
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "tcp4", t.Address)
	if err != nil {
		return "", err
	}
	c.Close()
	return "connected", nil
}

func (t Target) http(ctx context.Context) (string, error) {
	path := t.Path
	if path == "" {
		path = "/hostname"
	}
	client := &http.Client{Timeout: answerTimeout, Transport: &http.Transport{
		DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext, DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+t.Address+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	return string(body), nil
}

// api is what client libraries do inside a cluster.
func (t Target) api(ctx context.Context) (string, error) {
	const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return "", err
	}
	ca, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return "", err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return "", errors.New("ca.crt holds no certificate")
	}
	client := &http.Client{Timeout: answerTimeout, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+t.Address+t.Path, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+string(token))
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, body), nil
}

// udp speaks netexec's protocol: "hostname" is answered with the pod's name, and
// "echo X" with X.
func (t Target) udp(ctx context.Context) (string, error) {
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "udp4", t.Address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	request := "hostname"
	if t.Size > 0 {
		request = "echo " + strings.Repeat("x", t.Size-len("echo "))
	}
	buf := make([]byte, 1<<16)
	for range datagrams {
		if _, err = c.Write([]byte(request)); err != nil {
			return "", err
		}
		if err = c.SetReadDeadline(time.Now().Add(dialTimeout / datagrams)); err != nil {
			return "", err
		}
		var n int
		if n, err = c.Read(buf); err == nil {
			return string(buf[:n]), nil
		}
		if kind(err) != "timeout" {
			return "", err
		}
	}
	return "", err
}

// icmp pings. A ping socket needs no capability where the sandbox has them; a
// raw one is the alternative.
func (t Target) icmp() (string, error) {
	addr := net.ParseIP(t.Address).To4()
	if addr == nil {
		return "", fmt.Errorf("%q is not an IPv4 address", t.Address)
	}
	header := 0 // bytes before the ICMP header in what is received
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP)
	if err != nil {
		header = 20
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	}
	if err != nil {
		return "", fmt.Errorf("the probe itself may not ping: %v", err) //nolint:errorlint // must not look like an answer of the network
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: [4]byte(addr)}
	// A connected socket receives from that address only.
	if err := unix.Connect(fd, to); err != nil {
		return "", err
	}
	wait := unix.NsecToTimeval(int64(dialTimeout / datagrams))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return "", err
	}
	id := uint16(rand.Uint32()) //nolint:gosec // to tell this ping's replies from another's
	buf := make([]byte, 1<<16)
	for seq := range datagrams {
		if _, err = unix.Write(fd, echo(id, seq, t.Size)); err != nil {
			return "", err
		}
		for {
			var n int
			if n, err = unix.Read(fd, buf); err != nil {
				break
			}
			n -= header
			reply := buf[header:]
			// A raw socket hears all of ICMP; a ping socket has an id of its own.
			if n >= 8 && reply[0] == 0 && (header == 0 || binary.BigEndian.Uint16(reply[4:]) == id) {
				return fmt.Sprintf("echo reply with %d bytes", n-8), nil
			}
		}
		if kind(err) != "timeout" {
			return "", err
		}
	}
	return "", err
}

// echo is an ICMP echo request.
func echo(id uint16, seq, size int) []byte {
	m := make([]byte, 8+size)
	m[0] = 8
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], uint16(seq)) //nolint:gosec // a small number
	binary.BigEndian.PutUint16(m[2:], checksum(m))
	return m
}
