#!/bin/sh
# SFT on SAT, the paper's baseline, under ZeRO-3. See launch.sh for what the environment and the arguments change.
export ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-zero3}"
exec sh "$(dirname "$0")/launch.sh" sft sft_sat "$@"
