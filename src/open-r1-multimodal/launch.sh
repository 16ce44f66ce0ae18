#!/bin/sh
# Start a training script on every GPU of this machine, or on CPU processes where there is none.
# Several machines start it each, with the same arguments (docs/machines.md; scripts/slurm.sbatch does it on SLURM).
#
#   sh launch.sh SCRIPT RECIPE [ARGUMENTS]    (run_grpo_SAT.sh and run_sft.sh call it)
#
# From the environment:
#   MODEL              model name or folder                (default: the recipe's)
#   DATA               prepared JSON file, or all else that dataset_name takes: a YAML file mixes several data sets
#                                                          (default: the recipe's)
#   CONFIG             recipe, a file, or several files between blanks, of which a later one changes those before it:
#                      CONFIG="configs/grpo_sat.yaml configs/overlays/lora.yaml"; names are looked up in the current
#                      folder and then in the repository   (default: configs/RECIPE.yaml)
#   OUTPUT             output folder                       (default: the recipe's, else outputs/ and the recipes'
#                                                          names: outputs/grpo_sat_lora)
#   NUM_PROCESSES      processes of this machine, as many on each
#                                                          (default: the GPUs; 2 without one)
#   NUM_MACHINES       machines; they share the file system of OUTPUT and DATA   (default: 1)
#   MACHINE_RANK       this one's number, from 0 on, where there are several
#   MASTER_ADDR        address of machine 0, as the others see it
#   MASTER_PORT        a port that is free there           (default: 29500)
#   ACCELERATE_CONFIG  how to launch: zero2, zero3, ddp, cpu, or a file
#                      (default: zero2, and cpu without a GPU; zero3 for run_sft.sh)
# Arguments override the recipe: `--max_steps 100 --beta 0`; `--help` lists them all. `--doctor` looks at what would be
# started, says what is wrong with it, and starts nothing (scripts/doctor.py). The training scripts themselves
# take recipes as `--config A --config B`.
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
