"""Makes a run's completions the data of the page's browser: as many texts and images as fit, escaped."""

import base64
import io
import math
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from open_r1.base.fields import is_usable
from open_r1.base.images import DECODE_ERRORS, opened, to_rgb
from open_r1.report.runs import Trajectories

TEXT_LIMIT = 4000  # characters of one text in the page; longer ones keep this much of their beginning and end
TEXT_HEAD = 3000
IMAGE_SIDE = 256  # pixels of the longer side
MAX_GROUPS = 32  # prompts of one step
MAX_IMAGES = 8  # of one prompt
QUOTE = 160  # characters of a short text, and of an example on either side of its first reflection
# Bytes that the page spends on the completions of each source, and on images before base64 adds a third.
TEXT_BUDGETS = {"train": 6_000_000, "eval": 3_000_000}
IMAGE_BUDGET = 6_000_000
ROW_BYTES = 200  # of a completion beside its text

_TAG = re.compile(r"</?(?:think|answer)>")
# Control characters by their pictures, U+2400 on: a random model writes them, and nobody would see them. Half a
# character by the sign for it: it is no text.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}

Steps = dict[int, list[list[int]]]  # step -> the rows of each group, in the file's order


def steps_of(trajectories: Trajectories) -> Steps:
    """The rows of every step, group by group."""
    groups: dict[int, list[int]] = {}
    for index, group in enumerate(trajectories.rows["group"].tolist()):
        groups.setdefault(group, []).append(index)
    steps: Steps = {}
    for rows in groups.values():
        steps.setdefault(int(trajectories.rows["step"][rows[0]]), []).append(rows)
    return dict(sorted(steps.items()))


def choose_steps(prompts: Mapping[int, Collection[int]], count: int, required: Collection[int] = ()) -> list[int]:
    """About `count` steps to show: the first, the last, the required ones, and others evenly between.

    Of each stretch of steps the one is taken in which most prompts of the steps before it recur, so that one can see
    what became of them; of equals the one in the middle.

    Args:
        prompts: step, in order -> the prompts that it asks.
    """
    steps = list(prompts)
    if len(steps) <= count:
        return steps
    wanted = {steps[0], steps[-1], *required}
    chosen, seen = {steps[0]}, set(prompts[steps[0]])
    edges = np.linspace(1, len(steps) - 1, max(count - 1, 1)).round().astype(int)  # of count - 2 stretches
    for low, high in pairwise(edges):
        stretch = steps[low:high]
        middle = (len(stretch) - 1) / 2
        taken = [step for step in stretch if step in wanted] or [
            max(
                enumerate(stretch),
                key=lambda place: (len(seen.intersection(prompts[place[1]])), -abs(place[0] - middle)),
            )[1]
        ]
        chosen.update(taken)
        for step in taken:
            seen.update(prompts[step])
    return sorted(chosen | wanted)


def choose_groups(
    trajectories: Trajectories, groups: Sequence[list[int]], often: np.ndarray, required: set[int]
) -> list[tuple[int, list[int]]]:
    """At most `MAX_GROUPS` of a step's groups, with their numbers in it: required rows, then prompts that recur.

    Args:
        often: prompt -> in how many groups of the file it is asked.
    """

    def rank(place: int) -> tuple:
        rows = groups[place]
        prompt = trajectories.rows["prompt"][rows[0]]
        return required.isdisjoint(rows), -often[prompt], prompt

    places = sorted(sorted(range(len(groups)), key=rank)[:MAX_GROUPS])
    return [(place + 1, groups[place]) for place in places]


class Shared:
    """What the page holds once, however often it is asked: prompts and images."""

    def __init__(self, known_images: Container[str]) -> None:
        self.known_images = known_images
        self.prompts: list[dict[str, Any]] = []
        self.images: list[dict[str, str]] = []
        self._prompt_numbers: dict[tuple[int, int], int] = {}
        self._image_numbers: dict[str, int] = {}
        self._budget = IMAGE_BUDGET

    def prompt(self, trajectories: Trajectories, index: int, record: Mapping[str, Any]) -> int:
        """The number of a completion's prompt."""
        key = id(trajectories), int(trajectories.rows["prompt"][index])
        if key not in self._prompt_numbers:
            self._prompt_numbers[key] = len(self.prompts)
            head, question, tail = trajectories.question(record["prompt"])
            self.prompts.append(
                {
                    "head": segments(head),
                    "question": segments(question.strip()),
                    "tail": segments(tail),
                    "opens_think": record["prompt"].endswith("<think>"),
                    "images": [self.image(path) for path in record["images"][:MAX_IMAGES]],
                }
            )
        return self._prompt_numbers[key]

    def image(self, path: str) -> int:
        """The number of an image."""
        if path not in self._image_numbers:
            self._image_numbers[path] = len(self.images)
            record = {"name": visible(Path(path).name)[:QUOTE]}
            try:
                if path not in self.known_images:
                    raise PermissionError(path)
                data, kind = thumbnail(Path(path))
            except PermissionError:
                record["missing"] = "not named by the run's data"
            except DECODE_ERRORS as error:
                record["missing"] = "no such file" if isinstance(error, FileNotFoundError) else "cannot be decoded"
            else:
                self._budget -= len(data)
                if self._budget >= 0:
                    record["source"] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
                else:
                    record["missing"] = "left out to keep this page small"
            self.images.append(record)
        return self._image_numbers[path]


