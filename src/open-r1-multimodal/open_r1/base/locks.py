"""Locks a folder or file for one process at a time; a lock ends with its process and names its owner."""

import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from open_r1.base.errors import Mistake

IN_USE = ".in_use"


@contextmanager
def owned(target: str | Path, is_file: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder or a file inside the block; of a launch's processes the main one is it.

    Args:
        target: a folder, which is there and holds the lock, or a file, beside which it lies.
        is_file: which of them.

    Raises:
        Mistake: another process does; the line says which. Or the lock cannot be written.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    path = Path(target) / IN_USE
    if is_file:
        path = path.parent.with_name(f".{path.parent.name}{IN_USE}")
    try:
        file = _lock(path, target)
    except OSError as error:
        raise Mistake(error) from error
    os.register_at_fork(after_in_child=file.close)  # a child that outlives this process must not hold on
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def check_free(folder: str | Path) -> None:
    """See that nobody writes a folder now. Several may look at a time, as the launchers of several machines do.

    Raises:
        Mistake: somebody does, or the lock cannot be read.
    """
    try:
        with (Path(folder) / IN_USE).open("r+") as file:
            _take(file, fcntl.LOCK_SH, folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Mistake(error) from error


def holder(folder: str | Path) -> str | None:
    """Who holds the lock of a folder, in the words that it signed with; None when nobody does."""
    try:
        return (Path(folder) / IN_USE).read_text()
    except FileNotFoundError:
        return None


def _lock(path: Path, target: str | Path) -> TextIO:
    """The lock's file, open, locked and signed by this process."""
    while True:
        file = path.open("a+")
        try:
            _take(file, fcntl.LOCK_EX, target)
        except Mistake:
            file.close()
            raise
        if _is_at(file, path):
            break
        file.close()  # its last owner deleted it before it was ours
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    file.flush()
    return file


def _take(file: TextIO, kind: int, target: str | Path) -> None:
    """Lock an open file, as the one owner (LOCK_EX) or as one of those who look (LOCK_SH); raise Mistake if it is."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        name = file.read(200) or "another process"  # which has not signed yet
        raise Mistake(f"{target}: in use by {name}; wait until it ends, or choose another place") from error
    except OSError as error:
        print(f"{target}: nothing keeps a second run out, no lock can be had here: {error}", file=sys.stderr)


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one that the path leads to."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
