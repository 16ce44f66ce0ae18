"""What a benchmark is, and how its files become questions: columns, reading, limits."""

import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from open_r1.answers.statistics import Combination, gold_index
from open_r1.base.errors import MissingFile, Mistake
from open_r1.base.fields import Expected, Name, Record, Text, check
from open_r1.base.hub import fetch
from open_r1.tasks.examples import read_records

LIMIT_SEED = 0


@dataclass(frozen=True)
class Item:
    """One thing to ask.

    Attributes:
        id: of the question; rotations of its options share it.
        question: the question alone.
        options: in the order shown.
        answer: the right option's text or, when `prompt` shows letters, its letter as in "(C)".
        prompt: the user's text in full, before the chat template.
        images: as the converters see them a cell of the file (bytes, {bytes, path} or a path); as `read` returns them
            encoded bytes, None for an image that is not there.
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
        combination: name and formula of an official score over the sources' accuracies.
        images: where they are to be had, if the files only name them.
    """

    name: str
    hub_id: str
    files: tuple[str, ...]
    columns: type[Record]
    convert: Callable[[Mapping[str, Any], int], list[Item]]
    combination: tuple[str, Combination] | None = None
    images: str | None = None


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


# --- reading --------------------------------------------------------------------------------------


def read(benchmark: Benchmark, dataset_path: str | None = None, limit: int | None = None) -> list[Item]:
    """Everything to ask, in the files' order; images are read but not decoded.

    Args:
        dataset_path: a file, a folder, or a data set on the Hub (None: the benchmark's own).
        limit: at most this many questions; see `stratified`.

    Raises:
        Mistake: nothing to read there, or a row that contradicts itself.
    """
    questions: list[tuple[list[Item], Path]] = []
    first: dict[int | str, str] = {}  # id -> where it is
    rows = 0
    for file in locate(benchmark, dataset_path or benchmark.hub_id):
        for number, row in enumerate(read_records(file)):
            where = f"{file}: row {number}"
            columns = benchmark.columns.model_fields
            if missing := [name for name in columns if isinstance(row, dict) and name not in row]:
                raise Mistake(f"{file}: no column {', '.join(missing)}; is this {benchmark.name}?")
            check(benchmark.columns, row, where)
            try:
                asked = benchmark.convert(row, rows)
                for item in asked:
                    gold_index(item.to_row())
            except Mistake as error:
                raise Mistake(f"{where}: {error}") from error
            if asked:
                questions.append((asked, file.parent))
                if (same := first.setdefault(asked[0].id, where)) != where:
                    raise Mistake(f"{where}: has the idx {asked[0].id!r} of {same}; two questions need two")
            rows += 1
    if left_out := rows - len(questions):
        line = f"{benchmark.name}: left out {left_out} of {rows} rows without a right option"
        print(line, file=sys.stderr)
    if not questions:
        raise Mistake(f"{dataset_path or benchmark.hub_id}: no question in it")
    if limit is not None:
        questions = [questions[i] for i in stratified([items[0].task for items, _ in questions], limit)]
    asked = []
    for items, folder in questions:
        for item in items:
            images = tuple(image_data(cell, folder) for cell in item.images)
            asked.append(replace(item, images=images))
    if benchmark.images and not any(data for item in asked for data in item.images):
        raise MissingFile(f"{questions[0][1]}: none of the images is there; {benchmark.images}")
    return asked


def locate(benchmark: Benchmark, dataset_path: str) -> list[Path]:
    """The files to read: the one named, or those of a folder or of a data set on the Hub.

    Raises:
        Mistake: there is no such file, folder or data set, or none of the expected files in it.
    """
    path = Path(dataset_path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        path = fetch(dataset_path, benchmark.files, repo_type="dataset")
    files = []
    for pattern in benchmark.files:
        matches = sorted(path.glob(pattern))
        if not matches:
            raise MissingFile(f"{path}: no {pattern} in it; give a single file to evaluate that alone")
        files += matches
    return files


def image_data(cell: Any, folder: Path) -> bytes | None:
    """A cell (bytes, {bytes, path}, a path or nothing) -> the encoded image; None if it is missing."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if not isinstance(cell, str):
        return cell or None
    for path in (folder / cell, folder / "images" / cell):
        if path.is_file():
            return path.read_bytes()
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
        images = [hashlib.sha256(data or b"").hexdigest() for data in item.images]
        total.update(json.dumps([item.to_row(), item.prompt, images]).encode())
    return total.hexdigest()
