"""Turns the rewards of a group's completions into their advantages: the formula that GRPO is named after.

A completion is compared only with the others of its prompt. With rewards r of the G completions of a group,

    advantage = (r - mean(r)) / (std(r) + 1e-4)

(DeepSeekMath, arXiv 2402.03300, equation 3). Everything here is a pure function of the rewards of whole groups, the
completions of one prompt side by side. Shapes: B completions, of B / G groups, and F reward functions. A reward is NaN
if a function returned None for a completion. A completion without any reward has no part in its group's mean, and its
advantage is 0. `group_advantages` computes what TRL 1.16 does; tests/test_advantages.py compares the two.

To use another advantage, write a function with the signature of `leave_one_out` and name it in a recipe:
`advantage: module:function`.
"""

from collections.abc import Callable
from functools import partial

import torch
from trl.trainer.utils import nanstd

from open_r1.base.errors import Mistake
from open_r1.base.plugins import blamed_on, import_named

EPSILON = 1e-4  # keeps a group of nearly equal rewards finite, as in TRL

# rewards (B, F), weights (F,), group size G -> advantages (B,)
Advantage = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum (B,) of the rewards of each completion; NaN where no function gave one.

    Args:
        rewards: (B, F).
        weights: (F,).
    """
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_mean(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """The mean of each value's group, (B,) -> (B,), without NaN."""
    return values.view(-1, group_size).nanmean(dim=1).repeat_interleave(group_size)


def group_std(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """The standard deviation (of a sample) of each value's group (B,) -> (B,); 0 in a group of one."""
    if group_size == 1:
        return torch.zeros_like(values)
    return nanstd(values.view(-1, group_size), dim=1).repeat_interleave(group_size)


def batch_std(values: torch.Tensor) -> torch.Tensor:
    """The standard deviation (B,) of all values together; 0 for one."""
    return nanstd(values).expand_as(values) if len(values) > 1 else torch.zeros_like(values)


def normalize_each(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each function's rewards (B, F) less their group's mean and by its standard deviation, as GDPO has it."""
    columns = [
        (column - group_mean(column, group_size)) / (group_std(column, group_size) + EPSILON) for column in rewards.T
    ]
    return torch.stack(columns, dim=1)


def combined_rewards(
    rewards: torch.Tensor, weights: torch.Tensor, group_size: int, aggregation: str = "sum_then_normalize"
) -> torch.Tensor:
    """The sum of all functions' rewards (B,), by which completions are compared.

    NaN where no function gave a reward. Arguments: see `group_advantages`.
    """
    if aggregation == "sum_then_normalize":
        return total_rewards(rewards, weights)
    # the only reward of a group has no standard deviation: it counts as 0, as in TRL
    total = (normalize_each(rewards, group_size) * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def spread(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_size: int,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """The standard deviation (B,) that an advantage is divided by; if it is 0, a group teaches nothing.

    With `scale_rewards` "none", which divides by nothing, it is the group's. Arguments: see `group_advantages`.
    """
    total = combined_rewards(rewards, weights, group_size, aggregation)
    is_of_batch = scale_rewards == "batch" or aggregation == "normalize_then_sum"
    return batch_std(total) if is_of_batch else group_std(total, group_size)


def group_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_size: int,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """How much better than its group each completion was.

    Args:
        rewards: (B, F).
        weights: (F,), one for each function.
        group_size: G, completions of a prompt.
        scale_rewards: the difference to the group's mean is divided by the standard deviation of the "group", of the
            "batch", or by nothing: "none" (Dr. GRPO, arXiv 2503.20783).
        aggregation: "sum_then_normalize" first adds the functions' rewards; "normalize_then_sum" first normalizes each
            function's rewards within the group, adds the results, and normalizes the sums over the batch (GDPO, arXiv
            2601.05242); `scale_rewards` then has no effect.

    Returns:
        (B,), 0 where a completion has no reward.

    One prompt, four completions, one function that finds two of them right:

        >>> rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0]])
        >>> group_advantages(rewards, torch.ones(1), group_size=4, scale_rewards="none").tolist()
        [0.5, -0.5, -0.5, 0.5]
        >>> group_advantages(rewards, torch.ones(1), group_size=4)  # divided by the standard deviation, 0.577
        tensor([ 0.8659, -0.8659, -0.8659,  0.8659])
    """
    total = combined_rewards(rewards, weights, group_size, aggregation)
    sums_first = aggregation == "sum_then_normalize"
    advantages = total - (group_mean(total, group_size) if sums_first else total.nanmean())
    if not (sums_first and scale_rewards == "none"):
        advantages = advantages / (spread(rewards, weights, group_size, scale_rewards, aggregation) + EPSILON)
    return advantages.nan_to_num(nan=0.0)


def leave_one_out(rewards: torch.Tensor, weights: torch.Tensor, group_size: int) -> torch.Tensor:
    """How much better each completion was than the mean of the *others* of its group (RLOO, arXiv 2402.14740).

    Its baseline does not depend on the completion, so that the gradient has no bias; it is G / (G - 1) times
    `group_advantages` without scaling. Arguments and result: as there.

        >>> leave_one_out(torch.tensor([[1.0], [0.0], [0.0], [0.0]]), torch.ones(1), group_size=4)
        tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    groups = total_rewards(rewards, weights).view(-1, group_size)  # (B / G, G)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others
    return (groups - baseline).nan_to_num(nan=0.0).view(-1)


ADVANTAGES: dict[str, Advantage] = {"leave_one_out": leave_one_out}


def choose_advantage(name: str | None, scale_rewards: str, aggregation: str) -> Advantage:
    """The function from rewards to advantages that a recipe asks for.

    Args:
        name: of one in `ADVANTAGES`, or `module:name` of the user's own; None for `group_advantages`.
        scale_rewards, aggregation: for `group_advantages`.

    Raises:
        Mistake: there is no such function.
    """
    if name is None:
        return partial(group_advantages, scale_rewards=scale_rewards, aggregation=aggregation)
    return ADVANTAGES.get(name) or checked(import_named("advantage", "advantage", name, ADVANTAGES), name)


def checked(advantage: Advantage, name: str) -> Advantage:
    """The user's function of this name: what it raises names it, and a result that is no advantages is a Mistake."""

    def call(rewards: torch.Tensor, weights: torch.Tensor, group_size: int) -> torch.Tensor:
        with blamed_on("advantage", name):
            values = advantage(rewards, weights, group_size)
        is_tensor = isinstance(values, torch.Tensor)
        if not (is_tensor and values.shape == rewards.shape[:1] and values.isfinite().all()):
            shown = f"shape {tuple(values.shape)}" if is_tensor else type(values).__name__
            raise Mistake(f"advantage: {name} returned {shown}; expected a tensor of {len(rewards)} finite numbers")
        return values

    return call
