"""Refuses options of TRL and transformers that would not act here, before weights are loaded.

What a library refuses by itself when a trainer is made is left to it; what it would say only in the
first step is asked of it here. tests/test_options.py tries every switch and every choice of both
configurations.
"""

from dataclasses import MISSING, fields

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import GRPOConfig

from open_r1.base.errors import Mistake, first_line
from open_r1.settings.limits import check_values

_TEXTS = "it prepares rows of texts; those of a data set with images are prepared as docs/data.md says"
_ONE_EXAMPLE = "a row with images is one example"
_OWN_TOKENS = "a model keeps its family's tokens"

# Options that must keep their default -> why.
GRPO = {
    "cast_lm_head_to_fp32": "TRL finds the embeddings that the head is tied to in text models alone; dtype float32 "
    "keeps all in it",
    "label_smoothing_factor": "the loss of GRPO has no labels",
    "include_for_metrics": "rewards are the metrics of GRPO, and get every column of a row",
    "train_sampling_strategy": "shuffle_dataset says whether prompts are asked in the order of the data",
}
SFT = {
    "dataset_text_field": _TEXTS,
    "dataset_kwargs": _TEXTS,
    "dataset_num_proc": _TEXTS,
    "truncation_mode": _TEXTS,
    "packing_strategy": _TEXTS,
    "packing": _ONE_EXAMPLE,
    "padding_free": _ONE_EXAMPLE,
    "max_length": "a cut would lose image tokens; max_prompt_length and max_answer_length leave long rows out",
    "assistant_only_loss": "the answer alone is learned anyway",
    "completion_only_loss": "the answer alone is learned, never the prompt",
    "chat_template_path": "chat_template names the prompt's template",
    "eos_token": _OWN_TOKENS,
    "pad_token": _OWN_TOKENS,
    "remove_unused_columns": "the answer and the images are columns that no model takes; leave it out",
    "train_sampling_strategy": "the length of a row with images is not known before it is encoded",
}
HARMLESS = (("completion_only_loss", True), ("train_sampling_strategy", "sequential"))  # of SFT


def check_options(args: TrainingArguments) -> None:
    """See that TRL and transformers can do what their options ask for.

    Args:
        args: of GRPO, or of SFT as `sft.py` prepares it.

    Raises:
        Mistake: for the first option that cannot have its value.
    """
    refused, harmless = SFT, HARMLESS
    if isinstance(args, GRPOConfig):
        refused, harmless = GRPO, ()
        check_values({field.name: getattr(args, field.name) for field in fields(args)})
    for field in fields(args):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(args, field.name)
        if field.name in refused and value != default and (field.name, value) not in harmless:
            raise Mistake(f"{field.name}: {refused[field.name]}")
    _ask_libraries(args)


def _ask_libraries(args: TrainingArguments) -> None:
    """Raise Mistake for the schedule, optimizer, tracker or kernels that would be refused when training begins."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    steps = {"num_warmup_steps": 0, "num_training_steps": 2}
    kwargs = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}

    def start_trackers() -> None:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()

    def find_kernels() -> None:
        if args.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError("liger-kernel is not installed; leave it out, or pip install liger-kernel")

    questions = {
        "lr_scheduler_type, lr_scheduler_kwargs": lambda: get_scheduler(
            args.lr_scheduler_type, optimizer, **steps, **kwargs
        ),
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args),
        "report_to": start_trackers,
        "use_liger_kernel": find_kernels,
    }
    for option, ask in questions.items():
        try:
            ask()
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise Mistake(f"{option}: {first_line(error)}") from error
