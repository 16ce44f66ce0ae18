"""Draws curves with matplotlib, as SVG inside a page or as files of their own.

Curves in the page take their colours from its style sheet (light and dark) and their fonts from the reader's system.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LinearLocator, MaxNLocator

from open_r1.base.files import FIGURE_MARK, replacing
from open_r1.reporting.curves import Chart, Curves, Line, Panel
from open_r1.reporting.statistics import moving_average

SMOOTH_FROM = 40  # points from which on a moving average is drawn over them
# No curve is told from another by colour alone; `page.css` draws the same in legends.
DASHES = ("-", (0, (4, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
# Of each row of the paper's figure the number of the first colour on its left and right axis.
PAPER_CURVES = ((0, 2), (3, 5))

WIDE, NARROW = (12.6, 4.9), (5.4, 3.9)  # inches; one is 72 units of an SVG
BELOW = 0.5  # height of what stands below the paper's figure, as a share of its own
CARD = (5.4, 3.5)
PANELS = 5  # beside each other
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    curves: Sequence[str]
    ink: str
    grid: str


# In a figure for the page each colour is a mark, replaced by the style sheet's variable once the SVG is written.
PAGE = Theme(("#010101", "#010102", "#010103", "#010104", "#010105", "#010106"), ink="#010107", grid="#010108")
VARIABLES = {
    **{mark: f"var(--curve-{number})" for number, mark in enumerate(PAGE.curves, start=1)},
    PAGE.ink: "currentColor",
    PAGE.grid: "var(--grid)",
}
# In a figure of its own, on white.
PAPER = Theme(("#3b52c4", "#c2410c", "#0f766e", "#7c3aed", "#a16207", "#be185d"), ink="#1c1f26", grid="#e3e5ea")


def legend(chart: Chart) -> list[tuple[int, str]]:
    """Number and label of each curve, in drawing order, where there is more than one."""
    labels = [line.label for panel in chart.panels for line in panel.lines]
    return list(enumerate(labels)) if len(labels) > 1 else []


def accuracy_length_legend(curves: Curves) -> list[tuple[int, str]]:
    """Number and label of each curve of the paper's figure."""
    return [(number, line.label) for number, _, line in _paper_lines(curves)]


def _paper_lines(curves: Curves) -> Iterator[tuple[int, Panel, Line]]:
    """Number, panel and curve of all that the paper's figure shows."""
    for panels, starts in zip(curves.paper, PAPER_CURVES, strict=False):
        for panel, start in zip(panels, starts, strict=True):
            for number, line in enumerate(panel.lines, start):
                yield number, panel, line


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
        text = "; ".join(describe_curve(line, panel.percent) for panel in chart.panels for line in panel.lines)
        return _inline(figure, chart.name, f"{chart.title}. {text}.")


def accuracy_length_title(curves: Curves) -> str:
    """What the paper's figure shows."""
    if len(curves.paper) > 1:
        return "Accuracy, completion length and reflection"
    return "Accuracy and completion length"


def accuracy_length_svg(curves: Curves, name: str, size: tuple[float, float]) -> Markup:
    """The paper's figure for the page: accuracy (left axis) and response length (right axis) against steps.

    Below them, where the run looked for it, reflection (left axis) and the success of self-corrections (right axis).
    """
    with rc_context(_rc(name)):
        figure = _accuracy_length(curves, size)
        text = "; ".join(describe_curve(line, panel.percent) for _, panel, line in _paper_lines(curves))
        return _inline(figure, name, f"{accuracy_length_title(curves)}. {text}.")


def save_accuracy_length(curves: Curves, path: Path) -> None:
    """Two small plots as a file of its own, on white: accuracy with the share that reflects, and completion length.

    Each curve has its name at its end, so that no legend is needed. The format follows from the file's ending.
    """
    (accuracy, length), *others = curves.paper
    reflective = [line for left, _ in others for line in left.lines[:1]]
    panels = {
        "share of completions": replace(accuracy, label="", lines=[*accuracy.lines, *reflective]),
        "tokens": replace(length, label=""),
    }
    with replacing(path) as temporary, rc_context(_rc("accuracy-length")):
        figure = Figure((10.0, 3.2), layout="constrained")
        for axes, (title, panel), number in zip(figure.subplots(1, 2), panels.items(), (0, 3), strict=True):
            _draw_named(axes, panel, title, number)
        _save(figure, temporary, path.suffix)


