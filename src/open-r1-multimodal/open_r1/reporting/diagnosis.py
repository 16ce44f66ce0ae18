"""Looks for signs of what may keep reflection from emerging, each with the numbers of a run.

A sign is an entry of `SIGNS`, which holds the limits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from open_r1.answers.collapse import EXCESS, most_constant
from open_r1.reporting.browser import visible
from open_r1.reporting.runs import ACCURACY, FORMAT, LoggedRun, Trajectories
from open_r1.reporting.statistics import answers_at_the_end, by_step, by_tenth, first_and_last_tenth

FLAT = 0.05  # a rise of accuracy that is no more than sampling
NO_ENTROPY = 1e-6  # nats a token


class NotMeasured(Exception):
    """A run has not the data; says what is missing."""


@dataclass(frozen=True)
class Sign:
    """What may keep reflection from coming."""

    name: str
    limit: float  # it is seen from this value on
    # the run and its completions -> the value, and its numbers in words; raises NotMeasured
    measure: Callable[[LoggedRun, Trajectories], tuple[float, str]]
    seen: str  # what it means, with {limit}
    unseen: str  # what its absence means
    of_held_out: bool = False  # its completions are those of held-out questions, where there are some


@dataclass(frozen=True)
class Diagnosis:
    """What a sign says of a run; `seen` is None where it was not measured, and `numbers` says why."""

    name: str
    seen: bool | None
    numbers: str
    meaning: str = ""


def zero_signal(run: LoggedRun, train: Trajectories) -> tuple[float, str]:
    """The mean share of groups whose completions all earned the same."""
    values = run.series("frac_reward_zero_std").values
    if not len(values):
        raise NotMeasured("the log has no frac_reward_zero_std")
    first, last = first_and_last_tenth(values)
    return values.mean(), f"{values.mean():.0%} of the groups; first {first:.0%}, last {last:.0%}"


def format_alone(run: LoggedRun, train: Trajectories) -> tuple[float, str]:
    """How far format rose while the accuracy of what keeps it did not; 0 where that rose.

    An answer outside of its tag counts as wrong, so that accuracy over all completions rises with format alone.
    """
    form, correct, steps = train.rewards.get(FORMAT), train.correct(), train.rows["step"]
    if form is None or np.isnan(correct).all():
        raise NotMeasured("needs completions with the accuracy and the format reward")
    kept = form > 0.5
    before, after = first_and_last_tenth(by_step(steps, form).values)
    right = first_and_last_tenth(by_step(steps[kept], correct[kept]).values)
    if right is None:
        raise NotMeasured("no completion has the format")
    numbers = f"format {before:.0%} → {after:.0%}; accuracy of completions with it {right[0]:.0%} → {right[1]:.0%}"
    return (after - before if right[1] - right[0] < FLAT else 0.0), numbers


def entropy_fall(run: LoggedRun, train: Trajectories) -> tuple[float, str]:
    """How many times lower entropy is in the end."""
    tenths = first_and_last_tenth(run.series("entropy").values)
    if tenths is None:
        raise NotMeasured("the log has no entropy")
    first, last = tenths
    return first / max(last, NO_ENTROPY), f"{first:.2f} → {last:.2f} nats a token"


def contradictions(run: LoggedRun, train: Trajectories) -> tuple[float, str]:
    """The share of completions whose thought names another option last than their answer, where both name one."""
    asked, against = train.thoughts.asked, train.thoughts.against
    if not asked:
        raise NotMeasured("no completions of questions with known options")
    if not len(against):
        raise NotMeasured(f"of {asked:,} completions read, none names an option in its thought and its answer")
    share, tenths = against.mean(), by_tenth(train.thoughts.steps, against).values
    numbers = f"{against.sum():,} of {len(against):,} ({share:.0%}), of {asked:,} completions read"
    return share, f"{numbers}; first {tenths[0]:.0%}, last {tenths[-1]:.0%}"


def blind(run: LoggedRun, train: Trajectories) -> tuple[float, str]:
    """The accuracy on held-out questions without their images, as a share of that with them."""
    with_image, without = (
        {name: run.series(f"{prefix}rewards/{ACCURACY}/mean").values for prefix, name in run.evaluations(kind)}
        for kind in ("eval", "blind")
    )
    names = [name for name in without if name in with_image and len(without[name]) and len(with_image[name])]
    if not names:
        raise NotMeasured("needs held-out questions (eval_strategy), which the end of a run asks without their images")
    shares = []
    for name in names:
        blind, seeing = without[name][-1], with_image[name][-1]
        of_set = f" of {name}" if name else ""
        numbers = f"{blind:.0%} of the held-out questions{of_set} without their images, {seeing:.0%} with them"
        shares.append((blind / max(seeing, blind, 1e-6), numbers))
    return max(shares)[0], "; ".join(numbers for _, numbers in shares)


def collapse(run: LoggedRun, completions: Trajectories) -> tuple[float, str]:
    """By how much the most constant answer in the end is more frequent than it is right."""
    found = most_constant([row for row, _ in answers_at_the_end(completions)])
    if found is None:
        raise NotMeasured("no readable answers to questions with known options")
    return found.excess, visible(f"{found}; {found.questions:,} questions")


SIGNS = (
    Sign(
        "Groups without signal",
        0.5,
        zero_signal,
        "{limit:.0%} of the groups or more taught nothing, because all their completions earned the same: "
        "take easier or harder questions, or a higher temperature.",
        "Most groups had better and worse completions, so there was something to learn.",
    ),
    Sign(
        "Format alone",
        0.1,
        format_alone,
        "The model learned to write the tags, but the answers in them are not right more often than before.",
        "Accuracy rose together with the format reward, or the format reward hardly rose.",
    ),
    Sign(
        "Entropy collapse",
        4.0,
        entropy_fall,
        "Entropy fell to a {limit:.0f}th or less: what is no longer sampled, such as a reflection, cannot be rewarded.",
        "The model still samples different completions.",
    ),
    Sign(
        "Thought against answer",
        0.2,
        contradictions,
        "The option that a thought names last is often not the answer: the thought does not decide the answer, so "
        "longer thoughts earn nothing.",
        "Most answers are the option that the thought before them names last.",
    ),
    Sign(
        "Blind accuracy",
        0.9,
        blind,
        "Without the image the model is right about as often: it answers from what the questions give away, so to look "
        "at the image again can earn little.",
        "The model is right more often with the image than without it.",
    ),
    Sign(
        "Answer collapse",
        EXCESS,
        collapse,
        "Nearly all answers are the same, far more often than this answer is right: reflection does not change the "
        "answer.",
        "No answer is given nearly always unless it is nearly always right, or fewer than 20 questions were asked.",
        of_held_out=True,
    ),
)


def diagnose(run: LoggedRun, train: Trajectories, held_out: Trajectories) -> list[Diagnosis]:
    """What each sign says of a run."""
    findings = []
    for sign in SIGNS:
        try:
            value, numbers = sign.measure(run, held_out if sign.of_held_out and len(held_out) else train)
        except NotMeasured as reason:
            findings.append(Diagnosis(sign.name, None, str(reason)))
        else:
            seen = bool(value >= sign.limit)
            meaning = (sign.seen if seen else sign.unseen).format(limit=sign.limit)
            findings.append(Diagnosis(sign.name, seen, numbers, meaning))
    return findings
