"""Options of TRL and transformers: each works on a vision-language model, or is refused before weights are loaded."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, ModelConfig, SFTConfig

from open_r1 import sft
from open_r1.configs import LOSS_TYPES, Qwen2VLGRPOConfig, Qwen2VLSFTConfig, SFTScriptArguments, check_settings
from open_r1.settings.limits import CHOICES
from open_r1.settings.options import COMMON, GRPO, SFT, SFT_LOSSES, check_options
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import make_config, write_examples
from test_dropin import by_length, one_image

SCHEDULES = {  # transformers asks for more than their name
    "cosine_with_min_lr": {"min_lr": 0.0},
    "cosine_warmup_with_min_lr": {"min_lr": 0.0},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
# The texts that an option may be, where no type lists them.
CHOSEN: dict[str, tuple[Any, ...]] = {
    **{name: CHOICES[name] for name in ("scale_rewards", "importance_sampling_level", "multi_objective_aggregation")},
    "vllm_mode": CHOICES["vllm_mode"],
    "vllm_importance_sampling_mode": CHOICES["vllm_importance_sampling_mode"],
    "cache_implementation": ("dynamic", "static", "offloaded", "quantized"),
    "vllm_model_impl": ("vllm", "transformers"),
    "packing_strategy": ("bfd", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "log_level": ("debug", "error", "passive"),
    "log_level_replica": ("warning", "error"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "dataloader_multiprocessing_context": ("fork", "spawn"),
    "report_to": ("none", "tensorboard", "trackio"),
    "debug": ("", "underflow_overflow"),
    "pad_to_multiple_of": ("auto", 8),
    "torch_compile_mode": (None,),
    "include_for_metrics": (["loss"], ["inputs"]),
}
# What an option of one of these names takes is no choice: numbers, names, folders, dictionaries, another machine's.
FREE = re.compile(
    r".*_(?:kwargs|config|args|dir|host|url|regex|id|token|repo|path|field|name|names|weights|modules|port)"
    r"|hub_.*|trackio_.*|ddp_backend|fsdp|deepspeed|project|run_name|torch_compile_backend|resume_from_checkpoint"
    r"|metric_for_best_model"
)
# What needs hardware, a network or a launch of several processes, or takes minutes here.
ELSEWHERE = {"push_to_hub", "use_vllm", "tf32", "torch_compile", "use_cpu"}
WITH = {  # an option that means something beside another alone
    "sync_ref_model": {"beta": 0.1, "ref_model_sync_steps": 1},
    "use_adaptive_entropy": {"entropy_coef": 0.1},
    "log_unique_prompts": {"log_completions": True},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1},
    "greater_is_better": {"metric_for_best_model": "loss"},
}


def kinds(hint: Any) -> set[Any]:
    """The types that an annotation allows."""
    inner = typing.get_args(hint)
    return set().union(*map(kinds, inner)) if inner and typing.get_origin(hint) not in (list, dict) else {hint}


def choices(field: dataclasses.Field, hint: Any) -> tuple[Any, ...] | None:
    """What to try of an option; None where it is no choice."""
    allowed = kinds(hint)
    if field.name == "loss_type":
        return ()  # each configuration has its own
    if field.name in CHOSEN:
        return CHOSEN[field.name]
    if enums := [kind for kind in allowed if isinstance(kind, type) and issubclass(kind, Enum)]:
        return tuple(member.value for member in enums[0])
    if bool in allowed:
        return tuple(value for value in (True, False) if value is not field.default)
    return None


def options(kind: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(kind)
    return ((field, hints[field.name]) for field in dataclasses.fields(kind) if field.init)


@pytest.mark.parametrize("kind", [GRPOConfig, SFTConfig])
def test_every_option_is_tried_or_no_choice(kind):
    """A switch that a new version adds is tried by itself; a choice fails here until somebody names its values."""
    for field, hint in options(kind):
        if choices(field, hint) is None and not kinds(hint) <= {int, float, type(None)}:
            assert FREE.fullmatch(field.name), f"{field.name}: {hint}"


def trials(kind: type, losses: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each value of each choice, beside what it needs."""
    tried = [{"loss_type": loss} for loss in losses]
    for field, hint in options(kind):
        if field.name not in ELSEWHERE:
            tried += [{**WITH.get(field.name, {}), field.name: value} for value in choices(field, hint) or ()]
    for trial in tried:
        if kwargs := SCHEDULES.get(trial.get("lr_scheduler_type")):
            trial["lr_scheduler_kwargs"] = kwargs
    return tried


