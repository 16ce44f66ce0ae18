"""Callbacks of a GRPO run: where its rollouts go on, whether its engine samples from the policy, a last evaluation."""

import math
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from trl import GRPOConfig, GRPOTrainer

from open_r1.base.files import keep_rows
from open_r1.running.machines import decide_once
from open_r1.trainer.sampling import PassRates


def micro_batches(steps: int, args: GRPOConfig, dataloader: DataLoader | None) -> int:
    """How many micro-batches a process has trained on after so many optimiser steps.

    The last step of an epoch has what is left of it, which may be fewer than `gradient_accumulation_steps`.
    """
    if not has_length(dataloader):  # of a stream
        return steps * args.gradient_accumulation_steps
    epochs, rest = divmod(steps, max(math.ceil(len(dataloader) / args.gradient_accumulation_steps), 1))
    return epochs * len(dataloader) + rest * args.gradient_accumulation_steps


class ContinueRollouts(TrainerCallback):
    """At the start of a run, resumed or not, put the rollouts where the checkpoint's step says they are."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count from the checkpoint's step, and drop the trajectories of steps that are about to be repeated."""
        # TRL counts micro-batches from 0 after a resume, and would then take the wrong slice of a rollout
        # whenever one rollout serves several steps.
        self.trainer._step = micro_batches(state.global_step, args, kwargs.get("train_dataloader"))
        if not state.is_world_process_zero:
            return
        window = args.steps_per_generation * args.num_iterations
        if used := self.trainer._step % window:
            print(
                f"warning: a rollout serves {window} micro-batches, and this run goes on after {used} of them. A "
                "checkpoint does not hold the rest: its prompts are asked anew, and what follows differs from what an "
                "undisturbed run would have done (save_steps that end with a rollout avoid it)",
                file=sys.stderr,
            )
        for path in sorted(self.trainer.recorder.folder.glob("*.jsonl")):
            if dropped := keep_rows(path, lambda row: row["step"] <= state.global_step):
                print(f"{path}: dropped {dropped} lines after step {state.global_step}, which this run repeats")


class RememberPassRates(TrainerCallback):
    """Start a run, resumed or not, with the pass rates of its step; leave them beside checkpoints and at the end."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        folder = Path(args.output_dir)
        self.trainer.pass_rates = decide_once(lambda: PassRates.of_run(folder, state.global_step))

    def on_save(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            self.trainer.pass_rates.save(Path(args.output_dir), state.global_step)

    on_train_end = on_save


class CheckEngine(TrainerCallback):
    """Before the first step, resumed or not, see that an engine beside the policy samples from it."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.trainer.check_engine()


class AskBlind(TrainerCallback):
    """After the last step, ask the held-out questions once without their images, for the report to compare."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer

    def on_train_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.trainer.eval_dataset is not None and args.eval_strategy != "no":
            self.trainer.evaluate_blind()
