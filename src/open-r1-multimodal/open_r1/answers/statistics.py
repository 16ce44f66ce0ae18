"""Scores responses: judged rows, confidence intervals, baselines, paired tests.

A row is one response, as a dictionary with the reference's keys (`question`, `options`, `task`, `ground_truth`,
`response`, `model_answer`, `correct`), `reading` (the rule that found the answer, or why there is none) and, when they
are known, `id`, `rotation`, `type`, `source`, `truncated` and `error`. Rows of one `id` are the same question with its
options rotated (circular evaluation).
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

import numpy as np

from open_r1.answers.checker import Unread, judge
from open_r1.base.errors import Mistake

Row = Mapping[str, Any]
Combination = Callable[[Mapping[str, Any]], Any]  # accuracy by source -> one number; also of arrays

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile
BOOTSTRAP_SAMPLES = 10_000
BOOTSTRAP_SEED = 0
PARSERS = ("lenient", "strict")
UNREAD_WARNING_SHARE = 0.05
TOTAL = "Total"
ALL_ROTATIONS = "Total, right in every rotation"
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


def bootstrap(right: Mapping[str, tuple[int, int]], combine: Combination) -> tuple[float, float]:
    """Percentile bootstrap 95 % interval of a combination of proportions, resampled within each of them.

    Args:
        right: name -> (right answers, answers). Resampling n zeros and ones and counting the ones is a binomial draw.
        combine: name -> proportion to the combined number; called once, with arrays (samples,).
    """
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = {name: rng.binomial(n, k / n, BOOTSTRAP_SAMPLES) / n for name, (k, n) in right.items()}
    low, high = np.quantile(combine(draws), (0.025, 0.975))
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: could a fair coin split the questions that only one got right like this?"""
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


def judge_row(row: Row, parser: str) -> dict[str, Any]:
    """The row with `model_answer`, `correct` and `reading` as the package's answer checker reads its response.

    What it finds unreadable counts as cut off where generation is known to have been.

    Raises:
        Mistake: the ground truth is none of the options.
    """
    gold, options = row["ground_truth"], row["options"]
    lettered = _LETTER.fullmatch(gold) is not None
    verdict = judge(row["response"], gold, options, lettered=lettered, lenient=parser == "lenient")
    reading = verdict.reading
    if row.get("truncated") and reading == Unread.UNREADABLE.value:
        reading = Unread.CUT_OFF.value
    return {**row, "model_answer": verdict.answer, "correct": verdict.correct, "reading": reading}


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
    """Question -> the share of its rotations answered right, of which the Total is the mean."""
    shares = {}
    for position, rotations in enumerate(by_question(rows)):
        key = rotations[0].get("id", position), rotations[0]["question"]
        shares[key] = sum(row["correct"] for row in rotations) / len(rotations)
    return shares


def labels(row: Row) -> Sequence[str]:
    """What answers call the options: their letters, where the right one is a letter, else their texts."""
    options = row["options"]
    is_lettered = _LETTER.fullmatch(row["ground_truth"])
    return [f"({letter})" for letter in ascii_uppercase[: len(options)]] if is_lettered else options


def gold_index(row: Row) -> int:
    """The position of the right option.

    Raises:
        Mistake: the ground truth is none of the options.
    """
    gold, names = row["ground_truth"], labels(row)
    if gold not in names:
        raise Mistake(f"ground_truth: {gold!r} is none of its {len(names)} options")
    return names.index(gold)


def majority_positions(rows: Iterable[Row]) -> dict[str, int]:
    """Task -> the position at which the right option stands most often, the first of several."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        counts[row["task"]][gold_index(row)] += 1
    return {task: min(count, key=lambda position: (-count[position], position)) for task, count in counts.items()}


# --- scores -------------------------------------------------------------------------------------------------


def proportion(
    values: Sequence[float], best: Sequence[float], chance: Sequence[float], majority: Sequence[float]
) -> dict[str, Any]:
    """One score: a value in [0, 1] a question; `best` is that value if what could not be read were right.

    The other two are what guessing and a constant choice would have got.
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


def score(rows: Sequence[Row], combination: tuple[str, Combination] | None = None) -> dict[str, dict[str, Any]]:
    """Every score of judged rows, by name: the Total, each task, type and source, and the combination.

    Each holds `accuracy` (micro average), `n` (questions), `interval` (95 %: Wilson; bootstrap for the combination),
    `bounds` (the accuracy if every response that could not be read were wrong, as it is counted, or right) and two
    baselines: `chance`, a uniform guess, and `majority`, the most frequent position of each task. A question
    in several rotations counts once, with its mean; one more score then asks for all its rotations to be right.

    Args:
        combination: a name and a formula over the sources' accuracies; left out when a source is missing.
    """
    constant = majority_positions(rows)
    names: dict[str, list[int]] = {TOTAL: []}
    questions = by_question(rows)
    for field in ("task", "type", "source"):
        for index, question in enumerate(questions):
            if (name := question[0].get(field)) is not None:
                names.setdefault(name, []).append(index)
    names[TOTAL] = list(range(len(questions)))

    def mean(value: Callable[[Row], float]) -> list[float]:
        return [math.fsum(map(value, question)) / len(question) for question in questions]

    right = mean(lambda row: row["correct"])
    best = mean(lambda row: row["correct"] or is_unread(row))
    chance = mean(lambda row: 1 / len(row["options"]))
    majority = mean(lambda row: gold_index(row) == constant[row["task"]])
    scores = {
        name: proportion(*([values[index] for index in indices] for values in (right, best, chance, majority)))
        for name, indices in names.items()
    }
    if len(rows) > len(questions):
        all_right, all_best, all_majority = (
            [float(value == 1) for value in values] for values in (right, best, majority)
        )
        all_chance = [math.prod(1 / len(row["options"]) for row in question) for question in questions]
        scores[ALL_ROTATIONS] = proportion(all_right, all_best, all_chance, all_majority)
    if combination is not None:
        name, combine = combination
        sources = {row["source"] for row in rows if row.get("source") is not None}
        try:
            combined = {
                key: float(combine({source: scores[source][key] for source in sources}))
                for key in ("accuracy", "chance", "majority")
            }
            best_combined = float(combine({source: scores[source]["bounds"][1] for source in sources}))
        except KeyError:  # a source that the formula needs is not among the rows
            return scores
        counts = {s: (round(scores[s]["accuracy"] * scores[s]["n"]), scores[s]["n"]) for s in sorted(sources)}
        interval = list(bootstrap(counts, combine))
        bounds = [combined["accuracy"], best_combined]
        scores[name] = {**combined, "n": sum(n for _, n in counts.values()), "interval": interval, "bounds": bounds}
    return scores


def response_shares(rows: Sequence[Row]) -> dict[str, Any]:
    """What went wrong otherwise: responses without a readable answer and why, cut off, or without their image."""
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
