#!/bin/sh
# usage: bash scripts/sweep.sh --overlays "none dr_grpo dapo+refill" [--seeds "0 1 2"] [--steps N] [--jobs N]
#
# Compares recipes on a machine without a GPU or a model hub: trains the quick start's GRPO recipe with each named overlay
# of configs/overlays and each seed, in the quick start's tiny world. Every run is one process of one thread on the CPU, and
# is evaluated after its training. The results are in outputs/sweep, or in the folder that OUTPUT names: sweep.md (tables),
# sweep.png and .svg (learning curves), sweep.json (all numbers); each run in NAME/seedN, with its log in NAME/seedN.log.
#
#   --overlays  names between blanks; + combines several, none is the recipe alone. The others are compared with the
#               first one.
#   --seeds     of the training                                     (default: "0 1 2")
#   --steps     optimiser steps                                     (default: the recipe's, 60)
#   --jobs      runs at a time                                      (default: one a core)
#   MODEL       in the environment: a folder of another base        (default: configs/tiny/base)
#   TEACHER     in the environment: the folder of a model that `distill` learns from, such as another run's
#
# configs/overlays/tiny.yaml is put over every overlay: lengths, steps, batch and learning rate are the tiny recipe's.
# After an interruption the same command goes on; what is finished is not run again. A run that fails does not stop the
# others; it is named at the end with its log, and the exit code is 1.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/env.sh"
. "$ROOT/scripts/tiny_world.sh"

fail() {
    echo "sweep: error: $*" >&2
    exit 2
}

# The files of a recipe between blanks: `dapo+refill` -> tiny/grpo.yaml, its overlays, and their size.
config_of() {
    files=configs/tiny/grpo.yaml
    for part in $(printf '%s' "$1" | tr + ' '); do
        [ "$part" = none ] || files="$files configs/overlays/$part.yaml"
    done
    echo "$files configs/overlays/tiny.yaml"
}

is_done() { # folder of a run
    [ -f "$1/sweep_done" ] && [ "$(cat "$1/sweep_done")" = "$STEPS" ]
}

# xargs starts this script anew for each run, as `sweep.sh --run NAME SEED`, with the rest in the environment.
train_and_evaluate() { # name, seed
    name=$1 seed=$2
    run="$SWEEP/$name/seed$seed" log="$SWEEP/$name/seed$seed.log"
    ! is_done "$run" || return 0
    mkdir -p "$run"
    set --
    case "+$name+" in *+distill+*) set -- --teacher_model_name_or_path "$TEACHER" ;; esac
    begun=$(date +%s)
    echo "$name, seed $seed: started"
    {
        CONFIG=$(config_of "$name") OUTPUT="$run" sh "$ROOT/src/open-r1-multimodal/run_grpo_SAT.sh" --seed "$seed" \
            --eval_dataset_name "$SWEEP/world/data/SAT_val_256.json" ${STEPS:+--max_steps "$STEPS"} "$@" &&
            # The questions are asked as in training: a run without thinking is evaluated without it.
            evaluate_in_tiny_world "$SWEEP/world" "$run" "$run" \
                $(! grep -q '"style": "direct"' "$run/run.json" || echo --no-use_reasoning_prompt) &&
            echo "$STEPS" >"$run/sweep_done"
    } >>"$log" 2>&1 || {
        echo "$name, seed $seed: failed after $(($(date +%s) - begun)) s"
        return 1
    }
    echo "$name, seed $seed: done in $(($(date +%s) - begun)) s"
}

if [ "${1:-}" = --run ]; then
    train_and_evaluate "$2" "$3"
    exit
fi

if asks_help "$@"; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$ROOT/scripts/sweep.sh"
    exit
fi
overlays="" seeds="0 1 2" steps="" jobs=$(getconf _NPROCESSORS_ONLN)
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || fail "$1: unknown, or without a value; --help lists the arguments"
    case $1 in
        --overlays) overlays=$2 ;;
        --seeds) seeds=$2 ;;
        --steps) steps=$2 ;;
        --jobs) jobs=$2 ;;
        *) fail "unknown argument $1; --help lists them" ;;
    esac
    shift 2
done
set -f
set -- $overlays
[ $# -gt 0 ] || fail '--overlays: names none; for example --overlays "none lora"'
first=$1
for part in $(printf '%s' "$overlays" | tr + ' '); do
    [ "$part" = none ] || [ -f "$ROOT/configs/overlays/$part.yaml" ] ||
        fail "--overlays: there is no configs/overlays/$part.yaml"
    [ "$part" != distill ] || [ -d "${TEACHER:-}" ] ||
        fail "--overlays: distill needs TEACHER, the folder of a model to learn from, in the environment"
done
for number in $seeds $steps $jobs; do
    case $number in *[!0-9]* | 0?*) fail "--seeds, --steps, --jobs: expected whole numbers, not '$number'" ;; esac
done
[ -n "$seeds" ] && [ "$steps" != 0 ] && [ "${jobs:-0}" != 0 ] || fail "--seeds, --steps, --jobs: leave nothing to run"
for list in "$overlays" "$seeds"; do
    twice=$(printf '%s\n' $list | sort | uniq -d | head -n 1)
    [ -z "$twice" ] || fail "--overlays, --seeds: $twice is there twice"
done
need_packages

SWEEP="${OUTPUT:-$ROOT/outputs/sweep}"
mkdir -p "$SWEEP"
SWEEP=$(cd "$SWEEP" && pwd)
[ -z "${MODEL:-}" ] || MODEL=$(cd "$MODEL" && pwd)
[ -z "${TEACHER:-}" ] || TEACHER=$(cd "$TEACHER" && pwd)
cd "$ROOT" # where recipes are looked up first
export PYTHON SWEEP TEACHER STEPS="$steps" DATA="$SWEEP/world/data/SAT_train_2000.json" HF_HUB_OFFLINE=1
export MODEL="${MODEL:-$ROOT/configs/tiny/base}" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=-1
export NUM_PROCESSES=1 NUM_MACHINES=1 ACCELERATE_CONFIG=ddp
prepare_tiny_world "$SWEEP/world"

# One seed of every recipe, then the next one: what an interrupted sweep has, it has of all.
for seed in $seeds; do
    for name in $overlays; do
        echo "$name $seed"
    done
done | xargs -P "$jobs" -n 2 sh "$ROOT/scripts/sweep.sh" --run || true

set --
failed=""
for name in $overlays; do
    for seed in $seeds; do
        if is_done "$SWEEP/$name/seed$seed"; then
            set -- "$@" "$SWEEP/$name/seed$seed"
        else
            failed="$failed $name/seed$seed.log"
        fi
    done
done
case "${1:-}" in
    */"$first"/seed*) "$PYTHON" "$ROOT/scripts/sweep.py" "$@" --output "$SWEEP" ;;
    *) echo "sweep: no run of $first is finished, so there is nothing to compare with" >&2 ;;
esac
for log in $failed; do
    echo "sweep: not finished: $SWEEP/$log" >&2
done
[ -z "$failed" ]
