r"""Check a run before it starts: the machine, recipe, data, prompt, rewards, model and what the run costs.

    python scripts/doctor.py                                               # the machine alone
    python scripts/doctor.py --config configs/grpo_sat.yaml --num_processes 4 --dataset_name data.json
    python scripts/doctor.py --memory --config configs/grpo_sat.yaml --config configs/overlays/lora.yaml

run_grpo_SAT.sh and run_sft.sh with `--doctor` do the same for the run that they would start. Other arguments are the
recipe's settings. Each line says pass, warn, fail or skip (not checked), what was found, and a remedy. If a check fails
the exit code is 1. `--memory` only computes the memory, at the recipe's limits (longest prompt, largest image, longest
completions), in GB of 10^9 bytes on each GPU.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.base.errors import REPO_ROOT, MissingFile, Mistake, command_line, positive, run, use_environment

use_environment()

import torch

from open_r1 import grpo, sft
from open_r1.doctor.examination import examine, line
from open_r1.doctor.finding import Status
from open_r1.doctor.run import Run, planned
from open_r1.models.families import use_family
from open_r1.models.memory import MemoryCount, count_run
from open_r1.running.entry import Command, prepare_process
from open_r1.running.launch_settings import defaults_on_cpu
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import merge_recipes, read_recipe

LAUNCH_CONFIGS = REPO_ROOT / "src/open-r1-multimodal/configs"


def read_launch(name: str, num_processes: int, num_machines: int) -> Launch:
    """A launch with an accelerate configuration: a file, or the name of one of this project's."""
    path = Path(name) if Path(name).is_file() else LAUNCH_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise MissingFile(f"--accelerate_config: no file {path}")
    if num_processes % num_machines:
        raise Mistake(f"--num_processes {num_processes}: {num_machines} machines need as many each")
    return replace(Launch.of_config(str(path), num_processes), num_machines=num_machines)


def choose_command(script: str | None, recipes: list[str], overrides: list[str]) -> Command:
    """GRPO or SFT: as it is named, or else by what recipes and arguments set."""
    names = {*merge_recipes(recipes), *(override.lstrip("-").partition("=")[0] for override in overrides)}
    is_grpo = not names.isdisjoint({"num_generations", "reward_funcs"}) if script is None else script == "grpo"
    return grpo.COMMAND if is_grpo else sft.COMMAND


def count_recipe(command: Command, arguments: list[str], launch: Launch, is_cpu: bool) -> tuple[str, MemoryCount]:
    """The model's name and the count of its step, without vLLM; neither data nor a GPU are needed."""
    needed = ["--dataset_name", "-", "--output_dir", "-", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    with planned(launch):
        script_args, args, model_args = read_recipe(command.arguments, [*needed, *arguments])
    use_family(script_args.family)
    return model_args.model_name_or_path, count_run(script_args, args, model_args, launch, is_cpu)


def format_count(count: MemoryCount) -> str:
    """The count as a table in GB."""
    lines = []
    phases = (("all the time", count.base), ("rollout", count.rollout), ("backward", count.backward))
    for phase, rows in (*phases, ("update", count.update)):
        lines += [f"{phase:<14}{name:<24}{size / 1e9:>8.2f}" for name, size in rows.items()]
    return "\n".join([*lines, f"{'peak':<38}{count.peak / 1e9:>8.2f}"])


def show(examined: Run, as_json: bool) -> None:
    """Examine, and print finding by finding.

    Raises:
        Mistake: something failed; it names the first.
    """
    findings = []
    for finding in examine(examined):
        findings.append(finding)
        if not as_json:
            print(line(finding), flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    if bad := [finding for finding in findings if finding.verdict is Status.FAIL]:
        raise Mistake(f"{len(bad)} failed; first {bad[0].family}, {bad[0].name}: {bad[0].what}")


def main() -> None:
    """Command line entry point."""
    parser = command_line(__doc__)
    parser.add_argument("--memory", action="store_true", help="only compute a training step's memory")
    parser.add_argument(
        "--config", action="append", default=[], help="recipe, a file in configs/; may be given several times"
    )
    parser.add_argument(
        "--script", choices=("grpo", "sft"), help="the command that runs the recipe (default: found by its settings)"
    )
    parser.add_argument(
        "--num_processes",
        type=positive,
        default=1,
        help="number of processes on all machines together, one a GPU (default: 1)",
    )
    parser.add_argument("--num_machines", type=positive, default=1, help="number of machines (default: 1)")
    parser.add_argument("--accelerate_config", default="zero2", help="zero2, zero3, ddp or a file (default: zero2)")
    parser.add_argument("--cpu", action="store_true", help="with --memory: compute it for processes on a CPU")
    parser.add_argument("--json", action="store_true", help="print JSON; with --memory sizes are in bytes")
    args, overrides = parser.parse_known_args()
    if not args.config and (args.memory or overrides):
        raise Mistake(f"{'--memory' if args.memory else overrides[0]}: name a recipe with --config")
    launch = read_launch(args.accelerate_config, args.num_processes, args.num_machines)
    command = choose_command(args.script, args.config, overrides)
    named = [part for recipe in args.config for part in ("--config", recipe)]
    if not args.memory:
        prepare_process()
        # what a launch sets where nobody else does
        defaults = [] if torch.cuda.is_available() else defaults_on_cpu(args.config, overrides)
        show(Run(command, [*named, *defaults, *overrides] if named else [], launch), args.json)
        return
    model, count = count_recipe(command, [*named, *overrides], launch, args.cpu)
    if args.json:
        print(json.dumps({"model": model, "peak": count.peak, **asdict(count)}))
        return
    recipes = " ".join(args.config)
    print(f"{model}, {recipes}, {args.num_processes} GPUs, {args.accelerate_config}: computed, GB on each GPU")
    print(format_count(count))


if __name__ == "__main__":
    run(main)
