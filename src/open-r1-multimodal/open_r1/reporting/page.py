"""Makes one self-contained `report.html` of a run's folder: curves, "aha moments", a browser of completions.

The page needs no network and runs no script but its own. Statistics use every completion; of the texts and images as
many are embedded as fit its size, and it says how many. Model output, prompts and paths are untrusted: Jinja escapes
what it writes, and the page's script puts text only where text belongs.
"""

import base64
import hashlib
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from open_r1.answers.checker import extract_answer
from open_r1.base.files import MADE_BY, check_replaceable, replace_file
from open_r1.reporting import figures
from open_r1.reporting.browser import QUOTE, browser_data, shown, visible
from open_r1.reporting.curves import Curves, collect, is_sft
from open_r1.reporting.diagnosis import diagnose
from open_r1.reporting.runs import SETTINGS, KnownImages, LoggedRun, Trajectories, read_run, scan_trajectories
from open_r1.reporting.statistics import (
    PASS_RATES,
    answers_by_type,
    first_and_last_tenth,
    pass_rates,
    reflection_statistics,
)

MAX_EXAMPLES = 6
KEY_CHARTS = ("rewards", "held-out", "length", "loss", "token-accuracy")  # their first panels head the page


def write_report(run: Path, output: Path | None = None) -> Path:
    """Make the report of a run, finished or not.

    Args:
        run: the folder that training wrote (its `output_dir`).
        output: the page to write (default: `report.html` in the run's folder). The figure `accuracy_length.png` and
            `.svg` goes beside it, when there is something to draw.

    Returns:
        The path of the page.

    Raises:
        OSError, Mistake: not a run, a damaged file, a file in the output's place that is none of ours, a full disk.
    """
    output = output or run / "report.html"
    pictures = [output.with_name(f"accuracy_length{ending}") for ending in (".png", ".svg")]
    check_replaceable(output, *pictures)
    log = read_run(run)
    with (
        scan_trajectories(run / "trajectories/train.jsonl") as train,
        scan_trajectories(run / "trajectories/eval.jsonl") as held_out,
    ):
        curves = collect(log, train, held_out)
        page = render_page(log, train, held_out, curves)
    # Lone surrogates, of a file name that is not UTF-8, cannot be written.
    replace_file(output, page.encode("utf-8", errors="replace"))
    if curves.paper:
        for picture in pictures:
            figures.save_accuracy_length(curves, picture)
    return output


