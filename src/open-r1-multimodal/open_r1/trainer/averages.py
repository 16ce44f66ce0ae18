"""Averages a term beside TRL's loss over a micro-batch's tokens, weighted as TRL weighs its loss by loss type."""

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
