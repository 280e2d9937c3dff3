package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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

// crunSteps build both programs of a source that is configured.
var crunSteps = [][]string{ //nolint:gochecknoglobals // a constant
	{"make", "-C", "libocispec"},
	{"make", "git-version.h"},
	{"make", "crun", "LDFLAGS=-all-static -Wl,-s"},
	{"mv", "crun", "crun.built"},
	// The same libraries, and another main.
	{"make", "crun", "crun_OBJECTS=src/filter.o", "LDFLAGS=-all-static -Wl,-s -Wl,--wrap=ensure_cloned_binary"},
	{"mv", "crun", "seccomp-filter"},
	{"mv", "crun.built", "crun"},
}

// filterSource is a program for the node, which compiles seccomp profiles as crun does.
//
//go:embed seccomp/filter.c
var filterSource []byte //nolint:gochecknoglobals // a constant

// crunPrograms are built of crun's source: crun for the guest, and what compiles seccomp
// profiles for it on the node.
var crunPrograms = []string{"crun", "seccomp-filter"} //nolint:gochecknoglobals // a constant

// ensureCrun makes dir hold crunPrograms, which need no libraries, built of the source of
// Debian's package. Debian's own is linked with eleven of them: under TCG the dynamic
// loader's work is half of what each start of it costs. What was built of the same stays.
func ensureCrun(ctx context.Context, dir string) error {
	_, err := withLists(ctx, func() (struct{}, error) { return struct{}{}, obtainCrun(ctx, dir) })
	return err
}

func obtainCrun(ctx context.Context, dir string) error {
	stamp := filepath.Join(dir, "built-of")
	version, of, err := wantedCrun(ctx)
	switch have, bad := os.ReadFile(stamp); {
	case bad == nil && err == nil && string(have) == of:
		return nil
	case bad == nil && err != nil && haveCrun(dir):
		return nil // where nobody can tell which it should be, the one that is there will do
	case err != nil:
		return err
	case bad != nil && !errors.Is(bad, fs.ErrNotExist):
		return bad
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	source, err := buildCrun(ctx, scratch, version)
	if err != nil {
		return err
	}
	// Without its stamp, a half of what was built is built again.
	if err := os.Remove(stamp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range crunPrograms {
		built := filepath.Join(source, name)
		loader, _, err := linkage.Closure(built)
		if err != nil {
			return err
		}
		if loader != "" {
			return fmt.Errorf("%s asks for the loader %s: it should be linked statically", built, loader)
		}
		if err := os.Rename(built, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return os.WriteFile(stamp, []byte(of), 0o644)
}

// haveCrun says whether all of crunPrograms are in a directory.
func haveCrun(dir string) bool {
	return !slices.ContainsFunc(crunPrograms, func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err != nil
	})
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
	return version, fmt.Sprintf("crun %s, configured with %s, built by %q, a filter of %x, and\n%s",
		version, strings.Join(crunOptions, " "), crunSteps, sha256.Sum256(filterSource), with), nil
}

// buildCrun builds crunPrograms of a version of the source package, below the directory
// scratch, and returns the directory that they are in.
func buildCrun(ctx context.Context, scratch, version string) (source string, err error) {
	source, err = fetchSource(ctx, scratch, "crun", version)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(source, "src/filter.c"), filterSource, 0o644); err != nil {
		return "", err
	}
	configure := append([]string{"./configure"}, crunOptions...)
	for _, flags := range []string{"CFLAGS", "CPPFLAGS"} {
		value, err := run(ctx, source, "dpkg-buildflags", "--get", flags) // Debian's hardening
		if err != nil {
			return "", err
		}
		value = strings.TrimSpace(value)
		if flags == "CPPFLAGS" {
			value += " -I" + filepath.Join(source, "libocispec/yajl/src/headers") // only libocispec's own Makefile knows of it
			value += " -I" + filepath.Join(source, "libocispec/src")              // and only crun's rules of this
		}
		configure = append(configure, flags+"="+value)
	}
	for _, step := range slices.Insert(slices.Clone(crunSteps), 0, configure) {
		if _, err := run(ctx, source, step[0], step[1:]...); err != nil {
			return "", fmt.Errorf("build crun: %w", err)
		}
	}
	return source, nil
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
