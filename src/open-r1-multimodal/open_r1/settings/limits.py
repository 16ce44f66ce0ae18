"""The values that each setting of a recipe may have, in one table that is checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_r1.base.errors import Mistake


@dataclass(frozen=True)
class Limit:
    """The finite numbers that a setting takes.

    Attributes:
        low, high: the smallest and the largest; `open_low`, `open_high` leave these themselves out.
        also: one more, which means something of its own.
        hint: what to do about another.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: float | None = None
    hint: str = ""

    def admits(self, value: float) -> bool:
        """Whether a number is one of them; NaN never is."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (math.isfinite(value) and above and below) or value == self.also

    def __str__(self) -> str:
        words = [f"{'above' if self.open_low else 'of at least'} {self.low}"] if self.low > -math.inf else []
        words += [f"{'below' if self.open_high else 'at most'} {self.high}"] if self.high < math.inf else []
        also = "" if self.also is None else f", or {self.also}"
        return f"a number {' and '.join(words)}{also}" if words else "a finite number"


COUNT = Limit(low=1)
AMOUNT = Limit(low=0)
POSITIVE = Limit(low=0, open_low=True)
SHARE = Limit(low=0, high=1)
BELOW_ONE = Limit(low=0, high=1, open_high=True)
SEED = Limit(low=0, high=2**32 - 1)
PIXELS = Limit(low=28 * 28, hint="the area of one image token is 28 x 28 pixels")

# Numbers that are not named here are finite. Ours, and those of TRL, transformers and PEFT that a recipe may set.
LIMITS: dict[str, Limit] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("completions_per_step", "generation_batch_size", "steps_per_generation", "num_iterations"),
            *("num_generations_eval", "max_completion_length", "max_prompt_length", "max_length"),
            *("eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_timeout"),
            *("lora_r", "lora_alpha", "ref_model_sync_steps", "vllm_max_model_length", "vllm_tensor_parallel_size"),
            "max_refills",
        ),
        COUNT,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "beta", "epsilon", "epsilon_high", "top_k", "weight_decay", "warmup_steps"),
            *("max_grad_norm", "save_total_limit", "eval_delay", "neftune_noise_alpha"),
            *("dataloader_num_workers", "entropy_coef", "router_aux_loss_coef", "vllm_importance_sampling_clip_min"),
            "papo_coef",
        ),
        AMOUNT,
    ),
    **dict.fromkeys(
        (
            *("delta", "repetition_penalty", "adam_epsilon", "sapo_temperature_neg", "sapo_temperature_pos"),
            *("vllm_server_timeout", "vllm_importance_sampling_clip_max", "off_policy_mask_threshold"),
            *("logging_steps", "eval_steps", "num_train_epochs"),
        ),
        POSITIVE,
    ),
    **dict.fromkeys(
        (
            *("min_p", "label_smoothing_factor", "ref_model_mixup_alpha", "top_entropy_quantile"),
            *("min_signal_groups", "skip_solved", "skip_hopeless", "papo_mask_ratio"),
        ),
        SHARE,
    ),
    "rollout_noise": Limit(low=0, high=999, hint="a step of diffusion; NoisyRollout starts from 500"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), BELOW_ONE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), Limit(low=0, high=1, open_low=True)),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("max_pixels", "min_pixels"), PIXELS),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), Limit(low=1, high=65535)),
    "temperature": Limit(low=0, open_low=True, hint="completions are sampled"),
    "num_generations": Limit(low=2, hint="a completion is measured against the others of its group"),
    "max_steps": Limit(low=1, also=-1, hint="-1 trains num_train_epochs"),
    "save_steps": Limit(low=0, open_low=True, hint="save_strategy: no saves nothing"),
}

# TRL's own names, which it checks in the first step or never
CHOICES: dict[str, tuple[Any, ...]] = {
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate"),
    "attn_implementation": ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
}
NEEDED = ("num_generations", "max_completion_length", "reward_funcs")


def check_values(settings: Mapping[str, Any]) -> None:
    """See that every setting has a value that means something.

    Args:
        settings: name -> value, of any of the commands.

    Raises:
        ValueError: in one line, for the first that has not.
    """
    for name, value in settings.items():
        if name in NEEDED and value in (None, []):
            raise Mistake(f"{name}: needs a value")
        for number in value if isinstance(value, list) else [value]:
            limit = LIMITS.get(name, Limit())
            if isinstance(number, int | float) and not isinstance(number, bool) and not limit.admits(number):
                raise Mistake(f"{name} {number}: expected {limit}" + (f"; {limit.hint}" if limit.hint else ""))
        is_kernel = name == "attn_implementation" and "/" in str(value)  # on the Hub
        if name in CHOICES and value not in (None, *CHOICES[name]) and not is_kernel:
            raise Mistake(f"{name}: {value!r} is none of {', '.join(map(str, CHOICES[name]))}")
    check_pairs(settings)


def check_pairs(settings: Mapping[str, Any]) -> None:
    """See that settings that speak of one thing agree; raises as `check_values` does."""
    smallest, largest = settings.get("min_pixels"), settings.get("max_pixels")
    if smallest and largest and smallest > largest:
        raise Mistake(f"min_pixels {smallest} is more than max_pixels {largest}; min_pixels: {largest} would fit")
    rewards, weights = settings.get("reward_funcs"), settings.get("reward_weights")
    if rewards and weights is not None and len(rewards) != len(weights):
        raise Mistake(
            f"reward_weights: {len(weights)} for {len(rewards)} reward_funcs ({', '.join(rewards)}); give one for each"
        )
    if weights and not any(weights):
        raise Mistake("reward_weights: all are 0, and nothing would be learned")