def render_page(run: LoggedRun, train: Trajectories, held_out: Trajectories, curves: Curves) -> str:
    """The page's HTML."""
    here = Path(__file__).parent
    script = (here / "page.js").read_text(encoding="utf-8")
    picked = pick_examples(train)
    quoted = [quotation(train, index, train.correct()[index]) for index in picked]
    data = browser_data({"train": train, "eval": held_out}, {"train": picked, "eval": ()}, KnownImages(run))
    first = find_group(data, quoted[0]["step"], quoted[0]["group"]) if quoted else None
    return (
        jinja_environment()
        .get_template("page.html.jinja")
        .render(
            made_by=MADE_BY,
            style=Markup((here / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            name=run.path.resolve().name,
            info=run.info,
            settings=SETTINGS,
            summary=summary(run, train, held_out),
            figures=key_figures(curves),
            accuracy_length=[
                figures.accuracy_length_svg(curves, f"accuracy-length-{name}", size)
                for name, size in (("wide", figures.WIDE), ("narrow", figures.NARROW))
                if curves.paper
            ],
            accuracy_length_title=figures.accuracy_length_title(curves),
            accuracy_length_legend=figures.accuracy_length_legend(curves),
            charts=[(chart, figures.legend(chart), figures.chart_svg(chart)) for chart in curves.charts],
            pass_rate_kinds=PASS_RATES,
            pass_rates=pass_rates(train) if train.rewards else {},
            answers=[
                (shown(answer.asked), shown(answer.answer), accuracy, answer, first)
                for accuracy, answer, first in answers_by_type(held_out)
            ],
            missing=curves.missing,
            warnings=[(step, visible(guard), visible(sentence)) for step, guard, sentence in run.warnings],
            reflections=[
                (title, reflection_statistics(trajectories))
                for title, trajectories in (("training", train), ("held-out", held_out))
                if len(trajectories)
            ],
            examples=quoted,
            first_pictures=picture_uris(data, first) if first else [],
            pair=before_and_after(data, first),
            signs=[] if is_sft(run) or not (train or run.events) else diagnose(run, train, held_out),
            browser=data,
        )
    )


def jinja_environment() -> Environment:
    """Jinja for the pages: it escapes what it writes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


# --- the head of the page -----------------------------------------------------------------------------------


def summary(run: LoggedRun, train: Trajectories, held_out: Trajectories) -> dict[str, Any]:
    """What the run is and how far it came."""
    logged = max((event["step"] for event in run.events), default=0)
    done = logged or int(train.rows["step"].max(initial=0))
    of_steps = max(run.info.max_steps or 0, 0)
    if 0 < of_steps <= done:
        state = "finished"
    elif done:
        state = f"stopped at step {done} or still running"
    else:
        state = "no step finished yet"
    last_time = max((event.get("time") or 0 for event in run.events), default=0)
    return {
        "kind": "SFT" if is_sft(run) else "GRPO",
        "steps": done,
        "max_steps": of_steps,
        "state": state,
        "last_time": utc(datetime.fromtimestamp(last_time, UTC)) if last_time else None,
        "completions": len(train),
        "held_out_completions": len(held_out),
        "made": utc(datetime.now(UTC)),
    }


def utc(time: datetime) -> str:
    """A time as people write it, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def key_figures(curves: Curves) -> list[tuple[str, str, str]]:
    """Label, first and last value of each curve that heads the page (`KEY_CHARTS`)."""
    rows = []
    for chart in curves.charts:
        panel = chart.panels[0]
        for line in panel.lines if chart.name in KEY_CHARTS else ():
            values = line.points.values
            first, last = (values[0], values[-1]) if line.marked else first_and_last_tenth(values)
            rows.append((line.label, *(f"{100 * v:.1f} %" if panel.percent else f"{v:.3g}" for v in (first, last))))
    return rows


# --- aha moments --------------------------------------------------------------------------------------------


def pick_examples(trajectories: Trajectories) -> list[int]:
    """Rows worth reading: the first with a reflection, then self-corrections that ended right, over the whole run."""
    reflective = np.flatnonzero(trajectories.rows["reflective"])
    right = reflective[trajectories.rows["self_corrected"][reflective] & (trajectories.correct()[reflective] == 1)]
    chosen = set(reflective[:1].tolist())
    for pool in (right, reflective):
        rest = [index for index in pool.tolist() if index not in chosen]
        places = np.linspace(0, len(rest) - 1, min(MAX_EXAMPLES - len(chosen), len(rest)), dtype=int)
        chosen.update(rest[place] for place in places)
    return sorted(chosen)


def quotation(trajectories: Trajectories, index: int, correct: float) -> dict[str, Any]:
    """What a completion says around its first reflection, and where the page's browser has the whole of it."""
    record = trajectories.read(index)
    step, text, (start, end) = record.step, record.completion, min(record.reflections)
    groups = enumerate(trajectories.steps[step], start=1)
    group, rows = next((number, rows) for number, rows in groups if index in rows)
    return {
        "step": step,
        "group": group,
        "link": f"#train/{step}/{group}/{rows.index(index) + 1}",
        "before": visible(("…" if start > QUOTE else "") + text[max(0, start - QUOTE) : start]),
        "reflection": visible(text[start : min(end, start + QUOTE)]),
        "after": visible(text[end : end + QUOTE] + ("…" if end + QUOTE < len(text) else "")),
        "considered": shown(record.considered),
        "answer": shown(extract_answer(text)),
        "corrected": record.self_corrected,
        "correct": None if math.isnan(correct) else bool(correct),
    }


def find_group(data: Mapping[str, Any], step: int, number: int) -> dict[str, Any] | None:
    """A prompt's completions in one step of training, among what the page's browser holds."""
    for of_step in data["sources"]["train"]["steps"]:
        for group in of_step["groups"]:
            if (of_step["step"], group["number"]) == (step, number):
                return group
    return None


def picture_uris(data: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """The images of a group's prompt that the page holds, as data URIs."""
    images = [data["images"][number] for number in data["prompts"][group["prompt"]]["images"]]
    return [image["source"] for image in images if "source" in image]


def before_and_after(data: Mapping[str, Any], first: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """One prompt at the first and the last step that ask it, of those in the page's browser; None if none recurs.

    Args:
        data: what the browser holds.
        first: the group of the first reflection. Its prompt is taken if it recurs; else one that reflects in the end,
            better rightly, else any; of equals the one whose steps lie furthest apart.
    """
    asked: dict[int, list[tuple[str, int, dict[str, Any]]]] = {}
    for name, source in data["sources"].items():
        for of_step in source["steps"]:
            for group in of_step["groups"]:
                asked.setdefault(group["prompt"], []).append((name, of_step["step"], group))
    pairs = [(places[0], places[-1]) for places in asked.values() if places[0][1] < places[-1][1]]
    if not pairs:
        return None

    def rank(pair: tuple) -> tuple[bool, bool, bool, int]:
        (_, start, before), (_, end, after) = pair
        is_first = first is not None and before["prompt"] == first["prompt"]
        reflective = [completion for completion in after["completions"] if completion["reflective"]]
        is_right = any(completion["correct"] for completion in reflective)
        return is_first, is_right, bool(reflective), end - start

    before, after = max(pairs, key=rank)
    return {
        "question": data["prompts"][before[2]["prompt"]]["question"],
        "pictures": picture_uris(data, before[2]),
        "solution": before[2]["solution"],
        "sides": [side(*before, prefers_reflective=False), side(*after, prefers_reflective=True)],
    }


def side(name: str, step: int, group: Mapping[str, Any], prefers_reflective: bool) -> dict[str, Any]:
    """The first completion of a group, or the first that reflects, and how many of the group are right."""
    completions = group["completions"]
    place = 0
    if prefers_reflective:
        reflective = [at for at, completion in enumerate(completions) if completion["reflective"]]
        place = reflective[0] if reflective else 0
    correct = [completion["correct"] for completion in completions]
    judged = [is_right for is_right in correct if is_right is not None]
    return {
        "step": step,
        "link": f"#{name}/{step}/{group['number']}/{place + 1}",
        "tally": f"{sum(judged)} of {len(judged)} correct" if judged else f"{len(completions)} completions",
        "reflective": prefers_reflective and completions[place]["reflective"],
        "text": completions[place]["text"],
    }
