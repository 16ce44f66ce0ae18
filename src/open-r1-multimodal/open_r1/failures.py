"""How a run ends that cannot go on: what a user can mend is one line; anything else a traceback, told once.

All processes of a launch may fail alike, or one takes the others along. The first to fail tells, and says so in the
folder where torch's launcher lets its processes leave their errors.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_r1.front_door import Mistake, first_line, printable

MISTAKE = 2  # exit code, as argparse's
FIRST = "first_failure"
PAUSE = 1.0  # seconds
# How Python, safetensors and torch say that a file could not be written to its end.
NO_ROOM = re.compile(r"No space left|quota exceeded|File too large|PytorchStreamWriter|unexpected pos \d")
SETTLED = 5  # seconds that the failures of one cause lie apart; torch's launcher waits 30 before it kills


@contextmanager
def mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Inside it, exceptions of these kinds come from what a user wrote, and become `Mistake`s."""
    try:
        yield
    except kinds as error:
        raise Mistake(error) from error


@contextmanager
def full_disk(folder: str) -> Iterator[None]:
    """Inside it, what fails because a run's folder takes no more becomes a `Mistake`."""
    try:
        yield
    except Exception as error:
        if not NO_ROOM.search(str(error)):
            raise
        raise Mistake(
            f"{folder}: takes no more, is the disk full? ({first_line(error)}); make room, and the same command goes "
            "on from the newest whole checkpoint"
        ) from error


@contextmanager
def told_once() -> Iterator[None]:
    """Tell what goes wrong inside, unless another process of the launch has already, and exit."""
    try:
        yield
    except Exception as error:
        if _is_first(error):
            sys.stderr.write(f"error: {printable(error)}\n" if isinstance(error, Mistake) else traceback.format_exc())
            sys.stderr.flush()
        sys.exit(MISTAKE if isinstance(error, Mistake) else 1)


def _is_first(error: Exception) -> bool:
    """Whether this process is the first of its launch to fail; alone it is."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return True
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"])  # {folder of the launch}/{rank}/error.json
    path.write_text(json.dumps({"message": f"{type(error).__name__}: {error}", "timestamp": int(time.time())}))
    try:
        file = (path.parent.parent / FIRST).open("x")
    except FileExistsError:
        time.sleep(2 * PAUSE)  # the launcher ends the others with the first that leaves
        return False
    time.sleep(PAUSE)  # if what failed here is that another process was killed, the launcher ends this one now
    with file:
        file.write(os.environ["RANK"])
    return True


def last_word(failures: Mapping[int, Any], processes: int) -> tuple[int, str]:
    """How a launch ends that failed.

    Args:
        failures: rank -> torch's `ProcessFailure`, also of ranks that the launcher ended because another failed.
        processes: of the launch.

    Returns:
        The exit code, and one line that names the rank; empty where a `Mistake` is all there is to say.
    """
    start = min(failure.timestamp for failure in failures.values())
    marks = {Path(failure.error_file).parent.parent / FIRST for failure in failures.values()}
    told = [int(text) for path in marks if path.is_file() and (text := path.read_text())]
    # A killed process told nothing, and what the others saw of it is not the cause.
    killed = [
        rank
        for rank, failure in failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp - start < SETTLED
    ]
    ended = sorted(failures, key=lambda rank: (failures[rank].exitcode == -signal.SIGTERM, failures[rank].timestamp))
    rank = (killed or told or ended)[0]
    code = failures[rank].exitcode if rank in failures else 1
    if code == MISTAKE and rank in told:
        return code, ""
    name = f"rank {rank} of {processes}"
    if rank in told:
        return max(code, 1), f"error: {name} failed; its traceback is above"
    if code < 0:
        cause = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
        return 128 - code, f"error: {name} was ended by {signal.Signals(-code).name}{cause}"
    return code, f"error: {name} ended with exit code {code}"
