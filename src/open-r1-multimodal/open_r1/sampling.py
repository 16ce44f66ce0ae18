"""In what order prompts are asked, and how a rollout's groups are shuffled into micro-batches."""

from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

from open_r1.shared_prefix import rows_by_prompt


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the seed and the epoch, so that a resumed run finds it again.

    TRL's draws epoch after epoch from one generator, which a resumed run would start from the first.
    """

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it at the start of every epoch, also of the one it resumes in."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """Reorder a rollout's rows, the completions of one prompt staying together; every entry with rows is (B, ...).

    Args:
        batch: tensors and lists, `prompts` (as `pack` takes them) among them.
    """
    groups = rows_by_prompt(batch["prompts"])
    order = [row for group in torch.randperm(len(groups)).tolist() for row in groups[group]]

    def reorder(values: Any) -> Any:
        if isinstance(values, torch.Tensor):
            return values[order] if values.ndim else values
        return [values[row] for row in order]

    return {name: reorder(values) for name, values in batch.items()}
