"""Tells how a run fails, once for all its processes: a line for what a user can mend, else a traceback.

All processes of a launch may fail alike, or one takes the others along. The first to fail tells.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_r1.base.errors import FIRST, Mistake, account, first_line, is_first, is_mistake
from open_r1.base.files import MANIFEST

MISTAKE = 2  # exit code, as argparse's
# How Python, safetensors and torch say that a file could not be written to its end.
NO_ROOM = re.compile(r"No space left|quota exceeded|File too large|PytorchStreamWriter|unexpected pos \d")
# How gloo, NCCL and torch's store say that the process at the other end is not there any more.
LOST = re.compile(r"Connection (?:closed|reset) by peer|remote process exited|failed to recv, got 0 bytes")
SETTLED = 5  # seconds that the failures of one cause lie apart; torch's launcher waits 30 before it kills


@contextmanager
def full_disk(folder: str) -> Iterator[None]:
    """Inside it, what fails because a run's folder takes no more becomes a `Mistake`."""
    try:
        yield
    except Exception as error:
        if not NO_ROOM.search(str(error)):
            raise
        # torch's RuntimeError is an assertion, which tells a user nothing
        reason = "half a file was written" if isinstance(error, RuntimeError) else first_line(error)
        raise Mistake(
            f"{folder}: takes no more, is the disk full? ({reason}); make room, and the same command goes on from the "
            "newest whole checkpoint"
        ) from error


def as_seen_here(error: Exception) -> Exception:
    """The error; of one that only says that a process of another machine is gone, a line that says so.

    On one machine the launcher ends the others before they can tell.
    """
    lost, machines = LOST.search(str(error)), int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if lost is None or machines == 1:
        return error
    return Mistake(
        f"machine {os.environ['GROUP_RANK']} of {machines}: a process of another machine is gone ({lost[0]}); what "
        "ended it is told there"
    )


@contextmanager
def told_once() -> Iterator[None]:
    """Tell what goes wrong inside, unless another process of the launch has already, and exit."""
    try:
        yield
    except Exception as raised:
        error = as_seen_here(raised)
        if is_first(error):
            sys.stderr.write(account(error))
            sys.stderr.flush()
        sys.exit(MISTAKE if is_mistake(error) else 1)


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
    return ended_by(name, -code) if code < 0 else (code, f"error: {name} ended with exit code {code}")


def ended_by(name: str, number: int) -> tuple[int, str]:
    """The exit code and the line of a process that a signal ended."""
    cause = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
    return 128 + number, f"error: {name} was ended by {signal.Signals(number).name}{cause}"


def continues(output_dir: str, resumes: bool) -> str:
    """Where a run that was stopped goes on: at its last whole checkpoint, if it is told to resume.

    Args:
        output_dir: of the run.
        resumes: whether `resume_from_checkpoint` is `auto`.
    """
    manifests = Path(output_dir).glob(f"checkpoint-*/{MANIFEST}") if resumes else []
    steps = [int(path.parent.name.partition("-")[2]) for path in manifests]
    return f"the same command continues at step {max(steps)}" if steps else "the same command starts from the beginning"
