"""Scores responses: judged rows, confidence intervals, baselines, paired tests.

A row is one response, as a dictionary with the reference's keys (`question`, `options`, `task`, `ground_truth`,
`response`, `model_answer`, `correct`), `reading` (the rule that found the answer, or why there is none) and, when they
are known, `id`, `rotation`, `type`, `source`, `truncated` and `error`. Rows of one `id` are the same question with its
options rotated (circular evaluation). A row without options asks for a number, and has `credit`, how close it came.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator

from open_r1.answers.checker import Unread, judge
from open_r1.answers.values import is_blank, only_number
from open_r1.base.errors import Mistake
from open_r1.base.fields import Expected, Name, Record, Text

Row = Mapping[str, Any]
Means = str | tuple["Means", ...]  # a score's name, or nested tuples to average: CV-Bench's ((a, b), c)

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile
BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 0
PARSERS = ("lenient", "strict")
UNREAD_WARNING_SHARE = 0.05
TOTAL = "Total"
EVERY_ROTATION = ", right in every rotation"
ALL_ROTATIONS = TOTAL + EVERY_ROTATION
CHANCE_ADJUSTED = ", chance-adjusted"
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the mean relative accuracy
_LETTER = re.compile(r"\([A-Z]\)")


# --- the mathematics ----------------------------------------------------------------------------------------


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion; (0, 1) without observations.

    `successes` may be fractional: the mean over a question's rotations varies no more than a single draw, so that
    the interval is then, if anything, too wide.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and 1 the bound is exact; rounding would leave it a hair inside.
    return 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half


def mean_of(means: Means, shares: Mapping[str, Any]) -> Any:
    """The mean, or mean of means, of numbers or arrays by name.

    >>> mean_of((("ADE20K", "COCO"), "Omni3D"), {"ADE20K": 0.5, "COCO": 0.75, "Omni3D": 0.875})
    0.75
    """
    if isinstance(means, str):
        return shares[means]
    return sum(mean_of(part, shares) for part in means) / len(means)


def names_in(means: Means) -> list[str]:
    """Every name of which it is the mean."""
    return [means] if isinstance(means, str) else [name for part in means for name in names_in(part)]


def bootstrap(values: Mapping[str, Sequence[float]], means: Means) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of a mean of groups' means, resampled within each group.

    Args:
        values: name -> what each question earned.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = {}
    for name, earned in values.items():
        # Questions that earned the same are alike: it is drawn how many there are of each kind, not which.
        levels, counts = np.unique(-np.asarray(earned, dtype=float), return_counts=True)
        draws[name] = rng.multinomial(len(earned), counts / len(earned), BOOTSTRAP_SAMPLES) @ -levels / len(earned)
    low, high = np.quantile(mean_of(means, draws), (0.025, 0.975))
    return float(low), float(high)


def relative_accuracy(answer: float, gold: float) -> float:
    """Mean relative accuracy of a number: the share of ten thresholds t with |answer - gold| / gold <= 1 - t.

    The thresholds are 0.5, 0.55 to 0.95. An answer of 4.2 to a gold answer of 5 is off by 0.16 of it: good enough for
    0.5, 0.55, 0.6, 0.65, 0.7, 0.75 and 0.8, so that it earns 0.7.

    Source: VSI-Bench, in its authors' code (`vision-x-nyu/thinking-in-space`, e6a72f3; the paper writes < for <=). It
    decides in floating point, as here: 8 for 10 is off by more than 1 - 0.8.
    """
    return float(np.mean(abs(answer - gold) / gold <= 1 - THRESHOLDS))


def chance_adjusted(accuracy: float, chance: float) -> float:
    """Where an accuracy lies between chance, 0, and all right, 1.

    Of questions with n options each it is sum(right - 1/n) / sum(1 - 1/n), SITE's chance-adjusted accuracy
    (`wenqi-wang20/SITE-Bench`, 36295bb). One of 4 options right and one of 2 wrong: (3/4 - 1/2) / (3/4 + 1/2) = 0.2, as
    of an accuracy of 1/2 at a chance of 3/8.
    """
    return (accuracy - chance) / (1 - chance)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value, from the numbers of questions that one side alone got right.

    It is the probability that a fair coin splits these questions at least as unevenly.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Second accuracy minus first over the same questions, and its percentile bootstrap 95 % interval.

    Questions are drawn anew in pairs, and of each side its seeds: runs of one recipe differ, too. A side of one seed
    says nothing about that, and the interval is then one of the questions alone.

    Args:
        first, second: (seeds, questions) in [0, 1], each with seeds of its own.
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    n = first.shape[1]
    # Questions that all runs answered alike are one column; n questions drawn anew say how often
    # it counts.
    columns, counts = np.unique(np.concatenate([first, second]), axis=1, return_counts=True)
    drawn = rng.multinomial(n, counts / n, BOOTSTRAP_SAMPLES) / n  # (samples, columns)
    means = drawn @ columns.T  # (samples, seeds of both)
    of_first, of_second = np.split(means, [len(first)], axis=1)

    def mean_of_drawn_seeds(of_seeds: np.ndarray) -> np.ndarray:
        seeds = of_seeds.shape[1]
        drawn = rng.multinomial(seeds, [1 / seeds] * seeds, BOOTSTRAP_SAMPLES) / seeds
        return (drawn * of_seeds).sum(axis=1)

    one, other = mean_of_drawn_seeds(of_first), mean_of_drawn_seeds(of_second)
    low, high = np.quantile(other - one, (0.025, 0.975))
    return float(second.mean() - first.mean()), float(low), float(high)


# --- rows ---------------------------------------------------------------------------------------------------


def _must_be_options(options: list[str]) -> list[str]:
    if any(map(is_blank, options)):
        raise ValueError
    return options


Options = Annotated[
    list[Text],
    AfterValidator(_must_be_options),
    Expected("a list of texts, none of them blank"),
]


class AskedRow(Record):
    """What a row says before there is a response."""

    question: Text
    options: Options
    task: Name
    ground_truth: Text
    type: Name | None = None
    source: Name | None = None


def judge_row(row: Row, parser: str) -> dict[str, Any]:
    """The row with `model_answer`, `correct` and `reading` as the package's answer checker reads its response.

    An answer that cannot be read is recorded as cut off if its response was. A number also has its `credit`, and is
    correct if that is 1: it is off by 5 % at most.

    Raises:
        Mistake: the ground truth is none of the options, or no number.
    """
    gold, options = row["ground_truth"], row["options"]
    lettered = _LETTER.fullmatch(gold) is not None
    verdict = judge(row["response"], gold, options, lettered=lettered, lenient=parser == "lenient")
    judged = {**row, "model_answer": verdict.answer, "correct": verdict.correct, "reading": verdict.reading}
    if not options:
        number = only_number(verdict.answer or "")
        earned = 0.0 if number is None else relative_accuracy(number, right_answer(row))
        judged |= {"correct": earned == 1, "credit": earned}
        if number is None and verdict.answer is not None:
            judged |= {"model_answer": None, "reading": Unread.UNREADABLE.value}
    if row.get("truncated") and judged["reading"] == Unread.UNREADABLE.value:
        judged["reading"] = Unread.CUT_OFF.value
    return judged


def credit(row: Row) -> float:
    """What a judged row earns, in [0, 1]."""
    return row.get("credit", row["correct"])


def is_unread(row: Row) -> bool:
    """Whether there is a response, but no answer could be read in it."""
    return row["model_answer"] is None and not row.get("error")


def by_question(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each question together, in order of appearance; a row without an id is its own question."""
    questions: dict[Hashable, list[Row]] = defaultdict(list)
    for position, row in enumerate(rows):
        questions[row.get("id", ("position", position))].append(row)
    return list(questions.values())


