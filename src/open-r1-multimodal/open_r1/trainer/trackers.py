"""Shows a few rollouts where a run reports to: Weights & Biases, Trackio and TensorBoard.

These get the scalars from transformers' own callbacks, under its names for them: `train/reward`, `eval/reward`. After a
resume they show repeated steps twice; `log.jsonl` holds every step once.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from open_r1.base.images import BrokenImage, open_image
from open_r1.reporting.card import MAX_SHOWN_CHARS, code_block

SHOWN_ROLLOUTS = 10  # in a whole run, beside the first
MAX_SHOWN_PIXELS = 512  # a side


class LogRollouts(TrainerCallback):
    """Show the first group of a rollout, its image and its completions, where the run reports to.

    It does so at the first logged step of a session and then at the first one after every tenth of `max_steps`.

    Args:
        trainer: its `recorder` has the trajectory rows of its newest rollout in training.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next logged step is the first."""
        self.due = 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Show a group when one is due."""
        if not state.is_world_process_zero or "loss" not in logs or state.global_step < self.due:
            return
        every = max(state.max_steps // SHOWN_ROLLOUTS, 1)
        self.due = (state.global_step // every + 1) * every
        callbacks = self.trainer.callback_handler.callbacks
        rows = [row for row in self.trainer.recorder.newest if row["group"] == 0]
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback):
                show_in_tensorboard(callback.tb_writer, rows, state.global_step)
            elif isinstance(callback, WandbCallback):
                show_as_table("wandb", rows, state.global_step)
            elif isinstance(callback, TrackioCallback):
                show_as_table("trackio", rows, state.global_step)


def shown_images(paths: Sequence[str]) -> list[Image.Image]:
    """The images of a prompt that are files, no larger than needed to see what they show."""
    images = []
    for path in paths:
        try:
            image = open_image(path)
        except BrokenImage:  # one that was never a file, or was deleted since
            continue
        image.thumbnail((MAX_SHOWN_PIXELS, MAX_SHOWN_PIXELS))
        images.append(image)
    return images


def show_in_tensorboard(writer: Any, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """One group as a text and images."""
    writer.add_text("rollout", rollout_markdown(rows), step)
    for number, image in enumerate(shown_images(rows[0]["images"]), start=1):
        writer.add_image(f"rollout/image_{number}", np.asarray(image), step, dataformats="HWC")


def show_as_table(module: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """One group as a table, a row a completion. Its texts are cells, which W&B and Trackio never render as HTML.

    Args:
        module: "wandb" or "trackio", whose tables and images are made alike.
        rows: of the group.
        step: of training.
    """
    tracker = importlib.import_module(module)
    images = [tracker.Image(image) for image in shown_images(rows[0]["images"])]
    columns = ["step", *(f"image_{number}" for number in range(1, len(images) + 1)), "prompt", "solution", "completion"]
    columns += [*rows[0]["rewards"], "advantage", "length"]
    cells = []
    for row in rows:
        texts = [text[:MAX_SHOWN_CHARS] for text in (row["prompt"], str(row["solution"]), row["completion"])]
        cells.append([step, *images, *texts, *row["rewards"].values(), row["advantage"], row["length"]])
    tracker.log({"rollout": tracker.Table(columns=columns, data=cells), "train/global_step": step})


def rollout_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One group's prompt, solution and completions; all texts in code blocks, where markup means nothing."""
    first = rows[0]
    parts = [f"prompt\n\n{code_block(first['prompt'])}", f"solution\n\n{code_block(str(first['solution']))}"]
    for number, row in enumerate(rows, start=1):
        figures = {**row["rewards"], "advantage": row["advantage"]}
        values = ", ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in figures.items())
        parts.append(f"completion {number}: {values}\n\n{code_block(row['completion'])}")
    return "\n\n".join(parts)


def as_text(prompt: list[dict[str, Any]] | str) -> list[dict[str, Any]] | str:
    """A prompt whose messages are texts: W&B's tables, into which TRL puts prompts, take no messages in parts."""
    if isinstance(prompt, str):
        return prompt
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": "".join(part.get("text") or f"<{part['type']}>" for part in message["content"])}
        for message in prompt
    ]
