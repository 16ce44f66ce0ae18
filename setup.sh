#!/bin/sh
# Install the pinned packages with uv, into the active virtual or conda environment. If none is active, they go into .venv
# beside this file, made with the system's Python 3.11 to 3.14 or with one that uv fetches. Running it again takes a second
# if nothing changed. `sh setup.sh` works as well as `bash setup.sh`.
#
# From the environment:
#   FLASH_ATTN=build        compile flash-attn, which takes hours; otherwise it is installed where uv finds a wheel
#   UV_TORCH_BACKEND=cu126  torch for CUDA 12.6, without vLLM, on GPUs or drivers that are too old for CUDA 13
set -eu
ROOT=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "error: $*" >&2
    exit 1
}

# What keeps the torch of requirements.txt from running on this machine's GPUs, and what to do about it: one line, or
# nothing. PyPI builds it for CUDA 13, which needs a driver from 580 on (NVIDIA's table of minor versions) and a compute
# capability from 7.5 on; PyTorch's own index has it for CUDA 12.6: drivers from 525, capabilities 5.0 to 9.0 (PyTorch's
# RELEASE.md). Both were read and not tried. The best card of several counts; an answer in another form says nothing.
gpu_is_too_old() {
    { timeout -k 1 10 nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader; } 2>/dev/null |
        awk -F ', *' '
            $1 + 0 > 0 && $2 + 0 > best { driver = $1; best = $2 + 0; name = $3 }
            END {
                other = "install torch for CUDA 12.6, without vLLM: UV_TORCH_BACKEND=cu126 bash setup.sh"
                cpu = "or go on without GPUs: CUDA_VISIBLE_DEVICES=-1 bash setup.sh"
                if (best && best < 7.5)
                    printf "%s: torch for CUDA 13 has no kernels for compute capability %.1f; %s, %s\n", name, best, other, cpu
                else if (best && driver + 0 < 580) {
                    wish = "update it" (best < 10 ? ", " other "," : "")
                    print name ": torch for CUDA 13 needs a driver from 580 on, and this is " driver "; " wish " " cpu
                }
            }'
}

