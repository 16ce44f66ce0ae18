"""The run that is checked: its settings, and its parts, which are built when a check first needs them.

A part that cannot be made fails the check that asks first; checks that ask later are skipped.
"""

import copy
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import GRPOConfig

from open_r1.base.errors import Mistake, first_line
from open_r1.doctor.survey import Survey, survey
from open_r1.models.families import family_of
from open_r1.models.loading import check_model, check_template, check_weights, load_config
from open_r1.models.memory import MemoryCount, build_model, count_run, free_memory, teacher_bytes, weight_bytes
from open_r1.rewards import Reward, check_gold, get_reward_funcs, needs_gold
from open_r1.running.data import columns_of, load_processor_from_args, opens_think
from open_r1.running.entry import Command, Settings, find_checkpoint, read_settings
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import PLANNED_PROCESSES
from open_r1.sft import check_answer
from open_r1.tasks.mixture import iter_mixture, parts_of

MEASURED_STEPS = 2


class Missing(Exception):
    """What a check needs is not there. The message says what; an earlier finding says why."""


class part(cached_property):
    """A cached property of a run that is tried once.

    Raises:
        Mistake: it cannot be made; for who asks first.
        Missing: likewise, for all who ask later.
    """

    def __get__(self, run: "Run", owner: type | None = None) -> Any:
        if self.attrname in run.lost:
            raise Missing(run.lost[self.attrname])
        try:
            return super().__get__(run, owner)
        except Missing as error:
            run.lost[self.attrname] = str(error)
            raise
        except (Mistake, OSError, RuntimeError) as error:  # RuntimeError: torch's, for shapes and memory
            run.lost[self.attrname] = f"no {self.attrname.replace('_', ' ')}, see above"
            raise Mistake(first_line(error)) from error