def browser_data(
    sources: Mapping[str, Trajectories], required: Mapping[str, Collection[int]], known_images: Container[str]
) -> dict[str, Any]:
    """What the page's script browses.

    Args:
        sources: name -> its completions.
        required: name -> rows that must be among those embedded.
        known_images: the paths of those that may be shown.
    """
    shared = Shared(known_images)
    embedded = {
        name: embed(source, set(required[name]), TEXT_BUDGETS[name], shared) for name, source in sources.items()
    }
    return {"sources": embedded, "prompts": shared.prompts, "images": shared.images}


def embed(trajectories: Trajectories, required: set[int], budget: int, shared: Shared) -> dict[str, Any]:
    """As many steps of one source as fit the budget (in bytes), in whole groups."""
    steps, correct = steps_of(trajectories), trajectories.correct()
    asked = {step: [int(trajectories.rows["prompt"][rows[0]]) for rows in groups] for step, groups in steps.items()}
    often = np.bincount([prompt for prompts in asked.values() for prompt in prompts], minlength=1)
    groups = {step: choose_groups(trajectories, steps[step], often, required) for step in steps}
    size = np.minimum(trajectories.rows["size"], TEXT_LIMIT) + ROW_BYTES
    total = sum(int(size[rows].sum()) for chosen in groups.values() for _, rows in chosen)
    required_steps = {int(trajectories.rows["step"][index]) for index in required}
    chosen = choose_steps(asked, max(2, int(len(steps) * budget / max(total, 1))), required_steps)
    first = [step for step in chosen if step in {chosen[0], chosen[-1], *required_steps}]
    records: dict[int, dict[str, Any]] = {}
    for step in [*first, *(step for step in chosen if step not in first)]:
        of_step = [group_record(trajectories, correct, number, rows, shared) for number, rows in groups[step]]
        budget -= len(htmlsafe_json_dumps(of_step))
        if budget < 0 and records:  # escapes may take more than was reckoned
            break
        records[step] = {"step": step, "asked": len(steps[step]), "groups": of_step}
    return {
        "steps": [records[step] for step in sorted(records)],
        "total": len(steps),
        "rewards": [visible(name) for name in trajectories.rewards],
    }


def group_record(
    trajectories: Trajectories, correct: np.ndarray, number: int, rows: Sequence[int], shared: Shared
) -> dict[str, Any]:
    """One prompt of one step, the `number`-th, and its completions."""
    records = [trajectories.read(index) for index in rows]
    return {
        "number": number,
        "prompt": shared.prompt(trajectories, rows[0], records[0]),
        "solution": shown(records[0].get("solution")),
        "completions": [
            {
                "text": segments(record["completion"], record.get("reflections", ())),
                "rewards": [rounded(record["rewards"].get(name)) for name in trajectories.rewards],
                "advantage": rounded(record["advantage"]),
                "length": record["length"],
                "truncated": not record["ended"],
                "correct": None if math.isnan(correct[index]) else bool(correct[index]),
                "reflective": bool(record.get("reflections")),
                "considered": shown(record.get("considered")) if record.get("self_corrected") else None,
            }
            for index, record in zip(rows, records, strict=True)
        ],
    }


# --- untrusted texts and images -----------------------------------------------------------------------------


def visible(text: str) -> str:
    """The text with a sign for what has none."""
    return text.translate(_VISIBLE)


def shown(text: str | None) -> str | None:
    """A short text, cut to what fits a line or two."""
    return text if text is None else visible(text if len(text) <= QUOTE else text[:QUOTE] + "…")


def rounded(value: float | None) -> float | None:
    """A number as JSON can hold it."""
    return round(value, 3) if is_usable(value) else None


def segments(text: str, reflections: Iterable[Sequence[int]] = ()) -> list[tuple[str, str]]:
    """The text as pieces (kind, text): `text`, `tag`, `reflection`; `cut` names what is left out of a long one."""
    windows = [(0, len(text))]
    if len(text) > TEXT_LIMIT:
        windows = [(0, TEXT_HEAD), (len(text) - (TEXT_LIMIT - TEXT_HEAD), len(text))]
    pieces: list[tuple[str, str]] = []
    position = 0
    for start, end in windows:
        if start > position:
            pieces.append(("cut", f"{start - position:,} characters left out"))
        position = start
        marks = [(match.start(), match.end(), "tag") for match in _TAG.finditer(text, start, end)]
        marks += [(first, last, "reflection") for first, last in reflections]
        for first, last, kind in sorted(marks):
            first, last = max(first, position), min(last, end)
            if first < last:
                pieces += [("text", text[position:first]), (kind, text[first:last])]
                position = last
        pieces.append(("text", text[position:end]))
        position = end
    return [(kind, visible(piece)) for kind, piece in pieces if piece]


def thumbnail(path: Path) -> tuple[bytes, str]:
    """A small copy of an image and its format, `png` or `jpeg`.

    Raises:
        one of `DECODE_ERRORS`: not a file, no image, damaged or too large.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)
    with opened(path) as image:
        image.draft("RGB", (2 * IMAGE_SIDE, 2 * IMAGE_SIDE))  # a large JPEG is decoded at a fraction of its size
        small = to_rgb(image)
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    if small.getcolors(256):  # flat colours: smaller and sharper as PNG
        small.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue(), "png"
    small.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue(), "jpeg"
