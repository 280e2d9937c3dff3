#!/bin/bash
# deps.sh LOG PACKAGE...: installs those of the Debian packages that are missing.
set -euo pipefail

log=$1
shift
missing=()
for p in "$@"; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "  installing ${missing[*]}"
"$(dirname "$0")"/step.sh "install packages" "$log" \
	"apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ${missing[*]}"
