#!/bin/sh
# Rehearse the real run before you pay for it: run the shipped recipes on a model of Qwen2-VL-2B's size, a step each, and
# report seconds, peak memory and the doctor's forecast of it. No model hub is needed: the weights are random.
#
#   bash scripts/dev/rehearse.sh                          every phase, into outputs/rehearsal
#   MODEL=Qwen/Qwen2-VL-2B bash scripts/dev/rehearse.sh   the same with real weights
#   bash scripts/dev/rehearse.sh --size smolvlm_256m --output outputs/smolvlm   a whole GRPO step, everything trained
#
# On a machine with GPUs it uses them and the recipes' own lengths, otherwise short completions and one process. It
# installs the packages by itself; `--help` lists the options.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
sh "$ROOT/setup.sh"
. "$ROOT/scripts/env.sh"
exec "$PYTHON" "$ROOT/scripts/dev/rehearse.py" "$@"
