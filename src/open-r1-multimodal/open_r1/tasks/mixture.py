"""Mixes several data sets, with the share of each, as a YAML file lists them.

    datasets:
      - path: SAT_train_15000.json   # all that dataset_name can be; relative to this file, or a name on the Hub
        fraction: 0.8
      - path: dynamic/SAT_train_4000.json
        fraction: 0.2

Keys and meaning are those of TRL's `DatasetConfig` (`path`, `name`, `split`, `fraction`): fractions are normalised, and
the mixture is as large as it can be with no row taken twice, the first ones of each set; without fractions all rows are
taken. A set may name columns of its own (`question_column`, ...), as a recipe does for all. The trainer shuffles. No
torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from open_r1.base.errors import MissingFile, Mistake
from open_r1.base.files import read_yaml
from open_r1.tasks.examples import FOLDER_TASKS, Columns, is_local, iter_rows, meant, read_records

SUFFIXES = (".yaml", ".yml")
TEXTS = ("path", "name", "split", "task", *(f"{column}_column" for column in asdict(Columns())))
KEYS = (*TEXTS, "fraction")


@dataclass(frozen=True)
class Part:
    """One data set of several, or the only one.

    Attributes:
        path, columns, name, split, task: see `iter_rows`, where `name` is `config`.
        fraction: of the mixture, against the others' fractions; None takes every row.
    """

    path: str
    columns: Columns
    name: str | None = None
    split: str = "train"
    task: str | None = None
    fraction: float | None = None


def parts_of(
    source: str | Path,
    columns: Columns | None = None,
    config: str | None = None,
    split: str = "train",
    task: str | None = None,
) -> list[Part]:
    """The data sets of a mixture, or the one that `source` is.

    Args:
        source: a YAML file, or all that `iter_rows` takes.
        columns, config, split, task: of a set that says nothing else.

    Raises:
        Mistake: the file is no mixture, or names a set that is not there; it says the file and the key.
    """
    alone = Part(str(source), columns or Columns(), config, split, task)
    if not str(source).endswith(SUFFIXES):
        return [alone]
    file = Path(source)
    if not file.is_file():
        raise MissingFile(f"{file}: no such file{meant(file)}")
    content = read_yaml(file)
    listed = content.get("datasets") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(listed, list) or not listed:
        raise Mistake(f"{file}: expected datasets, a list with path and fraction of each, and nothing else")
    parts = [read_part(entry, alone, file.parent, f"{file}: datasets {n}") for n, entry in enumerate(listed, start=1)]
    if len({part.fraction is None for part in parts}) > 1:
        raise Mistake(f"{file}: fraction: give it for each of the datasets or for none")
    return parts


def read_part(entry: Any, default: Part, folder: Path, where: str) -> Part:
    """One entry of the list -> a data set; `where` is its place for errors."""
    if not isinstance(entry, dict) or "path" not in entry:
        raise Mistake(f"{where}: expected path and fraction of a data set")
    if unknown := [str(key) for key in entry if key not in KEYS]:
        raise Mistake(f"{where}: unknown {unknown[0]!a}; known are {', '.join(KEYS)}")
    for key in TEXTS:
        if key in entry and not (isinstance(entry[key], str) and entry[key].strip()):
            raise Mistake(f"{where}: {key}: expected a text, not {entry[key]!r}")
    fraction = entry.get("fraction")
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if fraction is not None and not (is_number and math.isfinite(fraction) and fraction > 0):
        raise Mistake(f"{where}: fraction {fraction!r}: expected a number above 0")
    if entry.get("task") not in (None, *FOLDER_TASKS):
        raise Mistake(f"{where}: task {entry['task']!r} is none of {', '.join(FOLDER_TASKS)}")
    path = folder / entry["path"]
    if not path.exists() and is_local(entry["path"]):
        raise MissingFile(f"{where}: path: no file or folder {path}{meant(path)}")
    columns = {column: entry[f"{column}_column"] for column in asdict(Columns()) if f"{column}_column" in entry}
    return Part(
        path=str(path) if path.exists() else entry["path"],
        columns=replace(default.columns, **columns),
        name=entry.get("name", default.name),
        split=entry.get("split", default.split),
        task=entry.get("task", default.task),
        fraction=fraction,
    )


def rows_of_each(sizes: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many rows each set gives: shares as the fractions are, as many as there are without taking one twice.

    >>> rows_of_each([100, 50], [3, 1])
    [100, 33]
    """
    shares = [fraction / math.fsum(fractions) for fraction in fractions]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    return [round(total * share) for share in shares]


def iter_mixture(
    parts: Sequence[Part], must_exist: bool = True
) -> Iterator[tuple[str, int, dict[str, Any], list[str]]]:
    """The examples of all sets (`parts_of`), one set after the other; `must_exist` is that of `iter_rows`.

    Yields:
        The set, the number of the row in it, the row, and what of it no prompt shows.

    Raises:
        Mistake: as `iter_rows`; or a set would give no row at all.
    """
    counts: list[int | None] = [None] * len(parts)
    if all(part.fraction is not None for part in parts):
        sizes = [sum(1 for _ in read_records(part.path, part.name, part.split, part.task)) for part in parts]
        counts = rows_of_each(sizes, [part.fraction for part in parts])
        for part, size, count in zip(parts, sizes, counts, strict=True):
            if not count:
                raise Mistake(f"{part.path}: fraction {part.fraction} takes none of its {size} rows")
    for part, count in zip(parts, counts, strict=True):
        examples = iter_rows(part.path, part.columns, part.name, part.split, must_exist, part.task)
        for row, (example, unshown) in enumerate(islice(examples, count)):
            yield part.path, row, example, unshown
