"""GRPO for vision-language models: TRL's trainer, with the rollouts this project's users need to see and trust."""

import json
import math
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import has_length
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import get_config_model_id, split_tensor_dict

from open_r1 import agreement
from open_r1.backends import Backend, TransformersBackend
from open_r1.checkpoints import LoadWeightsMixin
from open_r1.configs import Qwen2VLGRPOConfig, SignalArguments, check_settings, check_shared_prefix
from open_r1.data import ROTATION_OF, most_broken, warn_of_unshown
from open_r1.decoding import check_generation, with_tokens
from open_r1.families import end_token_ids, family_of, vision_token_ids
from open_r1.files import append_rows, keep_rows
from open_r1.finite import FiniteMixin
from open_r1.front_door import Mistake, printable
from open_r1.heldout import NamedEvaluationMixin, check_best, held_out_figures
from open_r1.images import BrokenImage, ImageSource, image_name, open_image
from open_r1.machines import decide_once
from open_r1.modeling import (
    accept_missing_images,
    check_model_files,
    check_weights,
    load_processor,
    reset_generation_config,
)
from open_r1.perception import add_noise, batch_mean, mask_prompt, noise_step, perception_kl, seeded, split_halves
from open_r1.reflection import analyse, reflection_shares
from open_r1.rewards import completion_text, guarded
from open_r1.sampling import (
    EpochSampler,
    PassRates,
    draw_prompts,
    find_signal,
    find_swaps,
    merge_rollouts,
    replace_prompts,
    shuffle_groups,
)
from open_r1.shared_prefix import Prompt, enable_grouping, encode_prompt, images_of, pack, rows_by_prompt
from open_r1.trackers import LogRollouts
from open_r1.trajectories import Completion
from open_r1.vllm_backends import (
    TrainerVLLMBackend,
    adapted_weights,
    banned,
    check_adapter,
    engine_dtype,
    engine_settings,
    engines_with,
)

TOKENS = "tokens"  # of each batch of an evaluation; a private entry of TRL's metrics, never logged
PER_TOKEN = ("kl", "entropy")  # metrics that are a mean over a batch's tokens
ROW = "training_row"  # the column with a row's number, where prompts are drawn by it


def row_images(row: dict[str, Any]) -> list[ImageSource]:
    """The images of a dataset's row, by TRL's rule: those of `images` where there is such a column, else `image`."""
    if "images" in row:
        return list(row["images"] or [])
    return [] if row.get("image") is None else [row["image"]]


