"""Chooses the prompts of a step: their order, the shuffling of groups, and refills for groups without signal.

A group whose completions all earn the same teaches nothing. DAPO (arXiv 2503.14476) and GPG (arXiv 2504.02546) sample
on until enough groups of a batch do: here a rollout is one or more passes of as many prompts, merged into one of the
size of the first. What is asked follows from the seed, the step, the pass and the pass rates alone, so that every
process, and a resumed run, finds it by itself.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field
from trl.trainer.utils import RepeatSampler, pad

from open_r1.base.fields import Count, Record
from open_r1.base.files import read_json, replace_file, to_json, whole_lines
from open_r1.engines.shared_prefix import rows_by_prompt

PASS_RATES = "pass_rates.json"  # in a run's folder
ROW = "training_row"  # the column with a row's number, where prompts are drawn by it


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that follows from the seed and the epoch, so that a resumed run finds it again.

    TRL's draws epoch after epoch from one generator, which a resumed run would start from the first.

    Args:
        data_source, mini_repeat_count, batch_size, others: see TRL.
        together: so many rows that follow one another stay neighbours; batch_size is a multiple of it.
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


def merge_rollouts(
    rollout: Mapping[str, Any], refill: Mapping[str, Any], swaps: Mapping[int, int], group_size: int, pad_id: int
) -> dict[str, Any]:
    """A rollout with some groups of a refill in place of its own; the others stay where they are.

    Args:
        rollout, refill: the same entries: lists and tensors (B, ...), padded to a width of their own, those named
            `prompt_...` on the left and others on the right; a tensor (), which stays that of the rollout.
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
    """Prompts, some of which are passed over for a fresh one that never is; one for which there is none left stays.

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
    """As many fresh prompts, those of a kind that is passed over replaced; see `replace_prompts`.

    Where fewer are left, some of those that were taken come again.
    """
    rows = sorted(draw.sample(range(size), size), key=taken.__contains__)[:count]
    return replace_prompts(rows, chance, {*taken, *rows}, size, draw)


class SavedRates(Record):
    """What `PASS_RATES` holds: `counts` as `PassRates` has them."""

    step: Count
    counts: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]


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
        """The probability that a prompt is passed over: the first if all its completions succeeded, or if none did."""
        succeeded, judged = self.counts.get(row, (0, 0))
        if not judged or 0 < succeeded < judged:
            return 0.0
        return skip_solved if succeeded else skip_hopeless

    def save(self, folder: Path, step: int) -> None:
        """Write them into a run's folder as those after a step; not if they count a later one."""
        if self.step <= step:
            replace_file(folder / PASS_RATES, to_json({"step": step, "counts": self.counts}))

    @classmethod
    def of_run(cls, folder: Path, step: int) -> "PassRates":
        """Those of a run after a step: as it saved them then, or else counted from its trajectories."""
        with suppress(OSError, ValueError):  # none, or damaged: the trajectories say the same
            saved = SavedRates.model_validate(read_json(folder / PASS_RATES))
            if saved.step == step:
                return cls({int(row): count for row, count in saved.counts.items()}, step)
        rates, path = cls(), folder / "trajectories/train.jsonl"
        if path.exists():
            with path.open("rb") as file:
                rates.add(row for row in map(json.loads, whole_lines(file)) if row["step"] <= step)
        return rates


# --- a rollout of several passes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refills:
    """Samples on until enough groups of a rollout have signal. All processes decide by the same numbers.

    Attributes:
        settings: see `SignalArguments` of `open_r1.configs`.
        pass_rates: of the prompts so far.
        dataset: the training set, whose rows have their number as `ROW`.
        group_size: completions of a prompt.
        accelerator: of the run.
        seed: of the step; what is drawn follows from it.
        pad_id: what pads token ids.
    """

    settings: Any
    pass_rates: PassRates
    dataset: Any
    group_size: int
    accelerator: Accelerator
    seed: str
    pad_id: int

    def sample(
        self, inputs: list[dict[str, Any]], take: Callable[[list[dict[str, Any]], int], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """A rollout of this process, and what to log of it.

        Args:
            inputs: the rows that the sampler gave this process, each once a completion.
            take: a pass: rows and its number in, a batch with `advantages` (B,) and `rewards` (B, F) out.
        """
        settings, size = self.settings, self.group_size
        asked = gather_object([row[ROW] for row in inputs[::size]])  # of all processes, a row a group
        rows = replace_prompts(asked, self.chance, set(asked), len(self.dataset), self.draw(0))
        batch, has_signal = self.one_pass(inputs if rows == asked else self.own_rows(rows), 0, take)
        taken = {*asked, *rows}
        for refill in range(settings.max_refills + 1):
            found = self.accelerator.gather(has_signal)  # (groups of all processes,)
            with_signal = found.sum().item()
            if refill == settings.max_refills or with_signal / len(found) >= settings.min_signal_groups:
                break
            rows = draw_prompts(len(rows), self.chance, taken, len(self.dataset), self.draw(refill + 1))
            other, other_has_signal = self.one_pass(self.own_rows(rows), refill + 1, take)
            swaps = find_swaps(has_signal.tolist(), other_has_signal.tolist())
            batch = merge_rollouts(batch, other, swaps, size, self.pad_id)
            has_signal[list(swaps)] = True
            taken.update(rows)
        batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
        if settings.rescale_by_signal:
            batch["advantages"] = batch["advantages"] * (len(found) / max(with_signal, 1))
        return batch, {
            "signal/refills": refill,
            "signal/wasted": ((refill + 1) * len(found) - with_signal) * size,
            "signal/share": with_signal / len(found),
        }

    def one_pass(self, rows: list[dict[str, Any]], refill: int, take: Callable) -> tuple[dict[str, Any], torch.Tensor]:
        """A pass of this process, and which of its groups have signal (groups,)."""
        batch = take(rows, refill)
        return batch, find_signal(batch["advantages"], batch["rewards"], self.group_size)

    def own_rows(self, numbers: list[int]) -> list[dict[str, Any]]:
        """What this process asks of a pass: its slice of the training set's rows, each once a completion."""
        groups = len(numbers) // self.accelerator.num_processes
        start = self.accelerator.process_index * groups
        rows = [self.dataset[number] for number in numbers[start : start + groups]]
        return [dict(row) for row in rows for _ in range(self.group_size)]

    def chance(self, row: int) -> float:
        """The probability that a row is passed over."""
        return self.pass_rates.chance(row, self.settings.skip_solved, self.settings.skip_hopeless)

    def draw(self, refill: int) -> random.Random:
        """The random numbers of a pass."""
        return random.Random(f"{self.seed}/{refill}")
