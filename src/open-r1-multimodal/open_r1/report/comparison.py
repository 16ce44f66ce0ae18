"""Compares recipes that ran with several seeds each: what each reached, what it took, how sure that is.

The observation is the question, here as in `evaluate.statistics`: the seeds of a recipe answer the same questions, so a
question counts once, with its mean over them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from open_r1.answers.statistics import outcomes, paired_bootstrap, wilson
from open_r1.base.errors import Mistake
from open_r1.evaluate.results import read_scored
from open_r1.report.curves import reflection_share
from open_r1.report.runs import ACCURACY, Trajectories, read_run, scan_trajectories
from open_r1.report.statistics import by_step, first_and_last_tenth


@dataclass(frozen=True)
class Trial:
    """A run of one recipe with one seed. T held-out evaluations of Q questions each.

    Attributes:
        path: its folder.
        steps: (T,) after which the held-out questions were asked.
        completions: (T,) sampled until then, those that were not learned from included.
        held_out: (T, Q) 1 for a right answer, 0 for a wrong one; between them where a question was asked again.
        questions: Q names of the held-out questions.
        benchmark: question of the result file in the run's folder -> whether it was answered right; None without one.
        seconds: of all training steps; what evaluations and checkpoints took is not in it.
        length, reflective: tokens of a completion and share of reflective ones, over the last tenth of the steps.
    """

    path: Path
    steps: np.ndarray
    completions: np.ndarray
    held_out: np.ndarray
    questions: list[Hashable]
    benchmark: dict[Hashable, bool] | None
    seconds: float
    length: float
    reflective: float


def read_trial(path: Path) -> Trial:
    """What a run left in its folder.

    Raises:
        OSError, ValueError: not a run that was evaluated on held-out questions, or a damaged file; one line.
    """
    run = read_run(path)
    with (
        scan_trajectories(path / "trajectories/train.jsonl") as train,
        scan_trajectories(path / "trajectories/eval.jsonl") as held_out,
    ):
        steps, correct, questions = read_held_out(held_out, path)
        if not len(train):
            raise Mistake(f"{path}: no completions in trajectories/train.jsonl")
        lengths = by_step(train.rows["step"], train.rows["length"].astype(float)).values
        reflective = reflection_share(run, train, "reflective", "reflection/share").values
        return Trial(
            path=path,
            steps=steps,
            completions=np.searchsorted(np.sort(train.rows["step"]), steps, side="right"),
            held_out=correct,
            questions=questions,
            benchmark=read_benchmark(path),
            seconds=float(run.series("step_time").values.sum()),
            length=at_the_end(lengths),
            reflective=at_the_end(reflective),
        )


def read_held_out(held_out: Trajectories, origin: object) -> tuple[np.ndarray, np.ndarray, list[Hashable]]:
    """Steps (T,), right answers (T, Q) and Q names of questions, sorted, of a run's held-out evaluations.

    Raises:
        ValueError: there are none, or not all asked the same number of questions.
    """
    if not len(held_out):
        raise Mistake(f"{origin}: no held-out answers in trajectories/eval.jsonl; the recipe needs eval_strategy")
    if np.isnan(held_out.correct()).all():
        raise Mistake(f"{origin}: no {ACCURACY} in trajectories/eval.jsonl")
    _, first = np.unique(held_out.rows["group"], return_index=True)  # groups are numbered in the order of the questions
    correct = by_step(held_out.rows["group"], np.nan_to_num(held_out.correct())).values  # (T * Q,)
    steps, counts = np.unique(held_out.rows["step"][first], return_counts=True)
    if len(set(counts.tolist())) > 1:
        raise Mistake(f"{origin}: its evaluations asked {min(counts)} to {max(counts)} held-out questions")
    order = np.argsort(held_out.rows["step"][first], kind="stable")
    asked = [held_out.read(index) for index in first[order]]
    names = [(tuple(row["images"]), row.get("solution")) for row in asked]
    # Every seed asks them in an order of its own.
    count = counts[0]
    starts = range(0, len(names), count)
    ranked = [sorted(range(start, start + count), key=lambda index: repr(names[index])) for start in starts]
    correct = correct[order][np.concatenate(ranked)].reshape(len(steps), count)
    return steps, correct, [names[index] for index in ranked[0]]


def read_benchmark(path: Path) -> dict[Hashable, bool] | None:
    """The outcomes of the one result file in a run's folder, if there is one.

    Raises:
        ValueError: there are several, or it is none.
    """
    files = sorted(path.glob("*_result_*.json"))
    if len(files) > 1:
        raise Mistake(f"{path}: {len(files)} results in it ({files[0].name}, {files[1].name}); keep one")
    return outcomes(read_scored(files[0])["results"]) if files else None


def at_the_end(values: np.ndarray) -> float:
    """The mean over the last tenth of a run's steps; NaN without any."""
    ends = first_and_last_tenth(values)
    return float("nan") if ends is None else ends[1]


