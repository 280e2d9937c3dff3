package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"h8s.io/hypernetes/internal/hyper/install"

	"h8s.io/hypernetes/images/linkage"
)

//go:embed pause/pause.c
var pauseSource []byte

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// recipe gathers an image's content; bin is where the programs built here are.
type recipe func(ctx context.Context, bin string) (content, error)

// catalog is every image by name.
var catalog = map[string]recipe{
	"pause":   pause,
	"busybox": busybox,
	"agnhost": agnhost,
	"h8s":     h8s,
}

// pause is the container that holds a pod's namespaces.
func pause(ctx context.Context, _ string) (content, error) {
	work, err := os.MkdirTemp("", "pause-")
	if err != nil {
		return content{}, err
	}
	defer os.RemoveAll(work)
	out := filepath.Join(work, "pause")
	cc := exec.CommandContext(ctx, "gcc", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-x", "c", "-o", out, "-")
	cc.Stdin = strings.NewReader(string(pauseSource))
	if msg, err := cc.CombinedOutput(); err != nil {
		return content{}, fmt.Errorf("compile pause/pause.c: %w: %s (Debian's packages gcc and libc6-dev are needed: run `make deps`)", err, msg)
	}
	f, err := program(out, "gcc wrote nothing")
	if err != nil {
		return content{}, err
	}
	return content{
		layers: []tree{{"/pause": f}},
		config: v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535", Env: []string{defaultPath}, WorkingDir: "/"},
	}, nil
}

// busybox is a shell and the usual tools, from Debian's busybox-static.
func busybox(ctx context.Context, _ string) (content, error) {
	root, err := busyboxTree(ctx)
	if err != nil {
		return content{}, err
	}
	return content{
		layers: []tree{root},
		config: v1.Config{Cmd: []string{"sh"}, Env: []string{defaultPath}, WorkingDir: "/"},
	}, nil
}

func busyboxTree(ctx context.Context) (tree, error) {
	const missing = "install Debian's package busybox-static: run `make deps`"
	source, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, missing)
	}
	f, err := program(source, missing)
	if err != nil {
		return nil, err
	}
	_, needed, err := linkage.Closure(source)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, missing)
	}
	if len(needed) > 0 {
		return nil, fmt.Errorf("%s needs the libraries %q, a static one is wanted: %s", source, needed, missing)
	}
	applets, err := exec.CommandContext(ctx, source, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("list the applets of %s: %w", source, err)
	}
	root := tree{
		"/bin/busybox":       f,
		"/dev":               dir(0o755),
		"/proc":              dir(0o555),
		"/sys":               dir(0o555),
		"/root":              dir(0o700),
		"/home":              dir(0o755),
		"/run":               dir(0o755),
		"/tmp":               dir(os.ModeSticky | 0o777),
		"/var/run":           symlink("/run"),
		"/var/tmp":           dir(os.ModeSticky | 0o777),
		"/etc/passwd":        text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
		"/etc/group":         text("root:x:0:\nnogroup:x:65534:\n"),
		"/etc/nsswitch.conf": text("hosts: files dns\n"),
		"/etc/shells":        text("/bin/sh\n"),
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if name := "/" + applet; name != "/bin/busybox" {
			root[name] = symlink("/bin/busybox")
		}
	}
	return root, nil
}

// agnhost is Kubernetes' test image: its own program, with busybox around it for exec.
func agnhost(ctx context.Context, bin string) (content, error) {
	root, err := busyboxTree(ctx)
	if err != nil {
		return content{}, err
	}
	f, err := program(filepath.Join(bin, "agnhost"), "run `make upstream`")
	if err != nil {
		return content{}, err
	}
	return content{
		layers: []tree{root, {"/agnhost": f, "/uploads": dir(os.ModeSticky | 0o777)}},
		config: v1.Config{
			Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Env: []string{defaultPath}, WorkingDir: "/",
		},
	}, nil
}

// h8s holds the product's own programs and nft, which the node agent runs. What is run, and as whom, is
// the chart's choice: the controller's user is not root, the node agent's is.
func h8s(_ context.Context, bin string) (content, error) {
	tools := tree{
		"/tmp":        dir(os.ModeSticky | 0o777),
		"/etc/passwd": text("root:x:0:0:root:/root:/\nnobody:x:65534:65534:nobody:/:/\n"),
		"/etc/group":  text("root:x:0:\nnogroup:x:65534:\n"),
	}
	if err := closure(tools, "/usr/sbin/nft", "install Debian's package nftables: run `make deps`"); err != nil {
		return content{}, err
	}
	programs := tree{}
	for _, name := range []string{"h8s-controller", "h8s-node", "h8s-cni"} {
		f, err := program(filepath.Join(bin, name), "run `make ours`")
		if err != nil {
			return content{}, err
		}
		programs["/usr/local/bin/"+name] = f
	}
	// For nodes that do not have them otherwise (the chart's hyper.install).
	hyper := tree{}
	for _, name := range install.Files() {
		f, err := program(filepath.Join(bin, name), "run `make hyper`")
		if err != nil {
			return content{}, err
		}
		hyper["/usr/local/lib/h8s/"+name] = f
	}
	return content{
		layers: []tree{tools, hyper, programs},
		config: v1.Config{Env: []string{defaultPath}, WorkingDir: "/"},
	}, nil
}
