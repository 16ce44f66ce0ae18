"""Draws a run's rewards (or its loss) while it trains, in place of lines of progress, where a notebook shows them."""

import sys
from importlib import import_module
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from open_r1.base.fields import is_usable
from open_r1.reporting.curves import Line, Panel
from open_r1.reporting.runs import Series


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython() if ipython else None, "kernel")


class LivePlot(TrainerCallback):
    """One plot that grows with the log: the mean of every reward and held-out accuracy; of SFT the loss."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Make room for the plot."""
        self.ipython = import_module("IPython.display")  # which a notebook's kernel has
        self.points: dict[str, dict[int, float]] = {}
        self.handle = self.ipython.display(self.ipython.HTML("training ..."), display_id=True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any):
        """Draw the plot anew."""
        from open_r1.reporting.figures import panel_svg  # imports matplotlib, which a run in a shell starts without

        for metric, value in logs.items():
            # a reward that gave nothing in a whole step is logged as None
            if is_usable(value) and (name := curve_name(metric, logs)) is not None:
                self.points.setdefault(name, {})[state.global_step] = value
        lines = [
            Line(name, Series(np.array(list(points)), np.array(list(points.values()))), marked=name.startswith("held"))
            for name, points in self.points.items()
        ]
        if lines:
            label = f"step {state.global_step} of {state.max_steps}"
            self.handle.update(self.ipython.HTML(panel_svg(Panel("", lines), label)))


def curve_name(metric: str, logs: dict[str, Any]) -> str | None:
    """What the plot calls a metric of one log event; None leaves it out."""
    is_mean = metric.startswith("rewards/") and metric.endswith("/mean")
    if is_mean:
        return metric.split("/")[1].removesuffix("_reward")
    if metric == "eval_rewards/accuracy_reward/mean":
        return "held-out accuracy"
    return metric if metric == "loss" and "reward" not in logs else None
