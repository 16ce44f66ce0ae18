"""GRPO for vision-language models: TRL's trainer, with one copy of the prompt for a whole group."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import get_config_model_id, pad, split_tensor_dict, use_adapter

from open_r1.base.errors import Mistake, settings_of
from open_r1.configs import Qwen2VLGRPOConfig, SignalArguments, check_settings, check_shared_prefix
from open_r1.engines import agreement, vllm_backends
from open_r1.engines.backends import Backend, TransformersBackend
from open_r1.engines.shared_prefix import Prompt, enable_grouping, images_of, prepare_model, score_completions
from open_r1.models.families import end_token_ids, family_of, tokenizer_of, vision_token_ids
from open_r1.models.loading import (
    accept_missing_images,
    check_model_files,
    check_weights,
    load_processor,
    reset_generation_config,
)
from open_r1.models.trained import guide_gradients
from open_r1.rewards import format_reward, guarded, told, unique_names
from open_r1.running.callbacks import ModelCardMixin
from open_r1.running.checkpoints import LoadWeightsMixin
from open_r1.running.data import most_broken, opens_think, warn_of_unshown
from open_r1.settings.generation import check_generation, with_tokens
from open_r1.trainer.advantages import choose_advantage, spread
from open_r1.trainer.callbacks import CheckEngine, ContinueRollouts, RememberPassRates
from open_r1.trainer.distillation import TeacherMixin
from open_r1.trainer.finite import FiniteMixin
from open_r1.trainer.metrics import MetricsMixin, check_best, reward_figures
from open_r1.trainer.perception import PerceptionMixin
from open_r1.trainer.recorder import Recorder, Rollout, Rows
from open_r1.trainer.rows import ImageReader, prompts_with_images, put_images, row_images, without_images
from open_r1.trainer.sampling import ROW, PassRates, PromptSamplingMixin, shuffle_groups
from open_r1.trainer.trackers import LogRollouts


@dataclass(eq=False)
class Scored:
    """The prompts of one scoring call, and afterwards, as `logps` (B, C), the log-probabilities of their completions.

    TRL's methods hand it on, unread, as `pixel_values`. `observe`: see `score_completions`.
    """

    prompts: Sequence[Prompt]
    observe: Callable[[torch.Tensor], None] | None = None
    logps: torch.Tensor | None = None


class Qwen2VLGRPOTrainer(
    MetricsMixin,
    FiniteMixin,
    LoadWeightsMixin,
    ModelCardMixin,
    PromptSamplingMixin,
    TeacherMixin,
    PerceptionMixin,
    GRPOTrainer,
):
    """TRL's `GRPOTrainer` for the models of `open_r1.models.families`; same signature and defaults.

    A dataset row holds `prompt`, conversational or (without images) a text; `images` or `image`, if it has any, in a
    form that `open_r1.base.images` opens, which are put before the text; and other columns for the reward functions.
    Rows with and without images may be mixed. In addition to TRL's behaviour:

    - every end-of-text id ends a completion, vision tokens are never sampled, and sampling settings
      come from `args` alone, never from the checkpoint's generation_config;
    - the prompt of a group is encoded, prefilled and scored once (`open_r1.engines`);
    - images may be masked in a term of the loss, or noised in half of a rollout (`perception`);
    - a larger model may teach the policy on the policy's own completions (`distillation`);
    - completions about an image that broke since the start get no reward and no part in the loss (`rows.ImageReader`);
    - a loss or gradient that is NaN or infinite ends the run before it changes the weights (`finite`);
    - an evaluation's figures are over its questions, each once, by evaluation set (`metrics`);
    - groups without signal can be replaced, and prompts that always or never succeed can be asked less often
      (`sampling`);
    - every completion goes to `{output_dir}/trajectories/{train,eval,blind}.jsonl` (`recorder`),
      and a few are shown where the run reports to (`trackers`).

    Args:
        model: Hub name or folder (loaded by TRL, in float32 unless `args.model_init_kwargs` says
            otherwise) or a model.
        args: TRL's configuration or `Qwen2VLGRPOConfig`.
        others: see TRL. `reward_funcs` may be functions of `open_r1.rewards`; they get the values of the run that they
            need: whether the chat template opens `<think>`, and how long a completion may be.
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
        # ---- Before TRL's: what cannot work is refused before weights are loaded
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = Qwen2VLGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        shared_prefix = getattr(args, "shared_prefix", True)
        check_settings(args, shared_prefix, streams=isinstance(train_dataset, IterableDataset))
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
        check_generation(args.generation_kwargs, len(tokenizer_of(processing_class)), args.use_vllm)
        ends, never = end_token_ids(processing_class), vision_token_ids(processing_class)
        if args.use_vllm:
            end, ban = "stop_token_ids", {"logit_bias": vllm_backends.banned(never)}
            engines = vllm_backends.engines_of_run(args, model, processing_class)
        else:
            end, ban, engines = "eos_token_id", {"suppress_tokens": never}, nullcontext()
        args.generation_kwargs = with_tokens(args.generation_kwargs, end, ends, ban)
        with engines, settings_of("trl", "transformers", "accelerate", "peft"):
            super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, *more, **kwargs)

        # ---- After it: rewards and sampling
        if self.accelerator.is_main_process:
            warn_of_unshown(train_dataset, eval_dataset)
        self.reward_func_names = unique_names(self.reward_func_names)
        asks = format_reward in self.reward_funcs and processing_class.chat_template
        of_the_run = {"think_prefilled": bool(asks) and opens_think(processing_class, **self.chat_template_kwargs)}
        of_the_run["max_completion_length"] = self.max_completion_length
        self.reward_funcs = [told(reward, **of_the_run) for reward in self.reward_funcs]
        check_best(args.metric_for_best_model, eval_dataset, self.reward_func_names)
        scale_rewards, aggregation = self.scale_rewards, self.multi_objective_aggregation
        self.advantage = choose_advantage(getattr(args, "advantage", None), scale_rewards, aggregation)
        self.eos_token_ids = args.generation_kwargs[end]
        if self.use_vllm:  # TRL tells its engine alone
            settings = {"max_new_tokens": self.max_completion_length, "eos_token_id": self.eos_token_ids}
            self.generation_config = GenerationConfig(**settings)
            vllm_backends.hand_over_whole_weights(self.vllm_generation)

        # ---- The policy, the reference model and the teacher
        policy = self.plain_model()
        self.teacher = self._load_teacher(policy)
        self.family = family_of(policy)
        reset_generation_config(policy, processing_class)
        guide_gradients(policy)
        # Tool calls put images and foreign tokens into completions; they stay on TRL's path.
        foreign = self.tools or self.environment_factories
        self.shared_prefix = shared_prefix and self._is_vlm and not (foreign or self.rollout_func)
        check_shared_prefix(args, self.shared_prefix)
        if foreign and self._is_vlm and self.use_vllm and self.vllm_mode == "colocate":
            raise Mistake("tools, environment_factory: TRL gives a colocated engine images twice; add --use_vllm false")
        encodes_once = self.shared_prefix and not self.use_vllm and not self.family.trains_vision(policy)
        if self.papo_coef and self.accelerator.num_processes > 1:
            encodes_once = False  # masked images run the tower, and all processes must together
        if self.shared_prefix:
            self.backend = self.make_backend(keep_features=encodes_once)
            self.rollout_func = self._roll_out  # TRL's seam for those who generate otherwise
        for model in filter(None, (policy, self.ref_model, self.teacher)):
            network = self.accelerator.unwrap_model(model)
            prepare_model(network, processing_class)
            encodes = model is self.teacher or not encodes_once
            accept_missing_images(network, always_encode=self.accelerator.num_processes > 1 and encodes)
            if self.shared_prefix:
                enable_grouping(network)

        # ---- What it keeps of rows and completions
        self.images = ImageReader(most_broken(len(train_dataset) if isinstance(train_dataset, Sized) else 0))
        self.recorder = Recorder(self)
        self.pass_rates = PassRates()  # equal in all processes
        self.step_seconds: Counter[str] = Counter()
        self.add_callback(ContinueRollouts(self))
        if self.signal.signal_settings:
            self.add_callback(RememberPassRates(self))
        if self.use_vllm and self.shared_prefix:
            self.add_callback(CheckEngine(self))
        self.add_callback(LogRollouts(self))

    # ---- One generation step: sample -> reward -> advantages -> score -> record. For each micro-batch
    # ---- `_compute_loss` then scores the packed completions and calls TRL's loss on them.

    # TRL has no public hook that sees prompts, completions, rewards and advantages together.
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]], refill: int = 0) -> dict[str, Any]:
        if self._is_blind():
            inputs = [without_images(row) for row in inputs]
        rollout = Rollout(inputs, refill)
        batch = self._take_step(rollout) if self.shared_prefix else self._take_stock_step(rollout)
        self._record(rollout, batch)
        return batch

    # In place of TRL's own body, which runs every prompt through processor and model once a
    # completion. Its numbers, and what it logs, are TRL's (tests/test_shared_prefix.py);
    # tests/test_trainer.py fails when TRL's body changes.
    def _take_step(self, rollout: Rollout) -> dict[str, Any]:
        """A generation step of this process, which fills its record.

        Returns:
            What `_compute_loss` takes, all but `num_items_in_batch` with B rows: `prompt_ids`,
            `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, C), `prompts`, `rewards`
            (B, F), `advantages` (B,), and as far as settings ask for them
            `sampling_per_token_logps`, `old_per_token_logps`, `ref_per_token_logps`, `masked_logps`
            (B, C) and `importance_sampling_ratio` (B, C) or (B, 1).
        """
        conversations = prompts_with_images(rollout.rows)
        # calls `_roll_out`, whose other results come back as `extra`
        prompt_ids, ids, _, completions, logprobs, extra, *_ = self._generate(conversations)
        rollout.is_broken = extra["is_broken"]
        batch = self._pad(prompt_ids, ids, logprobs, rollout.is_broken)
        batch["prompts"] = extra["encoded"]

        rows = Rows(rollout.rows, rollout)
        rewards = self._calculate_rewards(rows, conversations, completions, ids)  # (all B, F)
        weights, group_size = self.reward_weights.to(rewards.device), self._group_size()
        advantages = self.advantage(rewards, weights, group_size)  # (all B,)
        first = self.accelerator.process_index * len(ids)
        mine = slice(first, first + len(ids))
        batch["rewards"], batch["advantages"] = rewards[mine], advantages[mine]
        rollout.advantages = batch["advantages"].tolist()

        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs), torch.no_grad():
            self._score_rollout(batch)
        scale = spread(rewards, weights, group_size, self.scale_rewards, self.multi_objective_aggregation)
        self._log(reward_figures(rewards, weights, self.reward_func_names, scale))
        self._log_samples(conversations, completions, rewards, advantages)
        return batch

    def _roll_out(self, prompts: list[Any], _: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: images are opened, encoded and prefilled once for a prompt's rows."""
        row = self.accelerator.process_index * len(prompts)  # of all processes' rows
        # what is asked, how often, and the index of what is scored for it
        encoded, repeats, scored = [], [], []
        is_broken: list[bool] = []
        for prompt, same in groupby(prompts):
            count, images, has_broken = len(list(same)), [], False
            if not isinstance(prompt, str):
                images, has_broken = self.images.open(images_of(prompt))
                prompt = put_images(prompt, images)
            parts = self._encode_parts(prompt, images, row, count)
            scored += [len(encoded)] * len(parts)
            encoded += [part for part, _ in parts]
            repeats += [times for _, times in parts]
            is_broken += [has_broken] * count
            row += count
        try:
            answer = self.backend.generate(encoded, repeats, self.generation_config)
        except Mistake as error:  # no numbers: the update before it spoiled the weights
            self.stop(str(error), keeps_weights=False)
        prompts = [answer.prompts[index] for index, times in zip(scored, repeats, strict=True) for _ in range(times)]
        return {
            "prompt_ids": [prompt.input_ids.tolist() for prompt in prompts],
            "completion_ids": answer.ids,
            "logprobs": answer.logprobs,
            "encoded": prompts,
            "is_broken": is_broken,
        }

    def _pad(
        self,
        prompt_ids: list[list[int]],
        ids: list[list[int]],
        logprobs: list[list[float | None]] | None,
        is_broken: list[bool],
    ) -> dict[str, torch.Tensor]:
        """What was sampled as tensors: prompts padded on the left, completions on the right."""

        def join(rows: Iterable[list], side: str, value: float = 0) -> torch.Tensor:
            tensors = [torch.tensor(row) for row in rows]
            return pad(tensors, value, side, self.pad_to_multiple_of).to(self.accelerator.device)

        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        # The loss leaves out what was cut (mask_truncated_completions), and what saw a blank in an image's place.
        is_cut = [self.mask_truncated_completions and row[-1] not in ends for row in ids]
        is_kept = [not (cut or broken) for cut, broken in zip(is_cut, is_broken, strict=True)]
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

    def _take_stock_step(self, rollout: Rollout) -> dict[str, Any]:
        """TRL's own generation step, which fills the record on its way through `_calculate_rewards`.

        It is for shared_prefix false, tools, a rollout function of the user's, and text models; the rows may
        have images or none.
        """
        rows = []
        for row in rollout.rows:
            images, is_broken = self.images.open(row_images(row))
            rows.append({**row, "images": images})
            rollout.is_broken.append(is_broken)
        if not any(row["images"] for row in rows):
            rows = [{name: row[name] for name in row if name not in ("image", "images")} for row in rows]
        batch = super()._generate_and_score_completions(Rows(rows, rollout))
        rollout.advantages = batch["advantages"].tolist()
        if any(rollout.is_broken):  # the loss leaves out what saw a blank in an image's place
            batch["completion_mask"][rollout.is_broken] = 0
        counted = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()  # as TRL counts
        batch["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        return batch

    # TRL has None for a row without images, which its next call of the processor does not take.
    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        # TRL gathers the images for its table from the ranks that have some; a rank without would wait elsewhere.
        self.log_multimodal = self.args.log_multimodal and all(gather_object([images is not None]))
        return ids, images and [each or [] for each in images], fields

    # Reward functions see the rows as the dataset has them, and what the user's rollout function added.
    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rollout, given = inputs.rollout, self.reward_funcs  # which stay what the user gave
        self.reward_funcs = [
            reward if isinstance(reward, nn.Module) else guarded(reward, name)
            for reward, name in zip(given, self.reward_func_names, strict=True)
        ]
        try:  # (all B, F)
            rewards = super()._calculate_rewards(inputs.as_given(), prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = given
        if rewards.isnan().all() and self.model.training and not rollout.refill:
            names = ", ".join(self.reward_func_names)
            raise Mistake(f"reward_funcs: no completion of a step got a reward, only None ({names})")
        is_broken = self.accelerator.gather(torch.tensor(rollout.is_broken, device=rewards.device))  # (all B,)
        if is_broken.any():
            rewards[is_broken] = torch.nan  # TRL's word for: no advantage, and no part in a mean
            self._log({"broken_images/completions": is_broken.sum().item()})
            self.images.check()
        start = self.accelerator.process_index * len(prompts)
        rollout.completions, rollout.ids = completions, completion_ids_list
        rollout.rewards = rewards[start : start + len(prompts)].tolist()
        return rewards

    def _score_rollout(self, batch: dict[str, Any]) -> None:
        """Add the log-probabilities that the loss compares with: of the policy, and of the reference."""
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
        # A rollout that is used up in one optimiser step needs none: the weights have not changed since it was sampled,
        # and TRL's loss takes the present log-probabilities, detached.
        if corrects or args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations):
            batch["old_per_token_logps"] = score(self.model)
        if corrects:
            difference = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
            settings = batch["completion_mask"], self.vllm_importance_sampling_mode
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            ratio = agreement.importance_ratio(difference, *settings, *bounds)
            batch["importance_sampling_ratio"] = ratio
            gather = self.accelerator.gather
            self._log(agreement.sampling_figures(difference, ratio, *settings, gather))
        if self.beta and self.ref_model is not None:
            batch["ref_per_token_logps"] = score(self.ref_model)
        elif self.beta:  # the base below the adapter, or the adapter at the start, TRL's "ref"
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                batch["ref_per_token_logps"] = score(self.model)
        if self.papo_coef and self.model.training:
            scored.prompts = self._masked(batch["prompts"])
            batch["masked_logps"] = score(self.model)

    # ---- The loss of a micro-batch

    # TRL's shuffles completions across micro-batches, which would scatter the groups.
    def _prepare_inputs(self, generation_batch):
        if not (self.shared_prefix and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            sample = self._sample_groups if self.signal.signal_settings else self._generate_and_score_completions
            self._buffered_inputs = split_tensor_dict(shuffle_groups(sample(generation_batch)), steps)
        return self._buffered_inputs[self._step % steps]

    # `TeacherMixin` and `PerceptionMixin` add their terms to TRL's.
    def _compute_loss(self, model, inputs):
        if self.shared_prefix:
            inputs = {**inputs, "pixel_values": Scored(inputs["prompts"])}
        return super()._compute_loss(model, inputs)

    # TRL's runs the prompt through the model once a completion, padded on both sides. Its callers
    # hand on what a prompt's images became, as `pixel_values`; on the shared path that is the
    # prompts, encoded once.
    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
        with nullcontext() if torch.is_grad_enabled() else self._timed("scoring"):
            scored = kwargs.get("pixel_values")
            if not isinstance(scored, Scored):
                arguments = (model, input_ids, attention_mask, logits_to_keep)
                return super()._get_per_token_logps_and_entropies(*arguments, **kwargs)
            ids, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
            size = kwargs.get("batch_size") or len(ids)
            with self.accelerator.autocast():
                scored.logps, entropies, tokens = score_completions(
                    model,
                    self.family,
                    scored.prompts,
                    ids,
                    mask,
                    size,
                    with_entropy=kwargs.get("compute_entropy", False),
                    observe=scored.observe,
                )
            self._log({"packing/tokens_saved": 1 - tokens / input_ids.numel()})
            return scored.logps, entropies, None

    # ---- The models

    def plain_model(self) -> PreTrainedModel:
        """The policy without the wrappers of accelerate, DeepSpeed and PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @contextmanager
    def borrow_model(self) -> Iterator[PreTrainedModel]:
        """The policy to run without its wrappers; whole, where ZeRO-3 splits it.

        It runs under autocast. accelerate puts that around forward passes of the whole model alone: a vision tower that
        is called by itself would compute in float32, and float32 weights would be cast to 16 bits for every token.
        """
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with unwrapped as model, self.accelerator.autocast():
            yield model

    def make_backend(self, keep_features: bool) -> Backend:
        """The rollout engine of the shared prefix, transformers or vLLM."""
        model, processor, template = self.plain_model(), self.processing_class, self.chat_template_kwargs
        if not self.use_vllm:
            return TransformersBackend(model, processor, self.borrow_model, keep_features, **template)
        profile, engine = partial(profiling_context, self, "vLLM.generate"), self.vllm_generation
        return vllm_backends.TrainerVLLMBackend(model, processor, engine, self._group_size, profile, **template)

    # TRL sends vLLM weights only when `global_step` has changed. The best checkpoint's come without a new step, so
    # they are marked as not sent.
    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._last_loaded_step = -1
