"""Says which curves a report has and what each one shows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from open_r1.answers.judgement import Judgement
from open_r1.reporting.runs import ACCURACY, FORMAT, JUDGEMENTS, MAX_READ, LoggedRun, Series, Trajectories
from open_r1.reporting.statistics import by_step, by_tenth, group_accuracy, quartiles, reflection_statistics


@dataclass(frozen=True)
class Line:
    """One curve. `low` and `high` bound a band around it; `marked` points are few and each one matters."""

    label: str
    points: Series
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    marked: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves on common axes.

    Those of a `percent` panel are shares, and its axis goes from 0 to 1, or only as far as they do if they are `rare`.
    Those of a `stacked` panel have the same steps and are drawn as areas, one upon the other.
    """

    label: str
    lines: Sequence[Line]
    percent: bool = False
    rare: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Chart:
    """Panels one above the other over the same steps. `name` is its id in the page."""

    name: str
    title: str
    panels: Sequence[Panel]
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """What there is to draw of a run.

    Attributes:
        paper: rows of the paper's figure, each a panel for the left axis and one for the right.
        charts: the others.
        missing: titles without data.
    """

    paper: Sequence[tuple[Panel, Panel]]
    charts: Sequence[Chart]
    missing: Sequence[str]


def collect(run: LoggedRun, train: Trajectories, held_out: Trajectories) -> Curves:
    """The curves of a run, from every completion where there are completions, else from the log."""

    def logged(name: str, title: str, unit: str, label: str, metric: str) -> Chart:
        return Chart(name, title, [Panel(unit, [Line(label, run.series(metric))])])

    entropy = logged("entropy", "Entropy", "nats a token", "entropy", "entropy")
    if is_sft(run):
        line = Line("token accuracy", run.series("mean_token_accuracy"))
        note = "Share of the answer's tokens that the model ranks first."
        token_accuracy = [Panel("share", [line], percent=True)]
        charts = [
            logged("loss", "Loss", "loss", "loss", "loss"),
            Chart("token-accuracy", "Token accuracy", token_accuracy, note),
            logged("learning-rate", "Learning rate", "", "learning rate", "learning_rate"),
            entropy,
        ]
        return _with_data([], charts)

    steps = train.rows["step"]

    def reward(name: str) -> Series:
        values = train.rewards.get(name)
        return by_step(steps, values) if values is not None else run.series(f"rewards/{name}/mean")

    def per_step(column: np.ndarray, metric: str) -> Series:
        return by_step(steps, column.astype(float)) if len(train) else run.series(metric)

    accuracy, form = Line("accuracy", reward(ACCURACY)), Line("format", reward(FORMAT))
    other_names = [name for name in reward_names(run, train) if name not in (ACCURACY, FORMAT)]
    others = [Line(name, reward(name)) for name in other_names]
    held_out_lines = held_out_accuracies(run, held_out)
    lengths = per_step(train.rows["length"], "completions/mean_length")
    spread = by_step(steps, train.rows["length"].astype(float), quartiles) if len(train) else None
    length = Line("length in tokens", lengths, *(spread.values.T if spread else (None, None)))
    truncated = Line("truncated", per_step(~train.rows["ended"], "completions/clipped_ratio"))
    corrections = [Line("self-corrections that end right", correction_success(run, train))]
    reflections = [
        Line("reflective", reflection_share(run, train, "reflective", "reflection/share")),
        Line("reflective and answered rightly", right_reflections(train)),
        Line("self-corrected", reflection_share(run, train, "self_corrected", "reflection/self_correction")),
    ]
    against = [Line("against the thought", by_tenth(train.thoughts.steps, train.thoughts.against))]
    without_signal = [
        Line("groups without signal", run.series("frac_reward_zero_std")),
        Line("with signal, after refills", run.series("signal/share")),
    ]
    charts = [
        Chart("rewards", "Accuracy and format reward", [Panel("mean reward", [accuracy, form], percent=True)]),
        logged("reward", "Total reward", "mean", "total reward", "reward"),
        *(Chart(f"reward-{n}", f"Reward: {line.label}", [Panel("mean", [line])]) for n, line in enumerate(others)),
        Chart(
            "held-out",
            "Held-out accuracy",
            [Panel("accuracy", held_out_lines, percent=True)],
            "Band: Wilson's 95 % interval over questions." if held_out_lines[0].low is not None else "",
        ),
        Chart(
            "why-zero",
            "Why completions earned no accuracy reward",
            [Panel("of completions", reasons(train), percent=True, stacked=True)],
            "Right answer, wrong form: the evaluation, which reads leniently, counts the completion as right; the "
            "accuracy reward, which is strict, finds no answer.",
        ),
        Chart(
            "length",
            "Completion length",
            [Panel("tokens", [length]), Panel("truncated", [truncated], percent=True)],
            "Band: from the lower to the upper quartile of the completions." if spread else "",
        ),
        Chart(
            "reflection",
            "Reflection and self-correction",
            [
                Panel("of completions", reflections, percent=True, rare=True),
                Panel("success", corrections, percent=True),
            ],
            f"Reflective: contains words that reconsider (“wait, let me check”){counted_reflections(train)}. "
            "Self-corrected: the answer is another option than the one named last before the first such words.",
        ),
        Chart(
            "contradictions",
            "Answers against their thoughts",
            [Panel("of completions", against, percent=True)],
            "Share of completions whose answer is another option than the one that their thought names last, among "
            f"those that name an option in both: the mean over each tenth of the steps, of up to {MAX_READ} "
            "completions in all.",
        ),
        entropy,
        logged("kl", "KL to the reference model", "nats a token", "KL", "kl"),
        Chart(
            "signal",
            "Reward spread and groups without signal",
            [
                Panel("std of rewards", [Line("std of rewards", run.series("reward_std"))]),
                Panel("of groups", without_signal, percent=True),
            ],
            "Without signal: all completions of a group earned the same reward, so their advantages are 0.",
        ),
        Chart("time", "Seconds a step", [Panel("seconds", step_time(run))]),
        logged("learning-rate", "Learning rate", "", "learning rate", "learning_rate"),
        logged("gradient", "Gradient norm", "norm", "gradient norm", "grad_norm"),
    ]
    accuracies = [accuracy, *(replace(line, low=None, high=None) for line in held_out_lines)]
    paper = [
        (
            Panel("accuracy", accuracies, percent=True, rare=True),
            Panel("completion length (tokens)", [Line("completion length", lengths)]),
        ),
        (
            Panel("reflection", reflections, percent=True, rare=True),
            Panel("ends right", corrections, percent=True),
        ),
    ]
    return _with_data(paper, charts)


