#!/bin/bash
# Fails if deepcopy functions or CRDs are not what api/ says. It looks at copies,
# so that a test never changes the tree it tests.
set -euo pipefail
cd "$(dirname "$0")/.."

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/deepcopy" "$tmp/crds"
go tool controller-gen object paths=./api/... output:object:dir="$tmp/deepcopy"
go tool controller-gen crd paths=./api/... output:crd:dir="$tmp/crds"
diff -u api/v1alpha1/zz_generated.deepcopy.go "$tmp/deepcopy/zz_generated.deepcopy.go" &&
	diff -ur deploy/h8s/templates/crds "$tmp/crds" || {
	echo "generated code is out of date: run make generate and commit what it changes"
	exit 1
}
