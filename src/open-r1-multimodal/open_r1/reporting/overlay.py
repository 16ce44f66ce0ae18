"""Draws the curves of several runs in common charts, on one page without their completions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from open_r1.base.errors import Mistake
from open_r1.base.files import MADE_BY, check_replaceable, replace_file
from open_r1.reporting import figures
from open_r1.reporting.browser import visible
from open_r1.reporting.curves import Chart, Curves, Line, Panel, collect
from open_r1.reporting.page import jinja_environment, write_report
from open_r1.reporting.runs import LoggedRun, read_run, scan_trajectories

MAX_RUNS = len(figures.DASHES)  # that can be told apart


def write_pages(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Make the report of one run, or of several the page with their curves (default: runs.html here)."""
    if len(folders) == 1:
        return write_report(*folders, output)
    return write_overlay(folders, output or Path("runs.html"))


def write_overlay(folders: Sequence[Path], output: Path) -> Path:
    """Make the page of several runs, finished or not.

    Args:
        folders: those that training wrote.
        output: the page to write.

    Returns:
        The path of the page.

    Raises:
        OSError, Mistake: too many runs, not a run, a damaged file, a file in the output's place that is none of ours.
    """
    if len(folders) > MAX_RUNS:
        raise Mistake(f"{len(folders)} runs: at most {MAX_RUNS} curves can be told apart; name fewer")
    check_replaceable(output)
    runs, curves = {}, {}
    for folder, name in zip(folders, names_of(folders), strict=True):
        runs[name], curves[name] = read_curves(folder)
    environment = jinja_environment()
    page = environment.get_template("overlay.html.jinja").render(
        made_by=MADE_BY,
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        runs=[(name, run.info, max((event["step"] for event in run.events), default=0)) for name, run in runs.items()],
        charts=[(chart, figures.legend(chart), figures.chart_svg(chart)) for chart in overlay(curves)],
    )
    replace_file(output, page.encode("utf-8", errors="replace"))
    return output


def names_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or where two are alike the paths as they were given."""
    names = [folder.resolve().name for folder in folders]
    return [
        visible(name if len(set(names)) == len(names) else str(folder))
        for name, folder in zip(names, folders, strict=True)
    ]


def read_curves(folder: Path) -> tuple[LoggedRun, Curves]:
    """A run and its curves."""
    run = read_run(folder)
    with (
        scan_trajectories(folder / "trajectories/train.jsonl") as train,
        scan_trajectories(folder / "trajectories/eval.jsonl") as held_out,
    ):
        return run, collect(run, train, held_out)


def overlay(curves: Mapping[str, Curves]) -> list[Chart]:
    """A chart for each curve that a run has, with that of every run in it.

    Args:
        curves: name of a run -> its curves; what is drawn as stacked areas is left out.
    """
    panels: dict[tuple[str, str], tuple[Panel, list[Line]]] = {}
    for name, of_run in curves.items():
        for chart in of_run.charts:
            for panel in chart.panels:
                for line in () if panel.stacked else panel.lines:
                    _, lines = panels.setdefault((chart.name, line.label), (panel, []))
                    lines.append(replace(line, label=name))
    return [
        Chart(f"{chart}-{number}", label[:1].upper() + label[1:], [replace(panel, lines=lines)])
        for number, ((chart, label), (panel, lines)) in enumerate(panels.items())
    ]
