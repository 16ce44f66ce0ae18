r"""Look at a recipe before a run does: how much memory it takes.

    python scripts/doctor.py --memory --config configs/grpo_sat.yaml --num_processes 4
    python scripts/doctor.py --memory --config configs/grpo_sat.yaml --config configs/overlays/lora.yaml \
        --max_completion_length 350

Arguments that it does not know are the recipe's, as for the run scripts. Figures are computed, not measured: at the
recipe's limits (longest prompt, largest image, longest completions), in GB of 10^9 bytes on each GPU.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src/open-r1-multimodal"))
from open_r1.front_door import run, use_environment

use_environment()

import yaml
from trl import ModelConfig

from open_r1.configs import GRPOScriptArguments, Qwen2VLGRPOConfig, Qwen2VLSFTConfig, SFTScriptArguments
from open_r1.families import FAMILIES
from open_r1.memory import Count, Launch, Load, count_memory, load_config
from open_r1.prompts import REPO_ROOT
from open_r1.recipes import merge_recipes, read_recipe

LAUNCH_CONFIGS = REPO_ROOT / "src/open-r1-multimodal/configs"
ANSWER_TOKENS = 32  # of an SFT example; no recipe bounds them


def read_launch(name: str, num_processes: int) -> Launch:
    """The ZeRO stage of an accelerate configuration: a file, or the name of one of this project's."""
    path = Path(name) if Path(name).is_file() else LAUNCH_CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--accelerate_config: no file {path}")
    settings = yaml.safe_load(path.read_text())
    return Launch(num_processes, (settings.get("deepspeed_config") or {}).get("zero_stage"))


def count_recipe(recipes: list[str], launch: Launch, overrides: list[str], is_cpu: bool = False) -> tuple[str, Count]:
    """The model's name and the count for recipes of GRPO or SFT, of which a later one changes those before it."""
    is_grpo = "num_generations" in merge_recipes(recipes)
    types = (
        (GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig)
        if is_grpo
        else (SFTScriptArguments, Qwen2VLSFTConfig, ModelConfig)
    )
    named = [argument for recipe in recipes for argument in ("--config", recipe)]
    needed = ["--dataset_name", "-", "--output_dir", "-", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    script_args, args, model_args = read_recipe(types, [*named, *needed, *overrides])
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    image = FAMILIES[config.model_type].count_patches(config, script_args.max_pixels or 0)
    batch = args.per_device_train_batch_size
    load = Load(batch, script_args.max_prompt_length, ANSWER_TOKENS, image, batch)
    if is_grpo:
        rollout = batch * args.gradient_accumulation_steps
        if args.completions_per_step:
            rollout = args.completions_per_step // launch.num_processes
        prompts = -(-batch // args.num_generations)
        load = Load(prompts, script_args.max_prompt_length, args.max_completion_length, image, batch, rollout)
    return model_args.model_name_or_path, count_memory(
        config,
        model_args,
        script_args,
        load,
        launch,
        has_reference=is_grpo and args.beta > 0,
        gradient_checkpointing=args.gradient_checkpointing,
        is_cpu=is_cpu,
    )


def format_count(count: Count) -> str:
    """The count as a table in GB."""
    lines = []
    phases = (("all the time", count.base), ("rollout", count.rollout), ("backward", count.backward))
    for phase, rows in (*phases, ("update", count.update)):
        lines += [f"{phase:<14}{name:<24}{size / 1e9:>8.2f}" for name, size in rows.items()]
    return "\n".join([*lines, f"{'peak':<38}{count.peak / 1e9:>8.2f}"])


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--memory", action="store_true", required=True, help="count a training step's memory")
    parser.add_argument(
        "--config", required=True, action="append", help="recipe, a file in configs/; may be given several times"
    )
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs (default: 1)")
    parser.add_argument("--accelerate_config", default="zero2", help="zero2, zero3, ddp or a file (default: zero2)")
    parser.add_argument("--cpu", action="store_true", help="count for processes on a CPU")
    parser.add_argument("--json", action="store_true", help="print bytes as JSON")
    args, overrides = parser.parse_known_args()
    launch = read_launch(args.accelerate_config, args.num_processes)
    model, count = count_recipe(args.config, launch, overrides, args.cpu)
    if args.json:
        print(json.dumps({"model": model, "peak": count.peak, **asdict(count)}))
        return
    recipes = " ".join(args.config)
    print(f"{model}, {recipes}, {args.num_processes} GPUs, {args.accelerate_config}: computed, GB on each GPU")
    print(format_count(count))


if __name__ == "__main__":
    run(main)