def put_images(messages: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """The messages with these images in place of their own."""
    following = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(following)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def with_images_inside(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose images are parts of its prompt.

    Raises:
        ValueError: for images beside a prompt that is rendered text, and for parts that are neither image nor text.
    """
    images = row_images(row)
    if not is_conversational(row):
        if images:
            raise ValueError("prompt: a text has no place for images; give a conversation ([{role, content}])")
        return row
    prompt = prepare_multimodal_messages(row["prompt"], images=images)
    kinds = {part["type"] for message in prompt for part in message.get("content") or []}
    if others := sorted(kinds - {"image", "text"}):
        raise ValueError(
            f"prompt: a part of type {others[0]} is not shown to the model; of a video give frames as images"
        )
    return {**{name: value for name, value in row.items() if name not in ("image", "images")}, "prompt": prompt}


def without_images(row: dict[str, Any]) -> dict[str, Any]:
    """The row as if it had no images."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
            for message in prompt
        ]
    nothing = {name: value for name, value in (("images", []), ("image", None)) if name in row}
    return {**row, **nothing, "prompt": prompt}


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


def text_or_none(value: Any) -> str | None:
    """A value for a trajectory's row."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


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

    def __init__(self, trainer: "Qwen2VLGRPOTrainer"):
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
        for path in sorted(self.trainer.trajectory_dir.glob("*.jsonl")):
            if dropped := keep_rows(path, lambda row: row["step"] <= state.global_step):
                print(f"{path}: dropped {dropped} lines after step {state.global_step}, which this run repeats")


class RememberPassRates(TrainerCallback):
    """Start a run, resumed or not, with the pass rates of its step; leave them beside checkpoints and at the end."""

    def __init__(self, trainer: "Qwen2VLGRPOTrainer"):
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

    def __init__(self, trainer: "Qwen2VLGRPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        self.trainer.check_engine()


class AskBlind(TrainerCallback):
    """After the last step, ask the held-out questions once without their images, for the report to compare."""

    def __init__(self, trainer: "Qwen2VLGRPOTrainer"):
        self.trainer = trainer

    def on_train_end(self, args: GRPOConfig, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if self.trainer.eval_dataset is not None and args.eval_strategy != "no":
            self.trainer.evaluate_blind()


@dataclass
class Rollout:
    """One generation step of this process, on its way from prompts to trajectories. B rows.

    Attributes:
        rows: as the dataset has them.
        is_broken: which have an image that could not be opened.
        given: the rows as TRL got them.
        prompts: encoded once each, where the prefix is shared.
        completions, ids: what was sampled, as reward functions get it.
        rewards: of each row one a function; NaN for none.
        refill: which pass it is of those that make one generation step.
    """

    rows: list[dict[str, Any]]
    is_broken: list[bool]
    refill: int = 0
    given: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)


class Qwen2VLGRPOTrainer(FiniteMixin, LoadWeightsMixin, NamedEvaluationMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` for the models of `open_r1.families`, with the same signature, defaults and datasets.

    A dataset row holds `prompt`, conversational or (without images) a text; `images` or `image`, if any, as whatever
    `open_r1.images` opens, which go in front of the text; and whatever else the reward functions take. Beside TRL's
    behaviour:

    - every end-of-text id ends a completion, vision tokens are never sampled, and sampling settings come from
      `args` alone, never from the checkpoint's generation_config; one that cannot act is refused (`open_r1.decoding`);
    - the prompt of a group is encoded, prefilled and scored once (`open_r1.shared_prefix`, `open_r1.rollout`);
    - rows with and without images may be mixed, in any number of processes;
    - images may be masked in a term of the loss, or noised in half of a rollout (`open_r1.perception`);
    - an image that cannot be opened any more ends no run: completions about it earn nothing and are counted, up to
      `data.most_broken`;
    - a loss or gradient that is no number ends it before the weights are spoiled (`open_r1.finite`);
    - the figures of an evaluation are over its questions, each once, and of several sets each has its own
      (`open_r1.heldout`);
    - groups without signal can be replaced by others, and prompts that never or always succeed be asked less
      (`SignalArguments` of `open_r1.configs`);
    - every completion goes to `{output_dir}/trajectories/{train,eval,blind}.jsonl`, and a few are shown where the
      run reports to;
    - the log says how many completions reflect, and how many correct themselves (`open_r1.reflection`).

    Args:
        model: Hub name or folder (loaded by TRL, in float32 unless `args.model_init_kwargs` says otherwise) or a model.
        reward_funcs: see TRL; callables of `open_r1.rewards` among them.
        args: TRL's configuration or `Qwen2VLGRPOConfig`.
        train_dataset, eval_dataset, processing_class, more, kwargs: see TRL.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *more: Any,
        **kwargs: Any,
    ):
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = Qwen2VLGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        shared_prefix = getattr(args, "shared_prefix", True)
        check_settings(args, shared_prefix, streams=isinstance(train_dataset, IterableDataset))
        check_best(args.metric_for_best_model, eval_dataset)
        self.signal = args if isinstance(args, SignalArguments) else SignalArguments()
        if self.signal.signal_settings and isinstance(train_dataset, Dataset):
            train_dataset = train_dataset.add_column(ROW, list(range(len(train_dataset))))
        revision = (args.model_init_kwargs or {}).get("revision") or "main"
        # TRL loads the reference by the policy's name, too, where there is no adapter to leave out
        if isinstance(model, str) or (args.beta and not (kwargs.get("peft_config") or is_peft_model(model))):
            check_model_files(name, revision)
            check_weights(name, revision)
        if processing_class is None:
            processing_class = load_processor(name, revision=revision)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        check_generation(args.generation_kwargs, len(tokenizer), args.use_vllm)
        never = vision_token_ids(processing_class)
        if args.use_vllm:
            # TRL loads a model given by its name in float32, if it is told nothing else
            own = (args.model_init_kwargs or {}).get("dtype", "float32") if isinstance(model, str) else model.dtype
            end, ban = "stop_token_ids", {"logit_bias": banned(never)}
            settings = engine_settings(processing_class, engine_dtype(args, own))
            # Not quantised where the policy is, as TRL would have it: it is handed whole weights (`adapted_weights`).
            engines = engines_with(quantization=None, **settings)
        else:
            end, ban, engines = "eos_token_id", {"suppress_tokens": never}, nullcontext()
        args.generation_kwargs = with_tokens(args.generation_kwargs, end, end_token_ids(processing_class), ban)
        with engines:
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *more, **kwargs)
        if self.use_vllm and is_peft_model(self.vllm_generation.model):
            check_adapter(self.vllm_generation.model)
            self.vllm_generation._iter_named_params = partial(adapted_weights, self.vllm_generation)
        if self.accelerator.is_main_process:
            warn_of_unshown(train_dataset, eval_dataset)
        plain, reference = self._plain_model(), self.ref_model and self.accelerator.unwrap_model(self.ref_model)
        self.family = family_of(plain)
        reset_generation_config(plain, processing_class)
        self.eos_token_ids = args.generation_kwargs[end]
        if self.use_vllm:  # TRL tells its engine alone
            settings = {"max_new_tokens": self.max_completion_length, "eos_token_id": self.eos_token_ids}
            self.generation_config = GenerationConfig(**settings)
        self.reward_func_names = told_apart(self.reward_func_names)
        # Tool calls put images and foreign tokens into completions; they stay on TRL's path.
        self.shared_prefix = shared_prefix and self._is_vlm and not (self.tools or self.rollout_func)
        check_shared_prefix(args, self.shared_prefix)
        self.papo_coef, self.rollout_noise = (getattr(args, name, 0.0) for name in ("papo_coef", "rollout_noise"))
        encodes_once = self.shared_prefix and not self.use_vllm and not self.family.trains_vision(plain)
        if self.papo_coef and self.accelerator.num_processes > 1:
            encodes_once = False  # masked images run the tower, and then all processes must in every pass
        if self.shared_prefix:
            self.backend = self.make_backend(keep_features=encodes_once)
            self.rollout_func = self._roll_out  # TRL's seam for those who generate otherwise
        for each in filter(None, (plain, reference)):
            accept_missing_images(each, always_encode=self.accelerator.num_processes > 1 and not encodes_once)
            if self.shared_prefix:
                enable_grouping(each)
        self._rollout_seconds = 0.0  # of the optimiser step under way
        self.trajectory_dir = Path(args.output_dir) / "trajectories"
        self.last_rollout: list[dict[str, Any]] = []  # trajectory rows of all processes, the newest in training
        self.pass_rates = PassRates()  # equal in all processes
        self._is_blind = False  # whether the evaluation under way shows no images
        self._held_out: list[dict[str, Any]] = []  # trajectory rows of the evaluation under way
        self._held_out_left = math.inf  # how many it has still to see
        self._broken_images: set[str] = set()  # what is wrong with each, of all processes since the start
        prompts = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else 0
        self._most_broken = most_broken(prompts)
        self.add_callback(ContinueRollouts(self))
        if self.signal.signal_settings:
            self.add_callback(RememberPassRates(self))
        if self.use_vllm and self.shared_prefix:
            self.add_callback(CheckEngine(self))
        self.add_callback(LogRollouts(self))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        """TRL's, as an `EpochSampler`; both orders of a question come before one process."""
        sampler = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        together = 2 if ROTATION_OF in (getattr(sampler.data_source, "column_names", None) or []) else 1
        return EpochSampler(**{name: getattr(sampler, name) for name in names}, together=together)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """TRL's. An evaluation begins here: what its processes get beyond its questions, to be even, will not count."""
        dataloader = super().get_eval_dataloader(eval_dataset)
        dataset = dataloader.dataset
        self._held_out = []
        self._held_out_left = len(dataset) * self.num_generations_eval if isinstance(dataset, Dataset) else math.inf
        return dataloader

    # TRL sends an engine beside the policy the weights of a new step, and these belong to an old one.
    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._last_loaded_step = -1

    def evaluate_blind(self) -> None:
        """Ask the held-out questions without their images; logged as `blind_...`, written to `blind.jsonl`."""
        self._is_blind = True
        try:
            self.evaluate(metric_key_prefix="blind")
        finally:
            self._is_blind = False

    # The one place that sees a rollout's prompts, completions, rewards and advantages together. TRL has no public
    # hook there; tests/test_trainer.py fails when its contract changes.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]], refill: int = 0) -> dict[str, Any]:
        if self._is_blind:
            inputs = [without_images(row) for row in inputs]
        rollout = self._rollout = Rollout(inputs, [False] * len(inputs), refill)
        if self.shared_prefix:
            # The images go inside the prompts, as they are: rows without an `images` column keep TRL from
            # preprocessing every image again for every completion. Neighbours share one prompt, which is copied once.
            rows = []
            for _, group in groupby(inputs, key=lambda row: (row["prompt"], row_images(row))):
                group = list(group)
                prompt = with_images_inside(group[0])["prompt"]
                rows += [{**with_images_inside(row), "prompt": prompt} for row in group]
        else:
            rows = [{**row, "images": self._open(row_images(row), [index])} for index, row in enumerate(inputs)]
            if not any(row["images"] for row in rows):
                rows = [{name: row[name] for name in row if name not in ("image", "images")} for row in rows]
        rollout.given = [dict(row) for row in rows]
        output = super()._generate_and_score_completions(rows)
        if self.shared_prefix:
            output["prompts"] = rollout.prompts
        if self.papo_coef and self.model.training:
            output["masked_logps"] = self._score_masked(output)
        self._save_trajectories(rollout, output)
        return output

    # Keeps what TRL reduces to means: the texts, ids and every single reward of this process. Reward functions see
    # the rows as the dataset has them, and what a rollout function of the user's added to them.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollout = self._rollout
        rows = [
            {**row, **{name: now[name] for name in now if name not in given or now[name] is not given[name]}}
            for row, given, now in zip(rollout.rows, rollout.given, inputs, strict=True)
        ]
        own = self.reward_funcs  # which stay what the user gave
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else guarded(reward, name)
            for reward, name in zip(own, self.reward_func_names, strict=True)
        ]
        try:
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)  # (all B, funcs)
        finally:
            self.reward_funcs = own
        if rewards.isnan().all() and self._mode() == "train":
            names = ", ".join(self.reward_func_names)
            raise Mistake(f"reward_funcs: no completion of a step got a reward, only None ({names})")
        is_broken = self.accelerator.gather(torch.tensor(rollout.is_broken, device=rewards.device))  # (all B,)
        if is_broken.any():
            rewards[is_broken] = torch.nan  # TRL's word for: no advantage, and no part in a mean
            self._metrics[self._mode()]["broken_images/completions"].append(is_broken.sum().item())
            self._broken_images.update(gather_object(sorted(self._broken_images)))
            if len(self._broken_images) > self._most_broken:
                raise Mistake(
                    f"{len(self._broken_images)} images broke during training (allowed: {self._most_broken}); "
                    f"restore the data; one of them: {min(self._broken_images)}"
                )
        start = self.accelerator.process_index * len(prompts)
        rollout.completions, rollout.ids = completions, completion_ids_list
        rollout.rewards = rewards[start : start + len(prompts)].tolist()
        return rewards

    def _open(self, sources: list[ImageSource], rows: Iterable[int]) -> list[Image.Image]:
        """The images of these rows of the rollout, decoded; in place of one that is broken stands a blank."""
        images = []
        for source in sources:
            try:
                images.append(open_image(source))
            except BrokenImage as error:  # `load_dataset` has seen it whole
                images.append(Image.new("RGB", (56, 56), "white"))
                for row in rows:
                    self._rollout.is_broken[row] = True
                if str(error) not in self._broken_images:
                    self._broken_images.add(str(error))
                    print(
                        f"warning: {printable(error)}; completions about it earn nothing", file=sys.stderr, flush=True
                    )
        return images

    # ---- The rollout

    def _plain_model(self) -> PreTrainedModel:
        """The policy without the wrappers of accelerate, DeepSpeed and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def make_backend(self, keep_features: bool) -> Backend:
        """Whoever generates for a shared prefix."""
        model, processor = self._plain_model(), self.processing_class
        if self.use_vllm:
            profile = partial(profiling_context, self, "vLLM.generate")
            return TrainerVLLMBackend(
                model, processor, self.vllm_generation, self._group_size, profile, **self.chat_template_kwargs
            )

        return TransformersBackend(model, processor, self._borrow, keep_features, **self.chat_template_kwargs)

    def _borrow(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy to run without its wrappers; whole, where ZeRO-3 splits it."""
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

    def _roll_out(self, prompts: list[Any], _: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: images are opened, encoded and prefilled once for all neighbours of one prompt.

        With `rollout_noise` the second half of a group is sampled from noisy images; what is returned, and scored, is
        the prompt with the clean ones.
        """
        noise, first = self._noise_step(), self.accelerator.process_index * len(prompts)
        encoded, repeats, scored = [], [], []  # what is asked, how often, and the index of what is scored for it
        row = 0
        for prompt, same in groupby(prompts):
            rows = range(row, row + len(list(same)))
            row = rows.stop
            images = []
            if not isinstance(prompt, str):
                images = self._open(images_of(prompt), rows)
                prompt = put_images(prompt, images)
            versions, parts = [self.backend.encode(prompt)], [(False, len(rows))]
            if noise and images:
                rng = self._seeded((first + rows.start) // self._group_size())
                noisy = put_images(prompt, [add_noise(image, noise, rng) for image in images])
                versions.append(self.backend.encode(noisy))
                parts = split_halves(first + rows.start, len(rows), self._group_size())
            scored += [len(encoded)] * len(parts)
            encoded += [versions[is_noisy] for is_noisy, _ in parts]
            repeats += [count for _, count in parts]
        try:
            answer = self.backend.generate(encoded, repeats, self.generation_config)
        except Mistake as error:  # no numbers: the update before it spoiled the weights
            self.stop(str(error), keeps_weights=False)
        prompts = [answer.prompts[index] for index, count in zip(scored, repeats, strict=True) for _ in range(count)]
        self._rollout.prompts = self._scored = prompts
        return {
            "prompt_ids": [prompt.input_ids.tolist() for prompt in prompts],
            "completion_ids": answer.ids,
            "logprobs": answer.logprobs,
        }

    def _seeded(self, group: int) -> np.random.Generator:
        """Random numbers of a group of this step, counted over all processes; the same after a resume."""
        return seeded(self.args.seed, self.state.global_step, group)

    def _noise_step(self) -> int:
        """How noisy the images of this rollout's noisy halves are; 0 for an evaluation."""
        if not (self.rollout_noise and self.model.training):
            return 0
        return noise_step(self.rollout_noise, self.state.global_step / max(self.state.max_steps, 1))

    @torch.no_grad()
    def check_engine(self) -> None:
        """Compare an engine's log-probabilities of a few completions with the policy's; see `agreement`.

        Raises:
            Mistake: they differ.
        """
        self.vllm_generation.sync_weights()  # a resumed policy is not the one that the engine has loaded
        plain, group = self._plain_model(), self._group_size()
        encoded, prompts = [], []
        for row in islice(self.train_dataset, agreement.PROMPTS):
            prompt = with_images_inside(row)["prompt"]
            if not isinstance(prompt, str):
                prompt = put_images(prompt, [open_image(image) for image in images_of(prompt)])
            encoded.append(self.backend.encode(prompt))
            # encoded once more, by the policy's processor: the backend's own may be the mistake
            prompts += [encode_prompt(plain, self.processing_class, prompt, **self.chat_template_kwargs)] * group
        longest = min(agreement.TOKENS, self.max_completion_length)
        settings = GenerationConfig(max_new_tokens=longest, eos_token_id=self.eos_token_ids)
        answer = self.backend.generate(encoded, [group] * len(encoded), settings)
        rows = [torch.tensor(ids, device=self.accelerator.device) for ids in answer.ids]
        ids = pad_sequence(rows, batch_first=True)  # (B, C)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        self._scored = prompts
        was_training, dtype = self.model.training, engine_dtype(self.args, plain.dtype)
        self.model.eval()  # dropout is no rounding
        scored, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, ids.shape[1])
        exact = scored
        if dtype != "float32":
            with self._borrow() as model, agreement.InFloat32(self.accelerator.device):
                exact, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1])
        self.model.train(was_training)
        for metrics in self._metrics.values():  # none of it is a step's or an evaluation's
            metrics.clear()
        scored = [row[: len(known)] for row, known in zip(scored.tolist(), answer.ids, strict=True)]
        found = torch.cat([agreement.difference(rows, exact) for rows in (answer.logprobs, scored)])  # (4,)
        found = self.accelerator.reduce(found.to(self.accelerator.device), reduction="sum").tolist()
        mean, rounding = (total / max(count, 1) for total, count in (found[:2], found[2:]))
        agreement.check_agreement(mean, rounding, dtype)

    # ---- TRL's own path, without a shared prefix

    # TRL has None for a row without images, which its next call of the processor does not take.
    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        # TRL gathers the images for its table from the ranks that have some; a rank without would wait elsewhere.
        self.log_multimodal = self.args.log_multimodal and all(gather_object([images is not None]))
        return ids, images and [each or [] for each in images], fields

    # ---- Scoring

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
                batch = pack(self.family, self._scored[part], completion_ids[part], completion_mask[part])
                with self.accelerator.autocast():
                    outputs = model(**batch.model_inputs, shift_labels=batch.labels, fused_lm_head=True)
                logps.append(batch.unpack(outputs.log_probs))  # (b, C)
                if compute_entropy:
                    entropies.append(batch.unpack(outputs.entropy))
                packed_tokens += batch.model_inputs["input_ids"].numel()
            saved = 1 - packed_tokens / input_ids.numel()
            self._metrics[self._mode()]["packing/tokens_saved"].append(saved)
            logps = torch.cat(logps)
            if self.papo_coef:
                self._last_logps = logps  # `_compute_loss` keeps them to itself
            return logps, torch.cat(entropies) if compute_entropy else None, None

    @torch.no_grad()
    def _score_masked(self, output: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities (B, C) of a rollout's completions, by the policy that sampled them, behind masked images.

        Of a prompt without an image too: under ZeRO-3 all ranks must run as many forward passes.
        """
        first = self.accelerator.process_index * len(output["prompts"])
        self._scored = []
        for rows in rows_by_prompt(output["prompts"]):
            rng = self._seeded((first + rows[0]) // self.num_generations)
            prompt, ratio = output["prompts"][rows[0]], self.args.papo_mask_ratio
            self._scored += [mask_prompt(prompt, self.family, self.processing_class, ratio, rng)] * len(rows)
        ids, mask = (
            torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        longest, batch_size = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logps, *_ = self._get_per_token_logps_and_entropies(self.model, ids, mask, longest, batch_size)
        return logps

    def _perception_gain(self, inputs: dict[str, Any]) -> torch.Tensor:
        """PAPO's term of a micro-batch that was just scored, a scalar for the loss to fall by.

        It is `papo_coef` times `perception_kl`, 0 behind a prompt without an image, averaged as the loss type averages
        its tokens and over the step's micro-batches.
        """
        kl = perception_kl(self._last_logps, inputs["masked_logps"])  # (B, C)
        self._last_logps = None  # and with it the graph
        mask = inputs["completion_mask"]
        sees = torch.tensor([bool(prompt.image_inputs) for prompt in inputs["prompts"]], device=mask.device)
        kl = kl * sees[:, None]
        sums = torch.stack([(kl.detach() * mask).sum(), (mask * sees[:, None]).sum()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train"]["papo/kl"].append(total / max(count, 1))
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        mean = batch_mean(kl, mask, self.loss_type, self.max_completion_length, tokens / self.args.steps_per_generation)
        return self.papo_coef * mean / self.current_gradient_accumulation_steps

    # Tells the scoring above whose completions a micro-batch holds; TRL's signature has no place for it.
    def _compute_loss(self, model, inputs):
        if self.shared_prefix:
            self._scored = inputs["prompts"]
        if not self.model.training:
            tokens = self.accelerator.reduce(inputs["completion_mask"].sum(), reduction="sum").item()
            self._metrics["eval"][TOKENS].append(tokens)
        loss = super()._compute_loss(model, inputs)
        return loss - self._perception_gain(inputs) if "masked_logps" in inputs else loss

    # TRL's shuffles completions across micro-batches, which would scatter the groups.
    def _prepare_inputs(self, generation_batch):
        if not (self.shared_prefix and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            sample = self._sample_groups if self.signal.signal_settings else self._generate_and_score_completions
            batch = shuffle_groups(sample(generation_batch))
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

    # ---- Groups with signal

    def _sample_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout of this process, of several passes if need be; see `open_r1.sampling`.

        All processes decide by the same numbers: each runs as many passes as the others.
        """
        signal, metrics, total = self.signal, self._metrics["train"], len(self.train_dataset)
        chance = partial(self.pass_rates.chance, skip_solved=signal.skip_solved, skip_hopeless=signal.skip_hopeless)
        asked = gather_object([row[ROW] for row in inputs[:: self.num_generations]])  # of the batch, a row a group
        starts = {name: len(metrics.get(name, ())) for name in ("time/rollout", "time/scoring")}

        def draw(refill: int) -> random.Random:
            return random.Random(f"{self.args.seed}/{self.state.global_step}/{refill}")

        rows = replace_prompts(asked, chance, set(asked), total, draw(0))
        batch, has_signal = self._sample_pass(inputs if rows == asked else self._own_rows(rows), 0)
        asked = {*asked, *rows}
        for refill in range(signal.max_refills + 1):
            found = self.accelerator.gather(has_signal)  # (groups of all processes,)
            with_signal = found.sum().item()
            if refill == signal.max_refills or with_signal / len(found) >= signal.min_signal_groups:
                break
            rows = draw_prompts(len(rows), chance, asked, total, draw(refill + 1))
            other, other_has_signal = self._sample_pass(self._own_rows(rows), refill + 1)
            swaps = find_swaps(has_signal.tolist(), other_has_signal.tolist())
            batch = merge_rollouts(batch, other, swaps, self.num_generations, self._tokenizer.pad_token_id)
            has_signal[list(swaps)] = True
            asked.update(rows)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        if signal.rescale_by_signal:
            batch["advantages"] = batch["advantages"] * (len(found) / max(with_signal, 1))
        metrics["signal/refills"].append(refill)
        metrics["signal/wasted"].append(((refill + 1) * len(found) - with_signal) * self.num_generations)
        metrics["signal/share"].append(with_signal / len(found))
        for name, start in starts.items():  # a rollout's seconds are those of all its passes
            if passes := metrics.get(name, [])[start:]:
                metrics[name][start:] = [sum(passes)]
        return batch

    def _sample_pass(self, inputs: list[dict[str, Any]], refill: int) -> tuple[dict[str, Any], torch.Tensor]:
        """A pass of this process, and which of its groups have signal (groups,)."""
        batch = self._generate_and_score_completions(inputs, refill)
        advantages = batch["advantages"]
        rewards = torch.tensor(self._rollout.rewards, device=advantages.device)  # (B, functions)
        return batch, find_signal(advantages, rewards, self.num_generations)

    def _own_rows(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What this process asks of a pass: its slice of the training set's rows, each once a completion."""
        groups = len(numbers) // self.accelerator.num_processes
        start = self.accelerator.process_index * groups
        rows = [self.train_dataset[number] for number in numbers[start : start + groups]]
        return [dict(row) for row in rows for _ in range(self.num_generations)]

    # ---- What is logged and left behind

    def offending_batch(self) -> list[dict[str, Any]]:
        """The newest rollout: prompts, completions, rewards and all else of its trajectories."""
        return self.last_rollout

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _group_size(self) -> int:
        """Completions of one prompt, over all processes."""
        return self.num_generations if self.model.training else self.num_generations_eval

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

    # For the log alone: a rollout's seconds and tokens.
    def _generate(self, prompts):
        with self._timed("rollout"):
            output = super()._generate(prompts)
        _, completion_ids, *_ = output
        rate = sum(map(len, completion_ids)) / self._last_seconds
        self._metrics[self._mode()]["rollout/tokens_per_second"].append(rate)
        return output

    def training_step(self, model, inputs, num_items_in_batch):
        """TRL's, and the log of what is left of a step's seconds beside rollout and scoring."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            metrics["time/update"].append(metrics["step_time"][-1] - self._rollout_seconds)
            self._rollout_seconds = 0.0
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; of an evaluation the figures over its questions, where TRL has the means of its batches' means."""
        if self._mode() == "eval" and self._held_out:
            metrics = self._metrics["eval"]
            tokens = metrics.pop(TOKENS, [])
            for name in metrics:
                if name in PER_TOKEN or (name.startswith("clip_ratio/") and name.endswith("_mean")):
                    total = sum(value * count for value, count in zip(metrics[name], tokens, strict=True))
                    metrics[name] = [total / max(sum(tokens), 1)]
            figures = held_out_figures(self._held_out, self.reward_weights.tolist(), self.num_generations_eval)
            metrics.update({name: [value] for name, value in {**figures, **reflection_shares(self._held_out)}.items()})
            self._held_out = []
            if self._is_blind:
                logs = {f"{self.evaluation_prefix}_{name}": value for name, value in figures.items()}
                metrics.clear()
        if self.log_completions:
            prompts = self._logs["prompt"]
            self._logs["prompt"] = deque(map(as_text, prompts), maxlen=prompts.maxlen)
        super().log(logs, start_time)

    def _render(self, prompt: list[dict[str, Any]] | str, images: list[ImageSource]) -> tuple[str, list[str]]:
        """A prompt as text, and the names of its images."""
        if not isinstance(prompt, str):
            messages = prepare_multimodal_messages(prompt, images=images)
            images = images_of(messages)
            prompt = self.processing_class.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
        return prompt, [image_name(image) or "(not a file)" for image in images]

    def _save_trajectories(self, rollout: Rollout, output: dict[str, Any]) -> None:
        """Write this rollout's completions, those of all processes in order, from the main process; log reflections."""
        mode = self._mode()
        # A rollout in training serves the step under way, which the log counts when it is done.
        step = self.state.global_step + (mode == "train")
        prompts = []
        for (prompt, images), repeats in groupby(rollout.rows, key=lambda row: (row["prompt"], row_images(row))):
            prompts += [self._render(prompt, images)] * len(list(repeats))
        rows = []
        for row, (prompt, images), completion, ids, rewards, advantage in zip(
            *(rollout.rows, prompts, rollout.completions, rollout.ids, rollout.rewards),
            output["advantages"].tolist(),
            strict=True,
        ):
            text = completion_text(completion)
            options = row.get("options") or None
            if not (isinstance(options, list) and all(isinstance(option, str) for option in options)):
                options = None
            reflection = analyse(text, options)
            # a reward function that has nothing to say about a completion returns None, TRL's NaN
            rewards = [None if math.isnan(reward) else reward for reward in rewards]
            record = Completion(
                step=step,
                prompt=prompt,
                images=images,
                solution=text_or_none(row.get("solution")),
                options=options,
                completion=text,
                rewards=dict(zip(self.reward_func_names, rewards, strict=True)),
                advantage=advantage,
                length=len(ids),
                ended=ids[-1] in self.eos_token_ids,
                reflections=reflection.spans,
                considered=reflection.considered,
                self_corrected=reflection.self_corrected,
                row=row.get(ROW),
                refill=rollout.refill,
                dataset=None if mode == "train" else self.evaluated_set,
            )
            rows.append(record.to_row())
        first = self.accelerator.process_index * len(rows)
        rows = gather_object(rows)
        if mode == "train":
            earlier = self.last_rollout if rollout.refill else []
            start = len(earlier)
            self.last_rollout = earlier + rows
            self.pass_rates.add(rows)
            groups = [rows[i : i + self.num_generations] for i in range(0, len(rows), self.num_generations)]
            identical = sum(len({row["completion"] for row in group}) == 1 for group in groups) / len(groups)
            self._metrics[mode]["completions/identical_groups"].append(identical)
            for name, value in reflection_shares(rows).items():
                self._metrics[mode][name].append(value)
        else:
            start = len(self._held_out)
            rows = rows[: int(min(self._held_out_left, len(rows)))]
            self._held_out_left -= len(rows)
            self._held_out += rows
            output["completion_mask"][max(len(rows) - first, 0) :] = 0  # nor do their tokens count
        for index, row in enumerate(rows, start=start):
            row["group"] = index // self._group_size()
        if self.accelerator.is_main_process:
            append_rows(self.trajectory_dir / f"{'blind' if self._is_blind else mode}.jsonl", rows)


def told_apart(names: list[str]) -> list[str]:
    """The names, with a number behind one that was there before."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result
