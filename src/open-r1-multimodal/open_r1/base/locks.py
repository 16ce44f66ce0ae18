"""Locks a folder or file for one process at a time; a lock ends with its process and names its owner."""

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from open_r1.base.errors import Mistake

IN_USE = "_in_use"  # `Trainer.push_to_hub` leaves out names that begin so
LOOK_SECONDS = 1  # to wait for a lock, since `check_free` in another process holds it for a moment
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def is_main_process() -> bool:
    """Whether this is the main process of its launch, or of no launch; raises Mistake where RANK is no number."""
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise Mistake(f"RANK: {rank!r} is no number of a process; unset it, launchers set it themselves")
    return int(rank) == 0


@contextmanager
def owned(target: str | Path, is_file: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder or file in the block; the main process locks for its launch.

    Args:
        target: an existing folder, which holds the lock, or a file, beside which the lock lies.
        is_file: which of them.

    Raises:
        Mistake: another process does; the line says which.
    """
    if not is_main_process():
        yield
        return
    path = Path(target) / IN_USE
    if is_file:
        path = path.parent.with_name(f".{path.parent.name}{IN_USE}")
    lock = _lock(path, target)
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    path.write_text(f"process {os.getpid()} on {platform.node()} since {now}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_free(folder: str | Path) -> None:
    """Raise Mistake if a process holds the folder's lock. Launchers of several machines may check at the same time."""
    path = Path(folder) / IN_USE
    try:
        path.stat()
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise Mistake(f"{folder} is a file; name a folder") from error
    _lock(path, folder).release()


def holder(folder: str | Path) -> str | None:
    """Who holds the lock of a folder, in the words that it signed with; None when nobody does."""
    return _signature(Path(folder) / IN_USE)


def _signature(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def _lock(path: Path, target: str | Path) -> FileLock:
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=LOOK_SECONDS)
    except Timeout as error:
        name = _signature(path) or "another process"  # which has not signed yet
        reason = f"in use by {name}; wait until it ends, or choose another place"
        raise Mistake(f"{target}: {reason}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warning = f"nothing keeps a second run out, no lock can be had here: {error}"
        print(f"{target}: {warning}", file=sys.stderr)
    return lock
