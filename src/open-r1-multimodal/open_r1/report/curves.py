"""A run's numbers -> its curves: which there are, and how matplotlib draws them as SVG inside a page. No torch.

Curves in the page take their colours from its style sheet (light and dark) and their fonts from the reader's system.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LinearLocator, MaxNLocator

from open_r1.files import replacing
from open_r1.report.runs import (
    ACCURACY,
    FORMAT,
    Rollouts,
    Run,
    Series,
    by_step,
    group_accuracy,
    moving_average,
    quartiles,
)

MAX_POINTS = 600  # of a curve; more cannot be told apart
SMOOTH_FROM = 40  # points from which on a moving average is drawn over them
# No curve is told from another by colour alone; `page.css` draws the same in legends.
DASHES = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)))
LENGTH_CURVE = 2  # the number of length's colour in the paper's figure, with a held-out curve or without

# In a figure for the page each colour is a mark, replaced by the style sheet's variable once the SVG is written.
PAGE_COLOURS = ("#010101", "#010102", "#010103", "#010104")
PAGE_INK, PAGE_GRID = "#010105", "#010106"
VARIABLES = {
    **{mark: f"var(--curve-{number})" for number, mark in enumerate(PAGE_COLOURS, start=1)},
    PAGE_INK: "currentColor",
    PAGE_GRID: "var(--grid)",
}
# In a figure of its own, on white.
PAPER_COLOURS = ("#3b52c4", "#c2410c", "#0f766e", "#7c3aed")
PAPER_INK, PAPER_GRID = "#1c1f26", "#e3e5ea"

WIDE, NARROW = (12.6, 4.9), (5.4, 3.9)  # inches; one is 72 units of an SVG
CARD = (5.4, 3.5)
_MARK = re.compile("|".join(VARIABLES))


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
    """Curves on common axes; `stacked` ones add up.

    `percent` values are shares in [0, 1], drawn over the whole of it unless they are `rare`.
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
    """What there is to draw of a run: the paper's figure (accuracy, length), the charts, and titles without data."""

    accuracy: list[Line]
    length: list[Line]
    charts: list[Chart]
    missing: list[str]


# --- which curves -------------------------------------------------------------------------------------------


def collect(run: Run, train: Rollouts, held_out: Rollouts) -> Curves:
    """The curves of a run, from every completion where there are completions, else from the log."""
    if is_sft(run, train):
        charts = [
            Chart("loss", "Loss", [Panel("loss", [Line("loss", run.series("loss"))])]),
            Chart(
                "token-accuracy",
                "Token accuracy",
                [Panel("share", [Line("token accuracy", run.series("mean_token_accuracy"))], percent=True)],
                "Share of the answer's tokens that the model ranks first.",
            ),
            Chart("learning-rate", "Learning rate", [Panel("", [Line("learning rate", run.series("learning_rate"))])]),
            Chart("entropy", "Entropy", [Panel("nats a token", [Line("entropy", run.series("entropy"))])]),
        ]
        return _with_data([], [], charts)

    steps = train.rows["step"]

    def rewards(name: str) -> Series:
        values = train.rewards.get(name)
        return by_step(steps, values) if values is not None else run.series(f"rewards/{name}/mean")

    def per_step(column: np.ndarray, logged: str) -> Series:
        return by_step(steps, column.astype(float)) if len(train) else run.series(logged)

    accuracy, form = Line("accuracy", rewards(ACCURACY)), Line("format", rewards(FORMAT))
    others = [Line(name, rewards(name)) for name in reward_names(run, train) if name not in (ACCURACY, FORMAT)]
    held_out_line = held_out_accuracy(run, held_out)
    lengths = per_step(train.rows["length"], "completions/mean_length")
    spread = by_step(steps, train.rows["length"].astype(float), quartiles) if len(train) else None
    length = Line("length in tokens", lengths, *(spread.values.T if spread else (None, None)))
    corrections = [Line("self-corrections that end right", correction_success(run, train))]
    reflections = [
        Line("reflective", reflection_share(run, train, "reflective", "reflection/share")),
        Line("self-corrected", reflection_share(run, train, "corrected", "reflection/self_correction")),
    ]
    charts = [
        Chart("rewards", "Accuracy and format reward", [Panel("mean reward", [accuracy, form], percent=True)]),
        *(Chart(f"reward-{n}", f"Reward: {line.label}", [Panel("mean", [line])]) for n, line in enumerate(others)),
        Chart(
            "held-out",
            "Held-out accuracy",
            [Panel("accuracy", [held_out_line], percent=True)],
            "Band: Wilson's 95 % interval over questions." if held_out_line.low is not None else "",
        ),
        Chart(
            "length",
            "Completion length",
            [
                Panel("tokens", [length]),
                Panel(
                    "truncated", [Line("truncated", per_step(~train.rows["ended"], "completions/clipped_ratio"))], True
                ),
            ],
            "Band: the middle half of the completions." if spread else "",
        ),
        Chart(
            "reflection",
            "Reflection and self-correction",
            [Panel("of completions", reflections, True, rare=True), Panel("success", corrections, True)],
            "Reflective: reconsiders (“wait, let me check”). Self-corrected: then answers another option.",
        ),
        Chart("entropy", "Entropy", [Panel("nats a token", [Line("entropy", run.series("entropy"))])]),
        Chart("kl", "KL to the reference model", [Panel("nats a token", [Line("KL", run.series("kl"))])]),
        Chart(
            "signal",
            "Reward spread and groups without signal",
            [
                Panel("std of rewards", [Line("std of rewards", run.series("reward_std"))]),
                Panel("no signal", [Line("groups without signal", run.series("frac_reward_zero_std"))], True),
            ],
            "A group whose completions all earn the same reward teaches nothing.",
        ),
        Chart("time", "Seconds a step", [Panel("seconds", step_time(run), stacked=True)]),
        Chart("gradient", "Gradient norm", [Panel("norm", [Line("gradient norm", run.series("grad_norm"))])]),
    ]
    accuracies = [accuracy, Line("held-out accuracy", held_out_line.points, marked=True)]
    return _with_data(accuracies, [Line("completion length", lengths)], charts)


