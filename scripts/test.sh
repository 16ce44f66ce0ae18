#!/bin/sh
# Set up and run the tests: the quick suite, or with --all also those marked distributed, browser, real, slow or vllm.
# `-m nightly` runs what only the authors need. Other arguments go to pytest: `bash scripts/test.sh -k answers`,
# `bash scripts/test.sh -m browser -n 0`.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
if [ "${1:-}" = "--all" ]; then
    shift
    set -- -m "not nightly" "$@"
    install_language_model
    # The report's tests open it in a browser; without one they say what to install.
    if { ! command -v chromium && ! command -v google-chrome || ! command -v chromedriver; } >/dev/null 2>&1 &&
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "test: installing chromium and chromium-driver"
        { apt-get update -qq &&
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null ||
            echo "test: could not install a browser; the report's tests will say so"
    fi
fi
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Two processes, each with fixtures of its own (2 GB), so a file's tests stay together; in conftest.py's order.
HF_HUB_OFFLINE=1 exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
