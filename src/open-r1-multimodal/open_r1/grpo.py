"""Train with GRPO: a recipe and a prepared dataset in, checkpoints and trajectories out.

Launch it with `run_grpo_SAT.sh`, or by hand: `accelerate launch open_r1/grpo.py --config configs/grpo_sat.yaml
--dataset_name SAT_train_15000.json`. It leaves `output_dir` with Hugging Face checkpoints and `trajectories/`.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config

from open_r1.data import DataArguments, load_dataset, opens_think
from open_r1.modeling import freeze, load_model_from_args, load_processor
from open_r1.rewards import get_reward_funcs
from open_r1.trainer import Qwen2VLGRPOConfig, Qwen2VLGRPOTrainer


@dataclass
class GRPOScriptArguments(DataArguments):
    """What is rewarded and what is trained."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": "Rewards by registry name (accuracy, format, length) or as module:function; "
            "reward_weights weighs them."
        },
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Do not train the vision tower."})
    freeze_llm: bool = field(default=False, metadata={"help": "Do not train the language model."})


def resolve_report_to(report_to: list[str]) -> list[str]:
    """`auto`: wandb when a key or an offline mode is set, else tensorboard, so that no prompt ever blocks a run."""
    if report_to != ["auto"]:
        return report_to
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in read_text(Path("~/.netrc").expanduser())
    return ["wandb" if has_key or os.environ.get("WANDB_MODE") == "offline" else "tensorboard"]


def read_text(path: Path) -> str:
    """The file's text, or nothing when there is no such file."""
    return path.read_text() if path.is_file() else ""


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """`auto`: the newest checkpoint of the output folder, if it has one; `none`: start anew; else the path itself."""
    if resume_from_checkpoint != "auto":
        return None if resume_from_checkpoint in (None, "none") else resume_from_checkpoint
    return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None


def build_trainer(
    script_args: GRPOScriptArguments, training_args: Qwen2VLGRPOConfig, model_args: ModelConfig
) -> Qwen2VLGRPOTrainer:
    """The trainer that a parsed recipe describes."""
    training_args.report_to = resolve_report_to(training_args.report_to)
    template_kwargs = training_args.chat_template_kwargs or {}
    processor = load_processor(
        model_args.model_name_or_path,
        chat_template=script_args.chat_template,
        min_pixels=script_args.min_pixels,
        max_pixels=script_args.max_pixels,
        revision=model_args.model_revision,
    )
    train_dataset, eval_dataset = (
        load_dataset(path, processor, script_args.max_prompt_length, **template_kwargs) if path else None
        for path in (script_args.dataset_name, script_args.eval_dataset_name)
    )
    reward_funcs = get_reward_funcs(script_args.reward_funcs, think_prefilled=opens_think(processor, **template_kwargs))
    model = load_model_from_args(model_args)
    freeze(model, script_args.freeze_vision, script_args.freeze_llm)
    return Qwen2VLGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )


def main() -> None:
    """Parse the recipe, build, train, save."""
    sys.path.insert(0, os.getcwd())  # where a user's own `module:function` reward lies
    parser = TrlParser((GRPOScriptArguments, Qwen2VLGRPOConfig, ModelConfig))
    try:
        script_args, training_args, model_args = parser.parse_args_and_config()
        checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
        trainer = build_trainer(script_args, training_args, model_args)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend: recipe, data, model, reward
        sys.exit(f"error: {error}")
    if checkpoint:
        trainer.accelerator.print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"saved {training_args.output_dir}")


if __name__ == "__main__":
    main()