def is_sft(run: Run, train: Rollouts) -> bool:
    """Whether a run was supervised; an older one that does not say so has no rewards and no completions."""
    if "command" in run.info:
        return run.info["command"] == "sft"
    return bool(run.events) and not len(train) and not any("reward" in event for event in run.events)


def reward_names(run: Run, train: Rollouts) -> list[str]:
    """Every reward function of the run, by the name under which it is logged."""
    logged = [match[1] for event in run.events for name in event if (match := re.fullmatch(r"rewards/(.+)/mean", name))]
    return list(dict.fromkeys([*train.rewards, *logged]))


def held_out_accuracy(run: Run, held_out: Rollouts) -> Line:
    """Accuracy on the held-out questions, with its interval where their completions are there."""
    if not np.isnan(held_out.correct()).all():
        series = group_accuracy(held_out)
        mean, low, high = series.values.T
        return Line("held-out accuracy", Series(series.steps, mean), low, high, marked=True)
    return Line("held-out accuracy", run.series(f"eval_rewards/{ACCURACY}/mean"), marked=True)


def reflection_share(run: Run, train: Rollouts, column: str, logged: str) -> Series:
    """Share of a step's completions in which the run found a reflection or a self-correction."""
    measured = train.rows["has_reflections"]
    if not measured.any():
        return run.series(logged)
    return by_step(train.rows["step"][measured], train.rows[column][measured].astype(float))


def correction_success(run: Run, train: Rollouts) -> Series:
    """Share of a step's self-corrections that end right; no value in a step without one."""
    corrected = train.rows["corrected"]
    if not corrected.any():
        return run.series("reflection/correction_success")
    return by_step(train.rows["step"][corrected], train.correct()[corrected])


def step_time(run: Run) -> list[Line]:
    """The seconds of a step, divided; what the parts leave over is the rest."""
    total = run.series("step_time")
    parts = []
    for name in ("rollout", "scoring", "update"):
        part = run.series(f"time/{name}")
        found = dict(zip(part.steps.tolist(), part.values.tolist(), strict=True))
        if found:
            parts.append((name, np.array([found.get(step, 0.0) for step in total.steps.tolist()])))
    rest = total.values - sum(values for _, values in parts)
    # Clocks that start and stop at other times may leave a little less than nothing.
    parts.append(("rest" if parts else "step", np.maximum(rest, 0)))
    return [Line(name, Series(total.steps, values)) for name, values in parts]


