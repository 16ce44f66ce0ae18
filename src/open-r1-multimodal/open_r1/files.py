"""The files that a run leaves behind: JSON lines in order, without duplicates or holes after a resume."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to the end of a JSON Lines file and wait until they are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Rewrite a JSON Lines file with the rows for which `keep` holds; a half-written last line goes too.

    Returns:
        How many lines were dropped. A file that is not there has none.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with path.open("rb") as file:
        for line in file:
            # Only a crash leaves a line without its end, and only the last one.
            if line.endswith(b"\n") and keep(json.loads(line)):
                kept.append(line)
            else:
                dropped += 1
    if dropped:
        replace_file(path, b"".join(kept))
    return dropped


def replace_file(path: Path, content: bytes) -> None:
    """Give a file new content at once: a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
