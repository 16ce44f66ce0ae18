"""Computes the figures of an evaluation in training over its questions, each once.

Of several evaluation sets each logs under its own name, as transformers has it: `eval_easy_reward`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl.trainer.utils import nanstd

from open_r1.base.errors import Mistake
from open_r1.trainer.advantages import total_rewards


class NamedEvaluationMixin:
    """Logs TRL's metrics of an evaluation under the evaluation's own prefix, where TRL's trainers have `eval_` for all.

    For a trainer of TRL's, in front of it.
    """

    evaluation_prefix = "eval"  # of the evaluation under way: `eval_{name}` of a set with a name

    @property
    def evaluated_set(self) -> str | None:
        """The name of the set that is evaluated, if it has one."""
        return self.evaluation_prefix.partition("_")[2] or None

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """transformers', which calls it for each of several sets."""
        self.evaluation_prefix = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, which has nothing left to add to what an evaluation logs."""
        if not self.model.training:
            metrics = self._metrics["eval"]
            logs.update({f"{self.evaluation_prefix}_{name}": mean(values) for name, values in metrics.items()})
            metrics.clear()
        super().log(logs, start_time)


def check_best(metric: str | None, eval_dataset: Any) -> None:
    """Raise ValueError where `metric_for_best_model` names none of several evaluation sets."""
    if metric and isinstance(eval_dataset, dict):
        figure = metric.removeprefix("eval_")
        if not any(figure.startswith(f"{name}_") for name in eval_dataset):
            known = " or ".join(f"eval_{name}_{figure}" for name in eval_dataset)
            raise Mistake(f"metric_for_best_model: {metric} is of no evaluation set; {known} would be")


def mean(values: Sequence[float]) -> float | None:
    """The mean of the values that are numbers, as TRL logs it; None where none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else None


def held_out_figures(
    rows: Sequence[Mapping[str, Any]], weights: Sequence[float], group_size: int
) -> dict[str, float | None]:
    """The figures of an evaluation under the names, and in the definitions, of TRL's metrics of one batch.

    Args:
        rows: trajectory rows of all N completions, those of a question together; see `open_r1.trainer.trainer`.
        weights: of the reward functions, in the order of the rows' `rewards`.
        group_size: completions of each question.
    """
    names = list(rows[0]["rewards"])
    rewards = torch.tensor(
        [[float("nan") if row["rewards"][name] is None else row["rewards"][name] for name in names] for row in rows]
    )  # (N, functions); NaN where a function says nothing
    total = total_rewards(rewards, torch.tensor(weights))  # (N,)
    groups = total[: len(total) // group_size * group_size].view(-1, group_size)
    spread = groups.std(dim=1) if group_size > 1 else torch.zeros(len(groups))
    figures = {
        "reward": total.nanmean(),
        "reward_std": nanstd(total),
        "frac_reward_zero_std": torch.isclose(spread, torch.zeros_like(spread)).float().mean(),
    }
    for name, column in zip(names, rewards.T, strict=True):
        figures |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/std": nanstd(column)}
    lengths = torch.tensor([row["length"] for row in rows], dtype=torch.float)
    ended = torch.tensor([row["ended"] for row in rows])
    figures["completions/clipped_ratio"] = 1 - ended.float().mean()
    for kind, some in (("", lengths), ("terminated_", lengths[ended] if ended.any() else torch.zeros(1))):
        figures |= {
            f"completions/mean_{kind}length": some.mean(),
            f"completions/min_{kind}length": some.min(),
            f"completions/max_{kind}length": some.max(),
        }
    return {name: value.item() for name, value in figures.items()}
