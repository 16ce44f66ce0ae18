#!/bin/sh
# Start a training script on every GPU of this machine, or on CPU processes where there is none.
# Several machines start it each, with the same arguments (docs/running.md; scripts/slurm.sbatch does it on SLURM).
#
#   sh launch.sh SCRIPT RECIPE [ARGUMENTS]    (run_grpo_SAT.sh and run_sft.sh call it)
#
# From the environment:
#   MODEL              model name or folder                (default: the recipe's)
#   DATA               prepared JSON file, or all else that dataset_name takes: a YAML file mixes several data sets
#                                                          (default: the recipe's)
#   CONFIG             recipe, a file, or several files between blanks, of which a later one changes those before it:
#                      CONFIG="configs/grpo_sat.yaml configs/overlays/lora.yaml"; names are looked up in the current
#                      folder and then in the repository   (default: configs/RECIPE.yaml)
#   OUTPUT             output folder                       (default: the recipe's, else outputs/ and the recipes'
#                                                          names: outputs/grpo_sat_lora)
#   NUM_PROCESSES      processes of this machine, as many on each
#                                                          (default: the GPUs; 2 without one)
#   NUM_MACHINES       machines; they share the file system of OUTPUT and DATA   (default: 1)
#   MACHINE_RANK       this one's number, from 0 on, where there are several
#   MASTER_ADDR        address of machine 0, as the others see it
#   MASTER_PORT        a port that is free there           (default: 29500)
#   ACCELERATE_CONFIG  how to launch: zero2, zero3, ddp, cpu, or a file
#                      (default: zero2, and cpu without a GPU; zero3 for run_sft.sh)
# Arguments override the recipe: `--max_steps 100 --beta 0`; `--help` lists them all. `--doctor` looks at what would be
# started, says what is wrong with it, and starts nothing (scripts/doctor.py). The training scripts themselves
# take recipes as `--config A --config B`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$here/../.." && pwd)
. "$ROOT/scripts/env.sh"
need_packages
fail() {
    echo "error: $*" >&2
    exit 2
}
# Whether a text is a whole number, and from $2 to $3.
is_number() {
    case $1 in "" | *[!0-9]* | 0?* | ??????*) return 1 ;; esac
    [ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}
script="$here/open_r1/$1.py" command=$1
CONFIG="${CONFIG:-$ROOT/configs/$2.yaml}"
shift 2

if asks_help "$@"; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$here/launch.sh"
    exec "$PYTHON" "$script" --help
fi

doctor=""
for argument; do
    shift
    if [ "$argument" = --doctor ]; then doctor=yes; else set -- "$@" "$argument"; fi
done

for argument in "$@"; do
    case $argument in --config | --config=*) fail "--config: name the recipes in CONFIG" ;; esac
done
is_recipe() {
    [ -f "$1" ] || [ -f "$ROOT/$1" ]
}
! is_recipe "$CONFIG" || IFS= # one file, which may have blanks in its name: nothing to split
set -f
named=""
for recipe in $CONFIG; do
    set -- "$@" --config "$recipe"
    named=yes
done
set +f
unset IFS
[ -n "$named" ] || fail "CONFIG: names no recipe"
set -- ${DATA:+--dataset_name "$DATA"} ${OUTPUT:+--output_dir "$OUTPUT"} ${MODEL:+--model_name_or_path "$MODEL"} "$@"

listed=$(gpu_names) || fail "$gpu_hangs"
gpus=$(printf '%s' "$listed" | grep -c . || true)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$gpus" -gt 0 ]; then
    all=$gpus
    gpus=0
    for device in $(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' ' '); do
        case $device in # as CUDA reads it: numbers or UUIDs, up to the first that is neither
            GPU-* | MIG-*) ;;
            *[!0-9]*) break ;;
            *) [ "$device" -lt "$all" ] 2>/dev/null ||
                fail "CUDA_VISIBLE_DEVICES: there is no GPU $device; this machine's are 0 to $((all - 1))" ;;
        esac
        gpus=$((gpus + 1))
    done
fi
NUM_PROCESSES="${NUM_PROCESSES:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}"
is_number "$NUM_PROCESSES" 1 9999 || fail "NUM_PROCESSES: '$NUM_PROCESSES' is not a number of processes"
NUM_MACHINES="${NUM_MACHINES:-1}"
is_number "$NUM_MACHINES" 1 9999 || fail "NUM_MACHINES: '$NUM_MACHINES' is not a number of machines"
[ "$NUM_MACHINES" -gt 1 ] || MACHINE_RANK="${MACHINE_RANK:-0}"
is_number "${MACHINE_RANK:-}" 0 "$((NUM_MACHINES - 1))" ||
    fail "MACHINE_RANK: '${MACHINE_RANK:-}' is not the number of a machine, of NUM_MACHINES=$NUM_MACHINES from 0 on"
if [ "$NUM_MACHINES" -gt 1 ]; then
    MASTER_PORT="${MASTER_PORT:-29500}"
    is_number "$MASTER_PORT" 1 65535 || fail "MASTER_PORT: '$MASTER_PORT' is not a port, 1 to 65535"
    case "${MASTER_ADDR:-}" in "" | *[!0-9A-Za-z._-]*)
        fail "MASTER_ADDR: '${MASTER_ADDR:-}' is not the name or IPv4 address of machine 0, which every machine needs" ;;
    esac
fi
processes=$((NUM_PROCESSES * NUM_MACHINES))
case "${OMP_NUM_THREADS:-1}" in *[!0-9]* | 0*)
    echo "OMP_NUM_THREADS: '$OMP_NUM_THREADS' is not a number of threads, and left out" >&2
    unset OMP_NUM_THREADS ;;
esac
if [ "$gpus" -gt 0 ]; then
    [ "$NUM_PROCESSES" -le "$gpus" ] || fail "NUM_PROCESSES: $NUM_PROCESSES is more than the $gpus GPUs of this machine"
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-zero2}"
else
    echo "no GPU found: training on CPU processes in float32"
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-cpu}"
    # use_cpu goes to the trainer alone: told of it, accelerate would put plain DDP in DeepSpeed's place.
    set -- --use_cpu true --bf16 false --dtype float32 "$@"
    export DS_ACCELERATOR=cpu
    # What DeepSpeed compiles for the CPU belongs to this environment: others would compile it again, every time.
    prefix=$(PYTHONSAFEPATH=1 "$PYTHON" -c 'import sys; print(sys.prefix)')
    [ ! -w "$prefix" ] || export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}"
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cores + NUM_PROCESSES - 1) / NUM_PROCESSES))}"
fi
[ -f "$ACCELERATE_CONFIG" ] || ACCELERATE_CONFIG="$here/configs/$ACCELERATE_CONFIG.yaml"
[ -f "$ACCELERATE_CONFIG" ] || fail "ACCELERATE_CONFIG: no file $ACCELERATE_CONFIG"

# No Python from here on looks for modules in the current folder: a random.py there is not Python's.
export PYTHONSAFEPATH=1

if [ -n "$doctor" ]; then
    exec "$PYTHON" "$ROOT/scripts/doctor.py" --script "$command" --accelerate_config "$ACCELERATE_CONFIG" \
        --num_processes "$processes" --num_machines "$NUM_MACHINES" "$@"
fi

set -- "$script" "$@"
[ "$NUM_MACHINES" -eq 1 ] || set -- --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@"
# exec: a signal to this script reaches the launcher, which ends its processes.
exec "$PYTHON" "$here/open_r1/running/launch.py" --config_file "$ACCELERATE_CONFIG" --num_processes "$processes" "$@"
