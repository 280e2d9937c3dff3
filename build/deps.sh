#!/bin/bash
# Installs the Debian packages that building and running need and that are missing.
set -euo pipefail

packages=(gcc libc6-dev libseccomp-dev pkg-config nftables iproute2 kmod procps util-linux mount busybox-static conntrack ca-certificates)

missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null | grep -qx installed || missing+=("$p")
done
[ ${#missing[@]} -eq 0 ] && exit 0

start=$SECONDS
log=$(mktemp)
printf '  install %s' "${missing[*]}"
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
	printf ' FAILED; %s ends with:\n' "$log"
	tail -20 "$log"
	exit 1
fi
rm -f "$log"
printf ' %ds\n' $((SECONDS - start))
