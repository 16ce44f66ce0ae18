"""Checks a recipe: its settings, trackers, output folder and checkpoint, model, prompt and rewards."""

import os
from collections.abc import Iterator

from open_r1.base.locks import check_free
from open_r1.doctor.finding import Checks, Finding, failed, passed
from open_r1.doctor.run import Run, existing
from open_r1.running.entry import check_login


def settings(run: Run) -> Iterator[Finding]:
    """Recipes and arguments, read as every process reads them."""
    args, count, zero_stage = run.args, run.launch.num_processes, run.launch.zero_stage
    per_step = args.per_device_train_batch_size * count * args.gradient_accumulation_steps
    unit = f"completions, {args.num_generations} a prompt" if run.is_grpo else "examples"
    zero = "no ZeRO" if zero_stage == 0 else f"ZeRO-{zero_stage}"
    processes = "1 process" if count == 1 else f"{count} processes"
    yield passed(f"{run.command.name}, {processes}, {zero}; a step is {per_step} {unit}")


def tracking(run: Run) -> Iterator[Finding]:
    """wandb asks for a login, and a run without a terminal ends there."""
    check_login(run.args.report_to)
    yield passed(f"reports to {', '.join(run.args.report_to) or 'its folder alone'}")


def output(run: Run) -> Iterator[Finding]:
    """Where the run would begin, that it can be written to, and that nobody else does."""
    output_dir = run.args.output_dir
    check_free(output_dir)
    checkpoint = run.checkpoint
    folder = existing(output_dir)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield failed(f"output_dir {output_dir}: {folder} is no folder that can be written to", "choose another OUTPUT")
    else:
        yield passed(f"goes on from {checkpoint}" if checkpoint else f"starts anew in {output_dir}")


def model(run: Run) -> Iterator[Finding]:
    """The model's files are there, of a family that this project knows, with a processor."""
    family, size = run.model_outline.config.model_type, run.model_outline.num_parameters() / 1e6
    name = run.model_args.model_name_or_path
    yield passed(f"{name}: {family}, {size:,.1f} M parameters, {type(run.processor).__name__}")


def chat_template(run: Run) -> Iterator[Finding]:
    """The chat template can be rendered."""
    start = "inside <think>" if run.prompt_opening else "with their first word"
    yield passed(f"{run.script_args.chat_template or 'of the model'}: completions start {start}")


def rewards(run: Run) -> Iterator[Finding]:
    """The names of the rewards lead to functions."""
    if run.is_grpo:
        yield passed(", ".join(reward.__name__ for reward in run.reward_funcs))


CHECKS: Checks = (settings, tracking, output, model, chat_template, rewards)
