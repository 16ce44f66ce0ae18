#!/bin/sh
# Set up and run the tests: the quick suite, or with --all also the heavy one (ZeRO, kills, a browser).
# Other arguments go to pytest: `bash scripts/test.sh -k answers`.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
if [ "${1:-}" = "--all" ]; then
    shift
    set -- -m "heavy or not heavy" "$@"
fi
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
HF_HUB_OFFLINE=1 exec "$PYTHON" -m pytest "$@"
