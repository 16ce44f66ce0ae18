"""Averages a term beside TRL's loss over a micro-batch's tokens, weighted as TRL weighs its loss by loss type."""

from typing import Any

import torch


def batch_mean(
    values: torch.Tensor, mask: torch.Tensor, loss_type: str, longest: int, tokens: torch.Tensor
) -> torch.Tensor:
    """The mean of the values over a micro-batch's tokens, weighted as TRL 1.16 weighs tokens under a loss type.

    So PAPO's term is averaged over a completion first with `grpo` (the paper's PAPO-G), and over all tokens with `dapo`
    (PAPO-D); a teacher's likewise, and with `dapo` as in TRL's `DistillationTrainer`.

    Args:
        values, mask: (B, C).
        loss_type: TRL's.
        longest: tokens that a completion may have.
        tokens: completion tokens in a micro-batch of one process, the mean over the rollout.
    """
    totals = (values * mask).sum(dim=1)  # (B,)
    if loss_type in ("grpo", "sapo"):
        return (totals / mask.sum(dim=1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return totals.sum() / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return totals.sum() / (len(totals) * longest)
    if loss_type == "luspo":
        return totals.mean()
    return totals.sum() / tokens  # dapo, cispo, vespo


class TermMixin:
    """Mixin for a `GRPOTrainer` with a term beside TRL's loss."""

    def _mean_of(self, name: str, values: torch.Tensor, counted: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """What a term adds to a micro-batch's loss: its mean as the loss type weighs tokens, divided by accumulation.

        The plain mean of all processes' values is logged.

        Args:
            name: in the log.
            values: (B, C), 0 where they do not count.
            counted: (B, C), 1 where they do.
            inputs: of the micro-batch.
        """
        sums = torch.stack([(values.detach() * counted).sum(), counted.sum()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._log({name: total / max(count, 1)})
        tokens = inputs["num_items_in_batch"].clamp(min=1)
        tokens = tokens / self.accelerator.num_processes / self.args.steps_per_generation
        mean = batch_mean(values, inputs["completion_mask"], self.loss_type, self.max_completion_length, tokens)
        return mean / self.current_gradient_accumulation_steps
