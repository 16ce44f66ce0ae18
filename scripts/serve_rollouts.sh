#!/bin/sh
# Start the server that samples a run's completions: vLLM with the run's model, dtype and image bounds.
#
#   bash serve_rollouts.sh [ARGUMENTS of run_grpo_SAT.sh]
#
# The run itself is then started, on other GPUs or machines, with
#   bash run_grpo_SAT.sh --use_vllm true --vllm_mode server --vllm_server_host HOST [the same arguments]
# and sends its weights to the server after every step. Whoever reaches the server's port can do so, too: keep it inside
# the cluster.
#
# From the environment (give MODEL and CONFIG the same values as for the run):
#   MODEL            model name or folder         (default: the recipe's)
#   CONFIG           recipes, between blanks      (default: configs/grpo_sat.yaml)
#   VLLM_ARGUMENTS   more arguments of vllm serve: VLLM_ARGUMENTS="--tensor-parallel-size 2"
#   DRY_RUN          1 prints the command, and starts nothing
set -eu
here=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$here/.." && pwd)
. "$ROOT/scripts/env.sh"
if asks_help "$@"; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$here/serve_rollouts.sh"
    exit
fi
need_packages
export PYTHONSAFEPATH=1 # no Python looks for modules in the current folder
set -- ${MODEL:+--model_name_or_path "$MODEL"} "$@"
CONFIG="${CONFIG:-$ROOT/configs/grpo_sat.yaml}"
[ ! -f "$CONFIG" ] || IFS= # one file, which may have blanks in its name: nothing to split
set -f
for recipe in $CONFIG; do set -- "$@" --config "$recipe"; done
set +f
unset IFS
exec "$PYTHON" -m open_r1.running.serving "$@"
