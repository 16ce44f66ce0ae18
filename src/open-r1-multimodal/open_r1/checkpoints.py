"""Checkpoints that are whole or passed over: a manifest written last says which, and resuming believes only it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

MANIFEST = "complete.json"
# What a checkpoint holds for resuming alone. The rest is the model, as `save_model` writes it.
RESUME_FILES = ("optimizer*", "scheduler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py", MANIFEST)


def list_checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every `checkpoint-*` in a run's folder, complete or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for path in folders if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)))


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint complete: its manifest, {file: size in bytes}, appears at once and after all of them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    temporary = checkpoint / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({str(path.relative_to(checkpoint)): path.stat().st_size for path in files}))
    os.replace(temporary, checkpoint / MANIFEST)


def unseal(checkpoint: Path) -> None:
    """Take the declaration back, before the checkpoint is written over or deleted."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def find_defect(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not complete, in words, or None when it is."""
    manifest = Path(checkpoint) / MANIFEST
    if not manifest.is_file():
        return f"half-written (no {MANIFEST})"
    for name, size in json.loads(manifest.read_text()).items():
        path = Path(checkpoint) / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a run; every newer one that is not is reported in a line and passed over."""
    for _, checkpoint in reversed(list_checkpoints(output_dir)):
        defect = find_defect(checkpoint)
        if defect is None:
            return str(checkpoint)
        PartialState().print(f"{checkpoint}: passed over, {defect}")
    return None


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str) -> str | None:
    """`auto`: the newest complete checkpoint of the output folder, if it has one; `none`: start anew; else the path.

    Raises:
        FileNotFoundError: when the path is not a folder.
    """
    if resume_from_checkpoint in (None, "none"):
        return None
    if resume_from_checkpoint == "auto":
        return last_complete_checkpoint(output_dir)
    if not Path(resume_from_checkpoint).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: no folder {resume_from_checkpoint}")
    return resume_from_checkpoint


def completed_steps(checkpoint: str) -> int:
    """The optimiser steps that were done when the checkpoint was written."""
    return TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")).global_step


def copy_model(checkpoint: str, output_dir: str) -> None:
    """Copy a checkpoint's model and processor, without what only a resume needs, into the run's folder."""
    shutil.copytree(checkpoint, output_dir, ignore=shutil.ignore_patterns(*RESUME_FILES), dirs_exist_ok=True)


class CompleteCheckpoints(TrainerCallback):
    """Seal every checkpoint once all processes have written their part, and delete old ones only after that.

    It takes `save_total_limit` over from the trainer, which would delete the last good checkpoint before the new
    one is complete and counts half-written ones as good.
    """

    def __init__(self, args: TrainingArguments):
        self.limit = args.save_total_limit
        args.save_total_limit = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back the seals of checkpoints that this run is going to write over."""
        if state.is_world_process_zero:
            for step, checkpoint in list_checkpoints(args.output_dir):
                if step > state.global_step:
                    unseal(checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the new checkpoint; keep the newest `save_total_limit` complete ones and the best."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not self.limit:
            return
        past = [path for step, path in list_checkpoints(args.output_dir) if step <= state.global_step]
        complete = [path for path in past if find_defect(path) is None]
        kept = {*complete[-self.limit :], Path(state.best_model_checkpoint or ".")}
        for checkpoint in set(past) - kept:
            unseal(checkpoint)  # first, so that a kill in between leaves no checkpoint that looks whole
            shutil.rmtree(checkpoint)


class LoadWeightsMixin:
    """In front of a `Trainer`: resuming outside DeepSpeed loads the weights.

    transformers 5.17 saves Qwen2-VL under its Hub names (visual.*) but resumes by its names in memory
    (model.visual.*), without an error when none matches: the run would go on from the weights it started with.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:  # an adapter loads as it should
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())
