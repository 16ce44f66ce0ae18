"""Options of TRL and transformers: each works on a vision-language model, or is refused before weights are loaded."""

import dataclasses
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from trl import GRPOConfig, ModelConfig, SFTConfig

from open_r1 import sft
from open_r1.base.errors import Mistake
from open_r1.configs import LOSS_TYPES, Qwen2VLGRPOConfig, Qwen2VLSFTConfig, SFTScriptArguments
from open_r1.settings.limits import CHOICES
from open_r1.settings.options import GRPO, SFT, check_options
from open_r1.settings.recipes import overridden
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
    **{name: CHOICES[name] for name in ("vllm_mode", "vllm_importance_sampling_mode")},
    "cache_implementation": ("dynamic", "static"),
    "packing_strategy": ("bfd", "wrapped"),
    "truncation_mode": ("keep_start", "keep_end"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "dataloader_multiprocessing_context": ("fork", "spawn"),
    "report_to": ("none", "tensorboard", "trackio"),
    "pad_to_multiple_of": ("auto", 8),
    "include_for_metrics": (["loss"], ["inputs"]),
}
# What needs a GPU, a network or a launch of several processes, or takes minutes here.
ELSEWHERE = {"push_to_hub", "use_vllm", "tf32", "torch_compile", "use_cpu", "activation_offloading"}
WITH = {  # an option that means something beside another alone
    "sync_ref_model": {"beta": 0.1, "ref_model_sync_steps": 1},
    "use_adaptive_entropy": {"entropy_coef": 0.1},
    "log_unique_prompts": {"log_completions": True},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1},
    "greater_is_better": {"metric_for_best_model": "loss"},
}


def choices(field: dataclasses.Field, hint: Any) -> tuple[Any, ...]:
    """What to try of an option: values named above, members of an enumeration, the other side of a switch."""
    if field.name in CHOSEN:
        return CHOSEN[field.name]
    allowed = typing.get_args(hint) or (hint,)
    members = [kind for kind in allowed if isinstance(kind, type) and issubclass(kind, Enum)]
    if members and field.name != "loss_type":
        return tuple(member.value for member in members[0])
    return tuple(value for value in (True, False) if value is not field.default) if bool in allowed else ()


