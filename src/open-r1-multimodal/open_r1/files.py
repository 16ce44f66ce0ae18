"""Files that a crash cannot spoil: replaced at once, or JSON Lines with at most a torn last line, which is cut off."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "complete.json"  # written last into a checkpoint: it is whole


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """A temporary name for a file or folder to write in the block, which becomes `path` at its end.

    An exception leaves the old `path`, a crash the old or the new one; the next writer deletes a temporary one left.

    Args:
        path: where there may be a file, but no folder when the block ends.
        shared: whether several processes may write it at the same time.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    delete(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        delete(temporary)


def delete(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content at once: a crash leaves the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def json_line(row: dict[str, Any]) -> bytes:
    """A row of a JSON Lines file, with its end."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a JSON Lines file and wait until they are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"".join(map(json_line, rows))
    with path.open("ab") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that have their end: only a crash leaves one without, and only the last one."""
    return (line for line in lines if line.endswith(b"\n"))


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a JSON Lines file with the rows for which `keep` holds; a torn last line goes too.

    Returns:
        How many lines were dropped. A file that is not there has none.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = list(file)
    kept = [line for line in whole_lines(lines) if keep(json.loads(line))]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that is about to be continued; a torn last line is cut off the file.

    Raises:
        ValueError: a line in the middle is damaged.
    """
    try:
        keep_rows(path, lambda row: True)
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to start over") from error
