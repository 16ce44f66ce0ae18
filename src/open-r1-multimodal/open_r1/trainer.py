"""GRPO for vision-language models: TRL's trainer, with the rollouts this project's users need to see and trust."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from PIL import Image
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
from trl.models import unwrap_model_for_generation
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from open_r1.callbacks import LogRollouts
from open_r1.checkpoints import LoadWeightsMixin
from open_r1.data import open_image
from open_r1.grouping import (
    collapse_image_tokens,
    enable_grouping,
    encode_images,
    encode_prompt,
    pack,
    rows_by_prompt,
    shuffle_groups,
)
from open_r1.modeling import load_model, reset_generation_config, vision_token_ids
from open_r1.recipes import count_processes
from open_r1.reflection import analyse, shares
from open_r1.rewards import unique_names
from open_r1.rollout import generate
from open_r1.trajectories import append_rows, keep_rows

# TRL's own, which it checks in the first step
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


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

    shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Encode, prefill and score the prompt of a group once instead of once a completion. The numbers "
            "are the same; false falls back to TRL's path."
        },
    )

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: {self.loss_type!r} is none of {', '.join(LOSS_TYPES)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: completions are sampled; it must be above 0")
        self.resolve_accumulation()
        self.check_group_size()
        super().__post_init__()

    @property
    def world_size(self) -> int:
        """The processes of the run; before a launch, those that are planned."""
        return max(count_processes(), super().world_size)

    def resolve_accumulation(self) -> None:
        """Set `gradient_accumulation_steps` from `completions_per_step`; see its help."""
        if not self.completions_per_step or self.gradient_accumulation_steps > 1:
            return
        batch, processes = self.per_device_train_batch_size, count_processes()
        per_pass = batch * processes
        if self.completions_per_step % per_pass:
            below = self.completions_per_step // per_pass * per_pass
            fitting = [str(size) for size in (below, below + per_pass) if size]
            raise ValueError(
                f"completions_per_step {self.completions_per_step} is not a multiple of {per_pass} "
                f"(per_device_train_batch_size {batch} x {processes} processes); {' and '.join(fitting)} would fit"
            )
        self.gradient_accumulation_steps = self.completions_per_step // per_pass

    def check_group_size(self) -> None:
        """TRL's check, naming the sizes that fit.

        Raises:
            ValueError: when a rollout does not hold whole groups.
        """
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        size = self.generation_batch_size or self.per_device_train_batch_size * count_processes() * steps
        if self.num_generations < 2 or size % self.num_generations:
            fitting = ", ".join(str(group) for group in range(2, size + 1) if size % group == 0)
            raise ValueError(
                f"num_generations {self.num_generations}: a rollout of {size} completions "
                f"(per_device_train_batch_size x processes x accumulation) holds groups of {fitting or 'no size'}"
            )


def open_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every image path replaced by its decoded image."""
    return [
        {
            **message,
            "content": [
                {**part, "image": open_image(part["image"])} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    """The images in messages, in their order."""
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


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


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the seed and the epoch, so that a resumed run finds it again.

    TRL's draws epoch after epoch from one generator, which a resumed run would start from the first.
    """

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it at the start of every epoch, also of the one it resumes in."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class Qwen2VLGRPOTrainer(LoadWeightsMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` for Qwen2-VL, Qwen2.5-VL and Qwen3-VL, with the same signature.

    A dataset row holds `prompt` (conversational, text only), `images` (file paths, put in front of the text),
    `solution`, and whatever else the reward functions take. Beside TRL's behaviour:

    - every end-of-text id ends a completion, vision tokens are never sampled, and sampling settings come from
      `args` alone, never from the checkpoint's generation_config;
    - the prompt of a group is encoded, prefilled and scored once (`open_r1.grouping`, `open_r1.rollout`);
    - every completion goes to `{output_dir}/trajectories/{train,eval}.jsonl`, and a few are shown where the run
      reports to;
    - the log says how many completions reflect, and how many correct themselves (`open_r1.reflection`).

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
        self.reward_func_names = unique_names(self.reward_func_names)  # they are keys in log and trajectories
        # Tool calls put images and foreign tokens into completions; they stay on TRL's path.
        self.shared_prefix = getattr(args, "shared_prefix", True) and not (self.tools or self.rollout_func)
        if self.shared_prefix:
            enable_grouping(self._plain_model())
            tower = self._plain_model().base_model.visual
            self.tower_is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
            if self.ref_model is not None:
                enable_grouping(self.accelerator.unwrap_model(self.ref_model))
        self._rollout_seconds = 0.0  # of the optimiser step under way
        self.trajectory_dir = Path(args.output_dir) / "trajectories"
        self.last_rollout: list[dict[str, Any]] = []  # trajectory rows of all processes, the newest in training
        self.add_callback(ContinueRollouts(self))
        self.add_callback(LogRollouts(self))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        """TRL's, as an `EpochSampler`."""
        sampler = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return EpochSampler(**{name: getattr(sampler, name) for name in names})

    # The one place that sees a rollout's prompts, completions, rewards and advantages together. TRL has no public
    # hook there; tests/test_trainer.py fails when its contract changes.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        if self.shared_prefix:
            # The images go inside the prompts, as paths: rows without an `images` column keep TRL from preprocessing
            # every image again for every completion.
            rows = [
                {**row, "prompt": prepare_multimodal_messages(row["prompt"], images=row["images"])} for row in inputs
            ]
            for row in rows:
                del row["images"]
        else:
            images = {path: open_image(path) for path in {path for row in inputs for path in row["images"]}}
            rows = [{**row, "images": [images[path] for path in row["images"]]} for row in inputs]
        output = super()._generate_and_score_completions(rows)
        if self.shared_prefix:
            output["prompts"] = self._prompts
        self._save_trajectories(inputs, output["advantages"].tolist())
        return output

    # Keeps what TRL reduces to means: the texts, ids and every single reward of this process. Reward functions see
    # the rows as the dataset has them.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(self._rows, prompts, completions, completion_ids_list)  # (all B, funcs)
        start = self.accelerator.process_index * len(prompts)
        self._rollout = (completions, completion_ids_list, rewards[start : start + len(prompts)].tolist())
        return rewards

    # ---- The shared prefix: from here on each override does once a group what TRL does once a completion.

    def _plain_model(self) -> PreTrainedModel:
        """The policy without the wrappers of accelerate, DeepSpeed and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    # TRL's would decode and preprocess the prompt's images G times.
    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        if not self.shared_prefix:
            return super()._tokenize_prompts(prompts)
        self._prompts, self._images = [], []
        model = self._plain_model()
        for prompt, repeats in groupby(prompts):
            messages = open_images(prompt)
            encoded = encode_prompt(model, self.processing_class, messages, **self.chat_template_kwargs)
            count = len(list(repeats))
            self._prompts += [encoded] * count
            self._images += [images_of(messages)] * count
        return [prompt.input_ids.tolist() for prompt in self._prompts], None, {}

    # TRL's would encode and prefill the prompt G times; and it hands vLLM prompts whose image tokens are expanded,
    # which vLLM then expands again.
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args):
        with self._timed("rollout"):
            if not self.shared_prefix:
                output = super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *args)
            elif self.use_vllm:
                collapsed = [collapse_image_tokens(ids, self.processing_class.image_token_id) for ids in prompt_ids]
                output = super()._generate_single_turn(collapsed, self._images, {}, num_generations, *args)
            else:
                with unwrap_model_for_generation(
                    self.model_wrapped,
                    self.accelerator,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                ) as model:
                    groups = rows_by_prompt(self._prompts)
                    unique, repeats = [self._prompts[rows[0]] for rows in groups], [len(rows) for rows in groups]
                    if self.tower_is_frozen:
                        unique = [encode_images(self._plain_model(), prompt) for prompt in unique]
                        self._prompts = [p for p, count in zip(unique, repeats, strict=True) for _ in range(count)]
                    output = generate(model, unique, repeats, self.generation_config), None
        tokens = sum(len(ids) for ids in output[0])
        self._metrics[self._mode()]["rollout/tokens_per_second"].append(tokens / self._last_seconds)
        return output

    # TRL's runs the prompt through the model once a completion, padded on both sides.
    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        with nullcontext() if torch.is_grad_enabled() else self._timed("scoring"):
            if not self.shared_prefix:
                return super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
            completion_ids, completion_mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
            rows = len(input_ids)
            batch_size = batch_size or rows
            logps, entropies, packed_tokens = [], [], 0
            # One forward a micro-batch, however many prompts it holds: under ZeRO-3 all ranks must run as many.
            for start in range(0, rows, batch_size):
                part = slice(start, start + batch_size)
                batch = pack(self._prompts[part], completion_ids[part], completion_mask[part])
                with self.accelerator.autocast():
                    outputs = model(**batch.model_inputs, shift_labels=batch.labels, fused_lm_head=True)
                logps.append(batch.unpack(outputs.log_probs))  # (b, C)
                if compute_entropy:
                    entropies.append(batch.unpack(outputs.entropy))
                packed_tokens += batch.model_inputs["input_ids"].numel()
            saved = 1 - packed_tokens / input_ids.numel()
            self._metrics[self._mode()]["packing/tokens_saved"].append(saved)
            return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    # Tells the scoring above whose completions a micro-batch holds; TRL's signature has no place for it.
    def _compute_loss(self, model, inputs):
        if self.shared_prefix:
            self._prompts = inputs["prompts"]
        return super()._compute_loss(model, inputs)

    # TRL's shuffles completions across micro-batches, which would scatter the groups.
    def _prepare_inputs(self, generation_batch):
        if not (self.shared_prefix and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = shuffle_groups(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

    # ---- What is logged and left behind

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Log the seconds of the block as `time/{name}`."""
        synchronize = torch.cuda.synchronize if self.accelerator.device.type == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self._last_seconds = time.perf_counter() - start
        if self.model.training:
            self._rollout_seconds += self._last_seconds
        self._metrics[self._mode()][f"time/{name}"].append(self._last_seconds)

    def training_step(self, model, inputs, num_items_in_batch):
        """TRL's, and the log of what is left of a step's seconds beside rollout and scoring."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            metrics["time/update"].append(metrics["step_time"][-1] - self._rollout_seconds)
            self._rollout_seconds = 0.0
        return loss

    def _save_trajectories(self, inputs: list[dict[str, Any]], advantages: list[float]) -> None:
        """Write this rollout's completions, those of all processes in order, from the main process; log reflections."""
        mode = self._mode()
        # A rollout in training serves the step under way, which the log counts when it is done.
        step = self.state.global_step + (mode == "train")
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        prompts = []
        for (prompt, images), repeats in groupby(inputs, key=itemgetter("prompt", "images")):
            messages = prepare_multimodal_messages(prompt, images=images)
            rendered = self.processing_class.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
            prompts += [rendered] * len(list(repeats))
        rows = []
        for row, prompt, completion, ids, rewards, advantage in zip(
            inputs, prompts, *self._rollout, advantages, strict=True
        ):
            text = completion[0]["content"]
            options = row.get("options") or None
            reflection = analyse(text, options)
            rows.append(
                {
                    "step": step,
                    "prompt": prompt,
                    "images": row["images"],
                    "solution": row.get("solution"),
                    "options": options,
                    "completion": text,
                    # a reward function that has nothing to say about a completion returns None, TRL's NaN
                    "rewards": {
                        name: None if math.isnan(reward) else reward
                        for name, reward in zip(self.reward_func_names, rewards, strict=True)
                    },
                    "advantage": advantage,
                    "length": len(ids),
                    "ended": ids[-1] in self.eos_token_ids,
                    "reflections": reflection.spans,
                    "considered": reflection.considered,
                    "self_corrected": reflection.self_corrected,
                }
            )
        rows = gather_object(rows)
        for index, row in enumerate(rows):
            row["group"] = index // group_size
        for name, value in shares(rows).items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self.last_rollout = rows
        if self.accelerator.is_main_process:
            append_rows(self.trajectory_dir / f"{mode}.jsonl", rows)


def ban_tokens(ids: list[int], use_vllm: bool) -> dict[str, Any]:
    """Generation settings that give `ids` no probability, in the words of the rollout's backend."""
    return {"logit_bias": dict.fromkeys(ids, -100.0)} if use_vllm else {"suppress_tokens": ids}
