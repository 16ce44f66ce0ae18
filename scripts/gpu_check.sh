#!/bin/sh
# Measures this repository on one NVIDIA GPU in at most about nine minutes, and writes one table: the attention tests that
# need a GPU, decoding, a GRPO step of Qwen2-VL-2B's size against stock TRL, LoRA and QLoRA within the memory of smaller
# cards, two steps of run_grpo_SAT.sh, evaluation. The weights are random, and no model hub is needed.
#
#   bash scripts/gpu_check.sh                   into outputs/gpu_check
#   bash scripts/gpu_check.sh --wheels FOLDER   with packages from a folder, where there is no network to install from
#   bash scripts/gpu_check.sh --rehearsal       the same on a toy model and the CPU, to see that it runs
#
# For what cannot be measured the table gives the reason. Run `bash setup.sh` first, or have a folder of wheels; `--help`
# lists the options, and what must be in that folder.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/env.sh"
HF_HUB_OFFLINE=1 exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