def _with_data(accuracy: Sequence[Line], length: Sequence[Line], charts: Sequence[Chart]) -> Curves:
    """Leaves out what has no data: curves, panels (`missing` has their first curve's label), charts (their title)."""
    drawn, missing = [], []
    for chart in charts:
        panels = [
            replace(panel, lines=lines)
            for panel in chart.panels
            if (lines := [x for x in panel.lines if len(x.points)])
        ]
        if panels:
            drawn.append(replace(chart, panels=panels))
            empty = [panel for panel in chart.panels if not any(len(line.points) for line in panel.lines)]
            missing += [panel.lines[0].label for panel in empty]
        else:
            missing.append(chart.title)
    paper = ([line for line in lines if len(line.points)] for lines in (accuracy, length))
    return Curves(*paper, drawn, missing)


# --- how they are drawn -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; those of the page are marks that the style sheet fills in."""

    curves: Sequence[str]
    ink: str
    grid: str


PAGE = Theme(PAGE_COLOURS, PAGE_INK, PAGE_GRID)
PAPER = Theme(PAPER_COLOURS, PAPER_INK, PAPER_GRID)


def legend(chart: Chart) -> list[tuple[int, str]]:
    """Number and label of each curve, in drawing order, where there is more than one."""
    labels = [line.label for panel in chart.panels for line in panel.lines]
    return list(enumerate(labels)) if len(labels) > 1 else []


def accuracy_length_legend(curves: Curves) -> list[tuple[int, str]]:
    """The same for the paper's figure."""
    return [*enumerate(line.label for line in curves.accuracy), *((LENGTH_CURVE, line.label) for line in curves.length)]


def chart_svg(chart: Chart) -> Markup:
    """A chart for the page."""
    with rc_context(_rc(chart.name)):
        figure = Figure(CARD, layout="constrained")
        heights = [2, 1, 1, 1][: len(chart.panels)]
        rows = figure.subplots(len(chart.panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        number = 0
        for axes, panel in zip(rows, chart.panels, strict=True):
            _draw_panel(axes, panel, PAGE, number, parts=4 if axes is rows[0] else 2)
            number += len(panel.lines)
        _label_steps(rows[-1])
        text = "; ".join(describe(line, panel.percent) for panel in chart.panels for line in panel.lines)
        return _inline(figure, chart.name, f"{chart.title}. {text}.")


def accuracy_length_svg(curves: Curves, name: str, size: tuple[float, float]) -> Markup:
    """The paper's figure for the page: accuracy (left axis) and response length (right axis) against steps."""
    with rc_context(_rc(name)):
        figure = _accuracy_length(curves, PAGE, size)
        text = [describe(line, True) for line in curves.accuracy] + [describe(line, False) for line in curves.length]
        return _inline(figure, name, f"Accuracy and completion length. {'; '.join(text)}.")


def save_accuracy_length(curves: Curves, path: Path) -> None:
    """The paper's figure as a file of its own, on white; the format follows from the name's ending."""
    with replacing(path) as temporary, rc_context(_rc("accuracy-length")):
        figure = _accuracy_length(curves, PAPER, (8.0, 4.2))
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        metadata = {"Date": None} if path.suffix == ".svg" else {}  # the same run leaves the same file
        figure.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)


def describe(line: Line, percent: bool) -> str:
    """One curve in words, for readers who cannot see it."""
    steps, values = line.points.steps, line.points.values
    first, last = (f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in values[[0, -1]])
    return f"{line.label}: {first} at step {steps[0]}, {last} at step {steps[-1]}"


def thin(values: np.ndarray, limit: int = MAX_POINTS) -> np.ndarray:
    """Increasing indices of at most `limit` values: both ends, and the lowest and highest of each stretch between."""
    if len(values) <= limit:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), limit // 2 - 1)
    extremes = [part[at] for part in stretches for at in (values[part].argmin(), values[part].argmax())]
    return np.unique([0, *extremes, len(values) - 1])


