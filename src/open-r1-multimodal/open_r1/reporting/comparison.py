"""Compares results over the questions that they share, and recipes that ran with several seeds.

The observation is the question, here as in `answers.statistics`: rotations of its options and the
seeds of a recipe answer the same question, which counts once, with its mean over them. The first
result or recipe is the reference.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from open_r1.answers.statistics import Row, mcnemar, outcomes, paired_bootstrap, wilson
from open_r1.base.errors import Mistake
from open_r1.evaluation.results import read_scored
from open_r1.reporting.curves import reflection_share
from open_r1.reporting.runs import ACCURACY, Trajectories, read_run, scan_trajectories
from open_r1.reporting.statistics import by_step, first_and_last_tenth

Seed = TypeVar("Seed")  # whatever holds the answers of one seed
NONE = "-"  # a table's cell without a value


# --- tables ---------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left."""

    def line(cells: Sequence[str]) -> str:
        return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"

    ruler = f"|:-|{'-:|' * (len(header) - 1)}"
    return "\n".join([line(header), ruler, *map(line, rows)])


def percent(share: float | None, digits: int = 1) -> str:
    """`"45.2"`, or a dash."""
    return NONE if share is None else f"{100 * share:.{digits}f}"


def accuracy_cell(value: Mapping[str, Any] | None, digits: int) -> str:
    """`"45.20 (41.0 - 49.0)"` in %, with its interval; its bounds in brackets where it has them."""
    if value is None:
        return NONE
    low, high = map(percent, value["interval"])
    bounds = " [{} - {}]".format(*map(percent, value["bounds"])) if "bounds" in value else ""
    return f"{percent(value['accuracy'], digits)} ({low} - {high}){bounds}"


def difference_cell(difference: tuple[float, float, float], digits: int) -> str:
    """`"+1.2 (-0.4 - +2.8)"`: points and their interval."""
    points, low, high = (100 * value for value in difference)
    return f"{points:+.{digits}f} ({low:+.1f} - {high:+.1f})"


# --- results of one benchmark ---------------------------------------------------------------------


def paired_table(title: str, names: Sequence[str], results: Sequence[Sequence[Row]]) -> str:
    """How the Total of results differs from the first one's, over the questions that both answered.

    The difference is that of the means over questions, with its 95 % interval. McNemar's test needs questions that were
    asked once and are right or wrong; it is left out for several rotations, and for answers that are numbers.

    Args:
        title: of the first column.
        names, results: the rows of each result.

    Raises:
        Mistake: two results share no question.
    """
    shares = [outcomes(rows) for rows in results]
    is_rotated = any(len(rows) > len(share) for rows, share in zip(results, shares, strict=True))
    is_graded = is_rotated or any("credit" in row for rows in results for row in rows)
    first, *others = shares
    better, worse = "right where the first is wrong", "wrong where the first is right"
    if is_graded:
        better, worse = ("right in more rotations", "right in fewer rotations") if is_rotated else ("better", "worse")
    rows = []
    for name, other in zip(names[1:], others, strict=True):
        shared = [question for question in first if question in other]
        if not shared:
            raise Mistake(f"{name}: shares no question with the first result")
        before, after = (np.array([[share[key] for key in shared]]) for share in (first, other))
        gained, lost = int((after > before).sum()), int((after < before).sum())
        p = NONE if is_graded else f"{mcnemar(lost, gained):.2g}"
        difference = difference_cell(paired_bootstrap(before, after), 2)
        rows.append([name, difference, str(gained), str(lost), str(len(shared)), p])
    header = [title, "Total in points", better, worse, "questions of both", "McNemar p"]
    return markdown(header, rows)


