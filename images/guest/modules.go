package main

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// dependencies is modules.dep: what each module needs, by path below the modules' directory.
type dependencies map[string][]string

func readDependencies(r io.Reader) (dependencies, error) {
	d := dependencies{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		file, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep: no colon in %q", lines.Text())
		}
		d[file] = strings.Fields(needs)
	}
	return d, lines.Err()
}

// order returns the files of the named modules and of all that they need, each
// after what it needs. Equal questions have equal answers.
func (d dependencies) order(names ...string) ([]string, error) {
	byName := map[string]string{}
	for file := range d {
		byName[moduleName(file)] = file
	}
	var ordered []string
	state := map[string]int{} // 1: being visited, 2: done
	var visit func(file string) error
	visit = func(file string) error {
		switch state[file] {
		case 1:
			return fmt.Errorf("modules.dep: %s needs itself", file)
		case 2:
			return nil
		}
		needs, known := d[file]
		if !known {
			return fmt.Errorf("modules.dep: %s is needed, but not listed", file)
		}
		state[file] = 1
		for _, n := range slices.Sorted(slices.Values(needs)) {
			if err := visit(n); err != nil {
				return err
			}
		}
		state[file] = 2
		ordered = append(ordered, file)
		return nil
	}
	for _, name := range names {
		file, known := byName[moduleName(name)]
		if !known {
			return nil, fmt.Errorf("the kernel package has no module %s; is it built in now?", name)
		}
		if err := visit(file); err != nil {
			return nil, err
		}
	}
	return ordered, nil
}

// moduleName is what the kernel calls a module's file: it takes no dashes.
func moduleName(file string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(file), ".ko"), "-", "_")
}
