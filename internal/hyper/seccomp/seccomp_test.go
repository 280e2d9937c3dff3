package seccomp

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// That the filter is what the guest would have made, and does what it should, is shown in a
// guest: internal/hyper/guest TestMachine/seccomp.
func TestCompile(t *testing.T) {
	const filter = "12345678abcdefgh" // of two instructions
	errno := uint(1)
	profile := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow, DefaultErrnoRet: &errno, Architectures: []specs.Arch{specs.ArchX86_64},
			Flags:    []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog},
			Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}},
		}
	}
	refuse := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Flags: profile().Flags}
	foreign := map[string]string{filterAnnotation: "Zm9yZWlnbg==", "other": "stays"}
	kept := map[string]string{"other": "stays"}
	for name, test := range map[string]struct {
		program     string // a script
		profile     *specs.LinuxSeccomp
		err         string
		want        *specs.LinuxSeccomp
		annotations map[string]string
	}{
		"compiled": {
			program: `grep -q '"ociVersion":"1.0.0".*SCMP_ARCH_X86_64.*"read"' && printf ` + filter, profile: profile(), want: refuse,
			annotations: map[string]string{filterAnnotation: base64.StdEncoding.EncodeToString([]byte(filter)), "other": "stays"},
		},
		"no profile":          {program: "exit 1", annotations: kept},
		"it fails":            {program: "echo no such system call >&2; exit 1", profile: profile(), err: "no such system call", want: profile(), annotations: kept},
		"it says nothing":     {program: "cat >/dev/null", profile: profile(), err: "0 bytes", want: profile(), annotations: kept},
		"half an instruction": {program: "cat >/dev/null; printf 123456789", profile: profile(), err: "9 bytes", want: profile(), annotations: kept},
		"more than the kernel takes": {
			program: "cat >/dev/null; head -c 32776 /dev/zero", profile: profile(), err: "32776 bytes", want: profile(), annotations: kept,
		},
	} {
		t.Run(name, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "program")
			if err := os.WriteFile(program, []byte("#!/bin/sh\n"+test.program+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			spec := &specs.Spec{Version: "1.2.0", Annotations: map[string]string{}, Linux: &specs.Linux{Seccomp: test.profile}}
			for k, v := range foreign {
				spec.Annotations[k] = v
			}
			err := Compile(t.Context(), program, spec)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("error %v, want %q", err, test.err)
			}
			want := &specs.Spec{Version: "1.2.0", Annotations: test.annotations, Linux: &specs.Linux{Seccomp: test.want}}
			if d := cmp.Diff(want, spec); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}
