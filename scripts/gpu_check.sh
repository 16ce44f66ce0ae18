#!/bin/sh
# What this repository does on one NVIDIA GPU, in at most about nine minutes and one table: the attention tests that need
# a GPU, decoding, a GRPO step of Qwen2-VL-2B's size against stock TRL, LoRA and QLoRA in the room of smaller cards, two
# steps of run_grpo_SAT.sh, evaluation. The weights are random, and no model hub is asked.
#
#   bash scripts/gpu_check.sh                   into outputs/gpu_check
#   bash scripts/gpu_check.sh --wheels FOLDER   with packages from a folder, where there is no network to install from
#   bash scripts/gpu_check.sh --rehearsal       the same lines on a toy model and the CPU, to see that they run
#
# What cannot be measured is left out with its reason. `bash setup.sh` or a folder of wheels comes first; `--help` lists
# what can be chosen, and what belongs into that folder.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/env.sh"
HF_HUB_OFFLINE=1 exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
