#!/bin/sh
# The paper's experiment at a small size, in about 8 minutes, without a GPU or a model hub. The base, a tiny Qwen2-VL that
# can see but guesses, is fine-tuned on answers (SFT) and, separately, trained with GRPO. All three are evaluated.
#
#   bash scripts/quickstart.sh            into outputs/quickstart
#   bash scripts/quickstart.sh --seed 1   another training seed, into outputs/quickstart-seed1
#
# It runs the scripts of the real run on scenes rendered in SAT's and CV-Bench's schemas; only the recipes (configs/tiny)
# are small. After an interruption the same command goes on where it was.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$ROOT/scripts/quickstart.sh"
    exit "$1"
}

[ $# -le 2 ] || { echo "quickstart: error: unknown argument $3" >&2 && usage 2 >&2; }
seed=0
case "${1:-}" in
    "") ;;
    -h | --help) usage 0 ;;
    --seed)
        seed=${2:-}
        case $seed in "" | *[!0-9]*) echo "quickstart: error: --seed: expected a whole number, not '$seed'" >&2 && exit 2 ;; esac
        ;;
    *) echo "quickstart: error: unknown argument $1" >&2 && usage 2 >&2 ;;
esac

step() {
    echo
    echo "== $1/8 $2 ($(($(date +%s) - start)) s)"
}

start=$(date +%s)
step 1 "set up"
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
. "$ROOT/scripts/tiny_world.sh"
export PYTHON HF_HUB_OFFLINE=1
run="$ROOT/outputs/quickstart"
[ "$seed" = 0 ] || run="$run-seed$seed"
base="$ROOT/configs/tiny/base"

evaluate() { # model, further arguments
    evaluate_in_tiny_world "$run" "$run/results" "$@"
}

step 2 "prepare: scenes in SAT's and CV-Bench's schemas -> prepare_dataset.sh"
prepare_tiny_world "$run"
export DATA="$run/data/SAT_train_2000.json" MODEL="$base"

step 3 "evaluate the base: it sees, and guesses"
evaluate "$base"

step 4 "SFT: run_sft.sh, on the answers alone"
CONFIG="$ROOT/configs/tiny/sft.yaml" OUTPUT="$run/sft" sh "$ROOT/src/open-r1-multimodal/run_sft.sh" --seed "$seed"

step 5 "evaluate SFT: it was taught to answer without reasoning"
evaluate "$run/sft" --no-use_reasoning_prompt

step 6 "GRPO: run_grpo_SAT.sh, from the base, no SFT"
CONFIG="$ROOT/configs/tiny/grpo.yaml" OUTPUT="$run/grpo" sh "$ROOT/src/open-r1-multimodal/run_grpo_SAT.sh" \
    --eval_dataset_name "$run/data/SAT_val_256.json" --seed "$seed"

step 7 "evaluate GRPO"
evaluate "$run/grpo"

step 8 "compare"
"$PYTHON" "$ROOT/scripts/compare.py" "$run/results/CVBench_result_base_reasoning.json" \
    "$run/results/CVBench_result_sft_no_reasoning.json" "$run/results/CVBench_result_grpo_reasoning.json" \
    --names Base +SFT +GRPO
echo
echo "curves and rollouts: $run/grpo/report.html"
echo "quick start done in $(($(date +%s) - start)) s"