def trials(kind: type, losses: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each value of each choice, beside what it needs."""
    tried = [{"loss_type": loss} for loss in losses]
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.name not in ELSEWHERE:
            values = choices(field, hints[field.name])
            tried += [{**WITH.get(field.name, {}), field.name: value} for value in values]
    for trial in tried:
        if kwargs := SCHEDULES.get(trial.get("lr_scheduler_type")):
            trial["lr_scheduler_kwargs"] = kwargs
    return tried


def try_all(trials: list[dict[str, Any]], run: Callable[[int, dict[str, Any]], None]) -> None:
    """Run with each trial: it works, or ends in an error that names an option of it."""
    silent = []
    for number, trial in enumerate(trials):
        try:
            run(number, trial)
        except (ValueError, ImportError, RuntimeError) as error:
            if not any(name in str(error) for name in trial):
                silent.append((trial, repr(error)))
        except Exception as error:
            silent.append((trial, repr(error)))
    assert not silent, "\n".join(map(str, silent))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_every_option_of_grpo_works_or_is_refused(shared_prefix, tiny_model, tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1, "max_completion_length": 4}
    settings |= {"shared_prefix": shared_prefix, "disable_tqdm": True}

    def run(number: int, trial: dict[str, Any]) -> None:
        args = make_config(tmp_path / str(number), **{**settings, **trial})
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image(), one_image(2)).train()

    try_all(trials(GRPOConfig, LOSS_TYPES), run)


@pytest.mark.nightly
@pytest.mark.slow
def test_every_option_of_sft_works_or_is_refused(tiny_model, tmp_path):
    data = str(write_examples(tmp_path / "data", 4))
    script_args = SFTScriptArguments(data, eval_dataset_name=data, chat_template="base", max_pixels=12544)
    model_args = ModelConfig(model_name_or_path=str(tiny_model), dtype="float32")
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True}

    def run(number: int, trial: dict[str, Any]) -> None:
        args = Qwen2VLSFTConfig(str(tmp_path / str(number)), **{**settings, **trial})
        sft.build_trainer(script_args, args, model_args).train()

    try_all(trials(SFTConfig, ("nll", "dft", "chunked_nll")), run)


REFUSED = [
    ("cast_lm_head_to_fp32", True, "TRL finds the embeddings"),
    ("cache_implementation", "static", "the shared prefix has a cache of its own"),
    ("include_for_metrics", ["inputs"], "rewards are the metrics"),
    ("label_smoothing_factor", 0.1, "the loss of GRPO has no labels"),
    ("importance_sampling_level", "word", "'word' is none of token, sequence"),
    ("lr_scheduler_type", "warmup_stable_decay", "num_decay_steps"),
    ("optim", "schedule_free_adamw", "schedulefree"),
    ("report_to", "clearml", "clearml"),
    ("use_liger_kernel", True, "liger-kernel is not installed"),
]


@pytest.mark.parametrize("option, value, message", REFUSED)
def test_an_option_is_refused_before_weights_load(option, value, message, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loads"))
    args = make_config(tmp_path, **{option: value})
    with pytest.raises(Mistake, match=f"^{option}.*: .*{message}"):
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image())


@pytest.mark.parametrize("option, value", [("sync_ref_model", True), ("router_aux_loss_coef", 0.1)])
def test_what_trl_refuses_is_told_in_its_line(option, value, tmp_path, tiny_model):
    args = make_config(tmp_path, beta=0.0, **{option: value})
    with pytest.raises(Mistake, match=option):
        Qwen2VLGRPOTrainer(str(tiny_model), by_length, args, one_image())


SFT_REFUSED = [
    ("packing", True, "a row with images is one example"),
    ("completion_only_loss", False, "the answer alone is learned"),
    ("remove_unused_columns", True, "the answer and the images are columns"),
    ("train_sampling_strategy", "group_by_length", "the length of a row"),
    ("max_length", 512, "a cut would lose image tokens"),
    ("dataset_text_field", "body", "it prepares rows of texts"),
    ("optim", "schedule_free_adamw", ".*schedulefree"),
]


@pytest.mark.parametrize("option, value, message", SFT_REFUSED)
def test_an_option_of_sft_is_refused(option, value, message, tmp_path):
    args = Qwen2VLSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **{option: value})
    with pytest.raises(Mistake, match=f"^{option}: {message}"):
        sft.prepare(None, args, None)  # before it looks at data or model


def test_what_is_refused_is_an_option_and_no_default_is():
    """A name that TRL drops would be refused for ever after."""
    for refused, config in ((GRPO, Qwen2VLGRPOConfig), (SFT, Qwen2VLSFTConfig)):
        assert refused.keys() <= {field.name for field in dataclasses.fields(config)}
        check_options(config("x", bf16=False, use_cpu=True, report_to="none"))
    harmless = {"completion_only_loss": True, "train_sampling_strategy": "sequential"}
    check_options(Qwen2VLSFTConfig("x", bf16=False, use_cpu=True, report_to="none", **harmless))


def test_what_a_command_line_overrides_is_known_in_every_spelling():
    settings = {"learning_rate": 1e-6, "max_steps": 2, "shared_prefix": False, "beta": 0.04, "output_dir": "out"}
    line = [
        "--config",
        "a.yaml",
        "b.yaml",
        "--learning-rate",
        "1e-6",
        "--max_steps=2",
        "--no_shared_prefix",
        "--output_dir",
        "out",
    ]
    assert overridden(line, settings).keys() == settings.keys() - {"beta"}
