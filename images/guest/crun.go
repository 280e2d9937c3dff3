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
type crunPrograms struct{ crun, filter string }

func (p crunPrograms) all() []string { return []string{p.crun, p.filter} }

func (p crunPrograms) exist() bool {
	return !slices.ContainsFunc(p.all(), func(name string) bool {
		_, err := os.Stat(name)
		return err != nil
	})
}

// crunIn are the programs in a directory.
func crunIn(dir string) crunPrograms {
	return crunPrograms{crun: filepath.Join(dir, "crun"), filter: filepath.Join(dir, "seccomp-filter")}
}

// ensureCrun returns programs that need no libraries, built below dir of the source of
// Debian's package. Debian's own is linked with eleven of them: under TCG the dynamic
// loader's work is half of what each start of it costs. What was built of the same stays.
func ensureCrun(ctx context.Context, dir string) (crunPrograms, error) {
	return withLists(ctx, func() (crunPrograms, error) { return obtainCrun(ctx, dir) })
}

func obtainCrun(ctx context.Context, dir string) (crunPrograms, error) {
	programs, stamp := crunIn(dir), filepath.Join(dir, "built-of")
	version, of, err := wantedCrun(ctx)
	switch have, bad := os.ReadFile(stamp); {
	case bad == nil && err == nil && string(have) == of:
		return programs, nil
	case bad == nil && err != nil && programs.exist():
		return programs, nil // where nobody can tell which it should be, the one that is there will do
	case err != nil:
		return crunPrograms{}, err
	case bad != nil && !errors.Is(bad, fs.ErrNotExist):
		return crunPrograms{}, bad
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return crunPrograms{}, err
	}
	scratch, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return crunPrograms{}, err
	}
	defer os.RemoveAll(scratch)
	built, err := buildCrun(ctx, scratch, version)
	if err != nil {
		return crunPrograms{}, err
	}
	// Without its stamp, a half of what was built is built again.
	if err := os.Remove(stamp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return crunPrograms{}, err
	}
	for i, program := range built.all() {
		loader, _, err := linkage.Closure(program)
		if err != nil {
			return crunPrograms{}, err
		}
		if loader != "" {
			return crunPrograms{}, fmt.Errorf("%s asks for the loader %s: it should be linked statically", program, loader)
		}
		if err := os.Rename(program, programs.all()[i]); err != nil {
			return crunPrograms{}, err
		}
	}
	return programs, os.WriteFile(stamp, []byte(of), 0o644)
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

// buildCrun builds a version of the source package in the directory scratch.
func buildCrun(ctx context.Context, scratch, version string) (crunPrograms, error) {
	source, err := fetchSource(ctx, scratch, "crun", version)
	if err != nil {
		return crunPrograms{}, err
	}
	if err := os.WriteFile(filepath.Join(source, "src/filter.c"), filterSource, 0o644); err != nil {
		return crunPrograms{}, err
	}
	configure := append([]string{"./configure"}, crunOptions...)
	for _, flags := range []string{"CFLAGS", "CPPFLAGS"} {
		value, err := run(ctx, source, "dpkg-buildflags", "--get", flags) // Debian's hardening
		if err != nil {
			return crunPrograms{}, err
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
			return crunPrograms{}, fmt.Errorf("build crun: %w", err)
		}
	}
	return crunIn(source), nil
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
