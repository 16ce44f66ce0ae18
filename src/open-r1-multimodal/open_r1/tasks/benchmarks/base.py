"""What a benchmark is, and how its files become questions: columns, reading, limits."""

import hashlib
import json
import os
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

from pydantic import Field

from open_r1.answers.statistics import CHANCE_ADJUSTED, EVERY_ROTATION, TOTAL, AskedRow, Means, right_answer
from open_r1.base.errors import MissingFile, Mistake
from open_r1.base.fields import Expected, Name, Record, Text, check
from open_r1.base.hub import fetch
from open_r1.base.videos import FORMATS, MAX_FRAMES, Video, video_digest
from open_r1.tasks.examples import read_records

LIMIT_SEED = 0


class MissingImages(MissingFile):
    """The questions are there, but none of the images or videos that they name."""


@dataclass(frozen=True)
class Item:
    """One prompt to ask: a question, with its options in one of their rotations.

    Attributes:
        id: of the question; rotations of its options share it.
        question: the question alone.
        options: in the order shown; none for a question that asks for a number.
        answer: the right option's text or, when `prompt` shows letters, its letter as in "(C)"; or the right number.
        prompt: the user's text in full, before the chat template.
        images: as the converters see them a cell of the file (bytes, {bytes, path} or a path); as `read` returns them
            encoded bytes or a video, None for one that is not there.
        type, source: further groups to score, if the set has them.
    """

    id: int | str
    task: str
    question: str
    options: tuple[str, ...]
    answer: str
    prompt: str
    images: tuple[Any, ...]
    type: str | None = None
    source: str | None = None
    rotation: int = 0

    @property
    def key(self) -> tuple[int | str, int]:
        return self.id, self.rotation

    def to_row(self) -> dict[str, Any]:
        """The part of a result's row that does not depend on the response."""
        return {
            "id": self.id,
            "rotation": self.rotation,
            "question": self.question,
            "options": list(self.options),
            "task": self.task,
            "type": self.type,
            "source": self.source,
            "ground_truth": self.answer,
        }


@dataclass(frozen=True)
class Benchmark:
    """A question set.

    Attributes:
        name: in the result's file name.
        hub_id: of the data set.
        files: patterns of its files in a folder or on the Hub; each must match.
        columns: those that `convert` reads, and what they hold.
        convert: a row and its number -> what to ask; nothing for a row that cannot be scored, which is reported;
            ValueError for one that no intact file holds.
        combinations: the authors' scores that are means over groups, by name; the last is the one they publish.
        circular: whether a question counts for its authors only if it is right in every rotation of its options.
        adjusted: whether its authors adjust accuracy for chance.
        images: where they are to be had, if the files only name them.
        lmms: what lmms-eval (0.7.2) calls it, and the metric that it logs for each question.
    """

    name: str
    hub_id: str
    files: tuple[str, ...]
    columns: type[Record]
    convert: Callable[[Mapping[str, Any], int], list[Item]]
    combinations: Mapping[str, Means] = field(default_factory=dict)
    circular: bool = False
    adjusted: bool = False
    images: str | None = None
    lmms: tuple[str, str] | None = None

    @property
    def headline(self) -> str:
        """The name of the score that its authors publish."""
        if self.combinations:
            return list(self.combinations)[-1]
        return TOTAL + (EVERY_ROTATION if self.circular else CHANCE_ADJUSTED if self.adjusted else "")


# --- columns ---------------------------------------------------------------------------------------


Encoded = bytes | Text | None


class EncodedImage(Record):
    """An image as `datasets` writes it."""

    bytes: Encoded = None
    path: Encoded = None


Cell = Encoded | EncodedImage
ImageCell = Annotated[Cell, Expected("an image: bytes, a path, or {bytes, path}")]
Id = Annotated[int | Name, Expected("a whole number or a name")]
Texts = Annotated[list[str], Expected("a list of texts")]
ImageCells = Annotated[list[Cell], Expected("a list of images")]
Letter = Annotated[str, Field(pattern="^[A-Z]$"), Expected("a letter from A to Z")]
_MARK = re.compile(r"(?<![\w.])\(?(?P<letter>[A-H])(?P<dot>[.:)])\s")


def lettered(text: str) -> tuple[str, ...]:
    """The options behind letters in a text: `Which? A. left, B. right` -> left, right; nothing of a text without any.

    Where letters begin again at A, the last ones count. The last option ends with its line.
    """
    marks: list[re.Match[str]] = []
    for mark in _MARK.finditer(text):
        if mark["letter"] == "A":
            marks = [mark]
        elif marks and mark["dot"] == marks[0]["dot"] and ord(mark["letter"]) == ord("A") + len(marks):
            marks.append(mark)
    if not marks:
        return ()
    ends = [mark.start() for mark in marks[1:]] + [(text + "\n").index("\n", marks[-1].end())]
    return tuple(text[mark.end() : end].strip(" ,;\n") for mark, end in zip(marks, ends, strict=True))


