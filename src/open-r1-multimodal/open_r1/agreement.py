"""Whether an engine samples from what the policy scores: seen on a few completions before a run begins.

What an engine gets wrong it gets wrong silently: it answers another prompt, or the same about another image, and what
the loss does to correct for small differences hides that.
"""

from collections.abc import Callable, Sequence

import torch
from trl.trainer.utils import nanmax, nanmin

from open_r1.front_door import Mistake

PROMPTS, TOKENS = 2, 16  # asked, and the longest completion
BOUNDS = {"float32": 0.005}  # of the mean difference of log-probabilities, in nats
ROUNDED_BOUND = 0.05  # in 16 bits


def difference(sampled: Sequence[Sequence[float | None]], scored: torch.Tensor) -> torch.Tensor:
    """Sum and count (2,) of the absolute differences of log-probabilities.

    Args:
        sampled: of B completions what the engine says of each token; None where it does not know.
        scored: (B, C), the policy's, C at least as long as the longest.
    """
    pairs = [
        abs(ours - theirs)
        for completion, row in zip(sampled, scored.tolist(), strict=True)
        for theirs, ours in zip(completion, row, strict=False)
        if theirs is not None
    ]
    return torch.tensor([sum(pairs), len(pairs)], dtype=torch.float64)


def check_agreement(mean: float, dtype: str) -> None:
    """Let a run begin, or not.

    Args:
        mean: difference of log-probabilities.
        dtype: of the policy.

    Raises:
        Mistake: the difference is more than rounding, or no number.
    """
    bound = BOUNDS.get(dtype, ROUNDED_BOUND)
    if mean <= bound:
        return
    raise Mistake(
        f"use_vllm: the engine samples from something else than the policy scores: their log-probabilities differ by "
        f"{mean:.3f} in the mean (at most {bound} in {dtype}). Likely causes: another chat template; another "
        "max_pixels; a prompt whose image tokens are expanded twice; another checkpoint (a server's is the one that it "
        "was started with); or an untrained model, which gives vision tokens a share that is never sampled"
    )


def importance_ratio(
    difference: torch.Tensor, mask: torch.Tensor, mode: str, least: float | None, most: float | None
) -> torch.Tensor:
    """How much likelier the policy finds a completion than the engine that sampled it: by this the loss weighs tokens.

    TRL 1.16's correction (truncated or masked importance sampling), which has no function of its own there.

    Args:
        difference: (B, C), log-probability of the policy less that of the engine; NaN where the engine gave none.
        mask: (B, C), 1 on completion tokens.
        mode: "token_truncate" or "sequence_truncate" bound a ratio, "token_mask" or "sequence_mask" drop one outside.
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
    is_outside = (ratio < (-torch.inf if least is None else least)) | (ratio > (torch.inf if most is None else most))
    return ratio.masked_fill(is_outside, 0.0)


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
