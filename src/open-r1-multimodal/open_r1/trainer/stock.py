"""The generation step as TRL runs it: shared_prefix false, tools, a rollout function of the user's, text models."""

from typing import Any

from accelerate.utils import gather_object

from open_r1.trainer.recorder import Rollout, Rows
from open_r1.trainer.rows import row_images


class StockStepMixin:
    """Mixin for TRL's `GRPOTrainer`: its own step, with images opened here, for rows with images and without."""

    def _take_stock_step(self, rollout: Rollout) -> dict[str, Any]:
        """TRL's generation step, which fills the record on its way through `_calculate_rewards`."""
        rows = []
        for row in rollout.rows:
            images, is_broken = self.images.open(row_images(row))
            rows.append({**row, "images": images})
            rollout.is_broken.append(is_broken)
        if not any(row["images"] for row in rows):
            rows = [{name: row[name] for name in row if name not in ("image", "images")} for row in rows]
        batch = super()._generate_and_score_completions(Rows(rows, rollout))
        rollout.advantages = batch["advantages"].tolist()
        if any(rollout.is_broken):  # the loss leaves out what saw a blank in an image's place
            batch["completion_mask"][rollout.is_broken] = 0
        counted = (batch["completion_mask"] * batch.get("tool_mask", 1)).sum()  # as TRL counts
        batch["num_items_in_batch"] = self.accelerator.gather(counted).sum()
        return batch

    # TRL has None for a row without images, which its next call of the processor does not take.
    def _tokenize_prompts(self, prompts: list) -> tuple[list, list | None, dict]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        # TRL gathers the images for its table from the ranks that have some; a rank without would wait elsewhere.
        self.log_multimodal = self.args.log_multimodal and all(gather_object([images is not None]))
        return ids, images and [each or [] for each in images], fields
