"""What the entry points `grpo.py` and `sft.py` share: parse a recipe, continue or start, train, save."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import Trainer
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from open_r1.callbacks import add_run_callbacks
from open_r1.checkpoints import CompleteCheckpoints, completed_steps, copy_model, resolve_checkpoint
from open_r1.modeling import parameter_table
from open_r1.report import write_report

# What libraries warn about at every start although it is as it should be: logger -> part of the message.
NOISE = {
    # the recipe's accumulation is in DeepSpeed's configuration, where transformers puts it
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # the end-of-text tokens are those that open_r1.modeling chose
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # CUDA's compiler is there without a GPU
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def resolve_report_to(report_to: list[str]) -> list[str]:
    """`auto`: wandb when a key or an offline mode is set, else tensorboard, so that no prompt ever blocks a run."""
    if report_to != ["auto"]:
        return report_to
    has_key = "WANDB_API_KEY" in os.environ or "api.wandb.ai" in read_text(Path("~/.netrc").expanduser())
    return ["wandb" if has_key or os.environ.get("WANDB_MODE") == "offline" else "tensorboard"]


def read_text(path: Path) -> str:
    """The file's text, or nothing when there is no such file."""
    return path.read_text() if path.is_file() else ""


def quiet() -> None:
    """Silence what is only noise at the start of a run: single messages, never a logger, and bars of local files."""
    for name, part in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, part=part: part not in record.getMessage())
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    warnings.filterwarnings(
        "ignore", "Both num_training_steps and num_stable_steps are specified"
    )  # as the recipes mean
    downloads_are_shown = not are_progress_bars_disabled()
    disable_progress_bar()  # of loading and writing weights; it takes the bars of downloads along
    if downloads_are_shown:
        enable_progress_bars()


def run(command: str, dataclass_types: tuple[type, ...], build_trainer: Callable[..., Trainer]) -> None:
    """The whole of a training command.

    Args:
        command: its name, "grpo" or "sft".
        dataclass_types: what the recipe and the command line fill: script, trainer and model arguments.
        build_trainer: takes the filled dataclasses in that order.
    """
    quiet()
    sys.path.insert(0, os.getcwd())  # where a user's own `module:function` reward lies
    try:
        script_args, args, model_args = TrlParser(dataclass_types).parse_args_and_config()
        args.report_to = resolve_report_to(args.report_to)
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, args.output_dir)
        trainer = build_trainer(script_args, args, model_args)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend: recipe, data, model, reward
        sys.exit(f"error: {error}")
    say = trainer.accelerator.print
    say(parameter_table(trainer.model))
    # A trainer that resumes at its last step would take one step more.
    if checkpoint and 0 < args.max_steps <= completed_steps(checkpoint):
        say(f"{checkpoint}: nothing left to do, max_steps is {args.max_steps}")
        if trainer.is_world_process_zero():
            copy_model(checkpoint, args.output_dir)
            report(args.output_dir)
        return
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.add_callback(CompleteCheckpoints(args))
    add_run_callbacks(trainer, command, script_args, model_args)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    say(f"saved {args.output_dir}")
    if trainer.is_world_process_zero():
        report(args.output_dir)


def report(output_dir: str) -> None:
    """Write the run's report and say where. Training is done and saved: what is wrong with a report ends no run."""
    try:
        print(f"report: {write_report(Path(output_dir))}")
    except (OSError, ValueError) as error:
        print(f"no report: {error}", file=sys.stderr)
