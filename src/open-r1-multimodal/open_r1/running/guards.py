"""Warns in a line when a run's log shows that training goes wrong.

A guard is an entry of `GUARDS`; `docs/trouble.md` has their thresholds. What stops a run at once is in `finite.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from open_r1.answers.collapse import EXCESS, Habit, most_constant, most_frequent
from open_r1.base.fields import is_usable

# Log events, one a logged step, in order; each may hold, as `ANSWERS`, the step's rows of `answers.collapse.answered`.
Events = Sequence[Mapping[str, Any]]
ANSWERS = "answers"
NO_SPREAD = 1e-6  # a standard deviation that is rounding alone


@dataclass(frozen=True)
class Guard:
    """A sign that training goes wrong.

    Attributes:
        name: in the log.
        window: how many logged steps it looks at.
        limit: it warns from this measure on.
        measure: the run's first `window` events and its newest -> a number; KeyError where a metric is missing.
        sentence: what is told, with {value}, {limit}, {window} and {found}.
        found: the newest `window` events -> what else is to be told of them.
    """

    name: str
    window: int
    limit: float
    measure: Callable[[Events, Events], float]
    sentence: str
    found: Callable[[Events], object] = lambda newest: ""

    def value(self, events: Events) -> float | None:
        """The measure at the last event, where it comes to the limit; else None."""
        if len(events) < self.window:
            return None
        try:
            value = self.measure(events[: self.window], events[-self.window :])
        except KeyError:  # another kind of training, or no number
            return None
        return value if value >= self.limit else None

    def warning(self, events: Events) -> str | None:
        """The sentence, if the sign begins at the last event: it was not there for a window before."""
        value = self.value(events)
        if value is None or any(self.value(events[:-back]) is not None for back in range(1, self.window + 1)):
            return None
        found = self.found(events[-self.window :])
        return self.sentence.format(value=value, limit=self.limit, window=self.window, found=found)


def column(events: Events, name: str) -> list[float]:
    """A metric of every event; KeyError where one of them has no such number."""
    values = [event.get(name) for event in events]
    if not all(map(is_usable, values)):
        raise KeyError(name)
    return values


def least(name: str) -> Callable[[Events, Events], float]:
    """A measure: the metric's lowest value in the window, so that every step in it has to come to the limit."""
    return lambda first, newest: min(column(newest, name))


def mean(name: str) -> Callable[[Events, Events], float]:
    """A measure: the metric's mean over the window."""
    return lambda first, newest: fmean(column(newest, name))


def flat_share(first: Events, newest: Events) -> float:
    """Share of the steps whose completions all earned the same."""
    return fmean(value < NO_SPREAD for value in column(newest, "reward_std"))


def parting(first: Events, newest: Events) -> float:
    """The lesser of format's rise and accuracy's fall, from the first to the second half of the window."""
    half = len(newest) // 2
    rises = []
    for name in ("rewards/format_reward/mean", "rewards/accuracy_reward/mean"):
        values = column(newest, name)
        rises.append(fmean(values[half:]) - fmean(values[:half]))
    return min(rises[0], -rises[1])


def shrinkage(first: Events, newest: Events) -> float:
    """How many times shorter completions are than at the start."""
    before, now = (fmean(column(events, "completions/mean_length")) for events in (first, newest))
    return before / max(now, 1.0)


def jump(first: Events, newest: Events) -> float:
    """How many times the median of the steps before the last gradient is."""
    *before, last = column(newest, "grad_norm")
    return last / max(median(before), NO_SPREAD)


def most_constant_of(newest: Events) -> Habit | None:
    """The answer that was most constant; KeyError where an event has none noted.

    Many a base prefers the option shown first, which need not go wrong: that is left to the report.
    """
    return most_constant([row for event in newest for row in event[ANSWERS]], kinds=[most_frequent])


def collapse(first: Events, newest: Events) -> float:
    """By how much the most constant answer is more frequent than it is right."""
    found = most_constant_of(newest)
    return found.excess if found else 0.0


GUARDS = (
    Guard(
        "no signal",
        20,
        0.9,
        least("frac_reward_zero_std"),
        "for {window} steps, {limit:.0%} of the groups or more taught nothing: all completions of a group earned the "
        "same; take easier or harder questions, or a higher temperature",
    ),
    Guard(
        "no spread",
        5,
        1.0,
        flat_share,
        "for {window} steps all completions earned the same reward; read some in trajectories/train.jsonl",
    ),
    Guard(
        "format without accuracy",
        40,
        0.1,
        parting,
        "within {window} steps the format reward rose and accuracy fell, both by {value:.2f} or more",
    ),
    Guard(
        "length collapse",
        10,
        4.0,
        shrinkage,
        "over {window} steps completions are {value:.1f} times shorter than at the start",
    ),
    Guard(
        "length runaway",
        10,
        0.5,
        mean("completions/clipped_ratio"),
        "over {window} steps {value:.0%} of the completions ran into max_completion_length",
    ),
    Guard(
        "KL explosion",
        5,
        1.0,
        least("kl"),
        "for {window} steps KL was {value:.1f} nats a token or more; lower learning_rate, or raise beta",
    ),
    Guard(
        "gradient explosion",
        20,
        10.0,
        jump,
        "the gradient norm is {value:.0f} times its median over the {window} steps; lower learning_rate",
    ),
    Guard(
        "identical completions",
        5,
        0.5,
        least("completions/identical_groups"),
        "for {window} steps, {value:.0%} of the groups or more held the same completion throughout; "
        "raise the temperature",
    ),
    Guard(
        "answer collapse",
        10,
        EXCESS,
        collapse,
        "over {window} steps {found}: whatever is asked, the answer is the same; lower learning_rate, or raise beta",
        most_constant_of,
    ),
)

LOOKED_AT = 1 + 2 * max(guard.window for guard in GUARDS)  # events, by `Guard.warning`


def new_warnings(events: Events) -> dict[str, str]:
    """Name -> sentence of each guard that begins to warn at the last event."""
    warnings = {guard.name: guard.warning(events) for guard in GUARDS}
    return {name: sentence for name, sentence in warnings.items() if sentence}