def outcomes(rows: Sequence[Row]) -> dict[Hashable, float]:
    """Question -> what it earns, the share of its rotations answered right, of which the Total is the mean."""
    shares = {}
    for position, rotations in enumerate(by_question(rows)):
        key = rotations[0].get("id", position), rotations[0]["question"]
        shares[key] = sum(map(credit, rotations)) / len(rotations)
    return shares


def labels(row: Row) -> Sequence[str]:
    """What answers call the options: their letters, where the right one is a letter, else their texts."""
    options = row["options"]
    is_lettered = _LETTER.fullmatch(row["ground_truth"])
    return [f"({letter})" for letter in ascii_uppercase[: len(options)]] if is_lettered else options


def right_answer(row: Row) -> int | float:
    """The position of the right option or, of a question without options, the right number.

    Raises:
        Mistake: the ground truth is none of the options, or no number above 0.
    """
    gold, names = row["ground_truth"], labels(row)
    number = None if names else only_number(gold)
    if names and gold in names:
        return names.index(gold)
    if number is not None and number > 0:
        return number
    what = f"none of its {len(names)} options" if names else "no number above 0, and there are no options"
    raise Mistake(f"the right answer {gold!r} is {what}")


def majority_answers(rows: Iterable[Row]) -> dict[str, int | float]:
    """Task -> the position at which the right option stands most often, or the number; of several the first."""
    counts: dict[str, Counter[int | float]] = defaultdict(Counter)
    for row in rows:
        counts[row["task"]][right_answer(row)] += 1
    return {task: min(count, key=lambda answer: (-count[answer], answer)) for task, count in counts.items()}


