package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"h8s.io/hypernetes/images/linkage"
)

// crunOptions leave out of crun what a guest has no use for, and what would have to be
// loaded: systemd, plugins, checkpoints.
var crunOptions = []string{
	"--disable-systemd", "--disable-dl", "--disable-criu", "--enable-embedded-yajl", "--disable-dependency-tracking",
	"ac_cv_search_gcry_check_version=no", // it would cache seccomp filters, which costs a first container more than it saves
}

// crunNeeds are the packages that it is built with and that become part of it.
var crunNeeds = []string{"gcc", "libc6-dev", "libcap-dev", "libseccomp-dev"}

// ensureCrun returns a crun that needs no libraries, built below dir of the source of
// Debian's package. Debian's own is linked with eleven of them: under TCG the dynamic
// loader's work is half of what each start of it costs. What was built of the same stays.
func ensureCrun(ctx context.Context, dir string) (program string, err error) {
	return withLists(ctx, func() (string, error) { return obtainCrun(ctx, dir) })
}

func obtainCrun(ctx context.Context, dir string) (program string, err error) {
	program, stamp := filepath.Join(dir, "crun"), filepath.Join(dir, "built-of")
	version, of, err := wantedCrun(ctx)
	switch have, bad := os.ReadFile(stamp); {
	case bad == nil && (err != nil || string(have) == of):
		return program, nil // where nobody can tell which it should be, the one that is there will do
	case err != nil:
		return "", err
	case bad != nil && !errors.Is(bad, fs.ErrNotExist):
		return "", bad
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	scratch, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(scratch)
	built, err := buildCrun(ctx, scratch, version)
	if err != nil {
		return "", err
	}
	loader, _, err := linkage.Closure(built)
	if err != nil {
		return "", err
	}
	if loader != "" {
		return "", fmt.Errorf("%s asks for the loader %s: it should be linked statically", built, loader)
	}
	if err := os.Rename(built, program); err != nil {
		return "", err
	}
	return program, os.WriteFile(stamp, []byte(of), 0o644)
}

// wantedCrun is the version that Debian has, and all that a build of it depends on.
func wantedCrun(ctx context.Context) (version, of string, err error) {
	shown, err := run(ctx, "", "apt-cache", "show", "--no-all-versions", "crun")
	if err != nil {
		return "", "", fmt.Errorf("which crun to build: %w; run apt-get update", err)
	}
	if version, err = sourceVersion(shown); err != nil {
		return "", "", fmt.Errorf("which crun to build: %w", err)
	}
	with, err := run(ctx, "", "dpkg-query", append([]string{"--show"}, crunNeeds...)...)
	if err != nil {
		return "", "", fmt.Errorf("%w; run make deps", err)
	}
	return version, fmt.Sprintf("crun %s, configured with %s, and\n%s", version, strings.Join(crunOptions, " "), with), nil
}

// buildCrun builds a version of the source package in the directory scratch.
func buildCrun(ctx context.Context, scratch, version string) (program string, err error) {
	source, err := fetchSource(ctx, scratch, "crun", version)
	if err != nil {
		return "", err
	}
	configure := append([]string{}, crunOptions...)
	for _, flags := range []string{"CFLAGS", "CPPFLAGS"} {
		value, err := run(ctx, source, "dpkg-buildflags", "--get", flags) // Debian's hardening
		if err != nil {
			return "", err
		}
		value = strings.TrimSpace(value)
		if flags == "CPPFLAGS" {
			value += " -I" + filepath.Join(source, "libocispec/yajl/src/headers") // only libocispec's own Makefile knows of it
		}
		configure = append(configure, flags+"="+value)
	}
	for _, step := range [][]string{
		append([]string{"./configure"}, configure...),
		{"make", "-C", "libocispec"},
		{"make", "git-version.h"},
		{"make", "crun", "LDFLAGS=-all-static -Wl,-s"},
	} {
		if _, err := run(ctx, source, step[0], step[1:]...); err != nil {
			return "", fmt.Errorf("build crun: %w", err)
		}
	}
	return filepath.Join(source, "crun"), nil
}

// fetchSource downloads and unpacks a source package into scratch. The machine's
// configuration of apt need not know of sources: they are looked for where its packages
// come from.
func fetchSource(ctx context.Context, scratch, name, version string) (dir string, err error) {
	list, err := run(ctx, "", "apt-get", "indextargets", "--format",
		"deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)",
		"Created-By: Packages", "Origin: Debian")
	if err != nil {
		return "", err
	}
	sources, lists := filepath.Join(scratch, "sources.list"), filepath.Join(scratch, "lists")
	if err := os.MkdirAll(filepath.Join(lists, "partial"), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(sources, []byte(list), 0o644); err != nil {
		return "", err
	}
	options := []string{
		"--quiet",
		"--option", "Dir::Etc::SourceList=" + sources,
		"--option", "Dir::Etc::SourceParts=/dev/null",
		"--option", "Dir::State::Lists=" + lists,
		"--option", "Dir::Cache=" + filepath.Join(scratch, "cache"),
		"--option", "APT::Sandbox::User=root", // apt's own user may not write here
	}
	for _, command := range [][]string{{"update"}, {"source", name + "=" + version}} {
		if _, err := run(ctx, scratch, "apt-get", append(options, command...)...); err != nil {
			return "", err
		}
	}
	found, err := filepath.Glob(filepath.Join(scratch, name+"-*", "configure"))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("apt-get source %s left %d directories with a script configure, not one", name, len(found))
	}
	return filepath.Dir(found[0]), nil
}

// sourceVersion is the version of the source of which a package was built: its own, unless
// apt-cache's description of it tells another one.
func sourceVersion(shown string) (string, error) {
	var version string
	for line := range strings.Lines(shown) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Version":
			version = value
		case "Source": // crun (1.8.1-1)
			if _, of, ok := strings.Cut(value, " ("); ok {
				return strings.TrimSuffix(of, ")"), nil
			}
		}
	}
	if version == "" {
		return "", errors.New("apt knows no version of the package; run apt-get update")
	}
	return version, nil
}