def is_told(error: Exception, trial: dict[str, Any]) -> bool:
    """Whether an error is one line that names an option of the trial, or an optimizer's missing package."""
    text = str(error)
    return "\n" not in text and (text.startswith("optim: ") or any(name in text for name in trial))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_every_option_of_grpo_works_or_is_refused(shared_prefix, tiny_model, tmp_path):
    found, few = [], {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    held_out = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, "max_completion_length": 4}
    for number, trial in enumerate(trials(GRPOConfig, LOSS_TYPES)):
        settings = {**few, **held_out, "shared_prefix": shared_prefix, "disable_tqdm": True, **trial}
        try:
            args = make_config(tmp_path / str(number), **settings)
            check_settings(args, shared_prefix)
        except ValueError as error:
            if not is_told(error, trial):
                found.append((trial, repr(error)))
            continue
        try:
            Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image(), one_image(2)).train()
        except Exception as error:  # whatever it is, it came late
            found.append((trial, repr(error)))
    assert not found, "\n".join(map(str, found))


@pytest.mark.nightly
@pytest.mark.slow
def test_every_option_of_sft_works_or_is_refused(tiny_model, tmp_path):
    data = str(write_examples(tmp_path / "data", 4))
    script_args = SFTScriptArguments(data, eval_dataset_name=data, chat_template="base", max_pixels=12544)
    model_args = ModelConfig(model_name_or_path=str(tiny_model), dtype="float32")
    few = {"max_steps": 1, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    here = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
    found = []
    for number, trial in enumerate(trials(SFTConfig, SFT_LOSSES)):
        try:
            args = Qwen2VLSFTConfig(str(tmp_path / str(number)), **{**few, **here, "disable_tqdm": True, **trial})
            check_options(args)
        except ValueError as error:
            if not is_told(error, trial):
                found.append((trial, repr(error)))
            continue
        try:
            sft.build_trainer(script_args, args, model_args).train()
        except Exception as error:  # whatever it is, it came late
            found.append((trial, repr(error)))
    assert not found, "\n".join(map(str, found))


GRPO_REFUSED = [
    ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32: TRL finds the embeddings"),
    ({"use_transformers_continuous_batching": True}, r"use_transformers_continuous_batching: it \(.*\) takes no"),
    ({"cache_implementation": "static"}, "cache_implementation: the shared prefix has a cache of its own"),
    ({"include_for_metrics": ["inputs"]}, "include_for_metrics: rewards are the metrics"),
    ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model: without beta there is no reference"),
    ({"save_strategy": "best"}, "save_strategy: best is told by metric_for_best_model"),
    ({"importance_sampling_level": "word"}, "importance_sampling_level: 'word' is none of token, sequence"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers option needs num_workers > 0"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr, lr_scheduler_kwargs: One of"),
    ({"cache_implementation": "quantized", "shared_prefix": False}, "cache_implementation: optimum-quanto"),
    ({"optim": "schedule_free_adamw"}, "optim: .*schedulefree"),
    ({"report_to": "trackio"}, "report_to: .*trackio"),
]


@pytest.mark.parametrize("changes, message", GRPO_REFUSED, ids=str)
def test_an_option_that_cannot_work_is_refused_before_weights_load(changes, message, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loads"))
    args = make_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image())
    assert "\n" not in str(error.value)


SFT_REFUSED = [
    ({"packing": True}, "packing: a row with images is one example"),
    ({"assistant_only_loss": True}, "assistant_only_loss: the answer alone is learned anyway"),
    ({"chat_template_path": "x"}, "chat_template_path: chat_template names"),
    ({"remove_unused_columns": True}, "remove_unused_columns: the answer and the images are columns"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: the length of a row"),
    ({"max_length": 512}, "max_length: a cut would lose image tokens"),
    ({"loss_type": "mse"}, "loss_type: SFT's are nll, dft"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef: no model"),
]


@pytest.mark.parametrize("changes, message", SFT_REFUSED, ids=str)
def test_an_option_of_sft_that_cannot_work_is_refused(changes, message, tmp_path):
    args = Qwen2VLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **changes)
    with pytest.raises(ValueError, match=f"^{message}") as error:
        sft.prepare(None, args, None)  # before it looks at data or model
    assert "\n" not in str(error.value)


def test_what_is_refused_is_an_option():
    """A name that TRL drops would be refused for ever after."""
    for table, kinds in ((COMMON, (GRPOConfig, SFTConfig)), (GRPO, (GRPOConfig,)), (SFT, (SFTConfig,))):
        for kind in kinds:
            assert {row.option for row in table} <= {field.name for field in dataclasses.fields(kind)}
    for args in (Qwen2VLGRPOConfig("x", bf16=False, use_cpu=True), Qwen2VLSFTConfig("x", bf16=False, use_cpu=True)):
        args.report_to = []
        check_options(args)  # the defaults are not
        assert isinstance(args, TrainingArguments)
