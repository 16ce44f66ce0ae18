#!/bin/sh
# Install the pinned stack with uv, into the active virtual or conda environment, else into .venv beside this file.
# Running it again takes a second when nothing changed. `sh setup.sh` works as well as `bash setup.sh`.
set -eu
ROOT=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "error: $*" >&2
    exit 1
}

# The interpreter: the active environment's, else that of .venv, else a system Python to make .venv with
. "$ROOT/scripts/env.sh"
if [ "$PYTHON" = python3 ]; then
    system=""
    for candidate in python3.12 python3.11 python3.10 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            system=$candidate
            break
        fi
    done
    [ -n "$system" ] || fail "no Python 3.10, 3.11 or 3.12 found; install one (or activate a conda environment with it)"
    echo "setup: making $ROOT/.venv with $("$system" --version)"
    "$system" -m venv "$ROOT/.venv" ||
        fail "$system cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    PYTHON="$ROOT/.venv/bin/python"
fi
"$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$("$PYTHON" --version) in $PYTHON is not supported; use Python 3.10, 3.11 or 3.12"
prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')

gpu=""
if command -v nvidia-smi >/dev/null 2>&1; then
    gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
fi

# Nothing changed since the last time: say so and stop
stamp="$prefix/.setup-stamp"
state=$(cat "$ROOT/requirements.txt" "$ROOT/requirements-gpu.txt" "$ROOT/pyproject.toml" "$ROOT/setup.sh" | cksum)
state="$state $ROOT gpu=$gpu"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    echo "setup: $prefix is up to date"
    exit 0
fi

need_gb=8
[ -z "$gpu" ] || need_gb=25
free_gb=$(df -Pk "$prefix" | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free_gb" -ge "$need_gb" ] ||
    fail "the packages need about $need_gb GB in $prefix, where $free_gb GB are free; make room or use another disk"

if command -v uv >/dev/null 2>&1; then
    uv=uv
else
    uv="$prefix/bin/uv"
    [ -x "$uv" ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check uv ||
        fail "could not get uv from the package index; check the network (and pip's proxy or index settings)"
fi
install() {
    "$uv" pip install --python "$PYTHON" "$@"
}

start=$(date +%s)
install -r "$ROOT/requirements.txt" -e "$ROOT" ||
    fail "uv could not install requirements.txt (its message is above); check the network and run this again"
if [ -z "$gpu" ]; then
    choice="no NVIDIA GPU found: without vLLM and flash-attn, training runs on CPU processes"
    command -v c++ >/dev/null 2>&1 ||
        echo "setup: no C++ compiler found; DeepSpeed on CPU compiles a small helper (Debian: apt-get install g++)"
else
    install -r "$ROOT/requirements-gpu.txt" ||
        fail "uv could not install requirements-gpu.txt (its message is above); check the network and run this again"
    if ! command -v nvcc >/dev/null 2>&1; then
        choice="$gpu: with vLLM; no CUDA compiler for flash-attn, attention is torch's SDPA"
    elif install --no-build-isolation flash-attn==2.8.3.post2; then
        choice="$gpu: with vLLM and flash-attn"
    else
        choice="$gpu: with vLLM; flash-attn did not build, attention is torch's SDPA"
    fi
fi
printf '%s' "$state" >"$stamp"
echo "setup: $choice; $(($(date +%s) - start)) s, environment $prefix"
