"""Refuses options of TRL and transformers that cannot work with this trainer, before weights are loaded.

What a library checks by itself, and tells in a line, is asked of the library: a loader of nothing, a schedule of two
steps. tests/test_options.py tries every switch and every choice of both configurations.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from transformers.utils import is_liger_kernel_available, is_optimum_quanto_available
from trl import GRPOConfig, SFTConfig

from open_r1.base.errors import Mistake, first_line
from open_r1.settings.limits import check_values

SFT_LOSSES = ("nll", "dft", "chunked_nll")  # TRL's own


class Impossible(NamedTuple):
    """A value that an option cannot have here, and why."""

    option: str
    is_asked: Callable[[TrainingArguments], bool]
    reason: str


COMMON = (
    Impossible(
        "use_liger_kernel",
        lambda args: args.use_liger_kernel and not is_liger_kernel_available(),
        "liger-kernel is not installed",
    ),
    Impossible(
        "router_aux_loss_coef",
        lambda args: bool(args.router_aux_loss_coef),
        "no model that is supported here is a mixture of experts",
    ),
    Impossible(
        "save_strategy",
        lambda args: args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None,
        "best is told by metric_for_best_model, which has no value",
    ),
)
GRPO = (
    Impossible(
        "cast_lm_head_to_fp32",
        lambda args: args.cast_lm_head_to_fp32,
        "TRL finds the embeddings that the head is tied to in text models alone; dtype float32 keeps all in it",
    ),
    Impossible(
        "use_transformers_continuous_batching",
        lambda args: args.use_transformers_continuous_batching,
        "it (use_transformers_paged is its old name) takes no images; use_vllm does",
    ),
    Impossible(
        "cache_implementation",
        lambda args: args.cache_implementation is not None and getattr(args, "shared_prefix", True),
        "the shared prefix has a cache of its own; leave it out, or add --shared_prefix false",
    ),
    Impossible(
        "cache_implementation",
        lambda args: args.cache_implementation == "quantized" and not is_optimum_quanto_available(),
        "optimum-quanto, which quantizes a cache, is not installed",
    ),
    Impossible(
        "cache_implementation",
        lambda args: "offloaded" in (args.cache_implementation or "") and not torch.cuda.is_available(),
        "it moves a cache from an NVIDIA GPU, and there is none",
    ),
    Impossible(
        "include_for_metrics",
        lambda args: bool(args.include_for_metrics),
        "rewards are the metrics of GRPO, and get every column of a row",
    ),
    Impossible(
        "sync_ref_model",
        lambda args: args.sync_ref_model and not args.beta,
        "without beta there is no reference model to bring up to date",
    ),
)
_OF_TEXTS = ("dataset_text_field", "dataset_kwargs", "dataset_num_proc", "truncation_mode", "packing_strategy")
_DEFAULTS = {field.name: field.default for field in fields(SFTConfig)}
SFT = (
    *(
        Impossible(
            name,
            lambda args, name=name: getattr(args, name) != _DEFAULTS[name],
            "it prepares rows of texts; those of a data set with images are prepared as docs/running.md says",
        )
        for name in _OF_TEXTS
    ),
    Impossible(
        "max_length",
        lambda args: args.max_length is not None,
        "a cut would lose image tokens; max_prompt_length and max_answer_length leave long rows out",
    ),
    Impossible("loss_type", lambda args: args.loss_type not in SFT_LOSSES, f"SFT's are {', '.join(SFT_LOSSES)}"),
    *(
        Impossible(name, lambda args, name=name: bool(getattr(args, name)), "a row with images is one example")
        for name in ("packing", "padding_free")
    ),
    Impossible(
        "assistant_only_loss",
        lambda args: args.assistant_only_loss,
        "the answer alone is learned anyway",
    ),
    Impossible(
        "completion_only_loss",
        lambda args: args.completion_only_loss is False,
        "the answer alone is learned, never the prompt",
    ),
    Impossible(
        "chat_template_path",
        lambda args: args.chat_template_path is not None,
        "chat_template names the prompt's template",
    ),
    *(
        Impossible(name, lambda args, name=name: getattr(args, name) is not None, "a model keeps its family's tokens")
        for name in ("eos_token", "pad_token")
    ),
    Impossible(
        "remove_unused_columns",
        lambda args: args.remove_unused_columns,
        "the answer and the images are columns that no model takes; leave it out",
    ),
    Impossible(
        "train_sampling_strategy",
        lambda args: args.train_sampling_strategy == "group_by_length",
        "the length of a row with images is not known before it is encoded",
    ),
    Impossible(
        "activation_offloading",
        lambda args: args.activation_offloading and not torch.accelerator.is_available(),
        "it moves activations from a GPU, and there is none",
    ),
)


def check_options(args: TrainingArguments, command_line: bool = True) -> None:
    """See that TRL and transformers can do what their options ask for.

    Args:
        args: of GRPO or SFT.
        command_line: whether `sft.py` or `grpo.py` prepares the data; of a trainer that gets its own, less is known.

    Raises:
        ValueError: in one line, for the first that cannot be.
    """
    if isinstance(args, GRPOConfig):
        check_values({field.name: getattr(args, field.name) for field in fields(args)})
        _refuse((*COMMON, *GRPO), args)
    elif isinstance(args, SFTConfig):
        _refuse((*COMMON, *SFT) if command_line else COMMON, args)
    _ask_libraries(args)


def _refuse(table: Iterable[Impossible], args: TrainingArguments) -> None:
    for option, is_asked, reason in table:
        if is_asked(args):
            raise Mistake(f"{option}: {reason}")


def _ask_libraries(args: TrainingArguments) -> None:
    """Let torch and transformers say what they would say when training begins."""
    try:
        DataLoader(
            [None],
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
    except ValueError as error:  # starts with the name of its argument
        raise Mistake(f"dataloader_{first_line(error)}; that is dataloader_num_workers") from error
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    steps = {"num_warmup_steps": 0, "num_training_steps": 2}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (ValueError, TypeError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise Mistake(f"lr_scheduler_type {kind}, lr_scheduler_kwargs: {first_line(error)}") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise Mistake(f"optim: {first_line(error)}") from error
    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except (RuntimeError, ImportError) as error:
        raise Mistake(f"report_to: {first_line(error)}") from error
