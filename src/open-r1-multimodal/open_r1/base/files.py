"""Writes files so that a crash cannot damage them: replaced whole, or JSON Lines with at most a torn last line."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from open_r1.base.errors import FileMistake, MissingFile, Mistake

MANIFEST = "complete.json"  # written last into a checkpoint, so that one that has it is whole
MADE_BY = "made by open_r1"  # stands in every file that a command writes where its user says, near its start or end
# The `metadata` with which matplotlib's `savefig` writes the mark into a figure, by the file's ending. Without a date
# the same figure gives the same SVG.
FIGURE_MARK = {
    ".png": {"Software": MADE_BY},
    ".svg": {"Creator": MADE_BY, "Date": None},
    ".pdf": {"Creator": MADE_BY},
}
MARKED_BYTES = 65536  # of a file's start and of its end, where the mark is looked for


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name for a file or folder to write in the block, which becomes `path` at its end.

    An exception leaves the old `path`, a crash the old or the new one; the next writer deletes a temporary one left.
    Only one process may write a path at a time. When the block ends, `path` may be a file, which is replaced, but not a
    folder.
    """
    if not path.parent.is_dir():
        raise MissingFile(f"{path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.tmp")
    delete(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        delete(temporary)


def delete(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_replaceable(*paths: Path) -> None:
    """Raise FileMistake for a path that exists, unless a command of this project wrote the file (`MADE_BY`)."""
    for path in paths:
        if path.is_dir():
            raise FileMistake(f"{path} is a folder; name a file")
        if path.exists() and not (path.is_file() and _is_marked(path)):
            raise FileMistake(f"{path} is there, and was not made by this project; name another file or delete it")


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(MARKED_BYTES)
        file.seek(max(0, path.stat().st_size - MARKED_BYTES))
        return MADE_BY.encode() in start + file.read(MARKED_BYTES)


def check_new_folder(path: Path) -> None:
    """Raise FileMistake for a path that exists, unless it is an empty folder, which a command may fill."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileMistake(f"{path} exists; name another folder or delete it")


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content at once: a crash leaves the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(value: Any, indent: int | None = None) -> bytes:
    """A line of JSON in UTF-8; half a character, which UTF-8 cannot hold, becomes an escape."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace") + b"\n"


def parse_json(text: bytes, origin: object) -> Any:
    """What JSON in UTF-8 says; a Mistake names the origin of what is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise Mistake(f"{origin}: not JSON ({reason})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; what cannot be read is an OSError, what is no JSON a Mistake."""
    return parse_json(path.read_bytes(), path)


class _Loader(yaml.SafeLoader):
    """yaml's, but a key that is there twice is an error, and the error of a value says where it stands."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """yaml's; refuses a key that is there twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """yaml's; what Python refuses (the 45th of a month, a number of 5,000 digits) becomes an error of yaml's."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"no {kind} ({error})", problem_mark=node.start_mark) from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; what cannot be read is an OSError, what is no YAML a Mistake."""
    try:
        return yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise Mistake(f"{path}: not YAML ({reason})") from error


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a JSON Lines file and sync it to the disk; on a full disk no row is added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = memoryview(b"".join(map(to_json, rows)))
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from error


def whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that have their end: a crash leaves a last one without."""
    return (line for line in lines if line.endswith(b"\n"))


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a JSON Lines file with the rows for which `keep` holds; a torn last line goes too.

    Returns:
        How many lines were dropped. A damaged line in the middle is a Mistake.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = list(file)
    kept = []
    for number, line in enumerate(whole_lines(lines), start=1):
        try:
            if keep(json.loads(line)):
                kept.append(line)
        except (ValueError, RecursionError, LookupError, TypeError) as error:  # also of a row that is something else
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error
            raise Mistake(f"{path}: line {number}: damaged ({reason}); delete the line, or the file") from error
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, by the rules of `keep_rows`.

    For a file that the caller is about to continue, and never for one that another process may be writing: a torn last
    line is cut off. `reporting.runs.read_lines` leaves a file as it is.
    """
    rows: list[dict[str, Any]] = []
    keep_rows(path, lambda row: rows.append(row) or True)
    return rows