# --- recipes of several seeds ---------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A run of one recipe with one seed. T held-out evaluations of Q questions each.

    Attributes:
        path: its folder.
        steps: (T,) after which the held-out questions were asked.
        completions: (T,) sampled until then, those that were not learned from included.
        held_out: (T, Q) 1 for a right answer, 0 for a wrong one; between them for one asked again.
        questions: Q names of the held-out questions.
        benchmark: `outcomes` of the result file in the run's folder; empty without one.
        seconds: of all training steps; what evaluations and checkpoints took is not in it.
        length, reflective, against: tokens of a completion, share of reflective ones, and of answers
            against their thoughts (see `Thoughts`), over the last tenth of the steps.
    """

    path: Path
    steps: np.ndarray
    completions: np.ndarray
    held_out: np.ndarray
    questions: list[Hashable]
    benchmark: dict[Hashable, float]
    seconds: float
    length: float
    reflective: float
    against: float

    def final(self) -> np.ndarray:
        """(Q,) of the last held-out evaluation."""
        return self.held_out[-1]

    def accuracy(self) -> np.ndarray:
        """(T,) of each held-out evaluation."""
        return self.held_out.mean(axis=1)


def read_trial(path: Path) -> Trial:
    """What a run left in its folder.

    Raises:
        OSError, Mistake: not a run that was evaluated on held-out questions, or a damaged file.
    """
    run = read_run(path)
    results = sorted(path.glob("*_result_*.json"))
    if len(results) > 1:
        names = f"{results[0].name}, {results[1].name}"
        raise Mistake(f"{path}: {len(results)} results in it ({names}); keep one")
    with (
        scan_trajectories(path / "trajectories/train.jsonl") as train,
        scan_trajectories(path / "trajectories/eval.jsonl") as held_out,
    ):
        steps, correct, questions = read_held_out(held_out, path)
        if not len(train):
            raise Mistake(f"{path}: no completions in trajectories/train.jsonl")
        lengths = by_step(train.rows["step"], train.rows["length"].astype(float)).values
        reflective = reflection_share(run, train, "reflective", "reflection/share").values
        against = train.last_tenth().thoughts.against
        return Trial(
            path=path,
            steps=steps,
            completions=np.searchsorted(np.sort(train.rows["step"]), steps, side="right"),
            held_out=correct,
            questions=questions,
            benchmark=outcomes(read_scored(results[0])["results"]) if results else {},
            seconds=float(run.series("step_time").values.sum()),
            length=first_and_last_tenth(lengths)[1],
            reflective=first_and_last_tenth(reflective)[1] if len(reflective) else float("nan"),
            against=float(against.mean()) if len(against) else float("nan"),
        )


def read_held_out(
    held_out: Trajectories,
    origin: object,
) -> tuple[np.ndarray, np.ndarray, list[Hashable]]:
    """Steps (T,), right answers (T, Q) and Q names, sorted, of a run's held-out evaluations.

    Raises:
        Mistake: there are none, or not all asked the same number of questions.
    """
    correct = held_out.correct()
    if not len(held_out):
        reason = "no held-out answers in trajectories/eval.jsonl; the recipe needs eval_strategy"
        raise Mistake(f"{origin}: {reason}")
    if np.isnan(correct).all():
        raise Mistake(f"{origin}: no {ACCURACY} in trajectories/eval.jsonl")
    evaluations = []
    for groups in held_out.steps.values():
        answers = []
        for rows in groups:
            asked = held_out.read(rows[0])
            name = tuple(asked.images), asked.solution or ""
            # tells two questions with one picture and one answer apart, whatever template a recipe puts around them
            text = held_out.question(asked.prompt)[1]
            answers.append((name, text, np.nan_to_num(correct[rows]).mean()))
        # every seed asks in an order of its own
        evaluations.append(sorted(answers, key=lambda answer: answer[:2]))
    least, most = min(map(len, evaluations)), max(map(len, evaluations))
    if least < most:
        raise Mistake(f"{origin}: its evaluations asked {least} to {most} held-out questions")
    right = np.array([[share for *_, share in answers] for answers in evaluations])
    return np.array(list(held_out.steps)), right, [name for name, *_ in evaluations[0]]


def compare_recipes(recipes: Mapping[str, Sequence[Trial]]) -> list[dict[str, Any]]:
    """A row a recipe, as JSON has it; shares in [0, 1], completions and seconds as means over seeds.

    Args:
        recipes: name -> its runs, one a seed. The first is the reference: differences are to it, and
            `reached` is how many completions come up to its final held-out accuracy.

    Raises:
        Mistake: runs that were not evaluated after the same steps on the same questions.
    """
    reference = next(iter(recipes.values()))
    first = reference[0]
    for trial in (trial for trials in recipes.values() for trial in trials):
        if trial.questions != first.questions:
            raise Mistake(f"{trial.path}: other held-out questions than {first.path}")
        if trial.benchmark.keys() != first.benchmark.keys():
            what = "its result file is about other questions than"
            raise Mistake(f"{trial.path}: {what} {first.path}'s")
        if not np.array_equal(trial.steps, first.steps):
            raise Mistake(f"{trial.path}: evaluated after other steps than {first.path}")

    def benchmark(trial: Trial) -> np.ndarray:
        return np.array([float(trial.benchmark[question]) for question in first.benchmark])

    target = learning_curve(reference)["accuracy"][-1]
    rows = []
    for name, trials in recipes.items():
        curve = learning_curve(trials)
        reached = [first_reached(trial.completions, trial.accuracy(), target) for trial in trials]
        row = {
            "recipe": name,
            "runs": [str(trial.path) for trial in trials],
            "held_out": compare(Trial.final, trials, reference),
            "benchmark": compare(benchmark, trials, reference) if first.benchmark else None,
            "completions": mean([trial.completions[-1] for trial in trials]),
            "seconds": mean([trial.seconds for trial in trials]),
            "length": mean([trial.length for trial in trials]),
            "reflective": mean([trial.reflective for trial in trials]),
            "against": mean([trial.against for trial in trials]),
            "reached": {
                "accuracy": target,
                "completions": first_reached(curve["completions"], curve["accuracy"], target),
                "of_seeds": reached,
            },
            "curve": curve,
        }
        rows.append(row)
    return rows


def compare(answers: Callable[[Seed], np.ndarray], trials: Sequence[Seed], reference: Sequence[Seed]) -> dict[str, Any]:
    """Accuracy, with Wilson's 95 % interval over questions, and the paired difference to another.

    Args:
        answers: one seed's run, or result -> what it earned (questions,).
        trials, reference: the seeds of either recipe or model; where both are one list there is no difference.
    """
    right, right_in_reference = (np.stack(list(map(answers, runs))) for runs in (trials, reference))
    of_questions = right.mean(axis=0)
    difference = None
    if trials is not reference:
        points, low, high = paired_bootstrap(right_in_reference, right)
        difference = {"accuracy": points, "interval": [low, high]}
    return {
        "accuracy": float(right.mean()),
        "interval": list(wilson(float(of_questions.sum()), len(of_questions))),
        "of_seeds": right.mean(axis=1).tolist(),
        "questions": len(of_questions),
        "difference": difference,
    }


def learning_curve(trials: Sequence[Trial]) -> dict[str, list[float]]:
    """Completions and held-out accuracy, means over seeds, with the lowest and highest seed; all (T,)."""
    of_seeds = np.stack([trial.accuracy() for trial in trials])  # (seeds, T)
    return {
        "steps": trials[0].steps.tolist(),
        "completions": np.mean([trial.completions for trial in trials], axis=0).tolist(),
        "accuracy": of_seeds.mean(axis=0).tolist(),
        "low": of_seeds.min(axis=0).tolist(),
        "high": of_seeds.max(axis=0).tolist(),
    }


def first_reached(
    completions: Sequence[float],
    accuracy: Sequence[float],
    target: float,
) -> float | None:
    """Where a curve (T,) first comes up to the target, between its points on a line; None if never."""
    reached = np.flatnonzero(np.asarray(accuracy) >= target)
    if not len(reached):
        return None
    around = slice(max(reached[0] - 1, 0), reached[0] + 1)
    return float(np.interp(target, accuracy[around], completions[around]))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None where it is NaN, which JSON does not have."""
    result = float(np.mean(values))
    return None if np.isnan(result) else result


