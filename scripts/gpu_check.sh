#!/bin/sh
# What this repository does on one NVIDIA GPU, in nine minutes and one table: attention in 16 bits against float32, a GRPO
# step of Qwen2-VL-2B's size against stock TRL, LoRA and QLoRA in the room of smaller cards, rollout, evaluation. The
# weights are random, and no model hub is asked.
#
#   bash scripts/gpu_check.sh               into outputs/gpu_check
#   bash scripts/gpu_check.sh --rehearsal   the same lines on a toy model and the CPU, to see that they run
#
# What cannot be measured is left out with its reason. `bash setup.sh` comes first; `--help` lists what can be chosen.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/scripts/env.sh"
need_packages
HF_HUB_OFFLINE=1 exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
