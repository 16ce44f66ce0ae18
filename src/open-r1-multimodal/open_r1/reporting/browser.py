"""Makes a run's completions the data of the page's browser: as many texts and images as fit, escaped."""

import base64
import io
import math
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.utils import htmlsafe_json_dumps

from open_r1.base.fields import is_usable
from open_r1.base.images import DECODE_ERRORS, image_edit, image_file, open_image, opened, to_rgb
from open_r1.base.trajectories import CompletionRecord
from open_r1.reporting.runs import Trajectories

TEXT_LIMIT = 4000  # characters of one text in the page; longer ones keep this much of their beginning and end
TEXT_HEAD = 3000
IMAGE_SIDE = 256  # pixels of the longer side
MAX_GROUPS = 32  # prompts of one step
MAX_IMAGES = 8  # of one prompt
QUOTE = 160  # characters of a short text, and of an example on either side of its first reflection
# Bytes that the page spends on the completions of each source, and on images before base64 adds a third.
TEXT_BUDGETS = {"train": 6_000_000, "eval": 3_000_000}
IMAGE_BUDGET = 6_000_000

_TAG = re.compile(r"</?(?:think|answer)>")
# Control characters by their pictures, U+2400 on: a random model writes them, and nobody would see them. Half a
# character by the sign for it: it is no text.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    127: 0x2421,
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
}


def spread_evenly(steps: Sequence[int]) -> list[int]:
    """The steps in van der Corput's order: however many of the first are taken, they lie evenly over the run."""
    digits = len(steps).bit_length()
    places = sorted(range(len(steps)), key=lambda place: f"{place:0{digits}b}"[::-1])
    return [steps[place] for place in places]


def choose_groups(
    trajectories: Trajectories, groups: Sequence[list[int]], required: set[int]
) -> list[tuple[int, list[int]]]:
    """At most `MAX_GROUPS` of a step's groups, with their numbers in it.

    Those with required rows come first, then those whose prompts come first in the file, so that every evaluation shows
    the same prompts.
    """

    def rank(place: int) -> tuple[bool, int]:
        return required.isdisjoint(groups[place]), trajectories.rows["prompt"][groups[place][0]]

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

    def prompt(self, trajectories: Trajectories, index: int, record: CompletionRecord) -> int:
        """The number of a completion's prompt."""
        key = id(trajectories), int(trajectories.rows["prompt"][index])
        if key not in self._prompt_numbers:
            self._prompt_numbers[key] = len(self.prompts)
            head, question, tail = trajectories.question(record.prompt)
            self.prompts.append(
                {
                    "head": segments(head),
                    "question": segments(question.strip()),
                    "tail": segments(tail),
                    "opens_think": record.prompt.endswith("<think>"),
                    "images": [self.image(path) for path in record.images[:MAX_IMAGES]],
                }
            )
        return self._prompt_numbers[key]

    def image(self, path: str) -> int:
        """The number of an image."""
        if path not in self._image_numbers:
            self._image_numbers[path] = len(self.images)
            self.images.append({"name": visible(Path(path).name)[:QUOTE], **self._content(path)})
        return self._image_numbers[path]

    def _content(self, path: str) -> dict[str, str]:
        try:
            if path not in self.known_images:
                return {"missing": "not named by the run's data"}
            data, kind = thumbnail(path)
        except FileNotFoundError:
            return {"missing": "no such file"}
        except DECODE_ERRORS:
            return {"missing": "cannot be decoded"}
        self._budget -= len(data)
        if self._budget < 0:
            return {"missing": "left out to keep this page small"}
        return {"source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}


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
    """As many steps of one source as fit the budget (in bytes), in whole groups.

    First the first and the last step and those of required rows, then others evenly between.
    """
    steps, correct = trajectories.steps, trajectories.correct()
    every_step = list(steps)
    of_required = trajectories.rows["step"][sorted(required)].tolist()
    order = [*every_step[:1], *every_step[-1:], *of_required, *spread_evenly(every_step)]
    records: dict[int, dict[str, Any]] = {}
    for step in dict.fromkeys(order):
        of_step = [
            group_record(trajectories, correct, number, rows, shared)
            for number, rows in choose_groups(trajectories, steps[step], required)
        ]
        budget -= len(htmlsafe_json_dumps(of_step))
        if budget < 0 and records:
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
        "solution": shown(records[0].solution),
        "completions": [
            {
                "text": segments(record.completion, record.reflections or ()),
                "rewards": [rounded(record.rewards.get(name)) for name in trajectories.rewards],
                "advantage": rounded(record.advantage),
                "length": record.length,
                "truncated": not record.ended,
                "judgement": shown(record.judgement),
                "correct": None if math.isnan(correct[index]) else bool(correct[index]),
                "reflective": bool(record.reflections),
                "considered": shown(record.considered) if record.self_corrected else None,
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


def thumbnail(path: str) -> tuple[bytes, str]:
    """A small copy of an image, edited as its path says, and its format, `png` or `jpeg`.

    Raises:
        one of `DECODE_ERRORS`: not a file, no image, damaged or too large.
    """
    if not Path(image_file(path)).is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)
    if image_edit(path):  # is about the pixels of its full size
        small = open_image(path)
    else:
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
