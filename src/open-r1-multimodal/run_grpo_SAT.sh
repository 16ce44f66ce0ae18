#!/bin/sh
# GRPO on SAT, the paper's recipe. See launch.sh for what the environment and the arguments change.
exec sh "$(dirname "$0")/launch.sh" grpo grpo_sat "$@"
