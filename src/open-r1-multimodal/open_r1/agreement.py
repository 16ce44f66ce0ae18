"""Whether an engine samples from what the policy scores: seen on a few completions before a run begins.

What an engine gets wrong it gets wrong silently: it answers another prompt, or the same about another image, and what
the loss does to correct for small differences hides that.
"""

from collections.abc import Sequence

import torch

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