def panel_svg(panel: Panel, title: str) -> str:
    """One panel by itself, on white, as an SVG text; each curve has its name at its end."""
    buffer = io.StringIO()
    with rc_context(_rc("panel")):
        figure = Figure((6.4, 3.2), layout="constrained")
        _draw_named(figure.subplots(), panel, title, 0)
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _draw_named(axes: Axes, panel: Panel, title: str, number: int) -> None:
    """Draw a panel on white, its colours from `number` on, with a title and with each curve's name at its end."""
    _draw_panel(axes, panel, PAPER, number, parts=4)
    axes.set_title(title, loc="left", color=PAPER.ink, fontsize=12)
    _name_curves(axes)
    _label_steps(axes)


def _name_curves(axes: Axes) -> None:
    """Draw all curves without dashes, and write the name of each in its colour behind its end, none over another."""
    low, high = axes.get_ylim()
    lowest = -math.inf
    named = [drawn for drawn in axes.lines if not drawn.get_label().startswith("_")]
    for drawn in sorted(named, key=lambda drawn: drawn.get_ydata()[-1]):
        drawn.set_linestyle("-")
        lowest = max(drawn.get_ydata()[-1], lowest + 0.09 * (high - low))
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "clip_on": False}
        axes.text(1.02, lowest, drawn.get_label(), color=drawn.get_color(), **place)


def save_recipes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Held-out accuracy against completions: a panel a recipe, with a band over its seeds and the reference dashed.

    Args:
        rows: see `reporting.comparison.compare_recipes`; the first one is the reference.
        path: PNG or SVG.
    """
    columns = min(PANELS, len(rows))
    lines = -(-len(rows) // columns)
    with replacing(path) as temporary, rc_context({**_rc("sweep"), "font.size": 10}):
        figure = Figure((2.6 * columns + 0.6, 2.3 * lines + 0.4), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, row in zip(panels.flat, rows, strict=False):
            reference, curve = rows[0]["curve"], row["curve"]
            sampled = curve["completions"]
            axes.plot(reference["completions"], reference["accuracy"], color=PAPER.ink, alpha=0.5, linestyle=DASHES[1])
            axes.fill_between(sampled, curve["low"], curve["high"], color=PAPER.curves[0], alpha=0.16, lw=0)
            axes.plot(sampled, curve["accuracy"], color=PAPER.curves[0], linewidth=2)
            axes.set_title(row["recipe"], fontsize=10)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        for axes in panels.flat:  # when all is drawn: a limit ends the scaling of the axis that they share
            _frame(axes, "", PAPER, parts=5)
            _as_shares(axes)
        for axes in panels.flat[len(rows) :]:
            axes.set_visible(False)
        figure.supxlabel(f"completions sampled; dashed: recipe {rows[0]['recipe']}", fontsize=10)
        figure.supylabel("held-out accuracy; band: the seeds", fontsize=10)
        _save(figure, temporary, path.suffix)


def describe_curve(line: Line, percent: bool) -> str:
    """One curve in words, for readers who cannot see it."""
    steps, values = line.points.steps, line.points.values
    first, last = (f"{100 * value:.1f} %" if percent else f"{value:.4g}" for value in values[[0, -1]])
    return f"{line.label}: {first} at step {steps[0]}, {last} at step {steps[-1]}"


def _save(figure: Figure, path: Path, suffix: str) -> None:
    figure.savefig(path, format=suffix[1:], dpi=150, metadata=FIGURE_MARK[suffix])


def _rc(salt: str) -> dict[str, object]:
    # Text stays text; ids follow from the salt, so that they are the same every time and differ between figures; a
    # dollar sign in a label is a dollar sign.
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 12,
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
        "path.simplify_threshold": 0.5,  # of a curve with more points than can be told apart
    }


def _accuracy_length(curves: Curves, size: tuple[float, float]) -> Figure:
    heights = [1, BELOW][: len(curves.paper)]
    figure = Figure((size[0], size[1] * sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panels, (on_left, on_right) in zip(rows, curves.paper, PAPER_CURVES, strict=False):
        left, right = panels
        parts = 5 if axes is rows[0] else 3
        _draw_panel(axes, left, PAGE, on_left, parts)
        axes.yaxis.set_visible(bool(left.lines))
        if right.lines:
            twin = axes.twinx()
            _draw_panel(twin, right, PAGE, on_right, min(parts, 2) if right.percent else parts)
            twin.grid(False)
            _colour_axis(twin, PAGE.curves[on_right])
    _colour_axis(rows[0], PAGE.curves[0])
    _label_steps(rows[-1])
    return figure


def _colour_axis(axes: Axes, colour: str) -> None:
    axes.yaxis.label.set_color(colour)
    axes.tick_params(axis="y", labelcolor=colour)


def _draw_panel(axes: Axes, panel: Panel, theme: Theme, number: int, parts: int) -> None:
    """Draw a panel's curves in the theme's colours from `number` on, with about `parts` intervals between ticks."""
    below = 0.0
    for at, line in enumerate(panel.lines, start=number):
        colour, dashes = theme.curves[at % len(theme.curves)], DASHES[at % len(DASHES)]
        if panel.stacked:
            _draw_area(axes, line, below, colour, dashes)
            below = below + line.points.values
        else:
            _draw_line(axes, line, colour, dashes)
    _frame(axes, panel.label, theme, parts)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if panel.percent:
        _as_shares(axes)
    if panel.percent and not panel.rare:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(LinearLocator(parts + 1))
        for drawn in axes.lines:  # a curve along the edge is drawn in its full width
            drawn.set_clip_on(False)


def _frame(axes: Axes, label: str, theme: Theme, parts: int) -> None:
    """Grid, spines and ticks in the theme's colours, with about `parts` intervals between the ticks on the left."""
    axes.set_ylabel(label, color=theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.ink, length=0, pad=5)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.set_major_locator(MaxNLocator(parts))


