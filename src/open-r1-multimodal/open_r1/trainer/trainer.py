"""GRPO for vision-language models: TRL's trainer, with one copy of the prompt for a whole group."""

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
)
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import get_config_model_id, pad, split_tensor_dict, use_adapter

from open_r1.answers.reflection import reflection_shares
from open_r1.base.errors import Mistake, printable, settings_of
from open_r1.base.images import BrokenImage, ImageSource, image_name, open_image
from open_r1.base.plugins import import_named
from open_r1.configs import Qwen2VLGRPOConfig, SignalArguments, check_settings, check_shared_prefix
from open_r1.engines import agreement
from open_r1.engines.backends import Backend, TransformersBackend
from open_r1.engines.shared_prefix import Prompt, enable_grouping, encode_prompt, images_of, pack, prepare_model
from open_r1.engines.vllm_backends import (
    TrainerVLLMBackend,
    adapted_weights,
    banned,
    check_adapter,
    engine_dtype,
    engine_settings,
    engines_with,
)
from open_r1.models.families import end_token_ids, family_of, vision_token_ids
from open_r1.models.loading import (
    accept_missing_images,
    check_model_files,
    check_weights,
    load_processor,
    reset_generation_config,
)
from open_r1.rewards import guarded, told_apart
from open_r1.running.checkpoints import LoadWeightsMixin
from open_r1.running.data import ROTATION_OF, most_broken, warn_of_unshown
from open_r1.settings.generation import check_generation, with_tokens
from open_r1.trainer.advantages import ADVANTAGES, Advantage, checked, group_advantages, reward_figures
from open_r1.trainer.callbacks import CheckEngine, ContinueRollouts, RememberPassRates
from open_r1.trainer.finite import FiniteMixin
from open_r1.trainer.heldout import NamedEvaluationMixin, check_best, held_out_figures
from open_r1.trainer.perception import (
    add_noise,
    batch_mean,
    mask_prompts,
    noise_step,
    perception_kl,
    seeded,
    split_halves,
)
from open_r1.trainer.recorder import Recorder, Rollout, Rows
from open_r1.trainer.rows import put_images, row_images, with_images_inside, without_images
from open_r1.trainer.sampling import (
    ROW,
    EpochSampler,
    PassRates,
    Refills,
    shuffle_groups,
)
from open_r1.trainer.trackers import LogRollouts, as_text

TOKENS = "tokens"  # of each batch of an evaluation; a private entry of TRL's metrics, never logged
PER_TOKEN = ("kl", "entropy")  # metrics that are a mean over a batch's tokens


@dataclass(eq=False)
class Scored:
    """The prompts of the rows that are scored together, and what came of it: log-probabilities (B, C)."""

    prompts: Sequence[Prompt]
    logps: torch.Tensor | None = None