# The interpreter: the active environment's, else that of .venv, else a system Python to make .venv with
. "$ROOT/scripts/env.sh"
is_supported() { # trl needs 3.11; the newest with wheels of every package is 3.14
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}
if [ "$PYTHON" = python3 ]; then
    system=""
    for candidate in python3.12 python3.11 python3.13 python3.14 python3; do
        if command -v "$candidate" >/dev/null 2>&1 && is_supported "$candidate"; then
            system=$candidate
            break
        fi
    done
    if [ -n "$system" ]; then
        echo "setup: making $ROOT/.venv with $("$system" --version)"
        PYTHONSAFEPATH=1 "$system" -m venv "$ROOT/.venv" || {
            rm -rf "$ROOT/.venv" # half of one would be taken for whole next time
            fail "$system cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        }
    else
        echo "setup: no Python 3.11 to 3.14 found; uv brings one into $ROOT/.venv"
        uv=$(command -v uv) || {
            uv="$ROOT/.uv/bin/uv"
            [ -x "$uv" ] || { PYTHONSAFEPATH=1 python3 -m venv "$ROOT/.uv" && "$ROOT/.uv/bin/pip" install --quiet uv; } ||
                fail "no Python 3.11 to 3.14 found, and no uv to fetch one; install either and run this again"
        }
        {
            "$uv" venv --managed-python --python '>=3.11,<3.15' "$ROOT/.venv" &&
                "$uv" pip install --quiet --python "$ROOT/.venv/bin/python" uv
        } || {
            rm -rf "$ROOT/.venv"
            fail "no Python 3.11 to 3.14 found, and uv could not fetch one (its message is above); install one"
        }
    fi
    PYTHON="$ROOT/.venv/bin/python"
fi
is_supported "$PYTHON" ||
    fail "$("$PYTHON" --version) in $PYTHON is not supported; use Python 3.11, 3.12, 3.13 or 3.14"
prefix=$(PYTHONSAFEPATH=1 "$PYTHON" -c 'import sys; print(sys.prefix)')

# The GPU that a launch would find, if any; an error when nvidia-smi hangs
gpu=$(PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$ROOT/src/open-r1-multimodal" "$PYTHON" -c \
    'from open_r1.running.launch_settings import print_gpu; print_gpu()') || exit 1

# Nothing changed since the last time: say so and stop
stamp="$prefix/.setup-stamp"
state=$(cat "$ROOT"/requirements*.txt "$ROOT/pyproject.toml" "$ROOT/setup.sh" | cksum)
state="$state $ROOT gpu=$gpu flash-attn=${FLASH_ATTN:-} torch=${UV_TORCH_BACKEND:-}"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    echo "setup: $prefix is up to date"
    exit 0
fi

# Who names a build of torch has chosen; uv reads the variable.
if [ -n "$gpu" ] && [ -z "${UV_TORCH_BACKEND:-}" ]; then
    too_old=$(gpu_is_too_old)
    [ -z "$too_old" ] || fail "$too_old"
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
    [ -x "$uv" ] || PYTHONSAFEPATH=1 "$PYTHON" -m pip install --quiet --disable-pip-version-check uv ||
        fail "could not get uv from the package index; check the network (and pip's proxy or index settings)"
fi
install() {
    # Compiled once here, and not by every process of a machine that may not write into the environment later.
    "$uv" pip install --compile-bytecode --python "$PYTHON" "$@"
}

start=$(date +%s)
install -r "$ROOT/requirements.txt" -r "$ROOT/requirements-test.txt" -e "$ROOT" ||
    fail "uv could not install requirements.txt and requirements-test.txt (its message is above); check the network and run this again"
if [ -z "$gpu" ]; then
    choice="no NVIDIA GPU found: without vLLM and flash-attn, training runs on CPU processes"
    command -v c++ >/dev/null 2>&1 ||
        echo "setup: no C++ compiler found; DeepSpeed on CPU compiles a small helper (Debian: apt-get install g++)"
else
    # Triton, which TRL's loss and vLLM use, compiles a small helper when it is first used.
    command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 || [ -n "${CC:-}" ] ||
        echo "setup: no C compiler found, which training on a GPU needs (Debian: apt-get install gcc)"
    "$PYTHON" -c "import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_paths()['include'] + '/Python.h'))" ||
        echo "setup: Python's headers (Python.h) are not there, which training on a GPU needs (Debian: apt-get install python3-dev)"
    vllm="vLLM"
    if [ -n "${UV_TORCH_BACKEND:-}" ]; then
        vllm="no vLLM, whose wheel is for PyPI's torch and not for $UV_TORCH_BACKEND"
    else
        install -r "$ROOT/requirements-gpu.txt" ||
            fail "uv could not install requirements-gpu.txt (its message is above); check the network and run this again"
    fi
    # PyPI has flash-attn's source alone, and its authors' own wheels end before this torch: a wheel is one that a
    # user's index or folder has (UV_INDEX, UV_FIND_LINKS).
    if [ "${FLASH_ATTN:-}" = build ]; then
        command -v nvcc >/dev/null 2>&1 || fail "FLASH_ATTN=build: there is no CUDA compiler (nvcc) to build it with"
        install --no-build-isolation flash-attn==2.8.3.post2 ||
            fail "FLASH_ATTN=build: flash-attn did not build (its message is above); without FLASH_ATTN attention is torch's SDPA"
        attention="flash-attn, built here"
    elif install --only-binary flash-attn 'flash-attn>=2.8.3,<3' 2>/dev/null; then
        attention="flash-attn, from a wheel"
    else
        attention="torch's SDPA (no wheel of flash-attn found; FLASH_ATTN=build bash setup.sh compiles it, for hours)"
    fi
    choice="$gpu: $vllm; attention: $attention"
fi
printf '%s' "$state" >"$stamp"
echo "setup: $choice; $(($(date +%s) - start)) s, environment $prefix"
