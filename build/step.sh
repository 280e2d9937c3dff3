#!/bin/bash
# step.sh NAME LOG COMMAND: runs one step of the build in a shell and keeps what it
# prints in LOG. Shows the step with the time it takes, on a terminal while it runs,
# elsewhere in a line when it starts and one when it ends; shows LOG's tail if it fails.
set -uo pipefail
name=$1 log=$2 command=$3

start=$SECONDS
mkdir -p "$(dirname "$log")"
if [ -t 1 ] && [[ ${MAKEFLAGS-} != *jobserver* ]]; then
	# Ends with this script, however that ends.
	while kill -0 $$ 2>/dev/null; do
		printf '\r  … %-28s %4ds' "$name" $((SECONDS - start))
		sleep 1
	done &
	clock=$!
	trap 'kill $clock 2>/dev/null; wait $clock 2>/dev/null; printf "\r\033[K"' EXIT
else
	printf '  … %s\n' "$name"
fi

bash -euo pipefail -c "$command" >"$log" 2>&1
status=$?
if [ -n "${clock-}" ]; then
	kill $clock
	wait $clock 2>/dev/null
	trap - EXIT
	printf '\r\033[K'
fi
if [ $status -eq 0 ]; then
	printf '  ✓ %-28s %4ds\n' "$name" $((SECONDS - start))
else
	printf '  ✗ %-28s %4ds\n\n%s ends with:\n' "$name" $((SECONDS - start)) "$log"
	tail -20 "$log"
fi
exit $status
