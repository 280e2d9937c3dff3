#!/bin/bash
# Installs the Debian packages that building and running need and that are missing.
set -euo pipefail

packages=(gcc libc6-dev libseccomp-dev pkg-config nftables iproute2 kmod procps util-linux mount busybox-static conntrack ca-certificates)

missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

echo "  installing ${missing[*]}"
"$(dirname "$0")"/step.sh "install packages" "${1:?log}" \
	"apt-get update; DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ${missing[*]}"
