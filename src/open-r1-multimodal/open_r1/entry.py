"""What the entry points `grpo.py` and `sft.py` share: parse a recipe, continue or start, train, save."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer
from trl import TrlParser

from open_r1.checkpoints import CompleteCheckpoints, completed_steps, copy_model, resolve_checkpoint
from open_r1.modeling import parameter_table


def resolve_report_to(report_to: list[str]) -> list[str]:
    """`auto`: wandb when a key or an offline mode is set, else tensorboard, so that no prompt ever blocks a run."""
    if report_to != ["auto"]:
        return report_to
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in read_text(Path("~/.netrc").expanduser())
    return ["wandb" if has_key or os.environ.get("WANDB_MODE") == "offline" else "tensorboard"]


def read_text(path: Path) -> str:
    """The file's text, or nothing when there is no such file."""
    return path.read_text() if path.is_file() else ""


def run(dataclass_types: tuple[type, ...], build_trainer: Callable[..., Trainer]) -> None:
    """The whole of a training command.

    Args:
        dataclass_types: what the recipe and the command line fill; the second is the trainer's configuration.
        build_trainer: takes the filled dataclasses in that order.
    """
    sys.path.insert(0, os.getcwd())  # where a user's own `module:function` reward lies
    try:
        arguments = TrlParser(dataclass_types).parse_args_and_config()
        args = arguments[1]
        args.report_to = resolve_report_to(args.report_to)
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        trainer = build_trainer(*arguments)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend: recipe, data, model, reward
        sys.exit(f"error: {error}")
    say = trainer.accelerator.print
    say(parameter_table(trainer.model))
    # A trainer that resumes at its last step would take one step more.
    if checkpoint and 0 < args.max_steps <= completed_steps(checkpoint):
        say(f"{checkpoint}: nothing left to do, max_steps is {args.max_steps}")
        if trainer.is_world_process_zero():
            copy_model(checkpoint, args.output_dir)
        return
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.add_callback(CompleteCheckpoints(args))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    say(f"saved {args.output_dir}")
