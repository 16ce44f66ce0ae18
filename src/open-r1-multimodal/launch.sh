#!/bin/sh
# Start a training script on every GPU of this machine, or on CPU processes if it has none.
# For a run on several machines, start it on each, with the same arguments (docs/machines.md; scripts/slurm.sbatch does so).
#
#   sh launch.sh SCRIPT RECIPE [ARGUMENTS]    (run_grpo_SAT.sh and run_sft.sh call it)
#
# From the environment:
#   MODEL              model name or folder                (default: the recipe's)
#   DATA               prepared JSON file, or anything else that dataset_name takes (docs/data.md)
#                                                          (default: the recipe's)
#   CONFIG             the recipe's file, or several files between blanks, of which a later one overrides those before it:
#                      CONFIG="configs/grpo_sat.yaml configs/overlays/lora.yaml"; names are looked up in the current
#                      folder and then in the repository   (default: configs/RECIPE.yaml)
#   OUTPUT             output folder                       (default: the recipe's, else outputs/ and the recipes'
#                                                          names: outputs/grpo_sat_lora)
#   NUM_PROCESSES      number of processes on each machine  (default: the number of GPUs; 2 without a GPU)
#   NUM_MACHINES       machines; they share the file system of OUTPUT and DATA   (default: 1)
#   MACHINE_RANK       number of this machine, from 0 on, if there are several
#   MASTER_ADDR        address of machine 0, as the others see it
#   MASTER_PORT        a free port of machine 0            (default: 29500)
#   ACCELERATE_CONFIG  how to launch: zero2, zero3, ddp, cpu, or a file
#                      (default: zero2, and cpu without a GPU; zero3 for run_sft.sh)
# Arguments override the recipe: `--max_steps 100 --beta 0`; `--help` lists them all. With `--doctor` the run is checked
# and not started (scripts/doctor.py). The Python scripts (grpo.py, sft.py) take recipes as `--config A --config B`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$here/../.." && pwd)
. "$ROOT/scripts/env.sh"
need_packages
script=$1 recipe=$2
shift 2
if asks_help "$@"; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$here/launch.sh"
    exec "$PYTHON" "$here/open_r1/$script.py" --help
fi
export PYTHONSAFEPATH=1 # no Python looks for modules in the current folder: a random.py there is not Python's
exec "$PYTHON" "$here/open_r1/running/launch.py" "$script" "$recipe" "$@" # exec: signals reach the launcher