def behind_letters(options: Sequence[str], mark: str) -> list[str]:
    """A line an option: `["left", "right"]` and "." -> `["A. left", "B. right"]`."""
    return [f"{letter}{mark} {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]


# --- reading --------------------------------------------------------------------------------------


def read(
    benchmark: Benchmark, dataset_path: str | None = None, limit: int | None = None, max_frames: int = MAX_FRAMES
) -> list[Item]:
    """Everything to ask, in the files' order; images are read but not decoded.

    Args:
        dataset_path: a file, a folder, or a data set on the Hub (None: the benchmark's own).
        limit: at most this many questions; see `stratified`.
        max_frames: of a video.

    Raises:
        Mistake: nothing to read there, or a row that contradicts itself.
    """
    questions: dict[int | str, list[tuple[Item, Path]]] = defaultdict(list)  # its rotations, and where images start
    first: dict[tuple[int | str, int], str] = {}  # key -> where it is
    rows = left_out = 0
    for file in locate(benchmark, dataset_path or benchmark.hub_id):
        for number, row in enumerate(read_records(file)):
            where = f"{file}: row {number}"
            columns = benchmark.columns.model_fields
            if missing := [name for name in columns if isinstance(row, dict) and name not in row]:
                raise Mistake(f"{file}: no column {', '.join(missing)}; is this {benchmark.name}?")
            check(benchmark.columns, row, where)
            try:
                asked = benchmark.convert(row, rows)
            except Mistake as error:
                raise Mistake(f"{where}: {error}") from error
            for item in asked:
                try:
                    check(AskedRow, item.to_row(), "")  # else the answers to all could not be read back
                    right_answer(item.to_row())
                except Mistake as error:
                    raise Mistake(f"{where}: {error} (idx {item.id!r})") from error
                if (same := first.setdefault(item.key, where)) != where:
                    raise Mistake(f"{where}: has the idx {item.id!r} of {same}; two questions need two")
                questions[item.id].append((item, file.parent))
            rows, left_out = rows + 1, left_out + (not asked)
    if left_out:
        line = f"{benchmark.name}: left out {left_out} of {rows} rows without a right option"
        print(line, file=sys.stderr)
    if not questions:
        raise Mistake(f"{dataset_path or benchmark.hub_id}: no question in it")
    chosen = list(questions.values())
    if limit is not None:
        chosen = [chosen[i] for i in stratified([rotations[0][0].task for rotations in chosen], limit)]
    asked = []
    for item, folder in (pair for rotations in chosen for pair in rotations):
        asked.append(replace(item, images=tuple(image_data(cell, folder, max_frames) for cell in item.images)))
    if benchmark.images and not any(data for item in asked for data in item.images):
        raise MissingImages(f"{folder}: none of the images is there; {benchmark.images}")
    return asked


def locate(benchmark: Benchmark, dataset_path: str) -> list[Path]:
    """The files to read: the one named, or those of a folder or of a data set on the Hub.

    Raises:
        Mistake: there is no such file, folder or data set, or none of the expected files in it.
    """
    path = Path(os.path.expanduser(dataset_path))
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = fetch(dataset_path, benchmark.files, repo_type="dataset")
    files = []
    for pattern in benchmark.files:
        found = sorted(path.glob(pattern))
        matches = [file for name in found for file in (sorted(name.iterdir()) if name.is_dir() else [name])]
        if not matches:
            raise MissingFile(f"{path}: no {pattern} in it; give a single file to evaluate that alone")
        files += matches
    return files


def image_data(cell: Any, folder: Path, max_frames: int) -> bytes | Video | None:
    """A cell (bytes, {bytes, path}, a path or nothing) -> the encoded image, or the video; None if it is missing."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, str):
        return cell or None
    for path in (folder / cell, folder / "images" / cell, folder.parent / cell):
        if path.is_file():
            return Video(str(path), max_frames) if path.suffix.lower() in FORMATS else path.read_bytes()
    return None


def stratified(tasks: Sequence[str], limit: int) -> list[int]:
    """The indices of `limit` questions, drawn with a fixed seed; each task keeps its share.

    Seats that do not divide go to the largest remainders.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        members[task].append(index)
    limit = min(limit, len(tasks))
    seats = {task: limit * len(indices) // len(tasks) for task, indices in members.items()}
    remainders = sorted(members, key=lambda task: (-(limit * len(members[task]) % len(tasks)), task))
    for task in remainders[: limit - sum(seats.values())]:
        seats[task] += 1
    rng = random.Random(LIMIT_SEED)
    return sorted(index for task, indices in members.items() for index in rng.sample(indices, seats[task]))


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of all that is asked, images included, wherever the files lie."""
    total = hashlib.sha256()
    for item in items:
        images = [
            video_digest(data) if isinstance(data, Video) else hashlib.sha256(data or b"").hexdigest()
            for data in item.images
        ]
        total.update(json.dumps([item.to_row(), item.prompt, images]).encode())
    return total.hexdigest()
