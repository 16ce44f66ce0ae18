# Sourced by the other scripts, with ROOT set: chooses PYTHON. The active environment wins over .venv.
# Python scripts choose alike: open_r1/base/errors.py.
if [ -z "${PYTHON:-}" ]; then
    for candidate in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$ROOT/.venv"; do
        if [ -n "$candidate" ] && [ -x "$candidate/bin/python" ]; then
            PYTHON="$candidate/bin/python"
            break
        fi
    done
fi
PYTHON="${PYTHON:-python3}"
export PYTHONUTF8=1 # in a locale of ASCII, Python could not read files of its libraries
letters="${PYTHONIOENCODING:-}"
export PYTHONIOENCODING="${letters%%:*}:backslashreplace" # a terminal of few letters shows the others as escapes

# Ends the script in one line when PYTHON lacks the packages.
need_packages() {
    PYTHONSAFEPATH=1 "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("trl"))' 2>/dev/null && return
    echo "error: $PYTHON does not have this repository's packages; run \`bash setup.sh\` in $ROOT" >&2
    exit 1
}

# The names of the NVIDIA GPUs, one a line. Nothing when nvidia-smi is missing, fails or lists something else: with a
# broken driver it prints its error on stdout. Status 1 when it does not answer: there is a GPU then, and it hangs.
gpu_hangs="nvidia-smi does not answer within 10 s; restart the machine, or go on without its GPU: CUDA_VISIBLE_DEVICES=-1"
gpu_names() {
    case ${CUDA_VISIBLE_DEVICES-0} in "" | -1*) return 0 ;; esac
    command -v nvidia-smi >/dev/null 2>&1 || return 0
    { listed=$(timeout -k 1 10 nvidia-smi --list-gpus); } 2>/dev/null || case $? in # the shell would say "Killed"
        124 | 137) return 1 ;;
        *) return 0 ;;
    esac
    printf '%s\n' "$listed" | sed -n 's/^GPU [0-9][0-9]*: \(.*\) (UUID: GPU-.*)$/\1/p'
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

# Whether an argument asks for help. A value may hold these words, but none is one of them.
asks_help() {
    for argument in "$@"; do
        case $argument in --help | -h) return 0 ;; esac
    done
    return 1
}