def first_reached(completions: np.ndarray, accuracy: np.ndarray, target: float) -> float | None:
    """Where a curve (T,) first comes up to the target, between its points on a line; None when it never does."""
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return None
    around = slice(max(reached[0] - 1, 0), reached[0] + 1)
    return float(np.interp(target, accuracy[around], completions[around]))


def compare_recipes(recipes: Mapping[str, Sequence[Trial]]) -> list[dict[str, Any]]:
    """A row a recipe, as JSON has it; accuracies and shares in [0, 1], completions and seconds as a mean over seeds.

    Args:
        recipes: name -> its runs, one a seed. The first is the reference: differences are to it, and `reached` is how
            many completions come up to its final held-out accuracy.

    Raises:
        ValueError: runs that were not evaluated after the same steps on the same questions.
    """
    reference = next(iter(recipes.values()))
    for trial in (trial for trials in recipes.values() for trial in trials):
        if trial.questions != reference[0].questions:
            raise Mistake(f"{trial.path}: other held-out questions than {reference[0].path}")
        if (trial.benchmark or {}).keys() != (reference[0].benchmark or {}).keys():
            raise Mistake(f"{trial.path}: its result file is about other questions than {reference[0].path}'s")
        if not np.array_equal(trial.steps, reference[0].steps):
            raise Mistake(f"{trial.path}: evaluated after other steps than {reference[0].path}")
    target = float(mean_curve(reference)[1][-1])
    return [
        {
            "recipe": name,
            "runs": [str(trial.path) for trial in trials],
            "held_out": compare(final, trials, reference),
            "benchmark": compare(results, trials, reference) if reference[0].benchmark else None,
            "completions": mean([trial.completions[-1] for trial in trials]),
            "seconds": mean([trial.seconds for trial in trials]),
            "length": mean([trial.length for trial in trials]),
            "reflective": mean([trial.reflective for trial in trials]),
            "reached": {
                "accuracy": target,
                "completions": first_reached(*mean_curve(trials), target),
                "of_seeds": [first_reached(t.completions, t.held_out.mean(axis=1), target) for t in trials],
            },
            "curve": curve(trials),
        }
        for name, trials in recipes.items()
    ]


def final(trials: Sequence[Trial]) -> np.ndarray:
    """(seeds, questions) of the last held-out evaluation."""
    return np.stack([trial.held_out[-1] for trial in trials])


def results(trials: Sequence[Trial]) -> np.ndarray:
    """(seeds, questions) of the runs' result files."""
    names = list(trials[0].benchmark)
    return np.array([[float(trial.benchmark[name]) for name in names] for trial in trials])


def compare(
    answers: Callable[[Sequence[Trial]], np.ndarray], trials: Sequence[Trial], reference: Sequence[Trial]
) -> dict[str, Any]:
    """Accuracy, with Wilson's 95 % interval over questions, and the paired difference to the reference's.

    Args:
        answers: runs -> their answers (seeds, questions).
        trials, reference: the runs; the same for the reference itself, which differs from nothing.
    """
    own = answers(trials)
    of_questions = own.mean(axis=0)
    difference = None
    if trials is not reference:
        points, low, high = paired_bootstrap(answers(reference), own)
        difference = {"accuracy": points, "interval": [low, high]}
    return {
        "accuracy": float(own.mean()),
        "interval": list(wilson(float(of_questions.sum()), len(of_questions))),
        "of_seeds": own.mean(axis=1).tolist(),
        "questions": len(of_questions),
        "difference": difference,
    }


def mean_curve(trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """Completions (T,) and held-out accuracy (T,), means over seeds."""
    completions = np.mean([trial.completions for trial in trials], axis=0)
    return completions, np.mean([trial.held_out.mean(axis=1) for trial in trials], axis=0)


def curve(trials: Sequence[Trial]) -> dict[str, list[float]]:
    """The learning curve: `mean_curve`, and the lowest and highest seed at each of its points."""
    of_seeds = np.stack([trial.held_out.mean(axis=1) for trial in trials])  # (seeds, T)
    completions, means = mean_curve(trials)
    points = {"completions": completions, "accuracy": means, "low": of_seeds.min(axis=0), "high": of_seeds.max(axis=0)}
    return {"steps": trials[0].steps.tolist(), **{name: values.tolist() for name, values in points.items()}}


def mean(values: Sequence[float]) -> float | None:
    """None for what no JSON has: the mean of a value that is no number."""
    result = float(np.mean(values))
    return None if np.isnan(result) else result
