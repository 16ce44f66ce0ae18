"""Callbacks of a GRPO run: rollouts after a resume, a check of vLLM at the start, a last evaluation without images."""

import math
import sys
from itertools import islice
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import GenerationConfig, TrainerCallback
from transformers.trainer_utils import has_length
from trl import GRPOConfig, GRPOTrainer

from open_r1.base.files import keep_rows
from open_r1.base.images import open_image
from open_r1.engines import agreement
from open_r1.engines.shared_prefix import encode_prompt, images_of, score_completions
from open_r1.engines.vllm_backends import engine_dtype, sampling_plainly
from open_r1.running.machines import decide_once
from open_r1.trainer.metrics import BLIND
from open_r1.trainer.rows import put_images, with_images_inside
from open_r1.trainer.sampling import PassRates


def micro_batches(steps: int, args: GRPOConfig, dataloader: DataLoader | None) -> int:
    """How many micro-batches a process has trained on after so many optimiser steps.

    The last step of an epoch has what is left, maybe fewer than `gradient_accumulation_steps`.
    """
    if not has_length(dataloader):  # of a stream
        return steps * args.gradient_accumulation_steps
    epochs, rest = divmod(steps, max(math.ceil(len(dataloader) / args.gradient_accumulation_steps), 1))
    return epochs * len(dataloader) + rest * args.gradient_accumulation_steps


class OfTrainer(TrainerCallback):
    """A callback that acts on its trainer."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer


class ContinueRollouts(OfTrainer):
    """After a resume, sets TRL's count of micro-batches to the checkpoint's step, and drops trajectories behind it."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Count from the checkpoint's step, and drop the trajectories of steps that come again."""
        # TRL counts micro-batches from 0 after a resume, and would then take the wrong slice of a
        # rollout whenever one rollout serves several steps.
        self.trainer._step = micro_batches(state.global_step, args, kwargs.get("train_dataloader"))
        if not state.is_world_process_zero:
            return
        if args.sync_ref_model and state.global_step:
            print(
                "warning: sync_ref_model: a checkpoint does not hold the reference model; it is the base model again",
                file=sys.stderr,
            )
        window = args.steps_per_generation * args.num_iterations
        if used := self.trainer._step % window:
            print(
                f"warning: a rollout serves {window} micro-batches, and this run goes on after {used} of them. A "
                "checkpoint does not hold the rest: its prompts are asked anew, and what follows differs from what an "
                "undisturbed run would have done (save_steps that end with a rollout avoid it)",
                file=sys.stderr,
            )
        for path in sorted(self.trainer.recorder.folder.glob("*.jsonl")):
            if dropped := keep_rows(path, lambda row: 0 < state.global_step >= row["step"]):
                print(f"{path}: dropped {dropped} lines after step {state.global_step}, which this run repeats")


class RememberPassRates(OfTrainer):
    """Start a run with the pass rates of its step; leave them beside checkpoints and at the end."""

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        self.trainer.pass_rates = decide_once(lambda: PassRates.of_run(folder, state.global_step))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.pass_rates.save(Path(args.output_dir))

    on_train_end = on_save


class CheckEngine(OfTrainer):
    """Before the first step, checks that vLLM samples from the policy (`check_engine`)."""

    def on_train_begin(self, args, state, control, **kwargs):
        check_engine(self.trainer)


@torch.no_grad()
def check_engine(trainer: GRPOTrainer) -> None:
    """Compare an engine's log-probabilities of a few completions with the policy's (`agreement`).

    Raises:
        Mistake: they differ.
    """
    trainer.vllm_generation.sync_weights()  # a resumed policy is not the one that it has loaded
    policy, device, group = trainer.plain_model(), trainer.accelerator.device, trainer._group_size()
    encoded, prompts = [], []
    for row in islice(trainer.train_dataset, agreement.PROMPTS):
        prompt = with_images_inside(row)["prompt"]
        if not isinstance(prompt, str):
            prompt = put_images(prompt, [open_image(image) for image in images_of(prompt)])
        encoded.append(trainer.backend.encode(prompt))
        # encoded once more, by the policy's processor: the backend's own may be the mistake
        own = encode_prompt(policy, trainer.processing_class, prompt, **trainer.chat_template_kwargs)
        prompts += [own] * group
    longest = min(agreement.TOKENS, trainer.max_completion_length)
    settings = GenerationConfig(max_new_tokens=longest, eos_token_id=trainer.eos_token_ids)
    with sampling_plainly(trainer.vllm_generation):
        answer = trainer.backend.generate(encoded, [group] * len(encoded), settings)
    rows = [torch.tensor(ids, device=device) for ids in answer.ids]
    ids = pad_sequence(rows, batch_first=True)  # (B, C)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    was_training, dtype = trainer.model.training, engine_dtype(trainer.args, policy.dtype)
    trainer.model.eval()  # dropout is no rounding
    with trainer.accelerator.autocast():
        scored, *_ = score_completions(trainer.model, trainer.family, prompts, ids, mask, len(prompts))
    exact = scored
    if dtype != "float32":
        with trainer.borrow_model() as model, agreement.InFloat32(device):
            exact, *_ = score_completions(model, trainer.family, prompts, ids, mask, len(prompts))
    trainer.model.train(was_training)
    for metrics in trainer._metrics.values():  # none of it is a step's or an evaluation's
        metrics.clear()
    known = [row[: len(ids)] for row, ids in zip(scored.tolist(), answer.ids, strict=True)]
    sums = torch.cat([agreement.difference(logps, exact) for logps in (answer.logprobs, known)])  # (4,)
    sums = trainer.accelerator.reduce(sums.to(device), reduction="sum").tolist()
    mean, rounding = (total / max(count, 1) for total, count in (sums[:2], sums[2:]))
    agreement.check_agreement(mean, rounding, dtype)


class AskBlind(OfTrainer):
    """After the last step ask the held-out questions once without their images.

    The report compares them. Logged as `blind_...`, and written to `blind.jsonl`.
    """

    def on_train_end(self, args, state, control, **kwargs):
        if self.trainer.eval_dataset is not None and args.eval_strategy != "no":
            self.trainer.evaluate(metric_key_prefix=BLIND)
