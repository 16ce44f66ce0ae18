# Sourced by the other scripts, with ROOT set: chooses PYTHON. The active environment wins over .venv.
if [ -z "${PYTHON:-}" ]; then
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$ROOT/.venv"; do
        if [ -n "$candidate" ] && [ -x "$candidate/bin/python" ]; then
            PYTHON="$candidate/bin/python"
            break
        fi
    done
fi
PYTHON="${PYTHON:-python3}"
