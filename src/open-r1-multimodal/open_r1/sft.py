"""Fine-tune on the answers of a prepared dataset: the paper's SFT baseline, on TRL's `SFTTrainer`.

Launch it with `run_sft.sh`, or by hand: `accelerate launch open_r1/sft.py --config configs/sft_sat.yaml
--dataset_name SAT_train_15000.json`. It leaves `output_dir` with Hugging Face checkpoints.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from open_r1.base.errors import Mistake, printable, settings_of

# Above the libraries, since the package silences what they say when they are imported
# isort: split
import torch
from accelerate import PartialState
from PIL import Image
from transformers import ProcessorMixin
from trl import ModelConfig, SFTTrainer
from trl.trainer import utils
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from open_r1.base.images import BrokenImage, open_image
from open_r1.configs import Qwen2VLSFTConfig, SFTScriptArguments
from open_r1.engines.shared_prefix import prepare_model
from open_r1.models.loading import accept_missing_images, check_model, load_model_from_args, reset_generation_config
from open_r1.models.trained import check_saved_modules, freeze, get_adapter_config, guide_gradients
from open_r1.rewards import format_reward
from open_r1.running.callbacks import ModelCardMixin
from open_r1.running.checkpoints import LoadWeightsMixin, has_begun
from open_r1.running.data import (
    LEAST_BROKEN,
    Row,
    asks_for_thought,
    load_datasets_from_args,
    load_processor_from_args,
    most_broken,
    opens_think,
)
from open_r1.running.entry import Command, run_command
from open_r1.settings.options import check_options
from open_r1.trainer.finite import FiniteMixin
from open_r1.trainer.metrics import NamedEvaluationMixin


def after_prompt(answer: str, think_prefilled: bool) -> str:
    """The part of an answer to learn: without its `<think>` if the prompt already ends with it."""
    return answer.lstrip().removeprefix("<think>") if think_prefilled else answer


@dataclass
class AnswerCollator(DataCollatorForVisionLanguageModeling):
    """TRL's vision collator on rows of `load_dataset`: opens the images, and labels only the answer and its end."""

    completion_only_loss: bool = True
    template_kwargs: dict[str, str] = field(default_factory=dict)
    most_broken: int = LEAST_BROKEN  # images, before the run stops
    broken: set[str] = field(default_factory=set)
    last: tuple[dict[str, Any], list[Image.Image]] | None = None  # the newest row whose images could be opened

    @cached_property
    def think_prefilled(self) -> bool:
        """Whether the prompts end with `<think>`."""
        return opens_think(self.processor, **self.template_kwargs)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """B rows -> `input_ids`, `attention_mask`, `labels` (B, T), and what the model takes of images."""
        return super().torch_call(
            [
                {
                    "prompt": row["prompt"],
                    "completion": [
                        {"role": "assistant", "content": after_prompt(row["solution"], self.think_prefilled)}
                    ],
                    "images": images,
                    "chat_template_kwargs": self.template_kwargs,
                }
                for row, images in map(self.open_images, examples)
            ]
        )

    def open_images(self, row: dict[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
        """The row and its images; if an image broke during the run, the last good row, so that the run goes on."""
        try:
            self.last = row, [open_image(path) for path in row["images"]]
        except BrokenImage as error:  # `load_dataset` has seen it whole
            if str(error) not in self.broken:
                print(f"warning: {printable(error)}; the row before it is repeated", file=sys.stderr, flush=True)
            self.broken.add(str(error))
            if self.last is None or len(self.broken) > self.most_broken:
                raise Mistake(f"{len(self.broken)} images broke during training; restore the data: {error}") from error
        return self.last


class Qwen2VLSFTTrainer(FiniteMixin, LoadWeightsMixin, ModelCardMixin, NamedEvaluationMixin, SFTTrainer):
    """TRL's `SFTTrainer`, which also resumes outside DeepSpeed, and logs each evaluation set under its name."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, but on a CPU, too, only answers are scored."""
        with scoring_labels_alone():
            return super().compute_loss(*args, **kwargs)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, without the rows that fill up the last batch of a process beyond the data set."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # so many rows of all processes' batches count
            own = state.remainder - self.accelerator.process_index * self.args.eval_batch_size
            inputs["labels"][max(own, 0) :] = -100
        return super().prediction_step(model, inputs, *args, **kwargs)


@contextmanager
def scoring_labels_alone() -> Iterator[None]:
    """In the block, TRL scores the positions that have a label.

    Where there is no Triton TRL 1.16 scores prompts and padding too, which is most of a small model's step on a CPU.
    """
    original = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def check_answer(row: Row) -> None:
    """Raise Mistake for a row without an answer."""
    if row["solution"] is None:
        raise Mistake("no answer to train on (--answer_column names its field)")


def check_thought(row: Row, think_prefilled: bool) -> None:
    """Raise Mistake for an answer that GRPO's format reward would not reward, if the prompt asks for a thought.

    Args:
        row: with a `solution`.
        think_prefilled: whether the prompt ends with `<think>`; the answer may write it again, or not.
    """
    if format_reward([after_prompt(row["solution"], think_prefilled)], think_prefilled) != [1.0]:
        raise Mistake(
            "the prompt asks for a thought, and the answer is not <think>...</think> <answer>...</answer>; "
            "answers alone are learned with chat_template_kwargs: {style: direct}"
        )


def answer_checks(processor: ProcessorMixin, **template_kwargs: str) -> list[Callable[[Row], None]]:
    """The checks of every row for these prompts; with `style: direct` an answer needs no thought."""
    if template_kwargs.get("style") == "direct" or not asks_for_thought(processor, **template_kwargs):
        return [check_answer]
    return [check_answer, partial(check_thought, think_prefilled=opens_think(processor, **template_kwargs))]


def prepare(
    script_args: SFTScriptArguments, training_args: Qwen2VLSFTConfig, model_args: ModelConfig
) -> dict[str, Any]:
    """What the trainer takes beside the weights; Mistake for what no run can start with."""
    check_options(training_args)
    peft_config = get_adapter_config(model_args, script_args, family=check_model(model_args))
    template_kwargs = training_args.chat_template_kwargs or {}
    processor = load_processor_from_args(model_args, script_args, template_kwargs)
    train_dataset, eval_dataset = load_datasets_from_args(
        *(script_args, processor, template_kwargs, answer_checks(processor, **template_kwargs)),
        max_answer_length=script_args.max_answer_length,
        has_begun=has_begun(training_args),
    )
    return {
        "processing_class": processor,
        "data_collator": AnswerCollator(
            processor=processor, template_kwargs=template_kwargs, most_broken=most_broken(len(train_dataset))
        ),
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "peft_config": peft_config,
    }


def build_trainer(
    script_args: SFTScriptArguments,
    training_args: Qwen2VLSFTConfig,
    model_args: ModelConfig,
    prepared: dict[str, Any] | None = None,
) -> Qwen2VLSFTTrainer:
    """The trainer that a parsed recipe describes; `prepared` is what `prepare` returned, if it was called before."""
    prepared = prepared or prepare(script_args, training_args, model_args)
    model = load_model_from_args(model_args)
    prepare_model(model, prepared["processing_class"])
    reset_generation_config(model, prepared["processing_class"])
    accept_missing_images(model, always_encode=PartialState().num_processes > 1)
    freeze(model, script_args)
    check_saved_modules(model, prepared["peft_config"])
    with settings_of("trl", "transformers", "accelerate", "peft"):
        trainer = Qwen2VLSFTTrainer(model=model, args=training_args, **prepared)
    guide_gradients(model)  # which has its adapter by now
    return trainer


COMMAND = Command("sft", (SFTScriptArguments, Qwen2VLSFTConfig, ModelConfig), prepare, build_trainer)

if __name__ == "__main__":
    run_command(COMMAND)
