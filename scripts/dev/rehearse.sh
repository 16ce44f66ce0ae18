#!/bin/sh
# Rehearse the real run before you pay for it: the shipped recipes on a model of Qwen2-VL-2B's size, a step each, with
# seconds, peak memory and the doctor's forecast of it. Without a model hub the weights are random.
#
#   bash scripts/dev/rehearse.sh                          every phase, into outputs/rehearsal
#   MODEL=Qwen/Qwen2-VL-2B bash scripts/dev/rehearse.sh   the same with real weights
#   bash scripts/dev/rehearse.sh --size smolvlm_256m --output outputs/smolvlm   a whole GRPO step, everything trained
#
# On a machine with GPUs it uses them and the recipes' own lengths; without one, short completions and one process.
# It sets the packages up by itself; `--help` lists what can be chosen.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
exec "$PYTHON" "$ROOT/scripts/dev/rehearse.py" "$@"
