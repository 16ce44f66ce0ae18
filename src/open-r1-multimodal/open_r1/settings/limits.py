"""The values that each setting of a recipe may have, checked before anything is loaded."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from open_r1.base.errors import Mistake


@dataclass(frozen=True)
class Limit:
    """Which numbers a setting takes.

    Attributes:
        words: these numbers in words, for an error.
        admits: whether a number is one of them.
        hint: what an error adds, to explain the limit or to mend the setting.
    """

    words: str
    admits: Callable[[float], bool]
    hint: str = ""


FINITE = Limit(
    "a finite number of at most 64 bits",
    lambda value: math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63,
)
COUNT = Limit("a number of at least 1", lambda value: value >= 1)
AMOUNT = Limit("a number of at least 0", lambda value: value >= 0)
POSITIVE = Limit("a number above 0", lambda value: value > 0)
SHARE = Limit("a number of at least 0 and at most 1", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Limit("a number above 0 and at most 1", lambda value: 0 < value <= 1)
BELOW_ONE = Limit("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
SEED = Limit("a number of at least 0 and at most 4294967295", lambda value: 0 <= value < 2**32)
PIXELS = Limit("a number of at least 784", lambda value: value >= 784, "the area of one image token is 28 x 28 pixels")

# Limits of this project's settings, and of those of TRL, transformers and PEFT that with another value would end a run
# late, or train something else than is meant. Any number has to be finite.
LIMITS: dict[str, Limit] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("completions_per_step", "generation_batch_size", "steps_per_generation", "num_iterations"),
            *("num_generations_eval", "max_completion_length", "max_prompt_length", "max_refills"),
            *("lora_r", "lora_alpha", "ref_model_sync_steps", "dataloader_prefetch_factor"),
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "beta", "epsilon", "epsilon_high", "top_k", "weight_decay", "warmup_steps"),
            *("max_grad_norm", "save_total_limit", "papo_coef", "dataloader_num_workers"),
        ),
        AMOUNT,
    ),
    **dict.fromkeys(
        (
            *("repetition_penalty", "adam_epsilon", "logging_steps", "eval_steps", "num_train_epochs"),
            "distill_coef",
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            *("min_signal_groups", "skip_solved", "skip_hopeless", "papo_mask_ratio", "min_p"),
            *("top_entropy_quantile", "ref_model_mixup_alpha"),
        ),
        SHARE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), BELOW_ONE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), POSITIVE_SHARE),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("max_pixels", "min_pixels"), PIXELS),
    "delta": Limit("a number above 1", lambda value: value > 1, "it bounds the ratio itself, which is 1 at first"),
    "temperature": replace(POSITIVE, hint="completions are sampled"),
    "num_generations": Limit(
        "a number of at least 2", lambda value: value >= 2, "a completion is measured against the others of its group"
    ),
    "max_steps": Limit(
        "a number of at least 1, or -1", lambda value: value >= 1 or value == -1, "-1 trains num_train_epochs"
    ),
    "save_steps": replace(POSITIVE, hint="save_strategy: no saves nothing"),
    "rollout_noise": Limit(
        "a number of at least 0 and at most 999",
        lambda value: 0 <= value <= 999,
        "a step of diffusion; NoisyRollout starts from 500",
    ),
}

# Values of TRL's settings, which TRL checks in the first step or never; and of `task`, ours: what can be asked about a
# folder of pictures
CHOICES: dict[str, tuple[Any, ...]] = {
    "task": ("pretext",),
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
    "attn_implementation": ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
}
# Settings that must have a value -> what an error adds.
NEEDED = {
    **dict.fromkeys(("num_generations", "max_completion_length", "reward_funcs"), ""),
    "model_name_or_path": "; name a model in the recipe, or in MODEL",
}


def check_values(settings: Mapping[str, Any]) -> None:
    """See that every setting has a value that means something, and that settings agree.

    Args:
        settings: name -> value, of any of the commands.

    Raises:
        Mistake: for the first setting with a value that it does not take, or that contradicts another one.
    """
    for name, value in settings.items():
        if name in NEEDED and value in (None, []):
            raise Mistake(f"{name}: needs a value{NEEDED[name]}")
        for number in value if isinstance(value, list) else [value]:
            check_number(name, number)
        is_kernel = name == "attn_implementation" and "/" in str(value)  # on the Hub
        if name in CHOICES and value not in (None, *CHOICES[name]) and not is_kernel:
            raise Mistake(f"{name}: {value!r} is none of {', '.join(map(str, CHOICES[name]))}")
    smallest, largest = settings.get("min_pixels"), settings.get("max_pixels")
    if smallest and largest and smallest > largest:
        raise Mistake(f"min_pixels {smallest} is more than max_pixels {largest}; min_pixels: {largest} would fit")
    rewards, weights = settings.get("reward_funcs"), settings.get("reward_weights")
    if rewards and weights is not None and len(rewards) != len(weights):
        names = ", ".join(rewards)
        raise Mistake(f"reward_weights: {len(weights)} for {len(rewards)} reward_funcs ({names}); give one for each")
    if weights and not any(weights) and not settings.get("teacher_model_name_or_path"):
        raise Mistake("reward_weights: all are 0, and without a teacher nothing would be learned")


def check_number(name: str, value: Any) -> None:
    """Raise Mistake for a number that its setting does not take; values that are no numbers pass."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    for limit in (FINITE, LIMITS.get(name, FINITE)):
        if not limit.admits(value):
            raise Mistake(f"{name} {value}: expected {limit.words}" + (f"; {limit.hint}" if limit.hint else ""))
