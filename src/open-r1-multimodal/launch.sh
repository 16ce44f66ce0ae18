#!/bin/sh
# Start a training script on every GPU of this machine, or on CPU processes where there is none.
#
#   sh launch.sh SCRIPT RECIPE [ARGUMENTS]    (run_grpo_SAT.sh and run_sft.sh call it)
#
# From the environment:
#   MODEL              model name or folder                (default: the recipe's)
#   DATA               prepared JSON file                  (default: src/data/SAT/SAT_train_15000.json)
#   CONFIG             recipe, a file, or several files between blanks, of which a later one changes those before it:
#                      CONFIG="configs/grpo_sat.yaml configs/overlays/lora.yaml"; names are looked up in the current
#                      folder and then in the repository   (default: configs/RECIPE.yaml)
#   OUTPUT             output folder                       (default: outputs/ and the recipes' names: grpo_sat_lora)
#   NUM_PROCESSES      processes                           (default: the GPUs; 2 without one)
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

DATA="${DATA:-$ROOT/src/data/SAT/SAT_train_15000.json}"
for argument in "$@"; do
    case $argument in --config | --config=*) fail "--config: name the recipes in CONFIG" ;; esac
done
is_recipe() {
    [ -f "$1" ] || [ -f "$ROOT/$1" ]
}
! is_recipe "$CONFIG" || IFS= # one file, which may have blanks in its name: nothing to split
set -f
names=""
for recipe in $CONFIG; do
    is_recipe "$recipe" || fail "CONFIG: no recipe $recipe"
    set -- "$@" --config "$recipe"
    names="${names}_$(basename "$recipe" .yaml)"
done
set +f
unset IFS
[ -n "$names" ] || fail "CONFIG: names no recipe"
OUTPUT="${OUTPUT:-$ROOT/outputs/${names#_}}"
set -- --dataset_name "$DATA" --output_dir "$OUTPUT" ${MODEL:+--model_name_or_path "$MODEL"} "$@"

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
case "$NUM_PROCESSES" in
    *[!0-9]* | 0* | ?????*) fail "NUM_PROCESSES: '$NUM_PROCESSES' is not a number of processes" ;;
esac
case "${OMP_NUM_THREADS:-1}" in *[!0-9]* | 0*)
    echo "OMP_NUM_THREADS: '$OMP_NUM_THREADS' is not a number of threads, and left out" >&2
    unset OMP_NUM_THREADS ;;
esac
if [ "$gpus" -gt 0 ]; then
    [ "$NUM_PROCESSES" -le "$gpus" ] || fail "NUM_PROCESSES: $NUM_PROCESSES is more than the $gpus GPUs of this machine"
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-zero2}"
    set -- "$script" "$@"
else
    echo "no GPU found: training on CPU processes in float32"
    ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-cpu}"
    # use_cpu goes to the trainer alone: told of it, accelerate would put plain DDP in DeepSpeed's place.
    set -- --mixed_precision no "$script" --use_cpu true --bf16 false --dtype float32 "$@"
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
    while [ "$1" != "$script" ]; do shift; done # what is the launcher's
    shift
    exec "$PYTHON" "$ROOT/scripts/doctor.py" --script "$command" --accelerate_config "$ACCELERATE_CONFIG" \
        --num_processes "$NUM_PROCESSES" "$@"
fi

# exec: a signal to this script reaches the launcher, which ends its processes.
exec "$PYTHON" "$here/open_r1/launch.py" --config_file "$ACCELERATE_CONFIG" --num_processes "$NUM_PROCESSES" "$@"