class Run:
    """A run before it starts.

    Args:
        command: `grpo` or `sft`.
        arguments: of its command line; none to look at the machine alone.
        launch: of the processes that are going to run.
    """

    def __init__(self, command: Command, arguments: Sequence[str], launch: Launch):
        self.command, self.arguments, self.launch = command, arguments, launch
        self.lost: dict[str, str] = {}  # parts that could not be made, and why
        self.scratch = tempfile.TemporaryDirectory(prefix="doctor-")

    @part
    def settings(self) -> Settings:
        """As every process of the run gets them."""
        if not self.arguments:
            raise Missing("name a recipe with --config")
        with planned(self.launch):
            return read_settings(self.command, self.arguments)

    script_args = property(lambda self: self.settings.script_args)
    args = property(lambda self: self.settings.args)
    model_args = property(lambda self: self.settings.model_args)

    @property
    def is_grpo(self) -> bool:
        """Whether completions are sampled and rewarded."""
        return isinstance(self.args, GRPOConfig)

    @property
    def on_cpu(self) -> bool:
        """Whether the run has no GPU."""
        return self.args.use_cpu or not torch.cuda.is_available()

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """For the chat template."""
        return self.args.chat_template_kwargs or {}

    @part
    def checkpoint(self) -> str | None:
        """What the run goes on from."""
        return find_checkpoint(self.command, self.settings, self.launch)

    @part
    def model_outline(self) -> PreTrainedModel:
        """The policy without numbers, on torch's `meta` device."""
        model_args = self.model_args
        config = load_config(model_args.model_name_or_path, model_args.model_revision)
        check_model(model_args)
        check_weights(model_args.model_name_or_path, model_args.model_revision)
        return build_model(config, model_args, self.script_args, self.launch)

    def flops(self, tokens: float, images: float) -> float:
        """Of a forward pass: two for each parameter that a token or patch goes through.

        An image is as large as the recipe lets one be.
        """
        model, script_args = self.model_outline, self.script_args
        family = family_of(model)
        tower = sum(p.numel() for block in family.vision_blocks(model) for p in block.parameters())
        patches = family.count_patches(model.config, script_args.max_pixels or 0)
        return 2 * ((model.num_parameters() - tower) * tokens + tower * patches * images)

    @cached_property
    def speed(self) -> float:
        """FLOP/s of a model on this CPU: half of what products of matrices in float32 reach."""
        one, other = torch.ones(512, 1024), torch.ones(1024, 4096)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            one @ other
            seconds.append(time.perf_counter() - start)
        return 512 * 1024 * 4096 / sorted(seconds)[2]

    @part
    def processor(self) -> ProcessorMixin:
        """With the recipe's prompt and image bounds."""
        self.need("model_outline")
        return load_processor_from_args(self.model_args, self.script_args, self.template_kwargs)

    @part
    def prompt_opening(self) -> bool:
        """Whether completions start inside `<think>`."""
        source = self.script_args.chat_template or str(self.model_args.model_name_or_path)
        check_template(self.processor, source, **self.template_kwargs)
        return opens_think(self.processor, **self.template_kwargs)

    @part
    def reward_funcs(self) -> list[Reward]:
        """Of GRPO; of SFT none."""
        if not self.is_grpo:
            return []
        return get_reward_funcs(
            self.script_args.reward_funcs,
            think_prefilled=self.prompt_opening,
            max_completion_length=self.args.max_completion_length,
        )

    @part
    def train_set(self) -> Survey:
        """What is trained on, looked through."""
        return self.survey(self.script_args.dataset_name, self.script_args.dataset_train_split)

    @part
    def held_out_set(self) -> Survey | None:
        """What is held out, looked through, if anything is."""
        name = self.script_args.eval_dataset_name
        return self.survey(name, self.script_args.dataset_test_split) if name else None

    def survey(self, name: str, split: str) -> Survey:
        """A data set of the recipe, looked through; its answers as the run checks them."""
        script_args = self.script_args
        check = check_answer
        if self.is_grpo:
            rewards = [] if "reward_funcs" in self.lost else self.reward_funcs  # what is wrong with them was told
            check = check_gold if any(map(needs_gold, rewards)) else lambda row: None
        parts = parts_of(name, columns_of(script_args), script_args.dataset_config, split, script_args.task)
        return survey((example for _, _, example, _ in iter_mixture(parts)), check)

    @part
    def prepared_data(self) -> dict[str, Any]:
        """What the run's trainer takes beside the weights: data sets, rewards, processor."""
        self.need("processor", "reward_funcs")
        surveys = [self.train_set, self.held_out_set]
        if any(data.broken or data.unusable for data in surveys if data):
            raise Missing("images or answers are wrong, see above")
        return self.command.prepare(*self.settings)

    @property
    def rows(self) -> Dataset:
        """The examples that are trained on."""
        return self.prepared_data["train_dataset"]

    @part
    def trainer(self) -> Trainer:
        """The run's trainer in this process alone, set to two steps that leave nothing behind."""
        script_args, args, model_args = self.settings
        models = 1 + (self.is_grpo and args.beta > 0 and not model_args.use_peft)
        needed = models * weight_bytes(self.model_outline, model_args) + teacher_bytes(args, model_args)
        free = free_memory(self.on_cpu)
        if needed > free:
            raise Missing(f"the weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        return self.command.build_trainer(script_args, self.alone(args), model_args, self.prepared_data)

    def count(self, launch: Launch, args: TrainingArguments | None = None) -> MemoryCount:
        """The memory of a step under a launch, with the run's settings or others."""
        self.need("model_outline")
        if self.script_args.max_prompt_length is None:
            raise Missing("without max_prompt_length there is nothing to count for")
        return count_run(self.script_args, args or self.args, self.model_args, launch, self.on_cpu)

    def need(self, *parts: str) -> None:
        """Raise what these parts raise: what is wrong with them is told as theirs."""
        for name in parts:
            getattr(self, name)

    def alone(self, args: TrainingArguments) -> TrainingArguments:
        """Settings with which one process does the work of all in a step."""
        alone = copy.copy(args)
        alone.gradient_accumulation_steps *= self.launch.num_processes
        if self.is_grpo:
            alone.steps_per_generation *= self.launch.num_processes
            alone.use_vllm = False
            alone.model_init_kwargs = {"device_map": None}  # TRL would spread the reference model over all GPUs
        alone.output_dir, alone.max_steps = self.scratch.name, MEASURED_STEPS
        alone.save_strategy, alone.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
        alone.logging_strategy, alone.logging_steps = IntervalStrategy.STEPS, 1  # `hours` adds the steps' rollouts up
        alone.eval_on_start, alone.push_to_hub, alone.report_to = False, False, []
        alone._n_gpu = min(alone.n_gpu, 1)  # with more, transformers would put DataParallel around the model
        return alone


def planned(launch: Launch) -> AbstractContextManager[None]:
    """In the block, recipes are read as the processes of a launch will read them."""
    return patch_environment(**{PLANNED_PROCESSES: launch.num_processes})


def existing(folder: str) -> Path:
    """The part of a path that is there."""
    path = Path(folder).absolute()
    return next(place for place in (path, *path.parents) if place.exists())
