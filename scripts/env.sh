# Sourced by the other scripts, with ROOT set: chooses PYTHON. The active environment wins over .venv.
# Python scripts choose alike: open_r1/front_door.py.
if [ -z "${PYTHON:-}" ]; then
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$ROOT/.venv"; do
        if [ -n "$candidate" ] && [ -x "$candidate/bin/python" ]; then
            PYTHON="$candidate/bin/python"
            break
        fi
    done
fi
PYTHON="${PYTHON:-python3}"

# Ends the script in one line when PYTHON lacks the packages.
need_packages() {
    PYTHONSAFEPATH=1 "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("trl"))' 2>/dev/null && return
    echo "error: $PYTHON does not have this repository's packages; run \`bash setup.sh\` in $ROOT" >&2
    exit 1
}

# The names of the NVIDIA GPUs, one a line. Nothing when nvidia-smi is missing, fails, hangs or lists something else:
# with a broken driver it prints its error on stdout.
gpu_names() {
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    listed=$(timeout -k 1 30 nvidia-smi --list-gpus 2>/dev/null) || return 0
    printf '%s\n' "$listed" | sed -n 's/^GPU [0-9][0-9]*: \(.*\) (UUID: GPU-.*)$/\1/p'
}