# --- scores -------------------------------------------------------------------------------------------------


def proportion(
    values: Sequence[float], best: Sequence[float], chance: Sequence[float], majority: Sequence[float]
) -> dict[str, Any]:
    """One score of questions that each earn a value in [0, 1].

    Args:
        values: what each question earned.
        best: what it would have earned if every response that could not be read were right.
        chance, majority: what a uniform guess would have earned, and a constant answer in each task.
    """
    n, right = len(values), math.fsum(values)
    return {
        "accuracy": right / n,
        "n": n,
        "interval": list(wilson(right, n)),
        "bounds": [right / n, math.fsum(best) / n],
        "chance": math.fsum(chance) / n,
        "majority": math.fsum(majority) / n,
    }


def score(
    rows: Sequence[Row],
    combinations: Mapping[str, Means] = MappingProxyType({}),
    *,
    circular: bool = False,
    adjusted: bool = False,
) -> dict[str, dict[str, Any]]:
    """Every score of judged rows, by name: the Total, each task, type and source, and the combinations.

    Each holds `accuracy` (micro average), `n` (questions), `interval` (95 %: Wilson; bootstrap for a combination),
    `bounds` (the accuracy if every response that could not be read were wrong, as it is counted, or right) and two
    baselines: `chance`, a uniform guess (0 for a number), and `majority`, each task's most frequent position or number.
    A question in several rotations counts once, with its mean; one more score then asks for all its rotations to be
    right.

    Args:
        combinations: by name, means over accuracies of groups; one is left out when a group that it needs is missing.
        circular: whether tasks and types, too, are scored by questions that are right in all their rotations.
        adjusted: whether the Total and the tasks are also given as `chance_adjusted`.
    """
    constant = majority_answers(rows)
    questions = by_question(rows)
    names: dict[str, dict[int, None]] = {TOTAL: dict.fromkeys(range(len(questions)))}  # -> its questions
    for field in ("task", "type", "source"):
        for index, question in enumerate(questions):
            if (name := question[0].get(field)) is not None:
                names.setdefault(name, {})[index] = None  # a type may have the name of its only task

    def mean(value: Callable[[Row], float]) -> list[float]:
        return [math.fsum(map(value, question)) / len(question) for question in questions]

    def by_majority(row: Row) -> float:
        right, answer = right_answer(row), constant[row["task"]]
        return right == answer if row["options"] else relative_accuracy(answer, right)

    def guess(row: Row) -> float:
        return 1 / len(row["options"]) if row["options"] else 0.0

    right = mean(credit)
    best = mean(lambda row: is_unread(row) or credit(row))
    columns = right, best, mean(guess), mean(by_majority)

    def scored(indices: Iterable[int], columns: Iterable[Sequence[float]]) -> dict[str, Any]:
        return proportion(*([values[index] for index in indices] for values in columns))

    scores = {name: scored(indices, columns) for name, indices in names.items()}
    if len(rows) > len(questions):
        all_right, all_best, all_majority = ([float(value == 1) for value in columns[at]] for at in (0, 1, 3))
        in_every = all_right, all_best, [math.prod(map(guess, question)) for question in questions], all_majority
        for name in names if circular else [TOTAL]:
            scores[name + EVERY_ROTATION] = scored(names[name], in_every)
    if adjusted:
        tasks = dict.fromkeys(row["task"] for row in rows)
        levels = {name: scores[name] for name in (TOTAL, *tasks) if scores[name]["chance"] < 1}
        scores |= {name + CHANCE_ADJUSTED: above_chance(level) for name, level in levels.items()}
    for name, means in combinations.items():
        groups = sorted(names_in(means))
        if names.keys() >= set(groups):
            earned = {group: [right[index] for index in names[group]] for group in groups}
            scores[name] = combined(means, {group: scores[group] for group in groups}, earned)
    return scores