def _as_shares(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axes.set_ylim(bottom=0)


def _label_steps(axes: Axes) -> None:
    low, high = axes.get_xlim()
    if high - low < 1:  # a single step
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.set_xlabel("step")


def _draw_line(axes: Axes, line: Line, colour: str, dashes: object) -> None:
    steps, values = line.points.steps, line.points.values
    if line.low is not None:
        axes.fill_between(steps, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
    style = {"color": colour, "linestyle": dashes, "label": line.label}
    if line.marked or len(steps) == 1:
        axes.plot(steps, values, marker="o", markersize=5, **style)
    elif len(steps) < SMOOTH_FROM:
        axes.plot(steps, values, linewidth=2, **style)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, moving_average(values, len(values) // 25 | 1), linewidth=2.2, **style)


def _draw_area(axes: Axes, line: Line, below: np.ndarray | float, colour: str, dashes: object) -> None:
    """The area of a curve's values, upon those `below` it; of a single step it is as wide as the step."""
    steps, top = line.points.steps, below + line.points.values
    steps, below, top = np.broadcast_arrays(steps, below, top)
    if len(steps) == 1:
        steps, below, top = steps[0] + np.array([-0.5, 0.5]), below.repeat(2), top.repeat(2)
    axes.fill_between(steps, below, top, color=colour, alpha=0.45, linewidth=0)
    axes.plot(steps, top, color=colour, linestyle=dashes, linewidth=1.2, label=line.label)


def _inline(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an <svg> element of the page, with a description."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):  # a style would reach the whole page
                parent.remove(child)
    for node in root.iter():
        if "_" in node.get("id", ""):  # matplotlib's names of parts, alike in all figures; nothing refers to them
            del node.attrib["id"]
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    title = ElementTree.Element(f"{{{SVG}}}title", id=f"{name}-title")
    title.text = description
    root.insert(0, title)
    svg = ElementTree.tostring(root, encoding="unicode")
    for mark, variable in VARIABLES.items():
        svg = svg.replace(mark, variable)
    return Markup(svg)
