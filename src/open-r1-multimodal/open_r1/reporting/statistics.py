"""Computes statistics over a run's completions: a mean for each step, its spread, how often they reflect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_r1.answers.collapse import Habit, answered, habits, most_frequent, shown_first
from open_r1.answers.statistics import Row, wilson
from open_r1.reporting.runs import FORMAT, Series, Trajectories


def by_step(steps: np.ndarray, values: np.ndarray, reduce: Callable[[np.ndarray], Any] = np.mean) -> Series:
    """One number (or several) a step from the values (n,) of its completions; NaN values do not count."""
    known = ~np.isnan(values)
    steps, values = steps[known], values[known]
    order = np.argsort(steps, kind="stable")
    unique, starts = np.unique(steps[order], return_index=True)
    parts = np.split(values[order], starts[1:]) if len(unique) else []
    return Series(unique, np.array([reduce(part) for part in parts]))


def by_tenth(steps: np.ndarray, values: np.ndarray) -> Series:
    """The mean over each tenth of the steps that have values (n,), at its last step."""
    ends = np.array([part[-1] for part in np.array_split(np.unique(steps), 10) if len(part)])
    return by_step(ends[np.searchsorted(ends, steps)], values.astype(float))


def quartiles(values: np.ndarray) -> np.ndarray:
    """(2,) the lower and the upper quartile."""
    return np.quantile(values, (0.25, 0.75))


def group_accuracy(trajectories: Trajectories) -> Series:
    """Accuracy a step with Wilson's 95 % interval: values (n, 3) as mean, low, high.

    The observation is the question: completions of one question are not independent, so they count once, with
    their mean.
    """
    steps, correct, groups = trajectories.rows["step"], trajectories.correct(), trajectories.rows["group"]
    means = by_step(groups, correct)  # a group's number belongs to one step
    step_of = dict(zip(groups.tolist(), steps.tolist(), strict=True))
    return by_step(
        np.array([step_of[group] for group in means.steps.tolist()], dtype=np.int64),
        means.values.astype(float),
        lambda part: (part.mean(), *wilson(part.sum(), len(part))),
    )


def first_and_last_tenth(values: np.ndarray) -> tuple[float, float] | None:
    """The means of the first and of the last tenth, at least one value each; None without values."""
    if not len(values):
        return None
    tenth = -(-len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


PASS_RATES = ("none", "< 1/3", "middle", "> 2/3", "all")  # of a group's completions succeed


def pass_rates(trajectories: Trajectories) -> dict[str, np.ndarray]:
    """Shares (5,) of the groups in which so many completions succeed (`PASS_RATES`), by a label.

    In the first and in the last tenth of the steps, at least one each. Success is a first reward
    above 0.5; there must be a reward.
    """
    reward = next(iter(trajectories.rewards.values()))
    known = ~np.isnan(reward)
    steps, groups = trajectories.rows["step"][known], trajectories.rows["group"][known]
    seen = np.unique(steps)
    tenth = -(-len(seen) // 10)

    def shares(chosen: np.ndarray) -> np.ndarray:
        rates = by_step(groups[chosen], (reward[known][chosen] > 0.5).astype(float)).values
        kinds = np.digitize(rates, (1e-9, 1 / 3 - 1e-9, 2 / 3 + 1e-9, 1 - 1e-9))
        return np.bincount(kinds, minlength=len(PASS_RATES)) / len(rates)

    return {
        f"to step {seen[tenth - 1]}": shares(steps <= seen[tenth - 1]),
        f"from step {seen[-tenth]}": shares(steps >= seen[-tenth]),
    }


MAX_ANSWERS = 2_000  # that are read in the end, evenly over its steps


def answers_at_the_end(trajectories: Trajectories) -> list[tuple[Row, float]]:
    """Answers of the last tenth of the steps (at least one) to questions with options, each with `correct()`."""
    late = trajectories.last_tenth()
    chosen, correct = np.linspace(0, len(late) - 1, min(len(late), MAX_ANSWERS), dtype=int), late.correct()
    pairs = ((answered(vars(late.read(index))), float(correct[index])) for index in chosen)
    return [(row, is_correct) for row, is_correct in pairs if row is not None]


def answers_by_type(trajectories: Trajectories) -> list[tuple[float, Habit, Habit]]:
    """Of each type of question with options: the accuracy in the end, the most frequent answer, the first option."""
    pairs = answers_at_the_end(trajectories)

    def kind(row: Row) -> str:
        return row["type"] or "of no type"

    correct: dict[str, list[float]] = {}
    for row, is_correct in pairs:
        correct.setdefault(kind(row), []).append(is_correct)
    both = (habits((row for row, _ in pairs), kind, of_kind) for of_kind in (most_frequent, shown_first))
    found = sorted(zip(*both, strict=True), key=lambda habit: habit[0].asked)
    return [(float(np.mean(correct[answer.asked])), answer, first) for answer, first in found]


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """(n,) centred means over `window` (odd) values, over fewer at the ends."""

    def sums(addends: np.ndarray) -> np.ndarray:
        return np.convolve(addends, np.ones(window))[window // 2 :][: len(addends)]

    return sums(values) / sums(np.ones(len(values)))


@dataclass(frozen=True)
class Reflections:
    """How often completions reconsider, and whether it helps; pairs count the right and the judged."""

    measured: int  # completions in which reflections were looked for
    reflective: int
    first_step: int | None
    format_with: tuple[int, int]  # of the reflective ones: with the format, and judged
    accuracy_with: tuple[int, int]
    accuracy_without: tuple[int, int]
    corrections: int  # that changed their option
    corrected_right: tuple[int, int]


def reflection_statistics(trajectories: Trajectories) -> Reflections:
    """Counts over all completions in which the run looked for reflections."""
    rows, correct = trajectories.rows, trajectories.correct()
    form = trajectories.rewards.get(FORMAT, np.full(len(trajectories), np.nan))
    measured = rows["has_reflections"]
    with_one, corrected = measured & rows["reflective"], measured & rows["self_corrected"]

    def right(chosen: np.ndarray, reward: np.ndarray = correct) -> tuple[int, int]:
        return int((reward[chosen] == 1).sum()), int((~np.isnan(reward[chosen])).sum())

    return Reflections(
        measured=int(measured.sum()),
        reflective=int(with_one.sum()),
        first_step=int(rows["step"][with_one].min()) if with_one.any() else None,
        format_with=right(with_one, form),
        accuracy_with=right(with_one),
        accuracy_without=right(measured & ~rows["reflective"]),
        corrections=int(corrected.sum()),
        corrected_right=right(corrected),
    )
