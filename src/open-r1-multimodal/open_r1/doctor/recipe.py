"""Checks a recipe: its settings, where it reports to and begins, its model, prompt and rewards."""

import os
from collections.abc import Iterator

from open_r1.base.locks import check_free
from open_r1.doctor.finding import Checks, Finding, failed, passed
from open_r1.doctor.subject import Patient, existing
from open_r1.running.checkpoints import Layout
from open_r1.running.entry import find_checkpoint, resolve_report_to


def settings(patient: Patient) -> Iterator[Finding]:
    """Recipes and arguments, read as every process reads them."""
    args = patient.settings[1]
    per_step = args.per_device_train_batch_size * patient.launch.num_processes * args.gradient_accumulation_steps
    unit = f"completions, {args.num_generations} a prompt" if patient.is_grpo else "examples"
    zero = "no ZeRO" if patient.launch.zero_stage is None else f"ZeRO-{patient.launch.zero_stage}"
    processes = f"{patient.launch.num_processes} process{'es' if patient.launch.num_processes > 1 else ''}"
    yield passed(f"{patient.command.name}, {processes}, {zero}; a step is {per_step} {unit}")


def tracking(patient: Patient) -> Iterator[Finding]:
    """wandb asks for a login, and a run without a terminal ends there."""
    trackers = patient.settings[1].report_to
    ready = resolve_report_to(["auto"]) == ["wandb"] or os.environ.get("WANDB_MODE") == "disabled"
    if "wandb" in trackers and not ready:
        yield failed("report_to: wandb, without a key", "wandb login, WANDB_MODE=offline, or --report_to tensorboard")
    else:
        yield passed(f"reports to {', '.join(trackers) or 'its folder alone'}")


def output(patient: Patient) -> Iterator[Finding]:
    """Where the run would begin, that it can be written to, and that nobody else does."""
    args, layout = patient.settings[1], Layout(patient.launch.zero_stage or 0, patient.launch.num_processes)
    check_free(args.output_dir)
    checkpoint = find_checkpoint(patient.command, patient.settings, layout)
    folder = existing(args.output_dir)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        yield failed(f"output_dir {args.output_dir}: {folder} is no folder that can be written to", "another OUTPUT")
    else:
        yield passed(f"goes on from {checkpoint}" if checkpoint else f"starts anew in {args.output_dir}")


def model(patient: Patient) -> Iterator[Finding]:
    """Its files are there, of a family that this project knows, with a processor."""
    name = patient.settings[2].model_name_or_path
    family, size = patient.model_outline.config.model_type, sum(p.numel() for p in patient.model_outline.parameters())
    yield passed(f"{name}: {family}, {size / 1e6:,.1f} M parameters, {type(patient.processor).__name__}")


def chat_template(patient: Patient) -> Iterator[Finding]:
    """It can be rendered."""
    start = "inside <think>" if patient.prompt_opening else "with their first word"
    name = patient.settings[0].chat_template or "of the model"
    yield passed(f"{name}: completions start {start}")


def rewards(patient: Patient) -> Iterator[Finding]:
    """Names lead to functions."""
    if patient.is_grpo:
        yield passed(", ".join(reward.__name__ for reward in patient.reward_funcs))


CHECKS: Checks = {
    "settings": settings,
    "tracking": tracking,
    "output": output,
    "model": model,
    "chat template": chat_template,
    "rewards": rewards,
}