class Qwen2VLGRPOTrainer(FiniteMixin, LoadWeightsMixin, NamedEvaluationMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` for the models of `open_r1.models.families`, with the same signature, defaults and datasets.

    A dataset row holds `prompt`, conversational or (without images) a text; `images` or `image`, if any, as whatever
    `open_r1.base.images` opens, which go in front of the text; and whatever else the reward functions take. Beside
    TRL's behaviour:

    - every end-of-text id ends a completion, vision tokens are never sampled, and sampling settings come from
      `args` alone, never from the checkpoint's generation_config; one that cannot act is refused
      (`open_r1.settings.generation`);
    - the prompt of a group is encoded, prefilled and scored once (`open_r1.engines`);
    - rows with and without images may be mixed, in any number of processes;
    - images may be masked in a term of the loss, or noised in half of a rollout (`open_r1.trainer.perception`);
    - an image that cannot be opened any more ends no run: completions about it earn nothing and are counted, up to
      `data.most_broken`;
    - a loss or gradient that is no number ends it before the weights are spoiled (`open_r1.trainer.finite`);
    - the figures of an evaluation are over its questions, each once, and of several sets each has its own
      (`open_r1.trainer.heldout`);
    - groups without signal can be replaced by others, and prompts that never or always succeed be asked less
      (`SignalArguments` of `open_r1.configs`);
    - every completion goes to `{output_dir}/trajectories/{train,eval,blind}.jsonl`, and a few are shown where the
      run reports to;
    - the log says how many completions reflect, and how many correct themselves (`open_r1.answers.reflection`).

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
        with engines, settings_of("trl", "transformers", "accelerate", "peft"):
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
        self.advantage = self.choose_advantage(getattr(args, "advantage", None))
        self.papo_coef, self.rollout_noise = (getattr(args, name, 0.0) for name in ("papo_coef", "rollout_noise"))
        encodes_once = self.shared_prefix and not self.use_vllm and not self.family.trains_vision(plain)
        if self.papo_coef and self.accelerator.num_processes > 1:
            encodes_once = False  # masked images run the tower, and then all processes must in every pass
        if self.shared_prefix:
            self.backend = self.make_backend(keep_features=encodes_once)
            self.rollout_func = self._roll_out  # TRL's seam for those who generate otherwise
        for each in filter(None, (plain, reference)):
            prepare_model(each)
            accept_missing_images(each, always_encode=self.accelerator.num_processes > 1 and not encodes_once)
            if self.shared_prefix:
                enable_grouping(each)
        self.recorder = Recorder(
            Path(args.output_dir) / "trajectories",
            self.accelerator.is_main_process,
            self.reward_func_names,
            self.eos_token_ids,
            self._render,
        )
        self.pass_rates = PassRates()  # equal in all processes
        self._is_blind = False  # whether the evaluation under way shows no images
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
        is_counted = isinstance(dataset, Dataset)
        self.recorder.begin_evaluation(len(dataset) * self.num_generations_eval if is_counted else math.inf)
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

    # ---- One generation step: sample -> reward -> advantages -> score -> record. `_compute_loss` then packs and scores
    # ---- its micro-batches, and TRL's loss is taken of them.

    # TRL has no public hook that sees prompts, completions, rewards and advantages together.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]], refill: int = 0) -> dict[str, Any]:
        if self._is_blind:
            inputs = [without_images(row) for row in inputs]
        rollout = Rollout(inputs, refill, [False] * len(inputs))
        batch = self._take_step(rollout) if self.shared_prefix else self._take_stock_step(rollout)
        self._record(rollout, batch)
        return batch

    # In place of TRL's own body, which runs every prompt through processor and model once a completion. Its numbers,
    # and what it logs, are TRL's (tests/test_shared_prefix.py); tests/test_advantages.py fails when TRL's body changes.
    def _take_step(self, rollout: Rollout) -> dict[str, Any]:
        """A generation step of this process, which fills its record.

        Returns:
            What `_compute_loss` takes, all but `num_items_in_batch` with B rows: `prompt_ids`, `prompt_mask` (B, P),
            `completion_ids`, `completion_mask` (B, C), `prompts`, `rewards` (B, F), `advantages` (B,), and as far as
            settings ask for them `sampling_per_token_logps`, `old_per_token_logps`, `ref_per_token_logps`,
            `masked_logps` (B, C) and `importance_sampling_ratio` (B, C) or (B, 1).
        """
        # The images go inside the prompts, as they are, and neighbours share one prompt, which is encoded once.
        conversations: list[Any] = []
        for _, group in groupby(rollout.rows, key=lambda row: (row["prompt"], row_images(row))):
            group = list(group)
            conversations += [with_images_inside(group[0])["prompt"]] * len(group)
        prompt_ids, ids, _, completions, logprobs, found, *_ = self._generate(conversations)  # calls `_roll_out`
        rollout.prompts, rollout.is_broken = found["encoded"], found["is_broken"]
        rollout.completions, rollout.ids = completions, ids
        batch = self._pad(prompt_ids, ids, logprobs)
        batch["prompts"] = rollout.prompts

        rewards = self._calculate_rewards(Rows(rollout.rows, rollout), conversations, completions, ids)  # (all B, F)
        weights, group_size = self.reward_weights.to(rewards.device), self._group_size()
        advantages = self.advantage(rewards, weights, group_size)  # (all B,)
        mine = slice(self.accelerator.process_index * len(ids), (self.accelerator.process_index + 1) * len(ids))
        batch["rewards"], batch["advantages"] = rewards[mine], advantages[mine]
        rollout.advantages = batch["advantages"].tolist()

        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), torch.no_grad():
            self._score_rollout(batch)
        self._log(
            reward_figures(
                *(rewards, weights, group_size, self.reward_func_names),
                scale_rewards=self.scale_rewards,
                aggregation=self.multi_objective_aggregation,
            )
        )
        self._log_samples(conversations, completions, rewards, advantages)
        return batch

    def _roll_out(self, prompts: list[Any], _: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: images are opened, encoded and prefilled once for all neighbours of one prompt.

        With `rollout_noise` the second half of a group is sampled from noisy images; what is returned, and scored, is
        the prompt with the clean ones.
        """
        noise, first = self._noise_step(), self.accelerator.process_index * len(prompts)
        encoded, repeats, scored = [], [], []  # what is asked, how often, and the index of what is scored for it
        is_broken = [False] * len(prompts)
        row = 0
        for prompt, same in groupby(prompts):
            rows = range(row, row + len(list(same)))
            row = rows.stop
            images = []
            if not isinstance(prompt, str):
                images = self._open(images_of(prompt), rows, is_broken)
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
        return {
            "prompt_ids": [prompt.input_ids.tolist() for prompt in prompts],
            "completion_ids": answer.ids,
            "logprobs": answer.logprobs,
            "encoded": prompts,
            "is_broken": is_broken,
        }

    def _pad(
        self, prompt_ids: list[list[int]], ids: list[list[int]], logprobs: list[list[float | None]] | None
    ) -> dict[str, torch.Tensor]:
        """What was sampled as tensors: prompts padded on the left, completions on the right."""

        def join(rows: Iterable[list], side: str, value: float = 0) -> torch.Tensor:
            tensors = [torch.tensor(row) for row in rows]
            return pad(tensors, value, side, self.pad_to_multiple_of).to(self.accelerator.device)

        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        # with mask_truncated_completions one that was cut has no part in the loss
        is_kept = [row[-1] in ends or not self.mask_truncated_completions for row in ids]
        batch = {
            "prompt_ids": join(prompt_ids, "left", self._tokenizer.pad_token_id),  # (B, P)
            "prompt_mask": join(([1] * len(row) for row in prompt_ids), "left"),
            "completion_ids": join(ids, "right", self._tokenizer.pad_token_id),  # (B, C)
            "completion_mask": join(([int(kept)] * len(row) for row, kept in zip(ids, is_kept, strict=True)), "right"),
        }
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        if logprobs is not None:  # None of a token is one that the engine could not score
            numbers = ([torch.nan if value is None else value for value in row] for row in logprobs)
            batch["sampling_per_token_logps"] = join(numbers, "right", 0.0)
        return batch

    def _score_rollout(self, batch: dict[str, Any]) -> None:
        """Add the log-probabilities that the loss compares with: of the policy that sampled, and of the reference."""
        args, scored = self.args, Scored(batch["prompts"])
        ids, mask = (
            torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        longest = batch["completion_ids"].shape[1]
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

        def score(model: nn.Module) -> torch.Tensor:
            logps, *_ = self._get_per_token_logps_and_entropies(
                model, ids, mask, longest, batch_size=size, pixel_values=scored
            )
            return logps

        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        # A rollout that ends with its optimiser step is scored by the weights that sampled it: nothing to compare.
        if corrects or args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations):
            batch["old_per_token_logps"] = score(self.model)
        if corrects:
            difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
            mask, mode = batch["completion_mask"], self.vllm_importance_sampling_mode
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            batch["importance_sampling_ratio"] = ratio = agreement.importance_ratio(difference, mask, mode, *bounds)
            self._log(agreement.sampling_figures(difference, ratio, mask, mode, self.accelerator.gather))
        if self.beta and self.ref_model is not None:
            batch["ref_per_token_logps"] = score(self.ref_model)
        elif self.beta:  # the base below the adapter, or the adapter that training goes on from, which TRL calls "ref"
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                batch["ref_per_token_logps"] = score(self.model)
        if self.papo_coef and self.model.training:
            first = self.accelerator.process_index * len(mask)
            scored.prompts = mask_prompts(
                *(batch["prompts"], self.family, self.processing_class, args.papo_mask_ratio),
                lambda row: self._seeded((first + row) // self.num_generations),
            )
            batch["masked_logps"] = score(self.model)

    def _log_samples(
        self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """TRL's table of completions, and what reward functions put into log and table by `log_metric`, `log_extra`."""
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        self._logs["advantages"].extend(advantages.tolist())
        # sorted: all processes gather in one order
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(prompts))
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            sums = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(dim=0).tolist()
            self._metrics[self._mode()][name].append(total / count)
        self._pending_metrics.clear()

    # Reward functions see the rows as the dataset has them, and what a rollout function of the user's added to them.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollout = inputs.rollout
        own = self.reward_funcs  # which stay what the user gave
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else guarded(reward, name)
            for reward, name in zip(own, self.reward_func_names, strict=True)
        ]
        try:  # (all B, F)
            rewards = super()._calculate_rewards(inputs.as_given(), prompts, completions, completion_ids_list)
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

    def _record(self, rollout: Rollout, batch: dict[str, Any]) -> None:
        """Write down a rollout's completions, of all processes; log how they reflect."""
        mode = self._mode()
        # A rollout in training serves the step under way, which the log counts when it is done.
        step = self.state.global_step + (mode == "train")
        rows = self.recorder.describe(rollout, step, None if mode == "train" else self.evaluated_set)
        if mode == "eval":
            first = self.accelerator.process_index * len(rollout.rows)
            counted = self.recorder.add_held_out(rows, self._group_size(), self._is_blind)
            batch["completion_mask"][max(counted - first, 0) :] = 0  # the tokens of others do not count either
            return
        self.recorder.add_training(rows, rollout.refill, self._group_size())
        self.pass_rates.add(rows)
        groups = [rows[i : i + self.num_generations] for i in range(0, len(rows), self.num_generations)]
        identical = sum(len({row["completion"] for row in group}) == 1 for group in groups) / len(groups)
        self._log({"completions/identical_groups": identical, **reflection_shares(rows)})

    # ---- TRL's own path: shared_prefix false, tools, a rollout function of the user's, text models

    def _take_stock_step(self, rollout: Rollout) -> dict[str, Any]:
        """TRL's generation step, with images opened; it fills the record on its way through `_calculate_rewards`."""
        rows = [
            {**row, "images": self._open(row_images(row), [index], rollout.is_broken)}
            for index, row in enumerate(rollout.rows)
        ]
        if not any(row["images"] for row in rows):
            rows = [{name: row[name] for name in row if name not in ("image", "images")} for row in rows]
        batch = super()._generate_and_score_completions(Rows(rows, rollout))
        rollout.advantages = batch["advantages"].tolist()
        return batch

    # TRL has None for a row without images, which its next call of the processor does not take.
    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        # TRL gathers the images for its table from the ranks that have some; a rank without would wait elsewhere.
        self.log_multimodal = self.args.log_multimodal and all(gather_object([images is not None]))
        return ids, images and [each or [] for each in images], fields

    def _open(self, sources: list[ImageSource], rows: Iterable[int], is_broken: list[bool]) -> list[Image.Image]:
        """The images of these rows, decoded; in place of one that is broken stands a blank, and its rows are marked."""
        images = []
        for source in sources:
            try:
                images.append(open_image(source))
            except BrokenImage as error:  # `load_dataset` has seen it whole
                images.append(Image.new("RGB", (56, 56), "white"))
                for row in rows:
                    is_broken[row] = True
                if str(error) not in self._broken_images:
                    self._broken_images.add(str(error))
                    print(
                        f"warning: {printable(error)}; completions about it earn nothing", file=sys.stderr, flush=True
                    )
        return images

    def choose_advantage(self, name: str | None) -> Advantage:
        """The function from rewards to advantages: TRL's by its settings, or another by its name in a recipe."""
        if name is None:
            scale, aggregation = self.scale_rewards, self.multi_objective_aggregation
            return partial(group_advantages, scale_rewards=scale, aggregation=aggregation)
        return ADVANTAGES.get(name) or checked(import_named("advantage", "advantage", name, ADVANTAGES), name)

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

        @contextmanager
        def borrow() -> Iterator[PreTrainedModel]:
            # Under training's autocast. accelerate puts it around each forward pass of the whole model: a vision tower
            # that runs by itself would compute in float32, and trained weights be cast anew for every token.
            with self._borrow() as model, self.accelerator.autocast():
                yield model

        return TransformersBackend(model, processor, borrow, keep_features, **self.chat_template_kwargs)

    def _borrow(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy to run without its wrappers; whole, where ZeRO-3 splits it."""
        return unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )

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
        was_training, dtype = self.model.training, engine_dtype(self.args, plain.dtype)
        self.model.eval()  # dropout is no rounding
        scored, *_ = self._score(self.model, prompts, ids, mask, len(prompts))
        exact = scored
        if dtype != "float32":
            with self._borrow() as model, agreement.InFloat32(self.accelerator.device):
                exact, *_ = self._score(model, prompts, ids, mask, len(prompts))
        self.model.train(was_training)
        for metrics in self._metrics.values():  # none of it is a step's or an evaluation's
            metrics.clear()
        scored = [row[: len(known)] for row, known in zip(scored.tolist(), answer.ids, strict=True)]
        found = torch.cat([agreement.difference(rows, exact) for rows in (answer.logprobs, scored)])  # (4,)
        found = self.accelerator.reduce(found.to(self.accelerator.device), reduction="sum").tolist()
        mean, rounding = (total / max(count, 1) for total, count in (found[:2], found[2:]))
        agreement.check_agreement(mean, rounding, dtype)

    # ---- Scoring and loss

    # TRL's runs the prompt through the model once a completion, padded on both sides. Its callers hand on what a
    # prompt's images became, as `pixel_values`; on the shared path that is the prompts, encoded once.
    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        pixel_values=None,
        **kwargs,
    ):
        with nullcontext() if torch.is_grad_enabled() else self._timed("scoring"):
            if isinstance(pixel_values, Scored):
                completions = (values[:, -logits_to_keep:] for values in (input_ids, attention_mask))
                size = batch_size or len(input_ids)
                logps, entropies, packed = self._score(model, pixel_values.prompts, *completions, size, compute_entropy)
                self._metrics[self._mode()]["packing/tokens_saved"].append(1 - packed / input_ids.numel())
                pixel_values.logps = logps
                return logps, entropies, None
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                pixel_values=pixel_values,
                **kwargs,
            )

    def _score(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        batch_size: int,
        compute_entropy: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Score completions, the prompt of neighbours once.

        Args:
            prompts: of each of the B rows; neighbours that are one object share it.
            completion_ids, completion_mask: (B, C), padded on the right.
            batch_size: rows of one forward pass.

        Returns:
            Log-probabilities and entropies (B, C), and how many tokens went through the model.
        """
        logps, entropies, packed_tokens = [], [], 0
        # One forward a micro-batch, however many prompts it holds: under ZeRO-3 all ranks must run as many.
        for start in range(0, len(completion_ids), batch_size):
            part = slice(start, start + batch_size)
            batch = pack(self.family, prompts[part], completion_ids[part], completion_mask[part])
            with self.accelerator.autocast():
                outputs = model(**batch.model_inputs, shift_labels=batch.labels, fused_lm_head=True)
            logps.append(batch.unpack(outputs.log_probs))  # (b, C)
            if compute_entropy:
                entropies.append(batch.unpack(outputs.entropy))
            packed_tokens += batch.model_inputs["input_ids"].numel()
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, packed_tokens

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            tokens = self.accelerator.reduce(inputs["completion_mask"].sum(), reduction="sum").item()
            self._metrics["eval"][TOKENS].append(tokens)
        if not self.shared_prefix:
            return super()._compute_loss(model, inputs)
        scored = Scored(inputs["prompts"])
        loss = super()._compute_loss(model, {**inputs, "pixel_values": scored})
        return loss - self._perception_gain(scored.logps, inputs) if "masked_logps" in inputs else loss

    def _perception_gain(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """PAPO's term of a micro-batch with log-probabilities (B, C), a scalar for the loss to fall by.

        It is `papo_coef` times `perception_kl`, 0 behind a prompt without an image, averaged as the loss type averages
        its tokens and over the step's micro-batches.
        """
        mask = inputs["completion_mask"]
        sees = torch.tensor([bool(prompt.image_inputs) for prompt in inputs["prompts"]], device=mask.device)
        kl = perception_kl(logps, inputs["masked_logps"]) * sees[:, None]  # (B, C)
        sums = torch.stack([(kl.detach() * mask).sum(), (mask * sees[:, None]).sum()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._log({"papo/kl": total / max(count, 1)})
        tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        mean = batch_mean(kl, mask, self.loss_type, self.max_completion_length, tokens / self.args.steps_per_generation)
        return self.papo_coef * mean / self.current_gradient_accumulation_steps

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

    def _sample_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout of this process, of several passes if need be; see `sampling.Refills`."""
        metrics, timed = self._metrics["train"], ("time/rollout", "time/scoring")
        starts = {name: len(metrics.get(name, ())) for name in timed}
        refills = Refills(
            *(self.signal, self.pass_rates, self.train_dataset, self.num_generations, self.accelerator),
            seed=f"{self.args.seed}/{self.state.global_step}",
            pad_id=self._tokenizer.pad_token_id,
        )
        batch, figures = refills.sample(inputs, self._generate_and_score_completions)
        self._log(figures)
        for name, start in starts.items():  # a rollout's seconds are those of all its passes
            if passes := metrics.get(name, [])[start:]:
                metrics[name][start:] = [sum(passes)]
        return batch

    # ---- What is logged and left behind

    def offending_batch(self) -> list[dict[str, Any]]:
        """The newest rollout: prompts, completions, rewards and all else of its trajectories."""
        return self.recorder.newest

    def _log(self, figures: Mapping[str, float]) -> None:
        """Add to the means that the next log has."""
        for name, value in figures.items():
            self._metrics[self._mode()][name].append(value)

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
        self._metrics[self._mode()][f"time/{name}"].append(time.perf_counter() - start)

    # For the log alone: a rollout's seconds and tokens.
    def _generate(self, prompts):
        with self._timed("rollout"):
            output = super()._generate(prompts)
        _, completion_ids, *_ = output
        metrics = self._metrics[self._mode()]
        metrics["rollout/tokens_per_second"].append(sum(map(len, completion_ids)) / metrics["time/rollout"][-1])
        return output

    def training_step(self, model, inputs, num_items_in_batch):
        """TRL's, and the log of what is left of a step's seconds beside rollout and scoring."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            metrics = self._metrics["train"]
            told = sum(sum(metrics.get(f"time/{name}", ())) for name in ("rollout", "scoring", "update"))
            metrics["time/update"].append(sum(metrics["step_time"]) - told)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; of an evaluation the figures over its questions, where TRL has the means of its batches' means."""
        held_out = self.recorder.held_out
        if self._mode() == "eval" and held_out:
            metrics = self._metrics["eval"]
            tokens = metrics.pop(TOKENS, [])
            for name in metrics:
                if name in PER_TOKEN or (name.startswith("clip_ratio/") and name.endswith("_mean")):
                    total = sum(value * count for value, count in zip(metrics[name], tokens, strict=True))
                    metrics[name] = [total / max(sum(tokens), 1)]
            figures = held_out_figures(held_out, self.reward_weights.tolist(), self.num_generations_eval)
            metrics.update({name: [value] for name, value in {**figures, **reflection_shares(held_out)}.items()})
            self.recorder.begin_evaluation(math.inf)
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
