"""What GRPO logs beside TRL's metrics: rewards, the seconds of a step, and an evaluation's figures.

The figures of an evaluation are over its questions, each once, where TRL has the means of uneven
batches' means. Of several evaluation sets each logs under its own name, as transformers has it:
`eval_easy_reward`.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from trl.trainer.utils import nanstd

from open_r1.answers.reflection import reflection_shares
from open_r1.base.errors import Mistake
from open_r1.trainer.advantages import spread, total_rewards
from open_r1.trainer.recorder import Rollout
from open_r1.trainer.trackers import as_text

BLIND = "blind"  # the prefix of an evaluation that shows no images
# Under this name TRL's metrics keep the completion tokens of each batch of an evaluation, as weights of `PER_TOKEN`;
# `log` takes it out.
TOKENS = "tokens"
PER_TOKEN = ("kl", "entropy")  # metrics that are a mean over a batch's tokens
LOSSES_PER_TOKEN = ("bnpo", "cispo", "dapo", "vespo")  # loss types that are one; the others are over completions
FIGURES = ("reward", "reward_std", "loss", *PER_TOKEN)  # of every evaluation; a reward may have such a name, too


def check_best(metric: str | None, eval_dataset: Any, rewards: Sequence[str]) -> None:
    """Raise Mistake where `metric_for_best_model` names a reward in other words than the log, or no evaluation set.

    Args:
        metric: as it was given.
        eval_dataset: of the trainer.
        rewards: their names in the log.
    """
    figure = (metric or "").removeprefix("eval_")
    known = [f"rewards/{name}/{kind}" for name in rewards for kind in ("mean", "std")]
    is_reward = figure.startswith("rewards/") or {figure, f"{figure}_reward"} & set(rewards)
    if is_reward and figure not in (*known, *FIGURES):
        raise Mistake(f"metric_for_best_model: no evaluation has {metric}; they have reward, {', '.join(known)}")
    sets = eval_dataset if isinstance(eval_dataset, dict) else ()
    if figure and sets and not any(figure.startswith(f"{name}_") for name in sets):
        known = " or ".join(f"eval_{name}_{figure}" for name in sets)
        raise Mistake(f"metric_for_best_model: {metric} is of no evaluation set; {known} would be")


def reward_figures(
    rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str], scale: torch.Tensor
) -> dict[str, float]:
    """What TRL logs of rewards, under its names.

    Without `reward_std` and `frac_reward_zero_std` where all weights are 0, as where a teacher alone is learned from.

    Args:
        rewards: (B, F), NaN where a function says nothing.
        weights: (F,).
        names: of the F functions.
        scale: (B,), see `advantages.spread`.
    """
    figures = {}
    for name, column in zip(names, rewards.T, strict=True):
        figures |= {f"rewards/{name}/mean": column.nanmean(), f"rewards/{name}/std": nanstd(column)}
    total = total_rewards(rewards, weights)
    figures["reward"] = total.nanmean()
    if weights.any():
        figures["reward_std"] = nanstd(total)
        figures["frac_reward_zero_std"] = torch.isclose(scale, torch.zeros_like(scale)).float().mean()
    return {name: value.item() for name, value in figures.items()}


def figures_of(
    rows: Sequence[Mapping[str, Any]], weights: Sequence[float], group_size: int, *scaling: str
) -> dict[str, float]:
    """The figures of an evaluation or a rollout, named and defined as those that TRL logs of one batch.

    Args:
        rows: trajectory rows of all N completions, those of a question together.
        weights: of the reward functions, in the order of the rows' `rewards`.
        group_size: completions of each question.
        scaling: see `advantages.spread`.
    """
    names = list(rows[0]["rewards"])
    values = [[row["rewards"][name] for name in names] for row in rows]
    rewards = torch.tensor([[math.nan if value is None else value for value in row] for row in values])
    weights = torch.tensor(weights)
    figures = reward_figures(rewards, weights, names, spread(rewards, weights, group_size, *scaling))
    lengths = torch.tensor([row["length"] for row in rows], dtype=torch.float)
    ended = torch.tensor([row["ended"] for row in rows])
    figures["completions/clipped_ratio"] = 1 - ended.float().mean().item()
    terminated = lengths[ended] if ended.any() else torch.zeros(1)
    for kind, counts in (("length", lengths), ("terminated_length", terminated)):
        figures |= {
            f"completions/mean_{kind}": counts.mean().item(),
            f"completions/min_{kind}": counts.min().item(),
            f"completions/max_{kind}": counts.max().item(),
        }
    return figures


def text_figures(rows: Sequence[Mapping[str, Any]], group_size: int) -> dict[str, float]:
    """The share of a rollout's groups that say the same throughout, and how its completions reflect.

    Arguments: see `figures_of`.
    """
    groups = [{row["completion"] for row in rows[i : i + group_size]} for i in range(0, len(rows), group_size)]
    identical = sum(len(texts) == 1 for texts in groups) / len(groups)
    return {"completions/identical_groups": identical, **reflection_shares(rows)}


class NamedEvaluationMixin:
    """Mixin for a trainer of TRL's: each evaluation logs under its own prefix.

    TRL's trainers have `eval_` for all.
    """

    evaluation_prefix = "eval"  # of the evaluation under way: `eval_{name}` of a set with a name

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """transformers', which calls it for each of several sets."""
        self.evaluation_prefix = metric_key_prefix
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # For the error, which is a KeyError of transformers'; and for a figure that is None, which it does not expect: a
    # reward that said nothing of any completion makes no checkpoint the best.
    def _determine_best_metric(self, metrics, trial):
        chosen = self.args.metric_for_best_model
        name = f"eval_{chosen.removeprefix('eval_')}" if chosen else None
        if name and name not in metrics:
            raise Mistake(f"metric_for_best_model: no evaluation has {chosen}; they have {', '.join(sorted(metrics))}")
        return (name is None or metrics[name] is not None) and super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; the metrics of an evaluation are logged here before, so that it finds none to log as `eval_`."""
        if not self.model.training:
            for name, values in self._metrics["eval"].items():
                known = [value for value in values if not math.isnan(value)]
                mean = sum(known) / len(known) if known else None  # as TRL logs it
                logs[f"{self.evaluation_prefix}_{name}"] = mean
            self._metrics["eval"].clear()
        super().log(logs, start_time)


class MetricsMixin(NamedEvaluationMixin):
    """What `Qwen2VLGRPOTrainer` logs and leaves behind.

    `recorder` has the rows that it takes figures of, `step_seconds` a Counter of the seconds of the step under way.
    """

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _group_size(self) -> int:
        """Completions of one prompt, over all processes."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def _is_blind(self) -> bool:
        """Whether an evaluation is under way that shows no images: `evaluate(metric_key_prefix=BLIND)`."""
        return not self.model.training and self.evaluation_prefix.partition("_")[0] == BLIND

    def _log(self, figures: Mapping[str, float]) -> None:
        """Add to the means that the next log has."""
        for name, value in figures.items():
            self._metrics[self._mode()][name].append(value)

    @contextmanager
    def _timed(self, name: str) -> Iterator[list[float]]:
        """Log the seconds of the block as `time/{name}`; of a training step the sum over all of its blocks.

        Yields:
            A list, which holds the seconds when the block is left.
        """
        on_gpu = self.accelerator.device.type == "cuda"
        synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        synchronize()
        start, seconds = time.perf_counter(), []
        yield seconds
        synchronize()
        seconds.append(time.perf_counter() - start)
        if self.model.training:
            self.step_seconds[f"time/{name}"] += seconds[0]
        else:
            self._log({f"time/{name}": seconds[0]})

    # For the log alone: a rollout's seconds, and its tokens, of all processes.
    def _generate(self, prompts):
        with self._timed("rollout") as seconds:
            output = super()._generate(prompts)
        _, completion_ids, *_ = output
        tokens = torch.tensor(sum(map(len, completion_ids)), device=self.accelerator.device)
        self._log({"rollout/tokens_per_second": self.accelerator.reduce(tokens, "sum").item() / seconds[0]})
        return output

    def training_step(self, model, inputs, num_items_in_batch):
        """TRL's, and the log of a step's seconds: of rollout and scoring, and of the rest of it, the update."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.current_gradient_accumulation_steps == 0:
            update = self._metrics["train"]["step_time"][-1] - self.step_seconds.total()
            self._log({**self.step_seconds, "time/update": update})
            self.step_seconds.clear()
        return loss

    def _log_samples(
        self, prompts: list[Any], completions: list[Any], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> None:
        """TRL's table of completions, and what rewards put into log and table themselves.

        They do it by `log_metric` and `log_extra`. rewards (all B, F), advantages (all B,).
        """
        self._logs["prompt"].extend(gather_object(prompts))
        self._logs["completion"].extend(gather_object(completions))
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        self._logs["advantages"].extend(advantages.tolist())
        # sorted: all processes gather in one order
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            values = self._pending_extra_logs.get(column, [None] * len(prompts))
            self._logs["extra"][column].extend(gather_object(values))
        self._pending_extra_logs.clear()
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            sums = torch.tensor([sum(values), len(values)], dtype=torch.float32)
            total, count = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").tolist()
            self._log({name: total / count})
        self._pending_metrics.clear()

    def _record(self, rollout: Rollout, batch: dict[str, Any]) -> None:
        """Write down a rollout's completions, of all processes; log how they reflect."""
        mode, size = self._mode(), self._group_size()
        # A rollout in training serves the step under way, which the log counts when it is done.
        step = self.state.global_step + (mode == "train")
        dataset = self.evaluation_prefix.partition("_")[2] if mode == "eval" else ""
        rows = self.recorder.describe(rollout, step, dataset or None)
        if mode == "eval":
            first = self.accelerator.process_index * len(rollout.rows)
            counted = self.recorder.add_held_out(rows, size, self._is_blind())
            # the tokens of rows beyond the questions do not count either
            batch["completion_mask"][max(counted - first, 0) :] = 0
            return
        self.recorder.add_training(rows, rollout.refill, size)
        self.pass_rates.add(rows)
        self._log(text_figures(rows, size))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's; of an evaluation's batch it keeps the sum of all processes' losses, and their tokens.

        transformers would log the mean over processes and batches, of which the last hold fewer questions.
        """
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            divisor = len(mask)  # by which TRL makes a mean of a process's sum
            if self.loss_type == "bnpo":
                divisor = mask.sum()
            elif self.loss_type in LOSSES_PER_TOKEN:
                divisor = inputs["num_items_in_batch"] / self.accelerator.num_processes
            sums = torch.stack([loss.float() * divisor, mask.sum().float()])
            total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._log({"loss": total, TOKENS: tokens})
        return loss

    def _join_passes(self, logged: Mapping[str, int]) -> None:
        """Log the figures of a rollout over all its completions, whose passes need not be of one size.

        Figures of the engine and of packing stay means over passes.

        Args:
            logged: how many values each metric had before the first pass.
        """
        metrics, rows, size = self._metrics["train"], self.recorder.newest, self.num_generations
        scaling = self.scale_rewards, self.multi_objective_aggregation
        figures = {**figures_of(rows, self.reward_weights.tolist(), size, *scaling), **text_figures(rows, size)}
        for name, value in figures.items():
            metrics[name][logged.get(name, 0) :] = [value]

    def offending_batch(self) -> list[dict[str, Any]]:
        """In place of `FiniteMixin`'s: the newest rollout, with rewards and all of its trajectories."""
        return self.recorder.newest

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """TRL's. An evaluation begins here.

        What its processes get beyond its questions, so that each has as many, will not count.
        """
        dataloader = super().get_eval_dataloader(eval_dataset)
        is_counted = isinstance(dataloader.dataset, Dataset)
        questions = len(dataloader.dataset) if is_counted else math.inf
        self.recorder.begin_evaluation(questions * self.num_generations_eval)
        return dataloader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's; of an evaluation the figures over its questions."""
        held_out = self.recorder.held_out
        if self._mode() == "eval" and held_out:
            metrics = self._metrics["eval"]
            tokens = metrics.pop(TOKENS, [])
            count = sum(tokens) if self.loss_type in LOSSES_PER_TOKEN else len(held_out)
            metrics["loss"] = [sum(metrics["loss"]) / max(count, 1)]  # in place of transformers'
            for name in metrics:
                if name in PER_TOKEN or (name.startswith("clip_ratio/") and name.endswith("_mean")):
                    total = sum(value * count for value, count in zip(metrics[name], tokens, strict=True))
                    metrics[name] = [total / max(sum(tokens), 1)]
            weights = self.reward_weights.tolist()
            figures = figures_of(held_out, weights, self.num_generations_eval)
            for name, value in {**figures, **reflection_shares(held_out)}.items():
                metrics[name] = [value]
            if self._is_blind():
                logs = {f"{self.evaluation_prefix}_{name}": value for name, value in figures.items()}
                metrics.clear()
        if self.log_completions:
            prompts = self._logs["prompt"]
            self._logs["prompt"] = deque(map(as_text, prompts), maxlen=prompts.maxlen)
        super().log(logs, start_time)  # whose callbacks may look at the rows
        if self._mode() == "eval" and held_out:
            self.recorder.begin_evaluation(math.inf)