def is_sft(run: LoggedRun) -> bool:
    """Whether a run was supervised."""
    return run.info.command == "sft"


def reward_names(run: LoggedRun, train: Trajectories) -> list[str]:
    """Every reward function of the run, by the name under which it is logged."""
    logged = [match[1] for event in run.events for name in event if (match := re.fullmatch(r"rewards/(.+)/mean", name))]
    return list(dict.fromkeys([*train.rewards, *logged]))


def held_out_accuracies(run: LoggedRun, held_out: Trajectories) -> list[Line]:
    """Accuracy on the held-out questions of each evaluation set, with an interval where their completions are there."""
    lines = []
    for name in held_out.datasets:
        of_set = held_out.of_dataset(name)
        if not np.isnan(of_set.correct()).all():
            series = group_accuracy(of_set)
            mean, low, high = series.values.T
            lines.append(Line(_held_out_label(name), Series(series.steps, mean), low, high, marked=True))
    return lines or [
        Line(_held_out_label(name), run.series(f"{prefix}rewards/{ACCURACY}/mean"), marked=True)
        for prefix, name in run.evaluations("eval") or [("eval_", "")]
    ]


def _held_out_label(name: str) -> str:
    return f"held-out accuracy, {name}" if name else "held-out accuracy"


def reasons(train: Trajectories) -> list[Line]:
    """Share of a step's completions that earned no accuracy reward, for each reason that the run has."""
    judgements, steps = train.rows["judgement"], train.rows["step"]
    judged = judgements > 0
    return [
        Line(reason.value, by_step(steps[judged], (judgements[judged] == number).astype(float)))
        for number, reason in enumerate(JUDGEMENTS, start=1)
        if reason is not Judgement.RIGHT and (judgements == number).any()
    ]


def reflection_share(run: LoggedRun, train: Trajectories, column: str, logged: str) -> Series:
    """Share of a step's completions in which the run found a reflection or a self-correction."""
    measured = train.rows["has_reflections"]
    if not measured.any():
        return run.series(logged)
    return by_step(train.rows["step"][measured], train.rows[column][measured].astype(float))


def right_reflections(train: Trajectories) -> Series:
    """Share of a step's completions that reflect and answer rightly."""
    correct, measured = train.correct(), train.rows["has_reflections"]
    right = np.where(np.isnan(correct), np.nan, train.rows["reflective"] & (correct == 1))
    return by_step(train.rows["step"][measured], right[measured])


def counted_reflections(train: Trajectories) -> str:
    """How many reflective completions had the format and answered rightly, as the end of a sentence."""
    counts = reflection_statistics(train)
    (form, _), (right, judged) = counts.format_with, counts.accuracy_with
    if not judged:
        return ""
    return f"; {counts.reflective:,} completions do, {form:,} of them with the format and {right:,} answered rightly"


def correction_success(run: LoggedRun, train: Trajectories) -> Series:
    """Share of a step's self-corrections that end right; no value in a step without one."""
    corrected = train.rows["self_corrected"]
    if not corrected.any():
        return run.series("reflection/correction_success")
    return by_step(train.rows["step"][corrected], train.correct()[corrected])


def step_time(run: LoggedRun) -> list[Line]:
    """The seconds of a step, and of its parts."""
    names = {"step": "step_time"} | {part: f"time/{part}" for part in ("rollout", "scoring", "update")}
    return [Line(label, run.series(name)) for label, name in names.items()]


def _with_data(paper: Sequence[tuple[Panel, Panel]], charts: Sequence[Chart]) -> Curves:
    """Leaves out what has no data: curves, panels (`missing` has their first curve's label), charts (their title)."""

    def drawable(panel: Panel) -> Panel:
        return replace(panel, lines=[line for line in panel.lines if len(line.points)])

    rows = [(drawable(left), drawable(right)) for left, right in paper]
    drawn, missing = [], []
    for chart in charts:
        panels = [drawable(panel) for panel in chart.panels]
        filled = [panel for panel in panels if panel.lines]
        if filled:
            drawn.append(replace(chart, panels=filled))
            for panel, kept in zip(chart.panels, panels, strict=True):
                if not kept.lines:
                    missing.append(panel.lines[0].label)
        else:
            missing.append(chart.title)
    return Curves([row for row in rows if row[0].lines or row[1].lines], drawn, missing)
