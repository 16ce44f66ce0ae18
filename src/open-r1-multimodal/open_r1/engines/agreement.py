"""Checks that an engine samples from what the policy scores, on a few completions before a run.

What an engine gets wrong is silent: it answers another prompt or sees another image, and the loss
corrects for the difference. A right engine differs as well, because both round to 16 bits, with
real weights by 0.04 nats a token. So the policy scores the same tokens in float32, too, and the
engine may differ from that by little more than the policy in 16 bits does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from trl.trainer.utils import nanmax, nanmin

from open_r1.base.errors import Mistake

PROMPTS, TOKENS = 4, 32  # asked, and the longest completion
FLOOR = 0.005  # nats; a mean difference up to here is accepted in any dtype
MULTIPLE = 1.5  # of the policy's own; right engines were at 0.9 to 1.3, faults from 1.6 on (docs/measured.md)
SHORT = (torch.bfloat16, torch.float16)


def difference(sampled: Sequence[Sequence[float | None]], scored: torch.Tensor) -> torch.Tensor:
    """Sum and count (2,) of the absolute differences of log-probabilities.

    Args:
        sampled: of B completions what is said of each token; None where it is not known.
        scored: (B, C), the policy's in float32, C at least as long as the longest.
    """
    pairs = [
        abs(ours - theirs)
        for completion, row in zip(sampled, scored.tolist(), strict=True)
        for theirs, ours in zip(completion, row, strict=False)
        if theirs is not None
    ]
    return torch.tensor([sum(pairs), len(pairs)], dtype=torch.float64)


class InFloat32(TorchFunctionMode):
    """In the block, a model computes in float32 what it would in 16 bits; its weights stay.

    Every function of torch gets its tensors of 16 bits as float32, and makes float32 where it is asked for 16 bits. So
    no copy of the model is made: a weight is widened where it is used, and forgotten. For forward passes alone.

    Args:
        device: where the model is; autocast to 16 bits is off there.

    Example:
        linear = nn.Linear(3, 3).bfloat16()
        with InFloat32(linear.weight.device):
            linear(x)  # as linear.float()(x.float())
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ in ("__get__", "data_ptr"):  # an attribute, such as a shape; a tensor's place, for a kernel
            return func(*args)
        # the functions of the package flash-attn take nothing but 16 bits
        change = narrow if str(func).startswith("flash_attn.") else widen
        args, kwargs = tree_map(change, (args, kwargs or {}))
        with torch.autocast(self.device.type, enabled=False):
            return func(*args, **kwargs)


def widen(value: Any) -> Any:
    """A tensor, or a dtype, of 16 bits as float32; whatever else as it is."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in SHORT else value
    return torch.float32 if isinstance(value, torch.dtype) and value in SHORT else value


def narrow(value: Any) -> Any:
    """A tensor of float32 as bfloat16; whatever else as it is."""
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def check_agreement(mean: float, rounding: float, dtype: str) -> None:
    """Raise Mistake if an engine's log-probabilities differ from the policy's by more than rounding explains.

    Args:
        mean: absolute difference of the engine's log-probabilities from the policy's in float32.
        rounding: that of the policy's own in `dtype`.
        dtype: of the policy and the engine.

    Raises:
        Mistake: the difference is more than rounding, or no number.
    """
    bound = max(FLOOR, MULTIPLE * rounding)
    if mean <= bound:
        return
    raise Mistake(
        "use_vllm: the engine samples from something else than the policy scores: its log-probabilities differ by "
        f"{mean:.3f} in the mean from the policy's in float32 (at most {bound:.3f}; the policy's own in {dtype} differ "
        f"by {rounding:.3f}). Likely causes: another chat template; another max_pixels; a prompt whose image tokens "
        "are expanded twice; another checkpoint (a server's is the one that it was started with); or an untrained "
        "model, which gives vision tokens a share that is never sampled"
    )


def importance_ratio(
    difference: torch.Tensor, mask: torch.Tensor, mode: str, least: float | None, most: float | None
) -> torch.Tensor:
    """Probability of a completion under the policy over that under the engine; it weighs the loss.

    TRL 1.16's correction (truncated or masked importance sampling), in a function of its own.

    Args:
        difference: (B, C), log-probability of the policy less the engine's; NaN without one.
        mask: (B, C), 1 on completion tokens.
        mode: "token_truncate", "sequence_truncate" clip; "token_mask", "sequence_mask" drop.
        least, most: the bounds; None for none.

    Returns:
        (B, C), or (B, 1) for a sequence.
    """
    log_ratio = (difference * mask).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=-1, keepdim=True)
    ratio = log_ratio.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=least, max=most)
    lowest, highest = -torch.inf if least is None else least, torch.inf if most is None else most
    return ratio.masked_fill((ratio < lowest) | (ratio > highest), 0.0)


def sampling_figures(
    difference: torch.Tensor,
    ratio: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """What TRL logs of the distance between engine and policy, under its names.

    Args:
        difference, mask, mode: see `importance_ratio`, which gives `ratio`.
        gather: a number of every process.
    """
    mask = mask.bool()
    nothing = torch.zeros(1, device=mask.device)
    apart = difference.abs()[mask & ~difference.isnan()]
    ratio = ratio.flatten() if mode.startswith("sequence") else ratio[mask]
    apart, ratio = (values if len(values) else nothing for values in (apart, ratio))
    figures = {
        "sampling_logp_difference/mean": gather(apart.mean()).mean(),
        "sampling_logp_difference/max": gather(apart.max()).max(),
        "importance_sampling_ratio/min": nanmin(gather(ratio.min())),
        "importance_sampling_ratio/mean": gather(ratio.mean()).nanmean(),
        "importance_sampling_ratio/max": nanmax(gather(ratio.max())),
    }
    return {f"sampling/{name}": value.item() for name, value in figures.items()}
