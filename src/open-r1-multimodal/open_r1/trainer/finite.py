"""Stops a run at a NaN or infinite loss or gradient, before it changes the weights, and saves the batch."""

import math
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import gather_object

from open_r1.base.errors import Mistake
from open_r1.base.files import replace_file, to_json
from open_r1.running.checkpoints import find_defect, last_complete_checkpoint
from open_r1.running.machines import decide_once


class FiniteMixin:
    """Mixin for a `Trainer`: a step whose loss or gradient is NaN or infinite ends the run in one line.

    All processes stop together. A bad loss, and outside DeepSpeed a bad gradient, is found before the optimizer's
    update: the weights, still those of the step before, are saved as a checkpoint. DeepSpeed has made the update before
    it tells the gradient's norm: the error then names the newest checkpoint.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._batch_ids = inputs.get("input_ids")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            loss = result[0] if return_outputs else result
            if self.accelerator.reduce((~loss.isfinite()).float().sum(), reduction="sum").item():
                self.stop("the loss is not a number", keeps_weights=True)
        return result

    # The norm of the gradient that the update is about to use; DeepSpeed's, of the one that it just used.
    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # float16 has infinite ones by design: the step is left out, the loss scaled down. DeepSpeed's NaN is -1.
        if not self.args.fp16 and norm is not None and not 0 <= float(norm) < math.inf:
            self.stop("the gradient is not a number", keeps_weights=not self.is_deepspeed_enabled)
        return norm

    def offending_batch(self) -> list[dict[str, Any]]:
        """What the step under way learns from, as rows for JSON: those of all processes."""
        texts = self.processing_class.batch_decode(self._batch_ids)
        return [{"text": text} for text in gather_object(texts)]

    def stop(self, reason: str, keeps_weights: bool) -> NoReturn:
        """End the run at the step under way: leave its batch as JSON, and a checkpoint of the step before.

        Args:
            reason: what happened.
            keeps_weights: whether they are still those of the step before. All processes must come here then.

        Raises:
            Mistake: always; it says where checkpoint and batch are.
        """
        done, folder = self.state.global_step, Path(self.args.output_dir)
        rows, path = self.offending_batch(), folder / f"stopped_at_step_{done + 1}.json"
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, to_json({"step": done + 1, "reason": reason, "batch": rows}, indent=1))
        if keeps_weights and done and decide_once(lambda: find_defect(folder / f"checkpoint-{done}")):
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.accelerator.wait_for_everyone()  # until the main process has declared it complete
        checkpoint = last_complete_checkpoint(folder)
        goes_on = f"the same command goes on from {checkpoint}" if checkpoint else "there is no checkpoint yet"
        raise Mistake(
            f"step {done + 1}: {reason}; its batch is in {path}; {goes_on}; look at the batch, or lower learning_rate "
            "or max_grad_norm"
        )