def recipe_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each recipe of `compare_recipes` reached and what it took, as two tables and how to read them."""
    reference = rows[0]
    against = ["lowest - highest seed", f"difference to {reference['recipe']}"]
    reached_table = markdown(
        ["recipe", "seeds", "held-out accuracy", *against, "CV-Bench's form", *against],
        [
            [
                row["recipe"],
                str(len(row["runs"])),
                *reached_cells(row["held_out"]),
                *reached_cells(row["benchmark"]),
            ]
            for row in rows
        ],
    )
    until = f"until {percent(reference['reached']['accuracy'])} % held-out"
    cost = ["seconds", "tokens a completion", "reflective, %", "against the thought, %"]
    took_table = markdown(
        ["recipe", "completions sampled", until, "the same, by seed", *cost],
        [
            [
                row["recipe"],
                number(row["completions"]),
                number(row["reached"]["completions"]),
                ", ".join(map(number, row["reached"]["of_seeds"])),
                number(row["seconds"]),
                number(row["length"], ".1f"),
                percent(row["reflective"]),
                percent(row["against"]),
            ]
            for row in rows
        ],
    )
    questions = f"{reference['held_out']['questions']} held-out questions"
    if reference["benchmark"]:
        questions += f" and {reference['benchmark']['questions']} of CV-Bench's form"
    note = (
        "Accuracy in %, differences in points, each with its 95 % interval, over "
        f"{questions}. The other columns are means over the seeds: seconds are of the training steps; tokens, "
        "reflective completions and contradictions of the last tenth of the steps. Against the thought: answers that "
        "are another option than the one that their thought names last, as a share of those for which both name one. "
        f"{until.capitalize()}: completions sampled before the mean curve, or that of each seed, first reaches the "
        "final accuracy of the first recipe (-: never)."
    )
    return f"{reached_table}\n\n{took_table}\n\n{note}\n"


def reached_cells(value: Mapping[str, Any] | None) -> list[str]:
    """`["77.2 (73.6 - 80.3)", "76.9 - 77.5", "+1.2 (-0.4 - +2.8)"]`, or dashes."""
    if value is None:
        return [NONE] * 3
    seeds = f"{percent(min(value['of_seeds']))} - {percent(max(value['of_seeds']))}"
    cells = [accuracy_cell(value, 1), seeds, NONE]
    if difference := value["difference"]:
        cells[2] = difference_cell((difference["accuracy"], *difference["interval"]), 1)
    return cells


def number(value: float | None, form: str = ",.0f") -> str:
    """A number with its thousands apart, or a dash."""
    return NONE if value is None else format(value, form)