def combined(
    means: Means, scores: Mapping[str, Mapping[str, Any]], earned: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The score that is a mean over groups; `earned` is what each group's questions earned."""
    shares = {
        key: float(mean_of(means, {group: score[key] for group, score in scores.items()}))
        for key in ("accuracy", "chance", "majority")
    }
    best = float(mean_of(means, {group: score["bounds"][1] for group, score in scores.items()}))
    n, interval = sum(map(len, earned.values())), list(bootstrap(earned, means))
    return {**shares, "n": n, "interval": interval, "bounds": [shares["accuracy"], best]}


def above_chance(level: Mapping[str, Any]) -> dict[str, Any]:
    """A score as `chance_adjusted`; its interval and bounds are so, too, and chance is 0."""
    chance = level["chance"]
    shares = {key: chance_adjusted(level[key], chance) for key in ("accuracy", "chance", "majority")}
    ranges = {key: [chance_adjusted(bound, chance) for bound in level[key]] for key in ("interval", "bounds")}
    return {**shares, "n": level["n"], **ranges}


def response_shares(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and shares of responses without a readable answer (and why), cut off, or without their image."""
    reasons = Counter(row.get("reading", Unread.UNREADABLE.value) for row in rows if is_unread(row))
    unparsable = reasons.total()
    truncated = sum(bool(row.get("truncated")) for row in rows)
    return {
        "responses": len(rows),
        "unparsable": unparsable,
        "unparsable_share": unparsable / len(rows),
        "unread_shares": {reason.value: reasons[reason.value] / len(rows) for reason in Unread},
        "truncated": truncated,
        "truncated_share": truncated / len(rows),
        "image_errors": sum(bool(row.get("error")) for row in rows),
    }


def unread_warning(shares: Mapping[str, Any]) -> str | None:
    """One line when too much could not be read for the accuracy to stand alone."""
    if shares["unparsable_share"] <= UNREAD_WARNING_SHARE:
        return None
    reasons = ", ".join(f"{reason} {share:.1%}" for reason, share in shares.get("unread_shares", {}).items() if share)
    return (
        f"{shares['unparsable_share']:.1%} of the responses could not be read"
        + (f" ({reasons})" if reasons else "")
        + " and count as wrong; read the bounds beside the accuracy"
    )


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores in %, as a Markdown table."""
    width = max(map(len, scores))
    lines = [
        f"| {'':{width}} | accuracy | 95 % interval | unread wrong - right | chance | majority |    n |",
        f"|:{'-' * width}-|---------:|--------------:|---------------------:|-------:|---------:|-----:|",
    ]
    for name, value in scores.items():
        low, high = (100 * bound for bound in value["interval"])
        worst, best = (100 * bound for bound in value["bounds"])
        lines.append(
            f"| {name:{width}} | {100 * value['accuracy']:8.2f} | {low:5.1f} - {high:5.1f} "
            f"| {worst:12.1f} - {best:5.1f} "
            f"| {100 * value['chance']:6.1f} | {100 * value['majority']:8.1f} | {value['n']:4d} |"
        )
    return "\n".join(lines)
