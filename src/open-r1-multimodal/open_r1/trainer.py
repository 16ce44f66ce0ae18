"""GRPO for vision-language models: TRL's trainer, with the rollouts this project's users need to see and trust."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.grpo_trainer import RewardFunc

from open_r1.modeling import load_model, reset_generation_config, vision_token_ids
from open_r1.trajectories import append_rows, keep_rows


@dataclass
class Qwen2VLGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` and what this trainer adds to it."""

    completions_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Completions in one optimiser step over all processes. When set, gradient_accumulation_steps "
            "follows from it, per_device_train_batch_size and the number of processes, so that a recipe means the "
            "same on any number of GPUs. An explicit gradient_accumulation_steps above 1 wins."
        },
    )

    def __post_init__(self):
        self.resolve_accumulation()
        super().__post_init__()

    def resolve_accumulation(self) -> None:
        """Set `gradient_accumulation_steps` from `completions_per_step`; see its help."""
        if not self.completions_per_step or self.gradient_accumulation_steps > 1:
            return
        per_pass = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))
        if self.completions_per_step % per_pass:
            raise ValueError(
                f"completions_per_step {self.completions_per_step} is not a multiple of {per_pass} "
                "(per_device_train_batch_size x processes); change one of them"
            )
        self.gradient_accumulation_steps = self.completions_per_step // per_pass


def open_image(path: str) -> Image.Image:
    """Decode an image file to RGB and close it.

    Raises:
        OSError: one line that names the file, when it is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white instead of scaling it
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except OSError as error:
        raise OSError(f"image {path}: {error}; run prepare_dataset.sh again") from error


class ContinueRollouts(TrainerCallback):
    """At the start of a run, resumed or not, put the rollouts where the checkpoint's step says they are."""

    def __init__(self, trainer: "Qwen2VLGRPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Count from the checkpoint's step, and drop the trajectories of steps that are about to be repeated."""
        # TRL counts micro-batches from 0 after a resume, and would then take the wrong slice of a rollout
        # whenever one rollout serves several steps.
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        if not state.is_world_process_zero:
            return
        for path in sorted(self.trainer.trajectory_dir.glob("*.jsonl")):
            if dropped := keep_rows(path, lambda row: row["step"] <= state.global_step):
                print(f"{path}: dropped {dropped} lines after step {state.global_step}, which this run repeats")


class Qwen2VLGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with the same signature.

    A dataset row holds `prompt` (conversational, text only), `images` (file paths, put in front of the text),
    `solution`, and whatever else the reward functions take. Beside TRL's behaviour:

    - every end-of-text id ends a completion, vision tokens are never sampled, and sampling settings come from
      `args` alone, never from the checkpoint's generation_config;
    - every completion goes to `{output_dir}/trajectories/{train,eval}.jsonl`.

    Args:
        model: Hub name or folder (loaded by `open_r1.modeling.load_model` with `args.model_init_kwargs`) or a model.
        reward_funcs: see TRL; callables of `open_r1.rewards` among them.
        args: TRL's configuration or `Qwen2VLGRPOConfig`.
        train_dataset, eval_dataset, processing_class, kwargs: see TRL.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, str):
            model = load_model(model, **((args and args.model_init_kwargs) or {}))
        if args is None:
            args = Qwen2VLGRPOConfig(f"{Path(model.config.name_or_path).name}-GRPO")
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(model.config.name_or_path, padding_side="left")
        reset_generation_config(model, processing_class)
        args.generation_kwargs = {
            **ban_tokens(vision_token_ids(processing_class), args.use_vllm),
            **(args.generation_kwargs or {}),
        }
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.trajectory_dir = Path(args.output_dir) / "trajectories"
        self.add_callback(ContinueRollouts(self))

    # transformers saves Qwen2-VL under its Hub names (visual.*) but resumes by its names in memory (model.visual.*),
    # without an error when none matches: outside DeepSpeed a run would go on from the weights it started with.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())

    # The one place that sees a rollout's prompts, completions, rewards and advantages together. TRL has no public
    # hook there; tests/test_trainer.py fails when its contract changes.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        images = {path: open_image(path) for path in {path for row in inputs for path in row["images"]}}
        output = super()._generate_and_score_completions(
            [{**row, "images": [images[path] for path in row["images"]]} for row in inputs]
        )
        self._save_trajectories(inputs, output["advantages"].tolist())
        return output

    # Keeps what TRL reduces to means: the texts, ids and every single reward of this process.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (processes*B, funcs)
        start = self.accelerator.process_index * len(prompts)
        self._rollout = (completions, completion_ids_list, rewards[start : start + len(prompts)].tolist())
        return rewards

    def _save_trajectories(self, inputs: list[dict[str, Any]], advantages: list[float]) -> None:
        """Write this rollout's completions, those of all processes in order, from the main process."""
        mode = "train" if self.model.training else "eval"
        # A rollout in training serves the step under way, which the log counts when it is done.
        step = self.state.global_step + (mode == "train")
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        rows = []
        for row, completion, ids, rewards, advantage in zip(inputs, *self._rollout, advantages, strict=True):
            messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
            rendered = self.processing_class.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
            rows.append(
                {
                    "step": step,
                    "prompt": rendered,
                    "images": row["images"],
                    "solution": row.get("solution"),
                    "completion": completion[0]["content"],
                    "rewards": dict(zip(self.reward_func_names, rewards, strict=True)),
                    "advantage": advantage,
                    "length": len(ids),
                    "ended": ids[-1] in self.eos_token_ids,
                }
            )
        rows = gather_object(rows)
        if self.accelerator.is_main_process:
            for index, row in enumerate(rows):
                row["group"] = index // group_size
            append_rows(self.trajectory_dir / f"{mode}.jsonl", rows)


def ban_tokens(ids: list[int], use_vllm: bool) -> dict[str, Any]:
    """Generation settings that give `ids` no probability, in the words of the rollout's backend."""
    return {"logit_bias": {str(i): -100.0 for i in ids}} if use_vllm else {"suppress_tokens": ids}
