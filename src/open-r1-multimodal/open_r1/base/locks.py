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

IN_USE = ".in_use"
LOOK_SECONDS = 1  # after which a lock is not one that another process only looks at
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def owned(target: str | Path, is_file: bool = False) -> Iterator[None]:
    """Be the only one that writes a folder or a file inside the block; of a launch's processes the main one is it.

    Args:
        target: a folder, which is there and holds the lock, or a file, beside which it lies.
        is_file: which of them.

    Raises:
        Mistake: another process does; the line says which.
    """
    if int(os.environ.get("RANK", 0)):
        yield
        return
    path = Path(target) / IN_USE
    if is_file:
        path = path.parent.with_name(f".{path.parent.name}{IN_USE}")
    lock = _lock(path, target)
    path.write_text(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_free(folder: str | Path) -> None:
    """See that nobody writes a folder now. Several may look at a time, as the launchers of several machines do.

    Raises:
        Mistake: somebody does.
    """
    path = Path(folder) / IN_USE
    if path.exists():
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
        raise Mistake(f"{target}: in use by {name}; wait until it ends, or choose another place") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{target}: nothing keeps a second run out, no lock can be had here: {error}", file=sys.stderr)
    return lock