def _rc(salt: str) -> dict[str, object]:
    # Text stays text; ids follow from the salt, so that they are the same every time and differ between figures; a
    # dollar sign in a label is a dollar sign.
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 12,
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
    }


def _accuracy_length(curves: Curves, theme: Theme, size: tuple[float, float]) -> Figure:
    figure = Figure(size, layout="constrained")
    left = figure.subplots()
    _draw_panel(left, Panel("accuracy", curves.accuracy, percent=True, rare=True), theme, 0, parts=5)
    if curves.length:
        right = left.twinx()
        _draw_panel(right, Panel("completion length (tokens)", curves.length), theme, LENGTH_CURVE, parts=5)
        right.grid(False)
        right.yaxis.label.set_color(theme.curves[LENGTH_CURVE])
        right.tick_params(axis="y", labelcolor=theme.curves[LENGTH_CURVE])
    if curves.accuracy:
        left.yaxis.label.set_color(theme.curves[0])
        left.tick_params(axis="y", labelcolor=theme.curves[0])
    else:
        left.yaxis.set_visible(False)
    _label_steps(left)
    return figure


def _draw_panel(axes: Axes, panel: Panel, theme: Theme, number: int, parts: int) -> None:
    """Draw a panel's curves in the theme's colours from `number` on, with about `parts` intervals between ticks."""
    if panel.stacked:
        _draw_stack(axes, panel, theme, number)
    else:
        for at, line in enumerate(panel.lines, start=number):
            _draw_line(axes, line, theme.curves[at % len(theme.curves)], DASHES[at % len(DASHES)])
    axes.set_ylabel(panel.label, color=theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, length=0, pad=5)
    axes.xaxis.label.set_color(theme.ink)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(parts))
    if panel.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.set_ylim(bottom=0)
    if panel.percent and not panel.rare:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(LinearLocator(parts + 1))
        for drawn in axes.lines:  # a curve along the edge is drawn in its full width
            drawn.set_clip_on(False)


def _label_steps(axes: Axes) -> None:
    low, high = axes.get_xlim()
    if high - low < 1:  # a single step
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.set_xlabel("step")


def _draw_line(axes: Axes, line: Line, colour: str, dashes: object) -> None:
    steps, values = line.points.steps, line.points.values
    if line.low is not None:
        at = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS, dtype=int))
        axes.fill_between(steps[at], line.low[at], line.high[at], color=colour, alpha=0.16, linewidth=0)
    at = thin(values)
    if line.marked or len(steps) == 1:
        axes.plot(steps[at], values[at], color=colour, linestyle=dashes, marker="o", markersize=5, label=line.label)
    elif len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linestyle=dashes, linewidth=2, label=line.label)
    else:
        axes.plot(steps[at], values[at], color=colour, linewidth=0.8, alpha=0.35)
        smooth = moving_average(values, len(values) // 25 | 1)
        at = thin(smooth)
        axes.plot(steps[at], smooth[at], color=colour, linestyle=dashes, linewidth=2.2, label=line.label)


def _draw_stack(axes: Axes, panel: Panel, theme: Theme, number: int) -> None:
    steps = panel.lines[0].points.steps
    at = thin(sum(line.points.values for line in panel.lines))
    if len(steps) == 1:  # an area needs two points
        steps, at = np.array([steps[0] - 0.5, steps[0] + 0.5]), np.array([0, 0])
        values = [line.points.values[at] for line in panel.lines]
    else:
        steps, values = steps[at], [line.points.values[at] for line in panel.lines]
    colours = [theme.curves[(number + k) % len(theme.curves)] for k in range(len(panel.lines))]
    axes.stackplot(steps, values, colors=colours, alpha=0.75, linewidth=0)


def _inline(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an <svg> element of an HTML page: ids of its own, the page's colours and fonts, a description."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # A style element would reach the whole page.
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([^\s\"')]+)", " ".join(value for node in root.iter() for value in node.attrib.values())))
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        node.attrib.clear()
        for key, value in attributes.items():
            node.set(key, _MARK.sub(lambda match: VARIABLES[match[0]], value))
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    title = ElementTree.Element("title", id=f"{name}-title")
    title.text = description
    root.insert(0, title)
    return Markup(ElementTree.tostring(root, encoding="unicode"))
