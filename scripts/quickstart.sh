#!/bin/sh
# The whole story on a machine without a GPU or a model hub: set up, render a spatial world as parquet in SAT's and
# CV-Bench's schemas, prepare it, train a tiny Qwen2-VL with GRPO, load the checkpoint and ask it something.
# The scripts are the ones of the real run; only the size is small. It leaves everything in outputs/quickstart.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
export PYTHON HF_HUB_OFFLINE=1
run="$ROOT/outputs/quickstart"
mkdir -p "$run"

echo "== 1/4 render: parquet files in the schemas of SAT and CV-Bench"
[ -f "$run/world.parquet" ] || "$PYTHON" -m open_r1.world --schema sat --level easy --rows 400 --output "$run/world.parquet"
[ -f "$run/cvbench/test_3d.parquet" ] ||
    "$PYTHON" -m open_r1.world --schema cvbench --level easy --rows 80 --output "$run/cvbench"

echo "== 2/4 prepare: src/data/SAT/prepare_dataset.sh"
SAT_PARQUET="$run/world.parquet" sh "$ROOT/src/data/SAT/prepare_dataset.sh" --total_num 320 --output_dir "$run/data"

echo "== 3/4 train: src/open-r1-multimodal/run_grpo_SAT.sh, GRPO under DeepSpeed ZeRO-2"
[ -f "$run/model/config.json" ] ||
    "$PYTHON" -m open_r1.tiny --output "$run/model" --data "$run/data/SAT_train_320.json"
CONFIG="$ROOT/configs/tiny/grpo.yaml" MODEL="$run/model" DATA="$run/data/SAT_train_320.json" OUTPUT="$run/grpo" \
    sh "$ROOT/src/open-r1-multimodal/run_grpo_SAT.sh" "$@"

echo "== 4/4 load the checkpoint and ask"
"$PYTHON" "$ROOT/scripts/ask.py" --model "$run/grpo" --data "$run/data/SAT_train_320.json" --max_new_tokens 32
echo "quick start done: checkpoints and trajectories are in $run/grpo"
