"""Chooses the prompts of a step: their order, the shuffling of groups, and refills for groups without signal.

A group whose completions all earn the same teaches nothing. DAPO (arXiv 2503.14476) and GPG (arXiv 2504.02546) sample
on until enough groups of a batch do: here a rollout is one or more passes, merged into one of the size of the first.
The later ones ask as many prompts as are likely to bring what is missing. What is asked follows from the seed, the
step, the pass, the pass rates and which groups had signal, so that every process, and a resumed run, finds it by
itself.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.utils import RepeatSampler, pad

from open_r1.base.files import replace_file, to_json, whole_lines
from open_r1.engines.shared_prefix import rows_by_prompt
from open_r1.running.data import ROTATION_OF

PASS_RATES = "pass_rates.json"  # in a run's folder
ROW = "training_row"  # the column with a row's number, where prompts are drawn by it


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the seed and the epoch, so that a resumed run finds it again.

    TRL draws all epochs from one generator. A resumed run would start it anew, and repeat the first epoch's order.

    Args:
        data_source, mini_repeat_count, batch_size, others: see TRL.
        together: rows of the data set that are always asked one after the other, such as a question's two orders of
            options; batch_size is a multiple of it.
    """

    def __init__(
        self, data_source: Sized, mini_repeat_count: int, batch_size: int, together: int = 1, **others: Any
    ) -> None:
        super().__init__(range(len(data_source) // together), 1, batch_size // together, **others)
        self.together, self.completions = together, mini_repeat_count

    def __iter__(self) -> Iterator[int]:
        """The numbers of rows, each as often as it is completed."""
        for block in super().__iter__():
            for row in range(block * self.together, (block + 1) * self.together):
                yield from repeat(row, self.completions)

    def __len__(self) -> int:
        return super().__len__() * self.together * self.completions

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


# --- groups with signal ---------------------------------------------------------------------------------------


def find_signal(advantages: torch.Tensor, rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Which groups teach something: the advantages of their completions differ.

    Args:
        advantages: (B,) of whole groups.
        rewards: (B, functions); a completion for which all are NaN has no part in it.

    Returns:
        (B / group_size,) bool.
    """
    unknown = rewards.isnan().all(dim=1).view(-1, group_size)  # (groups, G)
    groups = advantages.view(-1, group_size)  # (groups, G)
    lowest = groups.masked_fill(unknown, torch.inf).amin(dim=1)
    highest = groups.masked_fill(unknown, -torch.inf).amax(dim=1)
    return highest > lowest


def find_swaps(has_signal: Sequence[bool], refill_has_signal: Sequence[bool]) -> dict[int, int]:
    """Group without signal -> group of the refill that takes its place, as far as those with signal go."""
    empty = [group for group, has_one in enumerate(has_signal) if not has_one]
    full = [group for group, has_one in enumerate(refill_has_signal) if has_one]
    return dict(zip(empty, full, strict=False))


def refill_size(has_signal: Sequence[Sequence[bool]], share: float, wanted: float) -> int:
    """How many prompts each process asks in a refill: the fewest that are expected to bring what is missing.

    All processes ask as many, at most what they asked first, and each has a use for as many new groups as it has
    without signal. With one process and all groups wanted it is the number of those without, divided by the share.

    Args:
        has_signal: of each process, its groups.
        share: of the groups sampled so far, those that had signal.
        wanted: of the rollout's groups, those that must have signal.

    Of 8 groups, 7 have signal:

        >>> refill_size([[True] * 7 + [False]], share=7 / 8, wanted=1.0)
        2
    """
    whole = len(has_signal[0])
    for size in range(1, whole):
        expected = sum(sum(groups) + min(groups.count(False), size * share) for groups in has_signal)
        if expected / (len(has_signal) * whole) >= wanted:
            return size
    return whole


def merge_rollouts(
    rollout: Mapping[str, Any], refill: Mapping[str, Any], swaps: Mapping[int, int], group_size: int, pad_id: int
) -> dict[str, Any]:
    """A rollout with some groups of a refill in place of its own; the others stay where they are.

    Args:
        rollout, refill: the same entries: lists and tensors (B, ...) of as many rows as each has, padded to a width of
            their own, those named `prompt_...` on the left and others on the right; a tensor (), which stays that of
            the rollout.
        swaps: group of the rollout -> group of the refill.
        group_size: rows of a group.
        pad_id: what pads token ids; the rest is padded with 0.
    """
    rows = len(rollout["advantages"])
    groups = range(rows // group_size)
    picked = [(refill, swaps[group]) if group in swaps else (rollout, group) for group in groups]

    def merge(name: str) -> Any:
        if isinstance(rollout[name], torch.Tensor) and not rollout[name].ndim:
            return rollout[name]
        values = [source[name][group * group_size + k] for source, group in picked for k in range(group_size)]
        if not isinstance(rollout[name], torch.Tensor):
            return values
        if not values[0].ndim:
            return torch.stack(values)  # (B,)
        side = "left" if name.startswith("prompt_") else "right"
        return pad(values, pad_id if name.endswith("_ids") else 0, side)  # (B, width of the widest)

    return {name: merge(name) for name in rollout}


# --- which prompts --------------------------------------------------------------------------------------------


def replace_prompts(
    rows: Sequence[int], chance: Callable[[int], float], taken: Set[int], size: int, draw: random.Random
) -> list[int]:
    """The prompts to ask: each of `rows` is passed over with its chance, for a fresh one whose chance is 0.

    It stays where no such prompt is left.

    Args:
        rows: of the training set, one a prompt.
        chance: the probability that a row is passed over.
        taken: rows that are not fresh.
        size: of the training set.
        draw: where chance comes from.
    """
    passed = [draw.random() < chance(row) for row in rows]
    if not any(passed):
        return list(rows)
    fresh = (row for row in draw.sample(range(size), size) if row not in taken and not chance(row))
    return [next(fresh, row) if is_passed else row for row, is_passed in zip(rows, passed, strict=True)]


def draw_prompts(
    count: int, chance: Callable[[int], float], taken: Set[int], size: int, draw: random.Random
) -> list[int]:
    """`count` fresh prompts, some of which are passed over for others as in `replace_prompts`.

    Where fewer are left, some of those that were taken come again.
    """
    rows = sorted(draw.sample(range(size), size), key=taken.__contains__)[:count]
    return replace_prompts(rows, chance, {*taken, *rows}, size, draw)


@dataclass
class PassRates:
    """How often each prompt was solved.

    Attributes:
        counts: row of the training set -> [completions that succeeded, completions that were judged].
        step: the newest that was counted.
    """

    counts: dict[int, list[int]] = field(default_factory=dict)
    step: int = 0

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count completions: rows of `trajectories`. One succeeds if its first reward is above 0.5."""
        for row in rows:
            reward = next(iter(row["rewards"].values()), None)
            if reward is not None and row.get("row") is not None:
                succeeded, judged = self.counts.get(row["row"], (0, 0))
                self.counts[row["row"]] = [succeeded + (reward > 0.5), judged + 1]
                self.step = max(self.step, row["step"])

    def chance(self, row: int, skip_solved: float, skip_hopeless: float) -> float:
        """The probability that a prompt is passed over for another.

        `skip_solved` where all its completions succeeded, `skip_hopeless` where none did, else 0.
        """
        succeeded, judged = self.counts.get(row, (0, 0))
        if not judged or 0 < succeeded < judged:
            return 0.0
        return skip_solved if succeeded else skip_hopeless

    def save(self, folder: Path) -> None:
        """Write them into a run's folder, for whoever wants to look."""
        replace_file(folder / PASS_RATES, to_json({"step": self.step, "counts": self.counts}))

    @classmethod
    def of_run(cls, folder: Path, step: int) -> "PassRates":
        """Those of a run after a step, counted from its trajectories."""
        rates, path = cls(), folder / "trajectories/train.jsonl"
        if path.exists():
            with path.open("rb") as file:
                rates.add(row for row in map(json.loads, whole_lines(file)) if row["step"] <= step)
        return rates


# --- a rollout of several passes ------------------------------------------------------------------------------


class PromptSamplingMixin:
    """Mixin for TRL's `GRPOTrainer`: the order of the prompts, and rollouts of several passes.

    All processes decide by the same numbers. With G = 2, `min_signal_groups` 0.75 and the rewards
    of four prompts' completions

        first pass    a: 0 1   b: 1 1   c: 0 0   d: 1 0    2 of 4 groups have signal: ask 1 / (2 / 4)
        refill 1      e: 0 0   f: 1 0                      f takes the place of b
        learned from  a: 0 1   f: 1 0   c: 0 0   d: 1 0    3 of 4: enough

    12 completions were sampled, of which 6 have signal; `rescale_by_signal` multiplies advantages
    by 4 / 3.

    It takes the settings `signal`, the prompts' `pass_rates`, `_log` and `_join_passes` of
    `MetricsMixin`, and with these settings a training set whose rows have their number as `ROW`.
    """

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        """TRL's, as an `EpochSampler`; both orders of a question's options (`rotate_options`) go to one process."""
        sampler = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        settings = {name: getattr(sampler, name) for name in names}
        if self.args.data_seed is not None:
            settings["seed"] = self.args.data_seed
        columns = getattr(sampler.data_source, "column_names", None) or []
        return EpochSampler(**settings, together=2 if ROTATION_OF in columns else 1)

    def get_train_dataloader(self) -> DataLoader:
        """TRL's; over several processes, too, an epoch that is resumed in its middle finds its order."""
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            # `set_epoch` of accelerate looks for a sampler in the batches and in what they wrap. A resume wraps the
            # share of a process once more, so that what it wraps would be out of sight.
            loader.batch_sampler.sampler = loader.batch_sampler.batch_sampler.sampler
        return loader

    def _sample_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout of this process, of as many passes as it takes.

        Args:
            inputs: the rows that the sampler gave this process, each once a completion.

        Returns:
            A batch with `advantages` (B,), `rewards` (B, F) and whatever else a pass gives.
        """
        settings, metrics, rows_in_all = self.signal, self._metrics["train"], len(self.train_dataset)
        processes, index = self.accelerator.num_processes, self.accelerator.process_index
        logged = {name: len(values) for name, values in metrics.items()}
        asked = gather_object([row[ROW] for row in inputs[:: self.num_generations]])  # of all processes, a row a group
        rows = replace_prompts(asked, self._chance, set(asked), rows_in_all, self._draw(0))
        batch, has_signal = self._take_pass(inputs if rows == asked else self._rows_of_process(rows), 0)
        taken, groups = {*asked, *rows}, len(rows)
        sampled, found = groups, sum(map(sum, has_signal))
        for refill in range(settings.max_refills + 1):
            with_signal = sum(map(sum, has_signal))
            if refill == settings.max_refills or with_signal / groups >= settings.min_signal_groups:
                break
            size = refill_size(has_signal, found / sampled, settings.min_signal_groups)
            rows = draw_prompts(size * processes, self._chance, taken, rows_in_all, self._draw(refill + 1))
            other, other_has_signal = self._take_pass(self._rows_of_process(rows), refill + 1)
            swaps = [find_swaps(*pair) for pair in zip(has_signal, other_has_signal, strict=True)]
            batch = merge_rollouts(batch, other, swaps[index], self.num_generations, self._tokenizer.pad_token_id)
            has_signal = [
                [full or group in swapped for group, full in enumerate(each)]
                for each, swapped in zip(has_signal, swaps, strict=True)
            ]
            taken.update(rows)
            sampled, found = sampled + len(rows), found + sum(map(sum, other_has_signal))
        tokens = batch["completion_mask"].sum()
        batch["num_items_in_batch"] = self.accelerator.gather(tokens).sum()
        if settings.rescale_by_signal:
            batch["advantages"] = batch["advantages"] * (groups / max(with_signal, 1))
        if refill:
            self._join_passes(logged)
        figures = {
            "refills": refill,
            "wasted": (sampled - with_signal) * self.num_generations,
            "share": with_signal / groups,
        }
        self._log({f"signal/{name}": value for name, value in figures.items()})
        return batch

    def _take_pass(self, rows: list[dict[str, Any]], refill: int) -> tuple[dict[str, Any], list[list[bool]]]:
        """A pass of this process, and of all processes which groups have signal."""
        batch = self._generate_and_score_completions(rows, refill)
        has_signal = find_signal(batch["advantages"], batch["rewards"], self.num_generations)  # (groups,)
        return batch, self.accelerator.gather(has_signal).view(self.accelerator.num_processes, -1).tolist()

    def _rows_of_process(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What this process asks of a pass: its slice of the training set's rows, each once a completion."""
        groups = len(numbers) // self.accelerator.num_processes
        start = self.accelerator.process_index * groups
        rows = [self.train_dataset[number] for number in numbers[start : start + groups]]
        return [dict(row) for row in rows for _ in range(self.num_generations)]

    def _chance(self, row: int) -> float:
        """The probability that a row is passed over."""
        return self.pass_rates.chance(row, self.signal.skip_solved, self.signal.skip_hopeless)

    def _draw(self, refill: int) -> random.Random:
        """The random numbers of a pass, which follow from seed, rollout and pass."""
        return random.Random(f"{self.args.seed}/{self._rollout_number()}/{refill}")

    def _rollout_number(self) -> int:
        """How many rollouts came before this one; the number of steps, where each step has one."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)
